"""Statistics of a data set that generated images are compared with: own files, and those of EDM2 and EDM. Own files are
`.npz` archives of plain arrays: `num_images`, and for each detector `DETECTOR/mu` [D], `DETECTOR/sigma` [D,D],
optionally `DETECTOR/features` [M,D] (for kid, precision and recall; of all images, or of MAX_FEATURES of them) and
`DETECTOR/sha256` (of its weights). At the end, what is computed against them: the numbers of a report.
"""

import math
import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from data.archives import ZipReader
from dnnlib.download import open_url
from dnnlib.files import PathLike, atomic_write, file_sha256, open_regular
from dnnlib.npy import read_npy, read_npy_header
from dnnlib.text import redact
from metrics.collect import Collected
from metrics.features.detectors import LoadedDetector
from metrics.kinds import KINDS, Metric
from torch_utils import safe_pickle

MAX_BYTES = 4 << 30  # of the arrays of a file, in float64
MAX_DIM = 1 << 13  # of features
MAX_FEATURES = 50_000  # images whose single features go into a file, as many as published values draw
_DATA = ("mu", "sigma", "features")
_MAX_TEXT = 4096  # bytes of a single text
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

    @cached_property
    def has_covariance(self) -> bool:
        """Whether sigma has no negative eigenvalues; O(D³)."""
        tolerance = _TOLERANCE * np.abs(self.sigma).max() * len(self.mu)
        return bool(np.linalg.eigvalsh(self.sigma).min() >= -tolerance)


@dataclass(frozen=True)
class Reference:
    """Statistics by detector, and where they come from."""

    statistics: dict[str, Statistics]
    num_images: int | None  # unknown in EDM's files
    source: str
    sha256: str  # of the file


def save_reference(path: PathLike, collected: Mapping[str, Collected]) -> None:
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


def load_reference(source: PathLike, *, quiet: bool = False) -> Reference:
    """Read reference statistics from a path or URL: own `.npz`, EDM's `.npz` (mu, sigma: `fid`), EDM2's pickle. The
    kind is told by the content; nothing in the file is executed. Raises ReferenceFileError (a ValueError) for what
    cannot be statistics, but for eigenvalues (`Statistics.has_covariance`); DownloadError for failed downloads.
    """
    path = open_url(source, quiet=quiet)
    try:
        with ZipReader(open_regular(path).detach()) as file:
            if zipfile.is_zipfile(file):
                statistics, count = _read_npz(file)
            elif file.seek(0) == 0 and file.read(1) != b"\x80":  # pickles of protocol 2 and later begin so
                raise ValueError("neither an .npz archive nor a pickle, or cut off")
            else:
                statistics, count = _read_pickle(path)
    except Exception as error:  # whatever damaged input makes the readers stumble over
        reason = " ".join((str(error) or type(error).__name__).removeprefix(f"{path}: ").split())[:200]
        raise ReferenceFileError(f"{path}: no usable reference statistics: {reason}") from None
    if not statistics:
        raise ReferenceFileError(f"{path}: no reference statistics in it (arrays mu and sigma)")
    for name, value in statistics.items():
        if not re.fullmatch(r"\w+", name):
            raise ReferenceFileError(f"{path}: no usable reference statistics: {name!r} is not a detector's name")
        if reason := _fault(value):
            raise ReferenceFileError(f"{path}: the statistics for {name} cannot be used: {reason}")
    if count is not None and count < 2:
        raise ReferenceFileError(f"{path}: num_images is {count}; a covariance needs at least 2")
    return Reference(statistics, count, redact(os.fspath(source)), file_sha256(path))


def _read_npz(file: BinaryIO) -> tuple[dict[str, Statistics], int | None]:
    with zipfile.ZipFile(file) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        if "mu" in members and "sigma" in members:  # of EDM
            members = {"fid/mu": members["mu"], "fid/sigma": members["sigma"]}
        names = [key.removesuffix("/mu") for key in members if key.endswith("/mu")]
        keys = [f"{name}/{part}" for name in names for part in (*_DATA, "sha256")] + ["num_images"]
        shapes = {}
        for key in (key for key in keys if key in members):
            if members[key].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{key} is neither stored nor deflated")
            with archive.open(members[key]) as member:
                shapes[key], dtype, _ = read_npy_header(member)
            if key.endswith(_DATA):
                _check_kind(dtype)
        for name in names:
            if f"{name}/sigma" not in shapes:
                raise ValueError(f"there is no array {name}/sigma")
            _check_shapes(name, *(shapes.get(f"{name}/{part}") for part in _DATA))
        if (size := sum(8 * math.prod(shape) for shape in shapes.values())) > MAX_BYTES:
            raise ValueError(f"its arrays take {size} bytes, more than the limit of {MAX_BYTES}")
        found: dict[str, Any] = {}
        for key, shape in shapes.items():
            with archive.open(members[key]) as member:
                found[key] = read_npy(member, 8 * math.prod(shape) if key.endswith(_DATA) else _MAX_TEXT)
    statistics = {}
    for name in names:
        mu, sigma, features, sha256 = (found.get(f"{name}/{part}") for part in (*_DATA, "sha256"))
        features = None if features is None else features.astype(np.float32)
        statistics[name] = Statistics(
            np.asarray(mu, np.float64), np.asarray(sigma, np.float64), features, None if sha256 is None else str(sha256)
        )
    count = found.get("num_images")
    if count is not None and count.shape != ():
        raise ValueError(f"num_images must be one number, not an array of shape {list(count.shape)}")
    return statistics, None if count is None else int(count)


def _check_shapes(name: str, mu: tuple, sigma: tuple, features: tuple | None = None) -> None:
    """Refuse what cannot be statistics by its shape alone, before data are read. Raises ValueError."""
    if len(mu) != 1 or not 1 <= mu[0] <= MAX_DIM or sigma != (*mu, *mu):
        found = f"mu has shape {str(list(mu))[:60]}, sigma {str(list(sigma))[:60]}"
        raise ValueError(f"for {name}, {found}; [D] and [D,D] are needed, with D up to {MAX_DIM}")
    if features is not None and (len(features) != 2 or features[1:] != mu):
        raise ValueError(f"for {name}, features have shape {str(list(features))[:60]}; [N,{mu[0]}] is needed")


def _read_pickle(path: Path) -> tuple[dict[str, Statistics], int | None]:
    content = safe_pickle.load(path, max_bytes=MAX_BYTES)
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not a dict of statistics")
    statistics = {}
    for name, value in content.items():
        if isinstance(value, dict) and "mu" in value and "sigma" in value:
            arrays = [v.numpy() if hasattr(v, "numpy") else v for v in (value["mu"], value["sigma"])]
            if wrong := [type(v).__name__ for v in arrays if not isinstance(v, np.ndarray)]:
                raise ValueError(f"mu and sigma must be arrays of numbers, not {wrong[0]}")
            _check_shapes(str(name), *(array.shape for array in arrays))
            for array in arrays:
                _check_kind(array.dtype)
            statistics[str(name)] = Statistics(*(np.asarray(array, np.float64) for array in arrays))
    count = content.get("num_images")
    return statistics, int(count) if isinstance(count, (int, np.integer)) else None


def _check_kind(dtype: np.dtype) -> None:
    if dtype.kind not in "fiu":
        raise ValueError(f"mu and sigma must be arrays of numbers, not of {str(dtype)[:60]}")


def _fault(value: Statistics) -> str | None:
    """Why these can be no mean and covariance, told before they become a plausible number; None if they can."""
    if not (np.isfinite(value.mu).all() and np.isfinite(value.sigma).all()):
        return "they are not finite"
    if np.abs(value.sigma - value.sigma.T).max() > _TOLERANCE * np.abs(value.sigma).max():
        return "sigma is not symmetric"
    if value.features is not None and not np.isfinite(value.features).all():
        return "features are not finite"
    if value.sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", value.sha256):
        return "sha256 is no SHA-256"
    return None


@dataclass(frozen=True)
class MetricValue:
    """One metric's outcome."""

    name: str
    value: float  # precision for precision and recall
    detector: str
    detector_sha256: str
    details: dict[str, Any] = field(default_factory=dict)  # recall, standard deviations, settings


def check_reference(
    metrics: Iterable[Metric], reference: Reference, detectors: Mapping[str, LoadedDetector] | None = None
) -> None:
    """Raise ReferenceFileError where the reference lacks what a metric needs, before any image is drawn, and, where
    `detectors` know before the first image how many features they give, if it has another number or no covariance.
    """
    for metric in metrics:
        if metric.needs == "logits":
            continue  # of the generated images alone
        statistics = reference.statistics.get(metric.detector)
        if statistics is None:
            held = f"{', '.join(reference.statistics)}, not for {metric.detector} ({metric.name})"
            advice = f"choose other --metrics, or make one with: calculate_metrics.py ref --metrics {metric.name}"
            raise ReferenceFileError(f"{reference.source} holds statistics for {held}: {advice}")
        if metric.needs == "features" and (statistics.features is None or len(statistics.features) < 4):
            lacks = f"holds no single features of {metric.detector}, which {metric.name} needs"
            advice = f"make it anew with: calculate_metrics.py ref --metrics {metric.name}"
            raise ReferenceFileError(f"{reference.source} {lacks}: {advice}")
        if detectors and (dim := detectors[metric.detector].feature_dim):
            _check_dimension(metric, statistics, dim)


def _check_dimension(metric: Metric, statistics: Statistics, dim: int) -> None:
    """Dimensions first: eigenvalues take their cube."""
    known, reason = len(statistics.mu), "sigma of the reference has negative eigenvalues, which no covariance has"
    if dim != known:
        raise ReferenceFileError(f"{metric.name}: the reference has {known} feature dimensions and the detector {dim}")
    if metric.needs == "moments" and not statistics.has_covariance:
        raise ReferenceFileError(f"{metric.name}: {reason}")


def compute_metrics(
    metrics: Iterable[Metric], collected: dict[str, Collected], reference: Reference | None
) -> tuple[list[MetricValue], list[str]]:
    """Return the values and warnings about numbers that mean less than they seem. Raises ValueError for fewer than 2
    images, statistics of another size and too few images for a metric.
    """
    values, warnings = [], []
    for metric in metrics:
        part = collected[metric.detector]
        statistics = None if reference is None else reference.statistics.get(metric.detector)
        if metric.needs == "logits":
            given = (part.logits,)
        elif statistics is None:
            raise ReferenceFileError(f"{metric.name} needs reference statistics: give --ref")
        else:
            warnings += _warnings(metric, part, statistics, reference.num_images)
            _check_dimension(metric, statistics, len(part.moments.mean()))
            if metric.needs == "features":
                given = part.features, torch.from_numpy(statistics.features)
            else:
                known = map(torch.from_numpy, (statistics.mu, statistics.sigma))
                given = part.moments.mean(), part.moments.cov(), *known
        value, details = KINDS[metric.kind].compute(*given)
        values.append(MetricValue(metric.name, value, metric.detector, part.detector.sha256, details))
    return values, list(dict.fromkeys(warnings))


def _warnings(metric: Metric, part: Collected, statistics: Statistics, reference_images: int | None) -> list[str]:
    count, dim, own = part.moments.count, len(part.moments.mean()), part.detector.sha256
    found, singular = [], "covariance is singular"
    if metric.needs == "moments" and count <= dim:
        large = "and the distance comes out much too large to compare with published values"
        found.append(f"{count} images for {dim} feature dimensions: their {singular}, {large}")
    if metric.needs == "moments" and reference_images is not None and reference_images <= dim:
        found.append(f"the reference has {reference_images} images for {dim} feature dimensions: its {singular}")
    if statistics.sha256 is not None and statistics.sha256 != own:
        weights = f"other weights of {metric.detector} ({statistics.sha256[:8]}, here {own[:8]})"
        found.append(f"the reference was made with {weights}: the values compare with nothing")
    return [f"{metric.name}: {warning}" for warning in found]
