"""Published weights: a given path, a folder of one's own, or the place that publishes them; checked, then loaded."""

from __future__ import annotations

import os
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dnnlib.download import DownloadError, cache_path, open_url
from dnnlib.files import file_sha256

FOLDER_VARIABLE = "NCVSD_DETECTORS"


class DetectorError(ValueError):
    """A detector is unknown, or its weights are missing, damaged or not those that define the metric."""


@dataclass(frozen=True)
class WeightFile:
    """A published file of weights."""

    name: str
    url: str
    size: str  # for people
    sha256_prefix: str  # leading hexadecimal digits of the file's SHA-256, as many as are published
    option: str = "--detector-path"  # of the scripts that have one for it


def load_published(
    net: nn.Module,
    weights: WeightFile,
    path: str | os.PathLike[str] | None = None,
    *,
    ignored: tuple[str, ...] = (),  # beginnings of names in the file that the network has no use for
    quiet: bool = False,
    download: bool = True,
) -> str:
    """Fill a network with published weights found as by `find_weights`, every name and shape as it has them; tensors
    are read only, and nothing in the file is run. Returns the file's SHA-256.

    Raises DetectorError, in one line that says where to get the file.
    """
    file, digest = find_weights(weights, path, quiet=quiet, download=download)
    kind = f"the {type(net).__name__} weights {weights.name}"
    if is_torchscript(file):  # which some releases of PyTorch would run
        raise DetectorError(f"{file} is a TorchScript program, not {kind}")
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
        net.load_state_dict({name: tensor for name, tensor in found.items() if not name.startswith(ignored)})
    except OSError as error:
        raise DetectorError(f"cannot read {kind} at {file}: {error.strerror or error}") from None
    except MemoryError:
        raise
    except Exception:  # a damaged or foreign pickle may raise nearly anything
        raise DetectorError(f"{file} is damaged or not {kind}; fetch it again from {weights.url}") from None
    return digest


def is_torchscript(path: Path) -> bool:
    """Whether PyTorch would take the file for a TorchScript program."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, RuntimeError, ValueError, struct.error):  # another format, or damaged
        return False


def find_weights(
    weights: WeightFile,
    path: str | os.PathLike[str] | None = None,
    *,
    quiet: bool = False,
    download: bool = True,  # False = what the cache holds already, and nothing from the network
) -> tuple[Path, str]:
    """Return the local file and its SHA-256, which is checked: `path` (the file, or a folder that holds it), else the
    folder $NCVSD_DETECTORS, else a download into the cache.

    Raises DetectorError, in one line that says where to get the file and where to put it.
    """
    for given in (path, os.environ.get(FOLDER_VARIABLE)):
        if given is None or not str(given):
            continue
        candidate = Path(given).expanduser()
        candidate = candidate / weights.name if candidate.is_dir() else candidate
        if candidate.is_file():
            return candidate, _checked(candidate, weights)
        if given is path:
            raise DetectorError(f"no {weights.name} at {given}: {_advice(weights)}")
    if not download and not cache_path(weights.url).is_file():
        raise DetectorError(f"{weights.name} is missing: {_advice(weights)}")
    try:
        downloaded = open_url(weights.url, quiet=quiet)
    except DownloadError as error:
        raise DetectorError(f"{weights.name} is missing, and no download ({error}): {_advice(weights)}") from None
    try:
        return downloaded, _checked(downloaded, weights)
    except DetectorError:
        downloaded.unlink(missing_ok=True)
        raise


def _checked(path: Path, weights: WeightFile) -> str:
    found = file_sha256(path)
    if not found.startswith(weights.sha256_prefix):
        raise DetectorError(
            f"{path} is not {weights.name}: its SHA-256 starts with {found[:8]}, not {weights.sha256_prefix[:8]}; "
            f"{_advice(weights)}"
        )
    return found


def _advice(weights: WeightFile) -> str:
    return (
        f"get it ({weights.size}) from {weights.url} and put it in a folder named by the environment variable "
        f"{FOLDER_VARIABLE}, or name it with {weights.option} where the script has that option"
    )
