"""The options of the generator's loss: gradients by finite differences, and what they aim at on Gaussian data."""

import dataclasses

import pytest
import torch

import networks
from networks.unet import set_recompute
from sampling.seeds import SeededNoise
from tests.training.tiny_runs import NCVSD
from toy.mixture import spiral_arms
from toy.settings import ToySettings
from toy.training import train
from training.losses import divergence_weight, generator_loss, inverse_scale
from training.optim import learning_rate
from training.presets import NCVSDConfig, PresetError
from training.tasks import Phase, Task, build_student

OBJECTIVES = [
    dict(scale="abs"),
    dict(scale="square"),
    dict(scale="output"),
    dict(scale="unit"),
    dict(direction="sid", scale="abs"),
    dict(direction="sid", scale="square", alpha=1.2),
    dict(direction="sid", scale="output", alpha=0.5),
    dict(direction="sid", scale="unit"),
]
MEAN, STD, SIGMA = 0.4, 0.7, 0.9


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Smooth(torch.nn.Module):
    """A tiny nonlinear network in float64, called as teacher or as score network."""

    sigma_data = 0.5

    def __init__(self, seed):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 1, 3, padding=1, dtype=torch.float64)
        for i, p in enumerate(self.conv.parameters()):
            p.data = draw(seed + i, *p.shape).mul_(0.3)

    def forward(self, x, level, *others):
        return (self.conv(x) / (1 + torch.as_tensor(level))).tanh()


def constant(x, logvar=0.0):
    """A generator that returns `x`."""
    u = torch.full((len(x), 1, 1, 1), logvar, dtype=x.dtype)
    return lambda y, sigma, labels, return_logvar, randn_like: (x, u)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_gradients_match_finite_differences(objective):
    """Of the loss with what is not differentiated held: the scale, and in VSD both networks' outputs."""
    teacher, score_net = Smooth(1).requires_grad_(False), Smooth(5).requires_grad_(False)
    y, x0, noise = draw(2, 3, 1, 4, 4), draw(3, 3, 1, 4, 4), draw(4, 3, 1, 4, 4)
    sigma, t = (torch.tensor(v, dtype=torch.float64).reshape(3, 1, 1, 1) for v in ([0.3, 1.0, 5.0], [2.0, 0.1, 0.7]))
    sid, alpha = objective.get("direction") == "sid", objective.get("alpha", 1.0)

    def views(x):
        x_t, total = x + t * noise, sigma**2 + t**2
        level = (sigma**2 * t**2 / total).sqrt()
        return teacher((t**2 * y + sigma**2 * x_t) / total, level), score_net(x_t, t), level

    target, estimate, level = views(x0)
    factor = inverse_scale(objective["scale"], x0 - target, target - estimate, level, sigma, 0.5)

    def held(x):
        a, b, _ = views(x) if sid else (target, estimate, None)
        if sid:
            return (factor * (a - b) * (a - x - alpha * (a - b))).sum()
        return (factor * (b - a) * x).sum()

    x = x0.clone().requires_grad_(True)
    loss, _ = generator_loss(
        constant(x), teacher, score_net, None, y, sigma, t, randn_like=lambda like: noise, **objective
    )
    loss.sum().backward()
    for index in ((0, 0, 0, 0), (1, 0, 2, 3), (2, 0, 1, 1)):
        step = torch.zeros_like(x0)
        step[index] = 1e-6
        wanted = (held(x0 + step) - held(x0 - step)) / 2e-6
        assert torch.isclose(x.grad[index], wanted, rtol=1e-6, atol=1e-9)


def gaussian_gradients(shift, spread, seed=0, count=40_000, t=0.5, **objective):
    """Expected gradient of the loss by shift and log spread of draws from a Gaussian around the true posterior of one
    observation, with the exact teacher and the exact score network of those draws.
    """
    y = torch.full((count, 1, 1, 1), 1.1, dtype=torch.float64)
    gain = STD**2 / (STD**2 + SIGMA**2)
    centre, width = MEAN + gain * (1.1 - MEAN), (STD**2 * SIGMA**2 / (STD**2 + SIGMA**2)) ** 0.5
    parameters = torch.tensor([shift, spread], dtype=torch.float64, requires_grad=True)
    half = draw(seed, count // 2, 1, 1, 1)
    x = centre + parameters[0] + width * parameters[1].exp() * torch.cat([half, -half])

    def teacher(x, sigma, labels=None):
        return (STD**2 * x + sigma**2 * MEAN) / (STD**2 + sigma**2)

    variance = width**2 * torch.tensor(2 * spread, dtype=torch.float64).exp()

    def score_net(x_t, t, y, sigma, labels):
        return centre + shift + variance / (variance + t**2) * (x_t - centre - shift)

    score_net.sigma_data = 0.5
    draws = draw(seed + 1, count, 1, 1, 1)
    loss, _ = generator_loss(
        constant(x), teacher, score_net, None, y, SIGMA, t, randn_like=lambda like: draws, **objective
    )
    loss.mean().backward()
    return parameters.grad


@pytest.mark.parametrize("objective", [{}, *OBJECTIVES], ids=str)
def test_the_expected_gradient_vanishes_at_the_true_posterior_and_points_to_it(objective):
    assert gaussian_gradients(0.0, 0.0, **objective).abs().max() < 1e-9
    for offset in (0.2, -0.2):
        by_shift, by_spread = (
            gaussian_gradients(offset, 0.0, **objective)[0],
            gaussian_gradients(0.0, offset, **objective)[1],
        )
        assert by_shift * offset > 1e-4 and by_spread * offset > 1e-4, (offset, by_shift, by_spread)


def test_divergences_weigh_by_the_density_ratio():
    t, logits = (
        torch.linspace(0.1, 8, 16).reshape(16, 1, 1, 1),
        torch.randn(16, generator=torch.Generator().manual_seed(0)),
    )
    assert torch.equal(divergence_weight("reverse-kl", logits, t), torch.ones_like(t))
    for divergence, raw in (("forward-kl", logits.exp()), ("js", logits.exp() / (1 + logits.exp()))):
        weight = divergence_weight(divergence, logits, t).flatten()
        for part in range(0, 16, 4):
            expected = raw[part : part + 4] / raw[part : part + 4].mean()
            assert torch.allclose(weight[part : part + 4], expected, rtol=1e-5)
    extreme = divergence_weight("forward-kl", torch.tensor([50.0, -50.0] * 8), t, bins=1)
    assert torch.isclose(extreme.max() / extreme.min(), torch.tensor(200.0))
    local = divergence_weight("js", logits[:, None].expand(16, 4), t)
    assert torch.allclose(local, divergence_weight("js", logits, t))


def test_a_balanced_adversarial_loss_has_the_gradient_norm_of_the_other_at_the_image():
    x = draw(0, 4, 1, 4, 4).requires_grad_(True)
    teacher, score_net, critic = Smooth(1), Smooth(3), Smooth(6)

    def discriminator(x_t, *others):
        return critic(x_t, 1.0).mean(dim=(1, 2, 3))

    arguments = (constant(x), teacher, score_net, discriminator, draw(7, 4, 1, 4, 4), 0.8, 0.5)
    parts = generator_loss(*arguments, randn_like=torch.zeros_like, scale="abs", balance=True)
    norms = [torch.autograd.grad(part.sum(), x, retain_graph=True)[0].norm() for part in parts]
    assert torch.isclose(*norms)
    plain = generator_loss(*arguments, randn_like=torch.zeros_like, scale="abs")
    assert torch.equal(plain[0], parts[0]) and not torch.allclose(plain[1], parts[1])


def test_the_generators_rate_rises_from_its_start():
    phase = Phase("gen", torch.nn.Linear(1, 1), 0.5, lambda *a: None, start=100, rampup=200)
    assert [phase.rate(n) for n in (0, 99, 100, 200, 300, 900)] == [0, 0, 0, 0.25, 0.5, 0.5]
    flat = dataclasses.replace(phase, rampup=0)
    assert [flat.rate(n) for n in (99, 100)] == [0, 0.5] and learning_rate(50, NCVSD) > 0


def test_an_iteration_updates_the_score_network_as_often_as_asked():
    phases = [Phase(name, torch.nn.Linear(1, 1), 1.0, lambda *a: None, updates=n) for name, n in (("a", 3), ("b", 1))]
    task = Task(phases, phases[0].net, {})
    assert [phase.name for phase in task.order] == ["a", "a", "a", "b"]


@pytest.mark.parametrize(
    "change",
    [
        dict(direction="sid", scale="abs", score_updates=2, beta1=0.0),
        dict(scale="output", levels="karras", t_min=0.01, t_max=10.0, t_cap=3.0),
        dict(divergence="js", gan_balance=True, own_states=0.5, g_rampup=0.5),
    ],
    ids=str,
)
def test_every_option_changes_training(change):
    base = dict(iterations=20, pretraining=5, batch=32, width=16, g_delay=0.0, gan_start=0.0)
    y = torch.randn(5, 2, 1, 1, generator=torch.Generator().manual_seed(0))

    def outcome(**settings):
        return train(spiral_arms(), ToySettings(**base, **settings)).generator(y, 0.3, randn_like=torch.ones_like)

    whole = outcome(**change)
    assert whole.isfinite().all()
    for name in change:
        if name == "scale" and change.get("direction") == "sid":
            continue
        assert not torch.equal(whole, outcome(**{k: v for k, v in change.items() if k != name})), name


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (dict(direction="dmd"), "direction must be one of vsd, sid"),
        (dict(direction="sid"), "has no learned scale"),
        (dict(scale="l2"), "scale must be one of"),
        (dict(divergence="kl"), "divergence must be one of"),
        (dict(levels="uniform"), "levels must be one of"),
        (dict(t_min=2.0, t_max=1.0), "must be positive and increase"),
        (dict(own_states=1.5), "share in"),
        (dict(t_cap=-1.0), "t_cap must not be negative"),
        (dict(score_updates=0), "at least 1"),
        (dict(beta1=1.0), r"beta1 must lie in \[0, 1\)"),
        (dict(d_head="deep"), "d_head must be one of"),
        (dict(g_rampup_kimg=-1.0), "g_rampup_kimg must not be negative"),
    ],
)
def test_settings_that_make_no_sense_are_refused(change, text):
    with pytest.raises(PresetError, match=text):
        NCVSDConfig(**change)


def test_noise_levels_between_two_bounds():
    from training.tasks import Observer

    levels = Observer(torch.nn.Identity(), NCVSDConfig(levels="karras", t_min=0.05, t_max=5.0)).levels(0.0, 1.0)
    t = levels.sample(SeededNoise(range(500)), 500)
    low, middle, high = levels.quartiles()
    assert 0.05 <= t.min() < low < middle < high < t.max() <= 5.0
    assert abs(float((t < middle).float().mean()) - 0.5) < 0.07


def test_balanced_losses_with_activations_computed_again(tiny_teacher):
    """Balancing passes backward through the graph twice, and each time activations are computed again."""
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        teacher = networks.load(tiny_teacher).net
        generator, score_net, discriminator = build_student(teacher, dataclasses.replace(NCVSD, scale="abs"))
        generator.train()
        set_recompute(generator, again)
        set_recompute(discriminator, again)
        noise = SeededNoise([1, 2])
        y = noise.randn([2, 1, 8, 8])
        vsd, gan = generator_loss(
            generator, teacher, score_net, discriminator, y, 1.0, 0.5, torch.eye(3)[:2],
            randn_like=noise.randn_like, scale="abs", balance=True,
        )  # fmt: skip
        (vsd + gan).sum().backward()
        gradients.append([p.grad for p in generator.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))
