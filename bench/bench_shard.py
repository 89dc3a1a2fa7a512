"""Ways to divide a network's training state between processes: time of an update, bytes per process, and whether the
forced weight normalisation of EDM2, which writes weights in the forward pass, reaches the weights that are kept.

OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 bench/bench_shard.py --out bench/results/cpu_shard.json
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from bench_options import out_option

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

ARCHITECTURE = dict(img_resolution=16, img_channels=1, label_dim=10, model_channels=32, channel_mult=[1, 2])
ARCHITECTURE |= dict(num_blocks=1, attn_resolutions=[8], channels_per_head=32)


@click.command(context_settings={"show_default": True})
@click.option("--updates", type=click.IntRange(1), default=10, help="Timed updates, after two that warm up.")
@click.option("--batch", type=click.IntRange(1), default=8, help="Images per process.")
@click.option("--device", default="auto")
@out_option()
def main(updates: int, batch: int, device: str, out: str | None) -> None:
    """Print a table for the embedded teacher's architecture, trained with its own loss."""
    from torch_utils import distributed
    from torch_utils.errors import user_errors

    if not distributed.launched_by_torchrun():
        start = "torchrun --standalone --nproc-per-node 2 bench/bench_shard.py"
        raise click.ClickException(f"this bench divides a state between processes: start it with {start}")
    with user_errors():
        resolved = distributed.init(device)
        distributed.print0(f"{'':22} {'ms/update':>10} {'KiB weights':>12} {'KiB Adam':>9} {'kept norm - 1':>14}")
        rows = []
        for name, wrap in (("replicated", replicated), ("ZeRO stage 1", zero), ("FSDP2", fsdp)):
            row = measure(wrap, updates, batch, resolved)
            figures = f"{row['ms']:10.1f} {row['weights'] / 1024:12.0f} {row['adam'] / 1024:9.0f} {row['norm']:14.1e}"
            distributed.print0(f"{name:22} {figures}")
            rows.append({"variant": name, **row})
        if out and distributed.is_main():
            from dnnlib.files import write_json

            write_json(out, {"processes": distributed.world_size(), "batch": batch, "rows": rows})


def measure(wrap: Callable[..., tuple[Any, Any]], updates: int, batch: int, device: Any) -> dict[str, float]:
    """One row, of the main process."""
    import torch

    from networks import Precond
    from networks.layers import MPConv
    from torch_utils import distributed
    from training.losses import edm2_loss

    torch.manual_seed(0)
    net = Precond(**ARCHITECTURE).to(device).train()
    callable_net, optimizer = wrap(net, device)
    net.requires_grad_(True)
    images = torch.randn(batch, 1, 16, 16, device=device)
    labels = torch.eye(10, device=device)[torch.arange(batch) % 10]
    started = 0.0
    for step in range(2 + updates):
        if step == 2:
            distributed.barrier()
            started = time.perf_counter()
        edm2_loss(callable_net, images, 1.0, labels, randn_like=torch.randn_like).mean().backward()
        optimizer.param_groups[0]["lr"] = 1e-2
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - started
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # one more pass: it normalises what the last update changed
    edm2_loss(callable_net, images, 1.0, labels, randn_like=torch.randn_like).mean().backward()
    inner = getattr(optimizer, "optim", optimizer)
    moments = [value for entry in inner.state.values() for value in entry.values()]
    kept = [whole(m.weight.detach()) for m in net.modules() if isinstance(m, MPConv)]
    worst = max(abs(float(weight.square().mean().sqrt()) - 1) for weight in kept)
    return {
        "ms": 1000 * seconds / updates,
        "weights": local_bytes(net.parameters()),
        "adam": local_bytes(moments),
        "norm": worst,
    }


def replicated(net: Any, device: Any) -> tuple[Any, Any]:
    from training.run.parallel import build_optimizer, replicate

    return replicate(net), build_optimizer(net, device)


def zero(net: Any, device: Any) -> tuple[Any, Any]:
    from training.run.parallel import build_optimizer, replicate

    return replicate(net), build_optimizer(net, device, shard=True)


def fsdp(net: Any, device: Any) -> tuple[Any, Any]:
    import warnings

    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from networks.unet import Block
    from torch_utils import distributed

    warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # that its output must not be changed in place
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    scalars = {p for p in net.parameters() if p.ndim == 0}  # which it cannot divide; EDM2 has one per block
    for module in net.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh, ignored_params=scalars)
    fully_shard(net, mesh=mesh, ignored_params=scalars)
    return net, torch.optim.Adam(net.parameters(), betas=(0.9, 0.99))


def whole(tensor: Any) -> Any:
    """The full tensor of a divided one. Collective."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local_bytes(tensors: Any) -> int:
    """Bytes of this process's share."""
    local = (t.to_local() if hasattr(t, "to_local") else t for t in tensors)
    return sum(t.numel() * t.element_size() for t in local)


if __name__ == "__main__":
    from torch_utils.options import set_wait_policy

    set_wait_policy()
    main()
