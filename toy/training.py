"""Distillation of the exact denoiser into a small network, with the losses and phases of the image networks."""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from dnnlib.files import atomic_path, open_regular, parse_json
from dnnlib.text import first_line
from networks import CombinedScore, GenerativeDenoiser
from sampling.posterior import combine_observations
from toy.mixture import GaussianMixture
from toy.networks import PointCondition, PointDiscriminator, PointPrecond, architecture
from toy.settings import ToySettings
from training.losses import weighted_error
from training.noise import UniformKarrasSigma
from training.optim import DivergenceError, count_nonfinite, learning_rate
from training.phema import PowerFunctionEMA
from training.presets import NCVSDConfig
from training.tasks import Batch, Phase, distillation_phases

FORMAT = "ncvsd-toy-1"
EMA_STD = 0.05
ADAM_BETAS = (0.9, 0.99)


class BatchNoise:
    """Draws for a whole batch from one random stream: `SeededNoise` without a stream per point."""

    def __init__(self, seed: int, count: int) -> None:
        self.device = torch.device("cpu")
        self.generator = torch.Generator().manual_seed(seed)
        self.count = count

    def randn(self, size: Sequence[int], *, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(tuple(size), generator=self.generator, dtype=dtype)

    def randn_like(self, x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=self.generator, dtype=x.dtype)

    def randint(self, high: int) -> Tensor:
        return torch.randint(high, (self.count,), generator=self.generator)


@dataclass
class Student:
    """What training leaves: the generative denoiser, and the one it started from."""

    generator: GenerativeDenoiser  # average of the weights, evaluation mode
    start: GenerativeDenoiser  # before distillation: a sample is the denoised mean at a raised noise level
    settings: ToySettings
    curves: list[dict[str, float]]  # one entry per logged iteration
    seconds: float  # of processor time, all stages


def pretrain(mixture: GaussianMixture, settings: ToySettings, noise: BatchNoise) -> PointPrecond:
    """Fit a plain denoiser to the exact one: the starting point that an image teacher's weights are."""
    net = PointPrecond(**architecture(settings.width, settings.blocks), sigma_data=mixture.sigma_data).train()
    optimizer = torch.optim.Adam(net.parameters(), betas=ADAM_BETAS, fused=True)
    levels = UniformKarrasSigma(sigma_max=120.0)
    for i in range(settings.pretraining):
        sigma = levels.sample(noise, settings.batch)
        x0 = mixture.sample(settings.batch, noise.randn_like)
        x = x0 + sigma * noise.randn_like(x0)
        denoised, logvar = net(x, sigma, return_logvar=True)
        weighted_error(denoised - mixture(x, sigma), sigma, logvar, net.sigma_data).mean().backward()
        progress = i / settings.pretraining
        optimizer.param_groups[0]["lr"] = settings.lr * min(1, i / 50, 1.5 * (1 - progress))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return net.eval().requires_grad_(False)


def train(
    mixture: GaussianMixture,
    settings: ToySettings,
    *,
    probe: Callable[[GenerativeDenoiser], dict[str, float]] | None = None,  # measured some 20 times on the way
    log: Callable[[str], object] = lambda text: None,
) -> Student:
    """Distil `mixture`'s exact denoiser. Raises DivergenceError where gradients are not finite."""
    begun = time.process_time()
    torch.manual_seed(settings.seed)
    noise = BatchNoise(settings.seed, settings.batch)
    teacher_net = pretrain(mixture, settings, noise)
    log(f"start network fitted: {time.process_time() - begun:.0f} s")
    config = settings.config()
    generator, phases = build_phases(mixture, teacher_net, settings, config)
    start = copy.deepcopy(generator).eval().requires_grad_(False)
    order = [p for p in phases for _ in range(p.updates) if settings.adversarial or p.name != "disc"]
    trained = {phase.name: _parameters(phase, settings) for phase in phases}
    betas = (config.beta1, ADAM_BETAS[1])
    optimizers = {name: torch.optim.Adam(params, betas=betas, fused=True) for name, params in trained.items()}
    for phase in phases:
        phase.net.eval().requires_grad_(False)
    ema = PowerFunctionEMA(generator, [EMA_STD])

    curves: list[dict[str, float]] = []
    sums: dict[str, list[float]] = {}
    for i in range(settings.iterations):
        nimg = i * settings.batch
        lr = learning_rate(nimg, config)
        for phase in order:
            if nimg < phase.start:
                continue
            optimizer = optimizers[phase.name]
            optimizer.param_groups[0]["lr"] = lr * phase.rate(nimg)
            x0 = mixture.sample(settings.batch, noise.randn_like)
            reported = update(phase, trained[phase.name], optimizer, Batch(x0, None, noise, nimg))
            for name, value in reported.items():
                sums.setdefault(name, []).append(float(value.detach().mean()))
        ema.update(nimg + settings.batch, settings.batch)
        if (i + 1) % max(settings.iterations // 100, 1) == 0:
            entry = {"iteration": i + 1, **{name: sum(values) / len(values) for name, values in sums.items()}}
            sums.clear()
            if probe is not None and (i + 1) % max(settings.iterations // 20, 1) == 0:
                entry |= probe(ema.network(0))
            curves.append(entry)
            log(json.dumps({k: round(v, 4) for k, v in entry.items()}) + f" {time.process_time() - begun:.0f} s")
    return Student(ema.network(0), start, settings, curves, time.process_time() - begun)


def build_phases(
    mixture: GaussianMixture, teacher_net: PointPrecond, settings: ToySettings, config: NCVSDConfig
) -> tuple[GenerativeDenoiser, list[Phase]]:
    """The generator and the phases of an iteration; networks begin as the start network `teacher_net`."""
    conditional = PointCondition(**teacher_net.init_kwargs).init_from_teacher(teacher_net)
    score_net = copy.deepcopy(conditional)
    if settings.combined_score:
        score_net = CombinedScore(score_net)
    discriminator = PointDiscriminator(**teacher_net.init_kwargs, head="joint" if settings.joint else "linear")
    discriminator.init_from_teacher(teacher_net)
    generator = GenerativeDenoiser(conditional, config.gamma, config.init_sigma)
    combine = combine_observations if settings.identity else lambda y, sigma, x_t, t: (x_t, t)
    return generator, distillation_phases(mixture, generator, score_net, discriminator, config, combine)


def update(
    phase: Phase, parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, batch: Batch
) -> dict[str, Tensor]:
    """One step of a phase's network; returns the losses. Raises DivergenceError where gradients are not finite."""
    phase.net.train()
    for parameter in parameters:
        parameter.requires_grad_(True)
    terms = phase.loss(batch, phase.net)
    (terms.total.sum() / len(batch.images)).backward()
    if count_nonfinite(phase.net.parameters()):
        raise DivergenceError(f"gradients of the {phase.name} network are not finite: use a lower learning rate")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    phase.net.eval().requires_grad_(False)
    return terms.reported


def _parameters(phase: Phase, settings: ToySettings) -> list[torch.nn.Parameter]:
    """What of a network is trained: without the control branch its weight stays 0, and y has no effect."""
    named = phase.net.named_parameters()
    return [p for name, p in named if settings.control or not name.endswith("additional_x_weight")]


def save_student(path: str | Path, student: Student) -> None:
    """Write one safetensors file, weights in float32, the rest as JSON metadata; the file appears whole or not."""
    facts = dict(
        format=FORMAT, settings=dataclasses.asdict(student.settings), curves=student.curves, seconds=student.seconds
    )
    nets = {"generator": student.generator, "start": student.start}
    tensors = {
        f"{name}.{key}": value.contiguous() for name, net in nets.items() for key, value in net.state_dict().items()
    }
    with atomic_path(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={"toy": json.dumps(facts, allow_nan=False)})


def load_student(path: str | Path) -> Student:
    """Read a file of `save_student`. Raises ValueError for any other file, OSError where it cannot be read."""
    try:
        with open_regular(path), safetensors.safe_open(path, framework="pt") as file:
            facts = parse_json((file.metadata() or {}).get("toy", "{}"))
        if facts.get("format") != FORMAT:
            raise ValueError(f"not written by toy_example.py train ({FORMAT})")
        settings = ToySettings(**facts["settings"])
        net = PointCondition(**architecture(settings.width, settings.blocks))
        generator = GenerativeDenoiser(net, settings.gamma).eval().requires_grad_(False)
        start = copy.deepcopy(generator)
        tensors = safetensors.torch.load_file(path)
        for name, target in (("generator", generator), ("start", start)):
            prefix = f"{name}."
            target.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        curves = facts["curves"]
        if not all(type(value) in (int, float) for entry in curves for value in entry.values()):
            raise ValueError("its curves hold something that is not a number")
        return Student(generator, start, settings, curves, float(facts["seconds"]))
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} holds no trained student: {first_line(error)}") from error
