"""On PYTHONPATH of what launchers start: sample sheets of training are small, and a Python that shall run a script, or
code that names torch, lets the server of tests/warm.py do it, passes signals on and ends with the same code.
"""

import importlib.abc
import importlib.machinery
import os
import signal
import sys

SCRIPTS = {"train_ncvsd.py", "generate.py", "calculate_metrics.py", "posterior_sample.py", "processes.py"}


class SmallSheets(importlib.abc.MetaPathFinder):
    """Finds training.run.session; once loaded, its sheets are changed to two images, the teacher's in few steps."""

    def find_spec(self, name, path, target=None):
        if name != "training.run.session":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def change(module):
            load(module)
            draw, module.GRID_SEEDS = module.draw, range(2)
            few = lambda net: {"num_steps": 3} if type(net).__name__ == "Precond" else {}  # noqa: E731
            module.draw = lambda net, *shown, **options: draw(net, *shown, **few(net) | options)

        spec.loader.exec_module = change
        return spec


def through_server():
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    from tests import warm

    process = warm.Popen([sys.executable, *sys.orig_argv[1:]])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, _: process.send_signal(number))
    code = process.wait()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


sys.meta_path.insert(0, SmallSheets())
words = *sys.orig_argv[1:], "", ""
slow = os.path.basename(words[0]) in SCRIPTS or (words[0] == "-c" and "torch" in words[1])
if slow and "NCVSD_TEST_SERVER" in os.environ:
    try:
        through_server()
    except BaseException as error:  # which `site` would pass over, and run the script
        print(f"tests/startup: {error!r}", file=sys.stderr)
        os._exit(70)
