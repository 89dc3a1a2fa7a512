"""Post-hoc EMA: networks of other averaging profiles from stored snapshots (EDM2, Section 3)."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import networks
from dnnlib.text import redact
from training.phema import profile_errors, solve_posthoc_coefficients, std_to_exp
from training.presets import MAY_CHANGE

MAX_ERROR = 0.1  # of a profile, relative

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


@dataclass(frozen=True)
class Plan:
    """How wanted profiles are made from snapshots."""

    snapshots: list[Snapshot]  # that are used
    nimg: int  # images at which the profiles end
    coefficients: np.ndarray  # [snapshots, wanted]
    errors: np.ndarray  # [wanted], of the profiles, relative


def plan_reconstruction(
    snapshots: Sequence[Snapshot],
    stds: Sequence[float],  # relative widths of the wanted profiles
    nimg: int | None = None,  # images at which they end, those of a snapshot; None = of the last one
    *,
    max_error: float = MAX_ERROR,
) -> Plan:
    """Coefficients of each wanted profile, from the names of the snapshots alone.

    Raises ReconstructionError where no snapshot ends at `nimg`, and for a profile that would be off by more than
    `max_error`.
    """
    counts = sorted({s.nimg for s in snapshots})
    nimg = counts[-1] if nimg is None else nimg
    if nimg not in counts:
        below, above = [n for n in counts if n < nimg][-1:], [n for n in counts if n > nimg][:1]
        near = " and ".join(map(str, below + above))
        raise ReconstructionError(f"a profile must end at a snapshot, and none is at {nimg} images (nearest: {near})")
    used = [s for s in snapshots if s.nimg <= nimg]
    stored, ends = ([s.nimg for s in used], [s.std for s in used]), [nimg] * len(stds)
    try:
        std_to_exp(np.array([*stds, *stored[1]]))
    except ValueError as error:
        raise ReconstructionError(str(error)) from None
    coefficients = solve_posthoc_coefficients(*stored, ends, stds)
    errors = profile_errors(*stored, ends, stds, coefficients)
    for std, error in zip(stds, errors, strict=True):
        if not error <= max_error:
            widths = ", ".join(f"{s:g}" for s in sorted(set(stored[1])))
            raise ReconstructionError(
                f"the profile of width {std:g} would be {error:.1%} off, and {max_error:.0%} is accepted: give more "
                f"snapshots than these {len(used)}, or a width nearer to the stored ones ({widths})"
            )
    return Plan(used, nimg, coefficients, errors)


def reconstruct(
    plan: Plan,
    *,
    progress: Callable[[Snapshot], object] | None = None,  # called after each snapshot
) -> tuple[list[dict[str, torch.Tensor]], networks.LoadedNetwork]:
    """Weights of each wanted profile, and the last snapshot used (with architecture and encoder).

    Snapshots are read one after the other: memory holds one of them and the results. Raises ReconstructionError where
    they are not of one network and one run.
    """
    first = plan.snapshots[0].path
    results: list[dict[str, torch.Tensor]] = []
    loaded, architecture = None, None
    run: dict[str, Any] = {}
    for snapshot, row in zip(plan.snapshots, plan.coefficients, strict=True):
        loaded = None  # the one before must not stay in memory while this one is read
        loaded = networks.load(snapshot.path)
        if (loaded.config["provenance"] or {}).get("reconstructed_from"):
            raise ReconstructionError(f"{snapshot.path} was itself reconstructed: give the snapshots of training")
        if architecture not in (None, _architecture(loaded)):
            raise ReconstructionError(f"{snapshot.path} is another kind of network than {first}")
        architecture = _architecture(loaded)
        for name, value in _run_facts(loaded).items():
            if run.setdefault(name, value) != value:
                raise ReconstructionError(
                    f"{snapshot.path} is of another run than the earlier ones ({name} is {value}, there {run[name]}): "
                    "give the snapshots of one run"
                )
        if not results:
            results = [{k: torch.zeros_like(p) for k, p in loaded.net.named_parameters()} for _ in row]
        for result, coefficient in zip(results, row, strict=True):
            for name, p in loaded.net.named_parameters():
                result[name].add_(p.detach(), alpha=float(coefficient))
        if progress is not None:
            progress(snapshot)
    return results, loaded


def reconstruct_files(
    paths: Sequence[str],  # run folders or snapshots
    stds: Sequence[float],  # relative widths of the wanted profiles
    nimg: int | None,  # images at which they end; None = of the last snapshot
    outdir: str,
    *,
    half: bool = True,  # kernels in float16; False = in float32
    quiet: bool = False,  # no progress bar
) -> Iterator[str]:
    """Write phema-IMAGES-STD.safetensors for each width; yields a line for each. Raises ReconstructionError."""
    plan = plan_reconstruction(find_snapshots(paths), stds, nimg)
    with tqdm(total=len(plan.snapshots), unit="file", disable=quiet) as bar:
        results, last = reconstruct(plan, progress=lambda snapshot: bar.update())
    for std, weights, column, error in zip(stds, results, plan.coefficients.T, plan.errors, strict=True):
        for name, p in last.net.named_parameters():
            p.copy_(weights[name])
        facts = {
            "images_seen": plan.nimg,
            "ema_std": std,
            "command": [redact(part) for part in sys.argv],
            "reconstructed_from": {s.path.name: float(c) for s, c in zip(plan.snapshots, column, strict=True)},
            "profile_error": float(error),
        }
        path = Path(outdir) / f"phema-{plan.nimg:09d}-{std:.3f}.safetensors"
        kernels = torch.float16 if half else torch.float32
        networks.save(path, last.net, last.encoder, dtype=kernels, dataset=last.config["dataset"], provenance=facts)
        yield (
            f"{path}: from {len(plan.snapshots)} snapshots, coefficients {column.min():.3g} to {column.max():.3g}, "
            f"profile error {error:.2%}"
        )


def _architecture(loaded: networks.LoadedNetwork) -> dict[str, Any]:
    return {key: loaded.config[key] for key in ("kind", "init_kwargs", "gamma", "init_sigma")}


def _run_facts(loaded: networks.LoadedNetwork) -> dict[str, Any]:
    """What shapes a run, as far as the file tells: settings, seed, and the data but for their name."""
    provenance, dataset = loaded.config["provenance"], loaded.config["dataset"]
    if not provenance:  # other people's files
        return {}
    settings = provenance.get("config")
    facts = {k: v for k, v in settings.items() if k not in MAY_CHANGE} if isinstance(settings, dict) else {}
    facts |= {f"dataset {k}": v for k, v in (dataset or {}).items() if k != "name"}
    return facts | ({"seed": provenance["seed"]} if "seed" in provenance else {})
