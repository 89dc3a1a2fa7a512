"""Which noise levels drive the generator: share of its squared gradient by level of y over training (toy).

python bench/gradient_share.py --only published --only "vsd, output, cap 3" --out bench/results/gradient_share.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

EDGES = (0.0, 0.03, 0.3, 3.0, float("inf"))
WINDOWS = 5


@click.command(context_settings={"show_default": True})
@click.option("--only", multiple=True, required=True, help="Recipes of recipes.json, by name.")
@click.option("--iterations", type=click.IntRange(WINDOWS), default=400)
@click.option("--seed", type=click.IntRange(0), default=0)
@click.option("--out", type=click.Path(dir_okay=False), required=True, help="JSON of all shares.")
def main(only: tuple[str, ...], iterations: int, seed: int, out: str) -> None:
    """Print, for each fifth of the generator's updates, the share of four bands of sigma."""
    from dnnlib.files import write_json

    listed = json.loads(Path(__file__).with_name("recipes.json").read_text(encoding="utf-8"))["toy"]
    unknown = sorted(set(only) - set(listed))
    if unknown:
        raise click.BadParameter(f"there is no recipe {unknown[0]!r}: use one of {', '.join(listed)}")
    found = {}
    for name in only:
        found[name] = shares({"iterations": iterations, **listed[name], "seed": seed})
        for row in found[name]:
            print(f"{name:40}", "  ".join(f"{value:.3f}" for value in row), flush=True)
    write_json(out, {"edges": EDGES[1:-1], "iterations": iterations, "seed": seed, "shares": found})


def shares(settings: dict[str, Any]) -> list[list[float]]:
    """Share of each band in the squared gradients at the network's raw output, for each window of training."""
    import torch
    from torch.nn.modules.module import register_module_forward_hook

    from networks import GenerativeDenoiser
    from networks.denoisers import preconditioning
    from toy.mixture import spiral_arms
    from toy.settings import ToySettings
    from toy.training import train

    torch.set_num_threads(1)
    updates: list[list[float]] = []

    def watch(module: torch.nn.Module, inputs: tuple, output: Any) -> None:
        if not (isinstance(module, GenerativeDenoiser) and isinstance(output, tuple) and output[0].requires_grad):
            return
        sigma = inputs[1].flatten()
        c_out = preconditioning((1 + module.gamma) * inputs[1], module.model.sigma_data).c_out

        def keep(gradient: torch.Tensor) -> None:
            square = (gradient * c_out).square().sum(dim=(1, 2, 3))
            bands = [square[(sigma >= low) & (sigma < high)].sum() for low, high in zip(EDGES, EDGES[1:], strict=False)]
            updates.append((torch.stack(bands) / square.sum()).tolist())

        output[0].register_hook(keep)

    handle = register_module_forward_hook(watch)
    try:
        train(spiral_arms(), ToySettings(**settings))
    finally:
        handle.remove()
    windows = torch.tensor(updates).tensor_split(WINDOWS)
    return [[round(float(value), 4) for value in window.mean(0)] for window in windows]


if __name__ == "__main__":
    from torch_utils.options import set_wait_policy

    set_wait_policy()
    main()
