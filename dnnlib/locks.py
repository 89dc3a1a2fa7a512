"""One process at a time in a folder. Imports no third-party package, so that scripts start fast."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import IO


class FolderInUseError(ValueError):
    """Another process is using a folder."""


def lock_folder(folder: str | os.PathLike[str]) -> IO[bytes] | None:
    """Keep other processes out of a folder that exists, by a lock on `.lock` in it, until the file returned is closed.

    Raises FolderInUseError where another process holds it. File systems without locks are trusted (None).
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    path = Path(folder) / ".lock"
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process: loader processes do not inherit it
    except OSError as error:
        holder = file.read(200).decode(errors="replace").strip()
        file.close()
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise FolderInUseError(
                f"{folder} is in use by another run ({holder or 'unknown'}): stop it, or use another --outdir"
            ) from None
        return None
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except OSError:  # a full disk: the lock holds without a name
        pass
    return file
