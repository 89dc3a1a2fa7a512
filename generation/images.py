"""Images by seed, batch by batch, from a teacher or from a distilled network. Per image, everything random comes from
the stream of its own seed, in this order: starting noise [C,H,W]; the class of a conditional network (also when one is
asked for, so that the rest does not shift); what the sampler draws.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from generation.pictures import save_image
from networks import GenerativeDenoiser, Precond
from networks.encoders import Encoder, RGBEncoder
from sampling.grids import few_step_sigmas
from sampling.ode import guided_denoiser, heun_sampler
from sampling.posterior import RandnLike
from sampling.seeds import SeededNoise
from torch_utils import distributed

DEFAULT_STEPS = 32  # teacher: 2·32 - 1 = 63 evaluations
Sampler = Callable[[Tensor, Tensor | None, RandnLike], Tensor]  # (noise, labels, randn_like) -> latents [N,C,H,W]


@dataclass
class GeneratedBatch:
    """One batch of generated images, on the device they were drawn on."""

    seeds: list[int]
    images: Tensor  # uint8 [N,C,H,W], decoded pixels
    latents: Tensor  # float32 [N,C,H,W], what the network drew, before decoding
    labels: Tensor | None  # one-hot float32 [N, label_dim]; None without classes
    paths: list[Path] = field(default_factory=list)  # files written, in the order of seeds


def image_path(outdir: str | Path, seed: int, *, subdirs: bool = False) -> Path:
    """Return where a seed's image goes: OUTDIR/000123.png, or OUTDIR/000000/000123.png with one folder per thousand."""
    folder = Path(outdir) / f"{seed - seed % 1000:06d}" if subdirs else Path(outdir)
    return folder / f"{seed:06d}.png"


def split_seeds(seeds: Sequence[int], batch: int, *, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    """Return the batches of one process: nearly equal ones of at most `batch`, dealt out to the processes in turn.
    Which seeds share a batch does not depend on the number of processes, unless there are fewer batches than those.
    """
    count = max(math.ceil(len(seeds) / batch), min(world_size, len(seeds)))
    parts = [list(seeds[len(seeds) * i // count : len(seeds) * (i + 1) // count]) for i in range(count)]
    return parts[rank::world_size]


def count_evaluations(net: nn.Module, *, ts: Sequence[int] | None = None, num_steps: int | None = None) -> int:
    """Return the evaluations of `net` that one image takes (a guiding network's come on top)."""
    if isinstance(net, GenerativeDenoiser):
        return 1 if ts is None else len(ts) - 1
    return 2 * (num_steps or DEFAULT_STEPS) - 1


def generate_images(
    net: nn.Module,  # GenerativeDenoiser (few steps) or Precond (Heun)
    encoder: Encoder | None = None,  # latents to pixels; None = plain RGB
    *,
    gnet: nn.Module | None = None,  # guiding Precond; None = net itself
    seeds: Sequence[int],  # one image per seed
    class_idx: int | None = None,  # None = a class drawn from each seed
    batch: int = 32,  # largest number of images at once, per process
    ts: Sequence[int] | None = None,  # generator: grid indices, n+1 for n steps; None = one direct step
    zeta: float = 1.0,  # generator with ts: share of fresh noise in each re-noising
    guidance: float = 1.0,  # teacher: gnet + guidance·(net - gnet)
    gnet_labels: bool = True,  # False = gnet sees no labels (classifier-free guidance)
    num_steps: int | None = None,  # teacher: noise levels; None = 32
    device: torch.device | str | None = None,  # None = where net is
    dtype: torch.dtype | None = None,  # compute type of the U-Nets; None = leave as is
    outdir: str | Path | None = None,  # write PNGs here
    subdirs: bool = False,  # one folder per thousand seeds
    rank: int | None = None,  # None = this process's place in its group
    world_size: int | None = None,
) -> Iterator[GeneratedBatch]:
    """Check the request, then return an iterator over this process's batches.

    The type of `net` decides the sampler. A seed gives the same image whatever the batch size, the number of processes
    and the device, up to rounding. Networks are in eval mode during each batch only, and no gradients are kept;
    `device` and `dtype` stay with the networks. Raises ValueError for options that do not fit together.
    """
    sample = _sampler(net, gnet, ts, zeta, guidance, gnet_labels, num_steps)
    _check(net, seeds, class_idx, batch, outdir)
    device = next(net.parameters()).device if device is None else torch.device(device)
    encoder = RGBEncoder() if encoder is None else encoder
    networks = [net] if gnet is None else [net, gnet]
    for module in (*networks, encoder):
        module.to(device)
    for network in networks if dtype is not None else []:
        network.compute_dtype = dtype
    rank = distributed.rank() if rank is None else rank
    parts = split_seeds(seeds, batch, rank=rank, world_size=world_size or distributed.world_size())

    def draw() -> Iterator[GeneratedBatch]:
        for part in parts:
            with torch.no_grad(), contextlib.ExitStack() as modes:
                for network in networks:  # in eval mode nothing rewrites their weights
                    modes.callback(network.train, network.training)
                    network.eval()
                source = SeededNoise(part, device)
                noise = source.randn([len(part), net.img_channels, net.img_resolution, net.img_resolution])
                labels = None
                if net.label_dim:
                    classes = source.randint(net.label_dim)
                    classes = classes if class_idx is None else torch.full_like(classes, class_idx)
                    labels = nn.functional.one_hot(classes, net.label_dim).to(torch.float32)
                latents = sample(noise, labels, source.randn_like)
                images = encoder.decode(latents)
            paths = [] if outdir is None else [image_path(outdir, seed, subdirs=subdirs) for seed in part]
            for path, image in zip(paths, images.cpu() if paths else (), strict=True):
                save_image(path, image)
            yield GeneratedBatch(part, images, latents, labels, paths)

    return draw()


def _check(net: nn.Module, seeds: Sequence[int], class_idx: int | None, batch: int, outdir: str | Path | None) -> None:
    """Raise ValueError for images that the network or the folder cannot take."""
    if class_idx is not None and not 0 <= class_idx < net.label_dim:
        known = f"has classes 0 to {net.label_dim - 1}" if net.label_dim else "has no classes"
        raise ValueError(f"class {class_idx} is not available: the network {known}")
    if batch < 1:
        raise ValueError(f"the batch size must be at least 1, not {batch}")
    if len(seeds) and not 0 <= min(seeds) <= max(seeds) < 1 << 63:
        raise ValueError(f"seeds must lie between 0 and 2^63 - 1, not from {min(seeds)} to {max(seeds)}")
    if outdir is not None and Path(outdir).exists() and not Path(outdir).is_dir():
        raise ValueError(f"{outdir} is a file: give a folder to write images to")


def _sampler(
    net: nn.Module,
    gnet: nn.Module | None,
    ts: Sequence[int] | None,
    zeta: float,
    guidance: float,
    gnet_labels: bool,
    num_steps: int | None,
) -> Sampler:
    """The sampler that the type of `net` decides. Raises ValueError for options that do not fit it or one another."""
    if isinstance(net, GenerativeDenoiser):
        if gnet is not None or guidance != 1 or not gnet_labels:
            raise ValueError("guidance and gnet apply to teachers only: a generative denoiser is sampled unguided")
        if num_steps is not None:
            raise ValueError("steps apply to teachers only: the steps of a generative denoiser are chosen with ts")
        if not 0 <= zeta <= 1:
            raise ValueError(f"zeta is the share of fresh noise and must lie in [0, 1], not {zeta}")
        if zeta != 1 and ts is None:
            raise ValueError("zeta applies to few-step sampling only: give ts as well, as in 10,22,39")
        if ts is not None:
            few_step_sigmas(ts, sigma_max=net.init_sigma)
        level, steps = net.init_sigma, {"ts": ts, "zeta": zeta}  # level·noise says nothing: the posterior is the prior
        return lambda noise, labels, randn_like: net(level * noise, level, labels, randn_like=randn_like, **steps)
    if not isinstance(net, Precond):
        raise ValueError(f"cannot sample from a {type(net).__name__}: give a teacher (Precond) or a GenerativeDenoiser")
    if ts is not None or zeta != 1:
        raise ValueError("ts and zeta apply to generative denoisers only, and this network is a teacher: use steps")
    if num_steps is not None and num_steps < 2:
        raise ValueError(f"the teacher needs at least 2 steps, not {num_steps}")
    if not math.isfinite(guidance):
        raise ValueError(f"guidance must be a finite number, not {guidance}")
    if gnet is not None:
        if not isinstance(gnet, Precond):
            raise ValueError(f"the guiding network must be a teacher (Precond), not a {type(gnet).__name__}")
        drawn, wanted = (f"{n.img_channels}x{n.img_resolution}x{n.img_resolution}" for n in (gnet, net))
        if drawn != wanted:
            raise ValueError(f"the guiding network draws {drawn} and the network {wanted}")
        if gnet_labels and gnet.label_dim not in (0, net.label_dim):
            raise ValueError(f"the guiding network has {gnet.label_dim} classes and the network {net.label_dim}")
    elif guidance != 1 and (gnet_labels or net.label_dim == 0):
        raise ValueError(
            f"guidance {guidance} needs a guiding network gnet (a weaker or unconditional teacher), or, for a "
            "conditional network trained with label dropout, evaluation of the network itself without labels"
        )
    if guidance == 1 and (gnet is not None or not gnet_labels):
        raise ValueError("a guiding network has no effect at guidance 1: give --guidance")
    guided = partial(guided_denoiser, net, gnet, guidance, gnet_labels=gnet_labels)
    return lambda noise, labels, _: heun_sampler(guided(labels=labels), noise, num_steps=num_steps or DEFAULT_STEPS)
