"""Statistics of a data set that generated images are compared with: own files, and those of EDM2 and EDM.

Own files are `.npz` archives of plain arrays: `num_images`, and for each detector `DETECTOR/mu` [D], `DETECTOR/sigma`
[D,D], optionally `DETECTOR/features` [M,D] (for kid, precision and recall; of all images, or of MAX_FEATURES of them)
and `DETECTOR/sha256` (of its weights).
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dnnlib.download import open_url
from dnnlib.files import atomic_write, file_sha256
from dnnlib.text import redact
from metrics.collect import Collected
from torch_utils import safe_pickle

MAX_BYTES = 8 << 30  # of the arrays of a file
MAX_FEATURES = 50_000  # images whose single features go into a file, as many as published values draw
_TOLERANCE = 1e-6  # of symmetry and of negative eigenvalues, relative to the largest entry


class ReferenceFileError(ValueError):
    """A file of reference statistics is missing, damaged or holds something else."""


@dataclass(frozen=True)
class Statistics:
    """A data set in one detector's features."""

    mu: np.ndarray  # float64 [D]
    sigma: np.ndarray  # float64 [D,D]
    features: np.ndarray | None = None  # float32 [M,D]
    sha256: str | None = None  # of the detector's weights


@dataclass(frozen=True)
class Reference:
    """Statistics by detector, and where they come from."""

    statistics: dict[str, Statistics]
    num_images: int | None  # unknown in EDM's files
    source: str
    sha256: str  # of the file


def save_reference(path: str | os.PathLike[str], collected: Mapping[str, Collected]) -> None:
    """Write statistics of a data set as `.npz`, whole or not at all. Raises ValueError for fewer than 2 images."""
    arrays: dict[str, np.ndarray] = {}
    for name, part in collected.items():
        arrays["num_images"] = np.array(part.moments.count)
        arrays[f"{name}/mu"] = part.moments.mean().cpu().numpy()
        arrays[f"{name}/sigma"] = part.moments.cov().cpu().numpy()
        arrays[f"{name}/sha256"] = np.array(part.detector.sha256)
        if part.features is not None:
            arrays[f"{name}/features"] = part.features.numpy()
    with atomic_write(path) as file:
        np.savez(file, **arrays)


def load_reference(source: str | os.PathLike[str], *, quiet: bool = False) -> Reference:
    """Read reference statistics from a path or URL: own `.npz`, EDM's `.npz` (mu, sigma: `fid`), EDM2's pickle.

    The kind is told by the content; nothing in the file is executed. Raises ReferenceFileError (a ValueError) for
    damaged files, arrays that cannot be statistics, and anything else; DownloadError for failed downloads.
    """
    path = open_url(source, quiet=quiet)
    try:
        found = _read_npz(path) if zipfile.is_zipfile(path) else _read_pickle(path)
    except Exception as error:  # whatever damaged input makes the readers stumble over
        reason = " ".join((str(error) or type(error).__name__).removeprefix(f"{path}: ").split())[:200]
        raise ReferenceFileError(f"{path}: no usable reference statistics: {reason}") from None
    statistics, count = found
    if not statistics:
        raise ReferenceFileError(f"{path}: no reference statistics in it (arrays mu and sigma)")
    for name, value in statistics.items():
        if not re.fullmatch(r"\w+", name):
            raise ReferenceFileError(f"{path}: no usable reference statistics: {name!r} is not a detector's name")
        _check(path, name, value)
    if count is not None and count < 2:
        raise ReferenceFileError(f"{path}: num_images is {count}; a covariance needs at least 2")
    return Reference(statistics, count, redact(os.fspath(source)), file_sha256(path))


def _read_npz(path: Path) -> tuple[dict[str, Statistics], int | None]:
    with zipfile.ZipFile(path) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > MAX_BYTES:
        raise ValueError(f"its arrays take {size} bytes, more than the limit of {MAX_BYTES}")
    with np.load(path, allow_pickle=False) as data:
        if "mu" in data and "sigma" in data:
            return {"fid": Statistics(_floats(data["mu"]), _floats(data["sigma"]))}, None
        names = [key.removesuffix("/mu") for key in data.files if key.endswith("/mu")]
        statistics = {}
        for name in names:
            features = _floats(data[f"{name}/features"]).astype(np.float32) if f"{name}/features" in data else None
            sha256 = str(data[f"{name}/sha256"]) if f"{name}/sha256" in data else None
            statistics[name] = Statistics(_floats(data[f"{name}/mu"]), _floats(data[f"{name}/sigma"]), features, sha256)
        return statistics, int(data["num_images"]) if "num_images" in data else None


def _read_pickle(path: Path) -> tuple[dict[str, Statistics], int | None]:
    content = safe_pickle.load(path, max_bytes=MAX_BYTES)
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not a dict of statistics")
    statistics = {}
    for name, value in content.items():
        if isinstance(value, dict) and "mu" in value and "sigma" in value:
            statistics[str(name)] = Statistics(_floats(value["mu"]), _floats(value["sigma"]))
    count = content.get("num_images")
    return statistics, int(count) if isinstance(count, (int, np.integer)) else None


def _floats(value: Any) -> np.ndarray:
    if hasattr(value, "numpy"):
        value = value.numpy()
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "fiu":
        raise ValueError(f"mu and sigma must be arrays of numbers, not {type(value).__name__}")
    return np.asarray(value, np.float64)


def _check(path: Path, name: str, value: Statistics) -> None:
    """Refuse what cannot be a mean and a covariance, before it becomes a plausible number."""
    mu, sigma, features, sha256 = value.mu, value.sigma, value.features, value.sha256

    def fail(reason: str) -> None:
        raise ReferenceFileError(f"{path}: the statistics for {name} cannot be used: {reason}")

    if mu.ndim != 1 or not mu.size or sigma.shape != (len(mu), len(mu)):
        fail(f"mu has shape {list(mu.shape)}, sigma {list(sigma.shape)}; [D] and [D,D] are needed")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        fail("they are not finite")
    scale = np.abs(sigma).max()
    if np.abs(sigma - sigma.T).max() > _TOLERANCE * scale:
        fail("sigma is not symmetric")
    if np.linalg.eigvalsh(sigma).min() < -_TOLERANCE * scale * len(mu):
        fail("sigma has negative eigenvalues, which no covariance has")
    if features is not None and (features.ndim != 2 or features.shape[1] != len(mu) or not np.isfinite(features).all()):
        fail(f"features have shape {list(features.shape)} or are not finite; [N,{len(mu)}] is needed")
    if sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", sha256):
        fail("sha256 is no SHA-256")
