"""Published weights: a given path, a folder of one's own, or the place that publishes them; checked, then loaded."""

import os
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dnnlib.download import DownloadError, cache_path, open_url
from dnnlib.files import PathLike, file_sha256

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

    @property
    def advice(self) -> str:
        """Where to get the file and where to put it."""
        return (
            f"get it ({self.size}) from {self.url} and put it in a folder named by the environment variable "
            f"{FOLDER_VARIABLE}, or name it with {self.option} where the script has that option"
        )


def load_published(
    net: nn.Module,
    weights: WeightFile,
    path: PathLike | None = None,
    *,
    ignored: tuple[str, ...] = (),  # beginnings of names in the file that the network has no use for
    download: bool = True,
) -> str:
    """Fill a network with published weights found as by `find_weights`, every name and shape as it has them; tensors
    are read only, and nothing in the file is run. Returns the file's SHA-256. Raises DetectorError, in one line.
    """
    file, digest = find_weights(weights, path, download=download)
    kind = f"the {type(net).__name__} weights {weights.name}"
    if is_torchscript(file):  # which some releases of PyTorch would run
        raise DetectorError(f"{file} is a TorchScript program, not {kind}")
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
        net.load_state_dict({name: tensor for name, tensor in found.items() if not name.startswith(ignored)})
    except MemoryError:
        raise
    except OSError as error:
        raise DetectorError(f"cannot read {kind} at {file}: {error.strerror or error}") from None
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


def find_weights(weights: WeightFile, path: PathLike | None = None, *, download: bool = True) -> tuple[Path, str]:
    """Return the local file and its SHA-256, which is checked: `path` (the file, or a folder that holds it), else the
    folder $NCVSD_DETECTORS, else the cache, into which it is downloaded if `download` says so. Raises DetectorError, in
    one line that says where to get the file and where to put it.
    """
    file, downloaded = None, False
    for given in filter(str, (path or "", os.environ.get(FOLDER_VARIABLE, ""))):
        file = Path(given).expanduser()
        file = file / weights.name if file.is_dir() else file
        if file.is_file():
            break
        if given is path:
            raise DetectorError(f"no {weights.name} at {given}: {weights.advice}")
    else:
        if not download and not cache_path(weights.url).is_file():
            raise DetectorError(f"{weights.name} is missing: {weights.advice}")
        try:
            file, downloaded = open_url(weights.url), True
        except DownloadError as error:
            raise DetectorError(f"{weights.name} is missing, and no download ({error}): {weights.advice}") from None
    digest = file_sha256(file)
    if not digest.startswith(weights.sha256_prefix):
        if downloaded:
            file.unlink(missing_ok=True)
        found = f"its SHA-256 starts with {digest[:8]}, not {weights.sha256_prefix[:8]}"
        raise DetectorError(f"{file} is not {weights.name}: {found}; {weights.advice}")
    return file, digest
