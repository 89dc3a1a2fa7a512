"""A web server of one file with many faults, a clock for its client, and the client."""

import time

from dnnlib import download
from tests.servers import QuietHandler

CONTENT = bytes(range(256)) * 8192  # 2 MiB


class Handler(QuietHandler):
    """Serves CONTENT. The server's `cut` gives how many bytes each coming answer may send before the line is cut."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        server.requests.append(self.headers.get("Range"))
        server.users.append(self.headers.get("Authorization"))
        if self.path.startswith("/drip"):
            self.drip(self.path.removeprefix("/drip-"))
            return
        if server.raw:
            self.wfile.write(server.raw)
            self.close_connection = True
            return
        if self.path.startswith("/missing"):
            self.send_error(404)
            return
        if self.path.startswith("/busy") and len(server.requests) < 3:
            self.send_error(503)
            return
        if self.path.startswith("/redirect"):
            self.send_response(302)
            self.send_header("Location", server.redirect)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start, wanted = 0, self.headers.get("Range")
        if self.path.startswith("/endless"):  # a redirect with a body that does not come to its end
            self.send_response(302)
            self.send_header("Location", "/file.bin")
            chunked = self.path.endswith("chunks")
            self.send_header(*(("Transfer-Encoding", "chunked") if chunked else ("Content-Length", str(1 << 60))))
            self.end_headers()
            self.server.over.wait()
            return
        if wanted and server.ranges and self.headers.get("If-Range", server.etag) == server.etag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if start >= len(server.content) and start:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        if server.kind:
            self.send_header("Content-Type", server.kind)
        if server.etag:
            self.send_header("ETag", server.etag)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}")
        self.end_headers()
        if server.cut:
            self.wfile.write(body[: server.cut.pop(0)])
            self.close_connection = True
        else:
            self.wfile.write(body)

    do_HEAD = do_GET

    def drip(self, what):
        """Byte after byte: of the body, one for each look at the client's clock; before it, without end."""
        self.close_connection = True
        start = {
            "body": b"Content-Length: 1000000\r\nETag: 1\r\n\r\n",
            "chunk": b"Transfer-Encoding: chunked\r\n\r\n4;",
            "header": b"X-Header: ",
        }[what]
        try:
            self.wfile.write(b"HTTP/1.1 200 OK\r\n" + start)
            while not self.server.over.is_set():
                if what == "body":
                    self.server.ticks.acquire()
                else:
                    time.sleep(0.002)
                self.wfile.write(b"x")
        except OSError:  # the client has given up
            pass


class Clock:
    """Time that passes by a second at each look, and while the client sleeps."""

    def __init__(self, server):
        self.server, self.now, self.naps = server, 0, []

    def __call__(self):
        self.now += 1
        self.server.ticks.release()
        return self.now

    def sleep(self, seconds):
        self.naps.append(seconds)
        self.now += seconds


def fetch(server, cache, name="file.bin", sha256=None, **limits):
    limits = download.Limits(**{"sleep": lambda seconds: None, **limits})
    return download.open_url(f"{server.url}/{name}", cache, sha256, quiet=True, limits=limits)
