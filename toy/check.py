"""What a student is measured by: the score identity, its posterior samples against the truth, and inverse problems."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sampling.posterior import combine_observations
from toy.inverse import measure_pnp
from toy.measures import energy_distance, sliced_wasserstein, spread
from toy.mixture import GaussianMixture
from toy.training import BatchNoise, Student

SIGMAS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 80.0)
SCHEDULES: dict[str, Sequence[int] | None] = {"1 step": None, "2 steps": (10, 22, 39), "4 steps": (0, 10, 20, 30, 39)}
ZETAS = (0.3, 0.7, 1.0)
PROBE_SAMPLES = 128  # draws per observation of a measurement during training
MODES = 8  # sections of the arms, of equal weight


@dataclass(frozen=True)
class Row:
    """Averages over all y of one way of drawing from p(x0 | y), at one noise level."""

    sigma: float
    sampler: str
    zeta: float | None  # None where there is nothing between steps
    energy: float  # energy distance to draws of the true posterior
    energy_ratio: float  # over that of a second set of true draws
    sliced: float  # sliced Wasserstein distance
    sliced_ratio: float
    spread_ratio: float  # root-mean-square spread over the truth's; below 1 = collapse
    mode_error: float  # half the sum over modes of |weight - true weight|


class Bench:
    """Observations y at each noise level, with two sets of draws from their true posteriors."""

    def __init__(
        self,
        mixture: GaussianMixture,
        *,
        sigmas: Sequence[float] = SIGMAS,
        points: int = 64,  # values of y per noise level
        samples: int = 256,  # draws per y
        seed: int = 12345,
    ) -> None:
        self.mixture, self.sigmas, self.points, self.samples = mixture, tuple(sigmas), points, samples
        self.noise = BatchNoise(seed, points)
        self.observations, self.true, self.weights = {}, {}, {}
        self.floors: dict[float, Row] = {}
        for sigma in self.sigmas:
            x0 = mixture.sample(points, self.noise.randn_like, torch.float64)
            y = x0 + sigma * self.noise.randn_like(x0)
            posterior = mixture.posterior(y, sigma)
            self.observations[sigma] = y.float()
            self.true[sigma] = posterior.sample(samples, self.noise.randn_like)
            self.weights[sigma] = _sum_modes(posterior.log_weights.exp())
            self.floors[sigma] = self.row(sigma, posterior.sample(samples, self.noise.randn_like), "true posterior")

    def row(self, sigma: float, draws: Tensor, sampler: str, zeta: float | None = None) -> Row:
        """Compare draws [points,samples,2] with the truth."""
        true = self.true[sigma]
        draws = draws.to(true.dtype)
        energy = float(energy_distance(draws, true).mean())
        sliced = float(sliced_wasserstein(draws, true).mean())
        flat = draws.reshape(-1, 2, 1, 1)
        weights = _sum_modes(self.mixture.responsibilities(flat)).reshape(self.points, self.samples, MODES).mean(1)
        floor = self.floors.get(sigma)
        return Row(
            sigma,
            sampler,
            zeta,
            energy,
            energy / floor.energy if floor else 1.0,
            sliced,
            sliced / floor.sliced if floor else 1.0,
            float((spread(draws) / spread(true)).mean()),
            float((weights - self.weights[sigma]).abs().sum(1).mean() / 2),
        )

    @torch.no_grad()
    def draw(self, denoiser: Callable[..., Tensor], sigma: float, **arguments: Any) -> Tensor:
        """Draws [points,samples,2] of a generative denoiser, `samples` for each y."""
        y = self.observations[sigma].repeat_interleave(self.samples, 0)
        return denoiser(y, sigma, randn_like=self.noise.randn_like, **arguments).reshape(self.points, self.samples, 2)


def _sum_modes(weights: Tensor) -> Tensor:
    """Weights [N,K] of components to those of modes [N,MODES]; components of an arm stand in order."""
    return weights.reshape(len(weights), MODES, -1).sum(2)


def identity_errors(
    mixture: GaussianMixture, sigmas: Sequence[float] = SIGMAS, points: int = 256, seed: int = 0
) -> list[dict[str, float]]:
    """Largest relative error of the score identity, over random points, for each (sigma, t) of a grid.

    One side is the gradient of log p(x_t | y), by automatic differentiation of the posterior's density; the other
    (D(y_eff, sigma_eff) - x_t)/t². Both in float64.
    """
    noise, rows = BatchNoise(seed, points), []
    for sigma in sigmas:
        for t in sigmas:
            x0 = mixture.sample(points, noise.randn_like, torch.float64)
            y = x0 + sigma * noise.randn_like(x0)
            posterior = mixture.posterior(y, sigma)
            x_t = posterior.sample(1, noise.randn_like).reshape(x0.shape) + t * noise.randn_like(x0)
            x_t.requires_grad_(True)
            (left,) = torch.autograd.grad(posterior.log_prob(x_t, t).sum(), x_t)
            x_t = x_t.detach()
            right = (mixture(*combine_observations(y, sigma, x_t, t)) - x_t) / t**2
            error = (left - right).flatten(1).norm(dim=1) / left.flatten(1).norm(dim=1)
            rows.append({"sigma": sigma, "t": t, "largest_relative_error": float(error.max())})
    return rows


def probe(mixture: GaussianMixture) -> Callable[[Callable[..., Tensor]], dict[str, float]]:
    """A small measurement for the course of training: one-step energy distance over the floor, by noise level."""
    bench = Bench(mixture, points=32, samples=PROBE_SAMPLES)

    def measure(denoiser: Callable[..., Tensor]) -> dict[str, float]:
        found = {f"energy_{s:g}": bench.row(s, bench.draw(denoiser, s), "1 step").energy_ratio for s in bench.sigmas}
        return {name: round(value, 4) for name, value in found.items()}

    return measure


def posterior_rows(bench: Bench, student: Student) -> Iterator[Row]:
    """The floor, the ceilings and every way of sampling, level by level."""
    for sigma in bench.sigmas:
        yield bench.floors[sigma]
        mean = bench.mixture(bench.observations[sigma].double(), sigma).reshape(-1, 1, 2)
        yield bench.row(sigma, mean.expand(-1, bench.samples, 2), "denoised mean")
        yield bench.row(sigma, bench.draw(student.start, sigma), "before distillation")
        for name, ts in SCHEDULES.items():
            for zeta in ZETAS if ts else (None,):
                draws = bench.draw(student.generator, sigma, ts=ts, zeta=1.0 if zeta is None else zeta)
                yield bench.row(sigma, draws, name, zeta)


def unconditional_modes(bench: Bench, student: Student) -> dict[str, float]:
    """Largest relative error of a mode's weight among unconditional samples, by schedule."""
    errors = {}
    for name, ts in SCHEDULES.items():
        flat = bench.draw(student.generator, 80.0, ts=ts).double().reshape(-1, 2, 1, 1)
        weights = _sum_modes(bench.mixture.responsibilities(flat)).mean(0)
        errors[name] = float((weights * MODES - 1).abs().max())
    return errors


def report(mixture: GaussianMixture, student: Student, *, points: int = 64, samples: int = 256, seed: int = 12345):
    """All measurements as plain data."""
    bench = Bench(mixture, points=points, samples=samples, seed=seed)
    rows = list(posterior_rows(bench, student))
    modes = unconditional_modes(bench, student)
    identity = identity_errors(mixture)
    return {
        "settings": dataclasses.asdict(student.settings),
        "training_processor_seconds": round(student.seconds, 1),
        "points": points,
        "samples": samples,
        "seed": seed,
        "identity": identity,
        "posterior": [dataclasses.asdict(row) for row in rows],
        "unconditional_mode_error": modes,
        "pnp": measure_pnp(mixture, student.generator, samples=samples, seed=seed),
        "targets": targets(rows, modes, identity),
    }


def targets(rows: Sequence[Row], modes: dict[str, float], identity: Sequence[dict[str, float]]) -> list[dict[str, Any]]:
    """What was to be reached, the worst value measured, and whether that is enough."""

    def worst(sampler: str, measure: Callable[[Row], float]) -> float:
        return max(measure(r) for r in rows if r.sampler == sampler and r.sigma >= 0.1 and r.zeta in (None, 1.0))

    found = [("score identity, relative error", max(row["largest_relative_error"] for row in identity), 1e-5)]
    for sampler, limit in (("1 step", 3.0), ("4 steps", 2.0)):
        found.append((f"{sampler}, energy distance over the floor", worst(sampler, lambda r: r.energy_ratio), limit))
    for sampler in SCHEDULES:
        found.append((f"{sampler}, error of mode weights given y", worst(sampler, lambda r: r.mode_error), 0.1))
        found.append((f"{sampler}, relative error of mode weights, unconditional", modes[sampler], 0.1))
    return [{"target": name, "worst": value, "limit": limit, "met": value <= limit} for name, value, limit in found]
