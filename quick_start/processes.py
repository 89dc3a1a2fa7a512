"""torchrun for the scripts beside it, and the way in which those that train are asked to stop."""

import glob
import logging
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path


def main() -> int:
    """Run torchrun, without its report of failures; return the exit code of the process that failed first."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        run.main(sys.argv[1:])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        print(f"error: process {rank} was ended by {signal.Signals(-failure.exitcode).name}", file=sys.stderr)
        return 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


def children(pid: int) -> list[int]:
    """Processes that `pid` has started."""
    files = glob.glob(f"/proc/{pid}/task/*/children")
    with suppress(OSError):
        listed = "".join(Path(file).read_text() for file in files)
        if not files:  # no Linux
            listed = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True).stdout
        return [int(word) for word in listed.split()]
    return []


def supervise(command: list[str], *, repeat: float = 1.0) -> int:
    """Run torchrun and hand requests to stop on to the processes that train: they finish their step, save and end with
    code 0. Returns the exit code; 130 after Ctrl-C, however they were told. A second Ctrl-C ends them at once. torchrun
    itself, sent a signal, would end them with an error, after 30 seconds by force. A request is repeated every `repeat`
    seconds, since those processes may not have started yet, and SIGUSR1 is ignored until they handle it.
    """
    requests, child = [], None

    def tell() -> None:
        for pid in children(child.pid) if child else ():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGUSR1)

    def request(number: int, _: object) -> None:
        requests.append(number)
        tell()
        if child and number == signal.SIGINT and requests.count(number) == 2:
            child.terminate()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) != signal.SIG_IGN:  # under nohup it stays so
            signal.signal(number, request)
    ignore = lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # noqa: E731
    # a session of its own: Ctrl-C reaches this process alone
    child = subprocess.Popen(command, start_new_session=True, preexec_fn=ignore)
    while True:
        with suppress(subprocess.TimeoutExpired):
            code = child.wait(timeout=repeat)
            break
        if requests:
            tell()
    return 130 if signal.SIGINT in requests else code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
