"""Solves the same inverse problem for many images, several posterior samples each, in batches of both."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from inverse.operators.base import Operator
from inverse.pnp import pnp_sample
from inverse.tasks import Task
from sampling.grids import karras_sigmas
from sampling.seeds import SeededNoise


@dataclass
class Problem:
    """One image to be found from its measurement."""

    name: str
    y: Tensor  # [C,h,w]
    truth: Tensor | None = None  # [C,H,W] in [-1, 1], where it is known
    class_idx: int | None = None


@dataclass
class Solution:
    """Posterior samples of one problem, on the CPU."""

    problem: Problem
    samples: Tensor  # [R,C,H,W] in [-1, 1] up to the network's overshoot
    retries: int  # Langevin steps repeated with a smaller step size, over all runs


def stream(seed: int, name: str, run: int | None = None) -> int:
    """Return the number that seeds an image's noise, of its measurement or of one run, and depends on nothing else."""
    text = f"{seed}/{'measurement' if run is None else run}/{name}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def simulate(operator: Operator, truth: Tensor, noise: float, *, seed: int, name: str) -> Tensor:
    """Return the measurement [C,h,w] of an image [C,H,W], with Gaussian noise of the image's own stream."""
    source = SeededNoise([stream(seed, name)], truth.device)
    return operator.measure(truth[None], noise, source.randn_like)[0]


@torch.no_grad()
def solve(
    net: Any,  # generative denoiser
    operator: Operator,
    task: Task,
    problems: Iterable[Problem],
    *,
    seed: int = 0,
    batch: int = 16,  # samples at once, of whatever images
    device: torch.device | str = "cpu",
    progress: Callable[[float], Any] | None = None,  # told how many samples' worth of work was done
) -> Iterator[Solution]:
    """Yield the `task.runs` posterior samples of each problem, in order, as soon as its last sample is drawn. A sample
    depends on `seed`, the problem's name and the run alone: bit for bit with `batch` 1, else up to the network's
    rounding, which Langevin chains can amplify (README.md). Raises ValueError as `inverse.pnp_sample` does.
    """
    levels = karras_sigmas(task.steps, task.sigma_min, task.sigma_max, task.rho, dtype=torch.float64).tolist()
    todo = ((problem, run) for problem in problems for run in range(task.runs))
    drawn: list[tuple[Problem, Tensor, int]] = []
    while units := list(islice(todo, batch)):
        count, labels = len(units), None
        if net.label_dim:
            classes = torch.tensor([problem.class_idx for problem, _ in units])
            labels = torch.nn.functional.one_hot(classes, net.label_dim).to(device, torch.float32)
        y = torch.stack([problem.y for problem, _ in units]).to(device, torch.float32)
        noise = SeededNoise([stream(seed, problem.name, run) for problem, run in units], device)
        how = {"labels": labels, "randn_like": noise.randn_like, **task.sampler_options()}
        how["progress"] = progress and (lambda _, levels, count=count: progress(count / levels))
        result = pnp_sample(net, operator, y, levels, **how)
        drawn += zip((problem for problem, _ in units), result.images.cpu(), result.retries.tolist(), strict=True)
        while len(drawn) >= task.runs:
            runs, drawn = drawn[: task.runs], drawn[task.runs :]
            of_problem, samples, retries = zip(*runs, strict=True)
            yield Solution(of_problem[0], torch.stack(samples), sum(retries))
