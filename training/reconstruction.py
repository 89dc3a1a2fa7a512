"""Post-hoc EMA: networks of other averaging profiles from stored snapshots (EDM2, Section 3)."""

import re
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import networks
from dnnlib.text import redact
from training.phema import profile_errors, solve_posthoc_coefficients
from training.presets import MAY_CHANGE

_NAME = re.compile(r".*?-?(\d{6,})-(\d\.\d{2,})\.(safetensors|pkl)")


class ReconstructionError(ValueError):
    """Snapshots that cannot be combined as asked."""


class Snapshot(NamedTuple):
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
    found: list[Snapshot] = []
    for path in map(Path, paths):
        if not (path.is_file() or path.is_dir()):
            raise ReconstructionError(f"{path}: no such file or folder")
        for file in path.iterdir() if path.is_dir() else [path]:
            match = _NAME.fullmatch(file.name)
            if file is not path and file.name.startswith("phema-"):
                continue
            if match is None and file is path:
                raise ReconstructionError(f"{file}: a snapshot's name ends in -IMAGES-STD.safetensors or -KIMG-STD.pkl")
            if match is not None and int(match[1]) > 0:  # before the first update there is no average
                found.append(Snapshot(int(match[1]) * (1000 if match[3] == "pkl" else 1), float(match[2]), file))
    if not found:
        raise ReconstructionError(f"no snapshots in {', '.join(map(str, paths))}")
    for a, b in pairwise(sorted(found)):
        if a[:2] == b[:2]:
            raise ReconstructionError(f"{a.path} and {b.path} are the same profile: give one of them")
    return sorted(found)


class Plan(NamedTuple):
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
    max_error: float = 0.1,  # of a profile, relative
) -> Plan:
    """Coefficients of each wanted profile, from the names of the snapshots alone.

    Raises ReconstructionError where no snapshot ends at `nimg`, and for a profile that would be off by more than
    `max_error`; ValueError for widths that no profile has.
    """
    counts = sorted({s.nimg for s in snapshots})
    nimg = counts[-1] if nimg is None else nimg
    if nimg not in counts:
        near = " and ".join(str(n) for n in [n for n in counts if n < nimg][-1:] + [n for n in counts if n > nimg][:1])
        raise ReconstructionError(f"a profile must end at a snapshot, and none is at {nimg} images (nearest: {near})")
    used = [s for s in snapshots if s.nimg <= nimg]
    profiles = [s.nimg for s in used], [s.std for s in used], [nimg] * len(stds), stds
    coefficients = solve_posthoc_coefficients(*profiles)
    errors = profile_errors(coefficients, *profiles)
    for std, error in zip(stds, errors, strict=True):
        if not error <= max_error:
            widths = ", ".join(f"{s:g}" for s in sorted({s.std for s in used}))
            raise ReconstructionError(
                f"the profile of width {std:g} would be {error:.1%} off, and {max_error:.0%} is accepted: give more "
                f"snapshots than these {len(used)}, or a width nearer to the stored ones ({widths})"
            )
    return Plan(used, nimg, coefficients, errors)


def reconstruct(plan: Plan, *, quiet: bool = True) -> tuple[list[dict[str, torch.Tensor]], networks.LoadedNetwork]:
    """Weights of each wanted profile, and the last snapshot used (with architecture and encoder).

    Snapshots are read one after the other: memory holds one of them and the results. Raises ReconstructionError where
    they are not of one network and one run.
    """
    results: list[dict[str, torch.Tensor]] = []
    loaded, architecture = None, None
    run: dict[str, Any] = {}
    for snapshot, row in zip(tqdm(plan.snapshots, unit="file", disable=quiet), plan.coefficients, strict=True):
        loaded = None  # the one before must not stay in memory while this one is read
        loaded = networks.load(snapshot.path)
        if (loaded.config["provenance"] or {}).get("reconstructed_from"):
            raise ReconstructionError(f"{snapshot.path} was itself reconstructed: give the snapshots of training")
        kind = {key: loaded.config[key] for key in ("kind", "init_kwargs", "gamma", "init_sigma")}
        if architecture not in (None, kind):
            raise ReconstructionError(f"{snapshot.path} is another kind of network than {plan.snapshots[0].path}")
        architecture = kind
        for name, value in _run_facts(loaded).items():
            if run.setdefault(name, value) != value:
                raise ReconstructionError(
                    f"{snapshot.path} is of another run than the earlier ones ({name} is {value}, there {run[name]}): "
                    "give the snapshots of one run"
                )
        results = results or [{k: torch.zeros_like(p) for k, p in loaded.net.named_parameters()} for _ in row]
        for result, coefficient in zip(results, row, strict=True):
            for name, p in loaded.net.named_parameters():
                result[name].add_(p.detach(), alpha=float(coefficient))
    return results, loaded


def reconstruct_files(
    paths: Sequence[str], stds: Sequence[float], nimg: int | None, outdir: str, *, half: bool, quiet: bool
) -> Iterator[str]:
    """Write phema-IMAGES-STD.safetensors, of kernels in float16 or not `half`, for each width; yields a line for each.
    For `stds` and `nimg` see `plan_reconstruction`; `paths` are folders or snapshots. Raises ReconstructionError.
    """
    plan = plan_reconstruction(find_snapshots(paths), stds, nimg)
    results, last = reconstruct(plan, quiet=quiet)
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
        made = f"from {len(plan.snapshots)} snapshots, coefficients {column.min():.3g} to {column.max():.3g}"
        yield f"{path}: {made}, profile error {error:.2%}"


def _run_facts(loaded: networks.LoadedNetwork) -> dict[str, Any]:
    """What shapes a run, as far as the file tells: settings, seed, and the data but for their name."""
    provenance, dataset = loaded.config["provenance"], loaded.config["dataset"]
    if not provenance:  # other people's files
        return {}
    settings = provenance.get("config")
    facts = {k: v for k, v in settings.items() if k not in MAY_CHANGE} if isinstance(settings, dict) else {}
    facts |= {f"dataset {k}": v for k, v in (dataset or {}).items() if k != "name"}
    return facts | ({"seed": provenance["seed"]} if "seed" in provenance else {})
