"""Checking that hostile input costs little memory, in a process of its own whose memory can be limited."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
HAS_LIMITS = Path("/proc/self/statm").exists()
EXTRA = 200 << 20  # bytes


def limit_memory() -> None:
    """From here on this process can map only EXTRA bytes more than it has now."""
    import gc
    import resource

    gc.collect()
    with open("/proc/self/statm") as file:
        limit = int(file.read().split()[0]) * resource.getpagesize() + EXTRA
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        bytearray(EXTRA + (16 << 20))
    except MemoryError:
        return
    raise SystemExit("the limit has no effect")


def refuse_all(load: Callable[[object], object], files: Mapping[str, object]) -> None:
    """Call `load` on each file with little memory: each must be refused, none for want of memory."""
    limit_memory()
    for case, file in files.items():
        try:
            load(file)
        except ValueError as error:
            message = str(error).lower()
            if any(word in message for word in ("memory", "allocate")):
                raise SystemExit(f"{case}: {error}") from None
        else:
            raise SystemExit(f"{case}: accepted")


def run_script(code: str, *arguments: object) -> None:
    """Run Python code in the repository's root; raise AssertionError with its output where it fails."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
