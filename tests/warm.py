"""Processes that have imported PyTorch already: half of the suite's time was spent on that.

`run` and `Popen` are subprocess's, but Python commands ([sys.executable, SCRIPT | -c CODE | -m MODULE, ...]) and those
that they start in turn are forked from a server, which has imported PyTorch and nothing of this project. Each has
arguments, folder, environment, streams, signals and exit code of its own; the interpreter's options, its hash seed and
what OpenMP reads when it is loaded are the server's. Tests of imports, or of anything before them, and one of what is
the same in several processes use subprocess.
"""

import array
import atexit
import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
ADDRESS = "NCVSD_TEST_SERVER"  # environment variable with the path of its socket
WORD = 8  # bytes of a number on the wire


class Popen(subprocess.Popen):
    """subprocess.Popen, through the server where it can do what is asked."""

    _answers = None  # the connection: pid, then wait status

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        _, _, shell, *pipes, _, _, _, _, _, session = rest[:15]
        p2cread, _, _, c2pwrite, _, errwrite = pipes
        if shell or preexec_fn or pass_fds or isinstance(args, str) or args[0] != sys.executable:
            return super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)
        request = dict(args=[os.fsdecode(a) for a in args[1:]], cwd=os.fsdecode(cwd or os.getcwd()), session=session)
        request["env"] = dict(os.environ if env is None else env)
        streams = [given if given != -1 else ours for given, ours in ((p2cread, 0), (c2pwrite, 1), (errwrite, 2))]
        self._answers = socket.socket(socket.AF_UNIX)
        self._answers.connect(address())
        message = json.dumps(request).encode()
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", streams))]
        self._answers.sendmsg([len(message).to_bytes(WORD, "big")], rights)
        self._answers.sendall(message)
        self.pid = self._number()
        self._child_created = True
        self._close_pipe_fds(*pipes)

    def _number(self):
        answer = self._answers.recv(WORD)
        if len(answer) < WORD:
            raise ChildProcessError(f"the server lost sight of {self.args}")
        return int.from_bytes(answer, "big")

    def _try_wait(self, wait_flags):
        if self._answers is None:
            return super()._try_wait(wait_flags)
        self._answers.setblocking(not wait_flags)
        try:
            status = self._number()
        except BlockingIOError:
            return 0, 0
        self._answers.close()
        return self.pid, status

    def _internal_poll(self, _deadstate=None, **kwargs):
        if self._answers is None:
            return super()._internal_poll(_deadstate, **kwargs)
        if self.returncode is None and self._answers.fileno() < 0:  # nobody waited for it
            self.returncode = _deadstate
        elif self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid:
                self._handle_exitstatus(status)
        return self.returncode


def run(command, *, timeout=None, check=False, capture_output=False, **options):
    """subprocess.run."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(command, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(command, process.returncode, out, err)
    if check:
        done.check_returncode()
    return done


def environment(variables=None, *, server=True):
    """`variables`, or this process's, for one that starts Python by itself: scripts go through the server, unless told
    not to, and draw small sample sheets when they train.
    """
    known = {**(os.environ if variables is None else variables), "OMP_NUM_THREADS": "1"}
    folders = [str(Path(__file__).parent / "startup"), *filter(None, [known.get("PYTHONPATH")])]
    known |= {"PYTHONPATH": os.pathsep.join(folders), ADDRESS: address()}
    return {name: value for name, value in known.items() if server or name != ADDRESS}


def address():
    """Of the server, which is started where this process has none."""
    if ADDRESS not in os.environ:
        folder = tempfile.TemporaryDirectory()
        path = os.path.join(folder.name, "socket")
        code = "import sys; from tests import warm; warm.serve(sys.argv[1])"
        options = dict(cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}, text=True)
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        server = subprocess.Popen([sys.executable, "-c", code, path], **options, **pipes)
        assert server.stdout.readline() == "ready\n"
        os.environ[ADDRESS] = path

        def end():
            server.stdin.close()
            server.wait()
            folder.cleanup()

        atexit.register(end)
    return os.environ[ADDRESS]


# ----------------------------------------------------------------------------
# the server


def serve(path):
    """Until stdin is closed, fork for each request: a keeper, which tells how its child, the process wanted, ends."""
    import numpy  # noqa: F401
    import PIL.Image  # noqa: F401
    import torch.distributed  # noqa: F401

    import tests.startup.sitecustomize  # noqa: F401

    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are not waited for
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([listener, sys.stdin], [], [])
            if sys.stdin in ready:
                return
            connection, _ = listener.accept()
            with contextlib.suppress(OSError):  # the other side sees that nothing comes
                if os.fork() == 0:
                    break
            connection.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request, streams = _receive(connection)
    begun, begin = os.pipe()
    child = os.fork()
    if child:
        for fd in (*streams, begin, 0, 1, 2):
            os.close(fd)
        os.read(begun, 1)  # until it is as it was asked for
        connection.sendall(child.to_bytes(WORD, "big"))
        status = os.waitpid(child, 0)[1]
        with contextlib.suppress(OSError):  # nobody waits any more
            connection.sendall(status.to_bytes(WORD, "big"))
        os._exit(0)
    connection.close()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["session"]:
        os.setsid()
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"] | {ADDRESS: path})
    subprocess.Popen = Popen
    os.close(begin)
    os.close(begun)
    _main(request["args"])


def _receive(connection):
    head, streams, _, _ = socket.recv_fds(connection, WORD, 3)
    size, message = int.from_bytes(head, "big"), b""
    while len(message) < size:
        part = connection.recv(size - len(message))
        if not part:  # whoever asked is gone
            os._exit(1)
        message += part
    return json.loads(message), streams


def _main(args):
    """What the interpreter does with its arguments."""
    if args[0] == "-u":
        sys.stdout.reconfigure(write_through=True)
        args = args[1:]
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    if args[0] == "-c":
        with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:
            file.write(f"import os, sys\nos.unlink(__file__)\nsys.argv[0] = '-c'\ndel os, sys, __file__\n{args[1]}")
        sys.argv[1:], sys.path[0] = args[2:], ""
        runpy.run_path(file.name, run_name="__main__")
    elif args[0] == "-m":
        sys.argv, sys.path[0] = args[1:], os.getcwd()
        runpy.run_module(args[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = args, os.path.dirname(os.path.abspath(args[0]))
        runpy.run_path(args[0], run_name="__main__")
