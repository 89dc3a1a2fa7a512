"""What is trained: the one phase of teacher pretraining and the three of NCVSD, in the order of an iteration."""

import copy
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from generation.images import generate_images
from networks import CombinedScore, Discriminator, GenerativeDenoiser, Precond, PrecondCondition
from networks.encoders import Encoder
from sampling.grids import parse_ts
from sampling.ode import guided_denoiser
from sampling.posterior import combine_observations
from sampling.seeds import SeededNoise
from training.losses import discriminator_loss, edm2_loss, generator_loss, score_loss
from training.noise import LogNormalSigma, UniformKarrasSigma
from training.presets import EDM2Config, NCVSDConfig

Levels = LogNormalSigma | UniformKarrasSigma
ScoreNet = PrecondCondition | CombinedScore
Seeds = Sequence[int]


@dataclass
class Batch:
    """What one forward pass sees."""

    images: Tensor  # clean images or latents [N,C,H,W]
    labels: Tensor | None  # class weights [N,label_dim]
    noise: SeededNoise  # one random stream per image
    nimg: int  # images seen before this iteration


@dataclass
class LossTerms:
    """Elementwise loss to be summed over [N,C,H,W], and the terms to report."""

    total: Tensor
    reported: dict[str, Tensor]  # losses, [N,C,H,W] or [N,1,1,1]
    levels: Tensor  # noise level of each image, [N,1,1,1]
    rates: dict[str, Tensor] = field(default_factory=dict)  # further quantities to average, by full name


Loss = Callable[[Batch, nn.Module], LossTerms]


@dataclass
class Phase:
    """One network's part of an iteration, on a fresh batch."""

    name: str
    net: nn.Module  # the network being trained
    lr_scaling: float  # relative to the schedule's rate
    loss: Loss  # with `net`, or what wraps it where gradients are exchanged
    start: float = 0  # images seen before the first update
    rampup: float = 0  # images over which its rate then rises to the full one
    updates: int = 1  # of this phase in an iteration
    beta1: float = 0.9  # of Adam
    level_edges: tuple[float, ...] = ()  # noise levels that part the statistics of the loss

    def rate(self, nimg: int) -> float:
        """Learning rate, relative to the schedule's, of an update after `nimg` images; 0 before the start."""
        ramp = min((nimg - self.start) / self.rampup, 1) if self.rampup else 1
        return self.lr_scaling * ramp if nimg >= self.start else 0.0


@dataclass
class Task:
    """Phases of one iteration, the network whose average is the result, and how to show it."""

    phases: list[Phase]
    result: nn.Module  # Precond or GenerativeDenoiser
    schedules: dict[str, dict[str, Any]]  # name of a sample grid -> arguments of generate_images
    teacher_digest: str | None = None  # SHA-256 of the teacher's weights
    frozen: dict[str, nn.Module] = field(default_factory=dict)  # further networks that the phases evaluate
    teacher: Precond | None = None  # whose samples to show once, for comparison
    views: Callable[[nn.Module, Encoder, Seeds, int], dict[str, Tensor]] = lambda *drawn: {}  # more images

    @property
    def order(self) -> list[Phase]:
        """Phases of an iteration, each as often as it updates its network; each time on a fresh batch."""
        return [phase for phase in self.phases for _ in range(phase.updates)]


def draw(net: nn.Module, encoder: Encoder, seeds: Seeds, batch: int, **arguments: Any) -> Tensor:
    """Images [N,C,H,W] uint8 on the CPU, all drawn by this process; arguments are those of generate_images."""
    batches = generate_images(net, encoder, seeds=seeds, batch=batch, rank=0, world_size=1, **arguments)
    return torch.cat([b.images.cpu() for b in batches])


def weights_digest(net: nn.Module) -> str:
    """SHA-256 of a network's weights and buffers."""
    sha256 = hashlib.sha256()
    for name, tensor in net.state_dict().items():
        sha256.update(name.encode())
        sha256.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha256.hexdigest()


def pretraining_task(net: Precond, config: EDM2Config) -> Task:
    """Teacher pretraining (EDM2)."""
    sigma_sampler = LogNormalSigma(config.p_mean, config.p_std)

    def loss(batch: Batch, net: nn.Module) -> LossTerms:
        sigma = sigma_sampler.sample(batch.noise, len(batch.images))
        value = edm2_loss(net, batch.images, sigma, batch.labels, randn_like=batch.noise.randn_like)
        return LossTerms(value, {"edm2": value}, sigma)

    schedules = {f"heun{2 * config.eval_steps - 1}": {"num_steps": config.eval_steps}}
    phase = Phase("teacher", net, 1.0, loss, level_edges=sigma_sampler.quartiles())
    return Task([phase], net, schedules)


def build_student(teacher: Precond, config: NCVSDConfig) -> tuple[GenerativeDenoiser, ScoreNet, Discriminator]:
    """Generator, score network and discriminator, initialised from the teacher, in the teacher's compute dtype."""
    arguments = {**teacher.init_kwargs, "dropout": config.dropout}
    conditional = PrecondCondition(**arguments).to(teacher.device).init_from_teacher(teacher)
    score_net = copy.deepcopy(conditional)
    discriminator = Discriminator(**arguments, head=config.d_head).to(teacher.device).init_from_teacher(teacher)
    for net in (conditional, score_net, discriminator):
        net.compute_dtype = teacher.compute_dtype
    generator = GenerativeDenoiser(conditional, config.gamma, config.init_sigma)
    return generator, CombinedScore(score_net) if config.combined_score else score_net, discriminator


def distillation_task(teacher: Precond, config: NCVSDConfig, gnet: Precond | None = None) -> Task:
    """The three phases of NCVSD (NCVSD, Algorithm 1): score network, discriminator, generator. With `guidance` the
    target is that of guided sampling, by `gnet`, or without one by the teacher without labels.
    """
    frozen = {"teacher": teacher} | ({} if gnet is None else {"guide": gnet})
    for net in frozen.values():
        net.eval().requires_grad_(False)
    schedules: dict[str, dict[str, Any]] = {"1step": {}}
    schedules |= {"ts" + "_".join(map(str, ts)): {"ts": ts} for ts in (parse_ts(given).ts for given in config.eval_ts)}
    generator, score_net, discriminator = build_student(teacher, config)

    def target(x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        return guided_denoiser(teacher, gnet, config.guidance, labels, gnet_labels=gnet is not None)(x, sigma)

    phases = distillation_phases(target, generator, score_net, discriminator, config)
    views = partial(denoised_views, score_net, target, math.exp(config.g_p_mean))
    digest = "+".join(map(weights_digest, frozen.values()))
    return Task(phases, generator, schedules, digest, frozen, teacher, views)


class Observer:
    """Draws what the losses of distillation see of a batch."""

    def __init__(self, generator: nn.Module, config: NCVSDConfig) -> None:
        self.generator, self.config = generator, config
        self.y_sampler = UniformKarrasSigma(config.sigma_steps, sigma_max=config.init_sigma, rho=config.sigma_rho)

    def levels(self, p_mean: float, p_std: float) -> Levels:
        """Distribution of t for one of the losses."""
        if self.config.levels == "karras":
            return UniformKarrasSigma(sigma_min=self.config.t_min, sigma_max=self.config.t_max)
        return LogNormalSigma(p_mean, p_std)

    def observe(self, batch: Batch, t_sampler: Levels, own: float = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy y, its level sigma and the level t of x_t; a share `own` of y is made of the student's draws."""
        noise, images = batch.noise, batch.images
        sigma = self.y_sampler.sample(noise, len(images))
        t = t_sampler.sample(noise, len(images))
        if self.config.t_cap:
            t = t.minimum(self.config.t_cap * sigma)
        if own:
            images = self.own_draws(batch, sigma, own)
        return images + sigma * noise.randn_like(images), sigma, t

    @torch.no_grad()
    def own_draws(self, batch: Batch, sigma: Tensor, share: float) -> Tensor:
        """Images, a share of them replaced by what the student draws at a level above sigma: its states when it samples
        in several steps (backward simulation, DMD2, arXiv 2405.14867).
        """
        noise, images = batch.noise, batch.images
        above = self.y_sampler.sample(noise, len(images)).maximum(sigma)
        y = images + above * noise.randn_like(images)
        draws = self.generator(y, above, batch.labels, randn_like=noise.randn_like)
        chosen = noise.randint(10**6).reshape(sigma.shape) < share * 10**6
        return torch.where(chosen, draws, images)


def distillation_phases(
    teacher: Callable[..., Tensor],  # D(x, sigma, labels): Precond, or any denoiser called like it
    generator: GenerativeDenoiser,
    score_net: ScoreNet,
    discriminator: Discriminator,
    config: NCVSDConfig,
    combine: Callable[..., tuple[Tensor, Tensor]] = combine_observations,  # see `generator_loss`
) -> list[Phase]:
    """The phases of an iteration in their order: score network, discriminator, generator."""
    c, observer = config, Observer(generator, config)
    parts = ((c.s_p_mean, c.s_p_std), (c.d_p_mean, c.d_p_std), (c.g_p_mean, c.g_p_std))
    s_levels, d_levels, g_levels = (observer.levels(*part) for part in parts)
    recipe = dict(direction=c.direction, alpha=c.alpha, scale=c.scale, divergence=c.divergence, balance=c.gan_balance)

    def score_phase(batch: Batch, score_net: nn.Module) -> LossTerms:
        y, sigma, t = observer.observe(batch, s_levels, c.own_states)
        value = score_loss(generator, score_net, y, sigma, t, batch.labels, randn_like=batch.noise.randn_like)
        return LossTerms(value, {"score": value}, t)

    def discriminator_phase(batch: Batch, discriminator: nn.Module) -> LossTerms:
        y, sigma, t = observer.observe(batch, d_levels)
        seen, options = (batch.images, y, sigma, t, batch.labels), dict(randn_like=batch.noise.randn_like)
        fake, real = discriminator_loss(generator, discriminator, *seen, **options)
        total = (0.5 * (fake + real)).expand_as(batch.images)
        chance = math.log(2)  # the cross-entropy of a logit of 0
        rates = {"Discriminator/accuracy_fake": fake < chance, "Discriminator/accuracy_real": real < chance}
        return LossTerms(total, {"disc_fake": fake, "disc_real": real}, t, rates)

    def generator_phase(batch: Batch, generator: nn.Module) -> LossTerms:
        y, sigma, t = observer.observe(batch, g_levels, c.own_states)
        nets = generator, teacher, score_net, discriminator if batch.nimg >= c.gan_warmup_kimg * 1000 else None
        options = dict(recipe, combine=combine, randn_like=batch.noise.randn_like)
        vsd, gan = generator_loss(*nets, y, sigma, t, batch.labels, **options)
        if gan is None:
            return LossTerms(vsd, {"vsd": vsd}, t)
        return LossTerms(vsd + c.gan_loss_scaling * gan, {"vsd": vsd, "gan": gan}, t)

    def phase(name: str, net: nn.Module, lr_scaling: float, loss: Loss, levels: Levels, **options: float) -> Phase:
        return Phase(name, net, lr_scaling, loss, level_edges=levels.quartiles(), beta1=c.beta1, **options)

    slow = dict(start=c.g_delay_kimg * 1000, rampup=c.g_rampup_kimg * 1000)
    return [
        phase("score", score_net, 1.0, score_phase, s_levels, updates=c.score_updates),
        phase("disc", discriminator, c.d_lr_scaling, discriminator_phase, d_levels),
        phase("gen", generator, c.g_lr_scaling, generator_phase, g_levels, **slow),
    ]


@torch.no_grad()
def denoised_views(
    score_net: nn.Module, teacher: nn.Module, t: float, generator: nn.Module, encoder: Encoder, seeds: Seeds, batch: int
) -> dict[str, Tensor]:
    """Images [N,C,H,W] uint8 on the CPU: E[x | x_t, y] for x_t = x + t·n and samples x of y at the highest level.

    By the score network ("score_view") and by the teacher ("teacher_view"). The generator's loss is the difference of
    the two: where they look alike it has nothing left to learn at this level.
    """
    sigma, classes, size = generator.init_sigma, generator.label_dim, generator.img_resolution
    views: dict[str, list[Tensor]] = {"score_view": [], "teacher_view": []}
    for first in range(0, len(seeds), batch):
        noise = SeededNoise(seeds[first : first + batch], generator.device)
        y = sigma * noise.randn([len(noise.seeds), generator.img_channels, size, size])
        labels = one_hot(noise.randint(classes), classes).float() if classes else None
        x = generator(y, sigma, labels, randn_like=noise.randn_like)
        x_t = x + t * noise.randn_like(x)
        views["score_view"].append(encoder.decode(score_net(x_t, t, y, sigma, labels)).cpu())
        combined, level = combine_observations(y, sigma, x_t, t)
        views["teacher_view"].append(encoder.decode(teacher(combined, level, labels)).cpu())
    return {name: torch.cat(images) for name, images in views.items()}
