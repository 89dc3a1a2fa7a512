"""Writing data sets in the EDM2 layout (see `data.dataset`): a folder or a ZIP that appears only when complete."""

import contextlib
import errno
import io
import json
import os
import secrets
import zipfile
from collections.abc import Iterator, Sequence

import numpy as np

from data.archives import DatasetError
from dnnlib.files import discard, temporary_beside

_ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # fixed: the same images give the same bytes


def encode_npy(latents: np.ndarray) -> bytes:
    """NPY file of float32 [C,H,W]."""
    np.save(stream := io.BytesIO(), np.asarray(latents, dtype=np.float32, order="C"), allow_pickle=False)
    return stream.getvalue()


def summary(num_images: int, shape: Sequence[int], labelled: bool, num_skipped: int = 0) -> str:
    """What was written, files of one shape [C,H,W], and how many images were left out."""
    labels = "with labels" if labelled else "without labels"
    skipped = f"; {num_skipped} too small for the resolution were left out" if num_skipped else ""
    return f"{num_images} files of {'x'.join(map(str, shape))} (channels, height, width) {labels}{skipped}"


class DatasetWriter:
    """Context manager that collects files under a temporary name beside `dest`, an uncompressed archive where that ends
    in `.zip`, else a folder, and renames it on success; on error nothing remains. Where `dest` cannot take the finished
    files at the end, they stay under another name, which the error gives. What killed processes left of the same data
    set is removed at the start. Labels may be class indices or lists of numbers; without any, `dataset.json` says
    `{"labels": null}`. Raises `DatasetError` where `dest` exists already (an empty folder, or a link to one, is
    accepted) or cannot be written.
    """

    def __init__(self, dest: str | os.PathLike):
        self.dest = os.path.normpath(os.fspath(dest))
        self._is_zip = self.dest.lower().endswith(".zip")
        self._target = os.path.realpath(self.dest)
        self._labels, self._finished, self._place = [], False, contextlib.ExitStack()
        with self._telling():
            self._check_free()
            self._temporary = self._place.enter_context(temporary_beside(self._target, folder=not self._is_zip))
            self._place.callback(self._abandon)
            self._zip = zipfile.ZipFile(self._temporary, "w") if self._is_zip else None

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Turns errors of the system into those of the data set."""
        try:
            yield
        except OSError as error:
            raise DatasetError(f"{self.dest}: cannot be written ({error.strerror or error})") from None

    def _check_free(self) -> None:
        if len(os.fsencode(os.path.basename(self._target))) > 255:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        if not os.path.lexists(self._target):
            return
        if self._is_zip or not os.path.isdir(self._target) or os.listdir(self._target):
            raise DatasetError(f"{self.dest}: exists already and is kept; choose another destination or remove it")
        if os.path.ismount(self._target) or os.path.samefile(self._target, os.curdir):
            raise DatasetError(f"{self.dest}: the current folder or a mount point; name a new folder inside it")

    def __enter__(self) -> "DatasetWriter":
        return self

    def add(self, name: str, data: bytes, label: int | list[float] | None = None) -> None:
        """Store one image or latent file under `name` (relative, forward slashes)."""
        self._store(name, data, zipfile.ZIP_STORED)
        if label is not None:
            self._labels.append([name, label])

    def _store(self, name: str, data: bytes, compression: int) -> None:
        with self._telling():
            if self._zip is not None:
                info = zipfile.ZipInfo(name, date_time=_ZIP_DATE)
                info.create_system, info.external_attr = 3, 0o644 << 16  # the same on every platform
                self._zip.writestr(info, data, compression)
            else:
                path = self._temporary / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._place, self._telling():
            if kind is None:
                self._store("dataset.json", json.dumps({"labels": self._labels or None}).encode(), zipfile.ZIP_DEFLATED)
                if self._zip is not None:
                    self._zip.close()
                self._finished = True
                self._publish()

    def _abandon(self) -> None:
        """Remove what is not finished."""
        if not self._finished:
            with contextlib.suppress(OSError, ValueError):  # closing writes, which a full disk refuses
                if self._zip is not None:
                    self._zip.close()
            discard(self._temporary)

    def _publish(self) -> None:
        """Give the complete files their name; they are kept where that fails."""
        try:
            with self._telling():
                self._check_free()
                if os.path.isdir(self._target):
                    os.rmdir(self._target)
                os.replace(self._temporary, self._target)
        except DatasetError as reason:
            kept = self._temporary
            with contextlib.suppress(OSError):  # under another name it is no later leftover
                kept = kept.rename(kept.with_name(f"{kept.stem}.{secrets.token_hex(4)}"))
            raise DatasetError(f"{reason}; the finished data set is in {kept}") from None
