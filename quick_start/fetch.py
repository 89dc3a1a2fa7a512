"""Fetch one file to a given path: continued where it stopped, checked in length and hash. Called by download.sh."""

import os
import re
import sys
from contextlib import suppress
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dnnlib.download import DownloadError, ask, open_url
from dnnlib.files import atomic_write, file_sha256, make_folder
from dnnlib.text import format_bytes
from torch_utils.errors import user_errors


@click.command()
@click.option("--url", required=True)
@click.option("--dest", required=True, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--bytes", "size", default="-", help="Expected length; - = that which the server tells")
@click.option("--sha256", default="-", help="Expected hash; - = that of an earlier download, or the Hub's, if there is")
def main(url: str, dest: Path, size: str, sha256: str) -> None:
    """Leave the file behind URL at DEST. A file that is there is checked and kept."""
    with user_errors():
        if "://" not in url:
            raise DownloadError(f"{url!r} is no http:// or https:// URL")
        if not (name := dest.name):
            raise DownloadError("the destination is empty or a folder: name a file")
        if os.path.lexists(dest) and not dest.is_file():
            raise DownloadError(f"{dest}: exists and is no file: name another place, or remove it")
        if not re.fullmatch("-|[0-9]{1,18}", size):
            raise DownloadError(f"{name}: its length must be a number of bytes, or - where unknown, not {size!r}")
        if not re.fullmatch("-|[0-9a-fA-F]{64}", sha256):
            raise DownloadError(f"{name}: its SHA-256 must be 64 hexadecimal digits, or - where unknown")
        note = dest.with_name(f"{name}.sha256")
        noted = None  # by an earlier download
        if sha256 == "-" and note.is_file():
            if not (match := re.match(rb"([0-9a-fA-F]{64})\s", note.read_bytes()[:100])):
                raise DownloadError(f"{note}: holds no SHA-256; remove it, and the file is compared with the server's")
            noted = match[1].decode()
        expected, unknown = noted if sha256 == "-" else sha256, "the server tells neither"
        present = dest.is_file()
        if expected is None:
            try:
                length, expected = ask(url)
                if present and size == "-" and length:  # a new download is as long as the server says
                    size = str(length)
            except DownloadError as error:
                unknown = str(error)
        path, parts = dest, dest.parent / ".parts"
        try:
            if not present:
                make_folder(dest.parent)
                path = open_url(url, cache_dir=parts, sha256=expected)
            found = check(path, size, expected)
        except DownloadError as error:
            remove_if_empty(parts)
            if noted:
                raise DownloadError(f"{error}; where the publisher has changed the file, remove {note} too") from None
            raise
        if not present:
            os.replace(path, dest)
            remove_if_empty(parts)
        facts = f"{dest}: {format_bytes(dest.stat().st_size)}, SHA-256 {found}"
        if present and expected is None and size == "-":  # without a note, so that it is compared the next time
            click.echo(f"{facts}; neither length nor hash could be compared ({unknown})")
        else:
            with atomic_write(note, "w") as file:
                file.write(f"{found}  {name}\n")
            click.echo(f"{facts} (none to compare with)" if expected is None else facts)


def remove_if_empty(parts: Path) -> None:
    """Remove the folder of partial downloads unless it holds one."""
    with suppress(OSError):
        for lock in parts.glob("*.lock"):
            lock.unlink()
        parts.rmdir()


def check(path: Path, size: str, expected: str | None) -> str:
    """SHA-256 of a file. Raises DownloadError where length or hash are not the expected ones."""
    if size != "-" and path.stat().st_size != int(size):
        raise DownloadError(f"{path}: {path.stat().st_size} bytes, expected {size}; remove the file and fetch it again")
    found = file_sha256(path)
    if expected is not None and found != expected.lower():
        raise DownloadError(f"{path}: SHA-256 is {found}, expected {expected}; remove the file and fetch it again")
    return found


if __name__ == "__main__":
    main()
