"""What is worth watching in a run: losses by noise level, norms, memory, and the line that sums them up."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dnnlib.text import format_bytes, format_time
from training.optim import total_norm
from training.run.record import RunningMeans
from training.run.trained import Trained
from training.tasks import LossTerms, Phase


def add_losses(means: RunningMeans, phase: Phase, terms: LossTerms) -> None:
    """Add each reported loss, its parts by quarter of the noise levels' distribution, and the rates."""
    for name, value in terms.reported.items():
        per_image = value.detach().float().mean(dim=(1, 2, 3))
        means.add(f"Loss/{name}", per_image.mean())
        for label, total, count in by_level(per_image, terms.levels, phase.level_edges):
            means.add(f"Levels/{name}_{label}", total, count)
    for name, value in terms.rates.items():
        means.add(name, value.detach().float().mean())


def by_level(values: Tensor, levels: Tensor, edges: tuple[float, ...]) -> list[tuple[str, Tensor, Tensor]]:
    """Label, sum and number of the `values` [N] of images whose `levels` [N] lie between neighbouring edges."""
    bounds = [0.0, *edges, float("inf")]
    levels = levels.flatten()
    parts = []
    for low, high in zip(bounds, bounds[1:], strict=False):
        inside = (levels >= low) & (levels < high)
        parts.append((f"t{low:.2g}-{high:.2g}", torch.where(inside, values, 0).sum(), inside.sum()))
    return parts


def facts(trained: Trained, lr: float) -> dict[str, float]:
    """Weight norms, the weights that blend in the control branches, learning rates, non-finite gradients so far."""
    values = {"Progress/lr": lr}
    for phase in trained.task.phases:
        values[f"Weights/{phase.name}_norm"] = float(total_norm(phase.net.parameters()))
        values[f"Rates/{phase.name}"] = lr * phase.rate(trained.nimg) if trained.nimg > phase.start else 0.0
        values[f"Nonfinite/{phase.name}_total"] = trained.health[phase.name].updates
        for key, p in phase.net.named_parameters():
            kind = key.rpartition(".")[2]
            if kind == "additional_x_weight":
                values[f"Control/{phase.name}_x"] = float(p.clamp(0, 1))  # as the network uses it
            elif kind == "additional_skips_weight":
                values |= {f"Control/{phase.name}_skip{i:02d}": w for i, w in enumerate(p.clamp(0, 1).tolist())}
    return values


def memory(device: torch.device) -> dict[str, float]:
    """Resident memory of this process and, on CUDA, the peak of what tensors held since the last call, in GiB."""
    values = {}
    statm = Path("/proc/self/statm")
    if statm.exists():
        import resource

        values["Memory/host_gib"] = int(statm.read_text().split()[1]) * resource.getpagesize() / 2**30
    if device.type == "cuda":
        values["Memory/gpu_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        torch.cuda.reset_peak_memory_stats(device)
    return values


def status_line(nimg: int, duration: int, values: dict[str, float]) -> str:
    """Images seen, speed, time to go, memory and losses in one line."""
    rate = values["Progress/img_per_s"]
    parts = [f"{nimg} of {duration} images", f"{rate:.4g} img/s", f"ETA {format_time((duration - nimg) / rate)}"]
    for name, label in (("Memory/host_gib", "memory"), ("Memory/gpu_gib", "GPU")):
        if name in values:
            parts.append(f"{label} {format_bytes(values[name] * 2**30)}")
    parts += [f"{k.removeprefix('Loss/')} {v:.4g}" for k, v in values.items() if k.startswith("Loss/")]
    return "  ".join(parts)
