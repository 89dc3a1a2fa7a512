"""Post-hoc EMA: networks of other averaging profiles from stored snapshots (EDM2, Section 3)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import networks
from training.phema import solve_posthoc_coefficients, std_to_exp

_NAME = re.compile(r".*?-?(\d{6,})-(\d\.\d{2,})\.(safetensors|pkl)")


class ReconstructionError(ValueError):
    """Snapshots that cannot be combined as asked."""


@dataclass(frozen=True, order=True)
class Snapshot:
    """A stored average."""

    nimg: int  # images at which its profile ends
    std: float  # relative width of its profile
    path: Path


def find_snapshots(paths: Sequence[str | Path]) -> list[Snapshot]:
    """Snapshots among files, or in folders, by name, the earliest first.

    Names end in -IMAGES-STD.safetensors for this project's files and in -KIMG-STD.pkl, thousands of images, for
    EDM2's. Reconstructions in folders (phema-...) are left out. Raises ReconstructionError for a file with another
    name, for none at all, and for two of the same profile.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            files += [f for f in path.iterdir() if _NAME.fullmatch(f.name) and not f.name.startswith("phema-")]
        elif not path.is_file():
            raise ReconstructionError(f"{path}: no such file or folder")
        else:
            files.append(path)
    found = []
    for file in files:
        match = _NAME.fullmatch(file.name)
        if match is None:
            raise ReconstructionError(f"{file}: a snapshot's name ends in -IMAGES-STD.safetensors or -KIMG-STD.pkl")
        found.append(Snapshot(int(match[1]) * (1000 if match[3] == "pkl" else 1), float(match[2]), file))
    found = sorted(s for s in found if s.nimg > 0)  # before the first update there is no average
    if not found:
        raise ReconstructionError(f"no snapshots in {', '.join(map(str, paths))}")
    for a, b in zip(found, found[1:], strict=False):
        if (a.nimg, a.std) == (b.nimg, b.std):
            raise ReconstructionError(f"{a.path} and {b.path} are the same profile: give one of them")
    return found


def reconstruct(
    snapshots: Sequence[Snapshot],
    stds: Sequence[float],  # relative widths of the wanted profiles
    nimg: int | None = None,  # images at which they end; None = those of the last snapshot
    *,
    progress: Callable[[Snapshot], Any] | None = None,  # called after each snapshot
) -> tuple[list[dict[str, torch.Tensor]], networks.LoadedNetwork, np.ndarray]:
    """Weights of each wanted profile, the last snapshot used (with architecture and encoder), and the coefficients.

    Snapshots are read one after the other: memory holds one of them and the results. Raises ReconstructionError where
    the profile cannot be had or the snapshots are not of one network.
    """
    nimg = snapshots[-1].nimg if nimg is None else nimg
    used = [s for s in snapshots if s.nimg <= nimg]
    if not used or nimg > snapshots[-1].nimg:
        span = f"{snapshots[0].nimg} to {snapshots[-1].nimg}"
        raise ReconstructionError(f"a profile that ends at {nimg} images needs snapshots around it: there are {span}")
    try:
        std_to_exp(np.array([*stds, *(s.std for s in used)]))
    except ValueError as error:
        raise ReconstructionError(str(error)) from None
    coefficients = solve_posthoc_coefficients([s.nimg for s in used], [s.std for s in used], [nimg] * len(stds), stds)
    results: list[dict[str, torch.Tensor]] = []
    loaded, architecture = None, None
    for snapshot, row in zip(used, coefficients, strict=True):
        loaded = None  # the one before must not stay in memory while this one is read
        loaded = networks.load(snapshot.path)
        if (loaded.config["provenance"] or {}).get("reconstructed_from"):
            raise ReconstructionError(f"{snapshot.path} was itself reconstructed: give the snapshots of training")
        if architecture not in (None, _architecture(loaded)):
            raise ReconstructionError(f"{snapshot.path} is another kind of network than {used[0].path}")
        architecture = _architecture(loaded)
        if not results:
            results = [{k: torch.zeros_like(p) for k, p in loaded.net.named_parameters()} for _ in stds]
        for result, coefficient in zip(results, row, strict=True):
            for name, p in loaded.net.named_parameters():
                result[name].add_(p.detach(), alpha=float(coefficient))
        if progress is not None:
            progress(snapshot)
    return results, loaded, coefficients


def _architecture(loaded: networks.LoadedNetwork) -> dict[str, Any]:
    return {key: loaded.config[key] for key in ("kind", "init_kwargs", "gamma", "init_sigma")}
