"""Fetch one file to a given path: continued where it stopped, checked in length and hash. Called by download.sh."""

import os
import sys
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dnnlib.util import DownloadError, atomic_write, file_sha256, format_bytes, open_url


@click.command()
@click.option("--url", required=True)
@click.option("--dest", required=True, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--bytes", "size", default="-", help="Expected length; - = unknown")
@click.option("--sha256", default="-", help="Expected hash; - = that of an earlier download, if there was one")
def main(url: str, dest: Path, size: str, sha256: str) -> None:
    """Leave the file behind URL at DEST. A file that is there is checked and kept."""
    note = dest.with_name(dest.name + ".sha256")
    try:
        expected = sha256 if sha256 != "-" else note.read_text().split()[0] if note.is_file() else None
        if not dest.is_file():
            dest.parent.mkdir(parents=True, exist_ok=True)
            fetched = open_url(url, cache_dir=dest.parent / ".parts", sha256=expected)
            check(fetched, size, expected)
            os.replace(fetched, dest)
        found = check(dest, size, expected)
        with atomic_write(note, "w") as file:
            file.write(f"{found}  {dest.name}\n")
    except (DownloadError, OSError, IndexError) as error:
        raise click.ClickException(str(error)) from None
    print(
        f"{dest}: {format_bytes(dest.stat().st_size)}, SHA-256 {found}{'' if expected else ' (none to compare with)'}"
    )


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
