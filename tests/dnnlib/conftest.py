import threading

import pytest

from tests.dnnlib.file_server import CONTENT, Handler
from tests.servers import serving


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(Handler) as server:
        server.requests, server.cut, server.ranges = [], [], True
        server.content, server.etag, server.redirect = CONTENT, '"one"', ""
        server.raw, server.kind, server.users = b"", "", []  # raw: the whole of every answer
        server.over, server.ticks = threading.Event(), threading.Semaphore(0)
        yield server
        server.over.set()
        server.ticks.release(1000)
