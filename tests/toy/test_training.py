"""Networks of points, and a distillation short enough for a test."""

import json

import pytest
import torch

from networks import CombinedScore
from sampling.posterior import combine_observations
from toy.check import Bench, report
from toy.mixture import spiral_arms
from toy.networks import PointCondition, PointDiscriminator, PointPrecond, architecture
from toy.report import tables
from toy.settings import ToySettings
from toy.training import load_student, save_student, train
from training.losses import generator_loss
from training.presets import PresetError


def points(count, seed=0):
    return torch.randn(count, 2, 1, 1, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def teacher():
    """A plain denoiser of points with random weights whose output is not zero."""
    torch.manual_seed(0)
    net = PointPrecond(**architecture(16, 1))
    with torch.no_grad():
        net.unet.out_gain.fill_(1.0)
    return net.eval()


def test_conditional_denoiser_starts_as_its_teacher_and_then_sees_y(teacher):
    net = PointCondition(**teacher.init_kwargs).init_from_teacher(teacher).eval()
    x, y = points(9), points(9, 1)
    assert torch.equal(net(x, 0.3, y, 0.5), teacher(x, 0.3))
    with torch.no_grad():
        net.dec.additional_x_weight.fill_(0.5)
    assert (net(x, 0.3, y, 0.5) - net(x, 0.3, y + 1, 0.5)).abs().max() > 1e-3


def test_combined_score_starts_as_the_score_of_the_true_posterior(teacher):
    net = CombinedScore(PointCondition(**teacher.init_kwargs).init_from_teacher(teacher)).eval()
    x, y = points(9), points(9, 1)
    denoised, logvar = net(x, 0.7, y, 0.2, return_logvar=True)
    assert torch.equal(denoised, teacher(*combine_observations(y, 0.2, x, 0.7)))
    assert logvar.shape == (9, 1, 1, 1) and net.sigma_data == teacher.sigma_data


@pytest.mark.parametrize("head", ["linear", "joint", "local"])
def test_only_a_joint_head_sees_whether_x_goes_with_y(teacher, head):
    net = PointDiscriminator(**teacher.init_kwargs, head=head).init_from_teacher(teacher).eval()
    a, b = points(8), points(8, 1)
    x, y = torch.cat([a, a, b, b]), torch.cat([a, b, a, b])
    aa, ab, ba, bb = net(x, 0.3, y, 0.3).flatten().split(8)
    interaction = (aa - ab - ba + bb).abs().max()
    assert interaction < 1e-4 if head == "linear" else interaction > 1e-2


def test_generator_loss_takes_the_teacher_at_the_combination_asked_for():
    mixture = spiral_arms()
    y, seen = points(6), []

    def teacher(x, sigma, labels=None):
        seen.append((x, sigma))
        return mixture(x, sigma)

    def generator(y, sigma, labels, return_logvar, randn_like):
        return y.clone().requires_grad_(True), torch.zeros(6, 1, 1, 1)

    def score_net(x, t, y, sigma, labels):
        return x

    score_net.sigma_data = 0.5
    arguments = (generator, teacher, score_net, None, y, 0.4, 0.3)
    generator_loss(*arguments, randn_like=torch.ones_like)
    generator_loss(*arguments, randn_like=torch.ones_like, combine=lambda y, sigma, x_t, t: (x_t, t))
    x_t = y + 0.3
    wanted = combine_observations(y, 0.4, x_t, 0.3)
    assert torch.equal(seen[0][0], wanted[0]) and torch.equal(seen[0][1], wanted[1])
    assert torch.allclose(seen[1][0], x_t) and torch.allclose(seen[1][1], torch.tensor(0.3))


SHORT = dict(iterations=220, pretraining=200, batch=256, width=48)


@pytest.fixture(scope="module")
def short():
    """A student after a few seconds of training."""
    return train(spiral_arms(), ToySettings(**SHORT))


def test_a_short_distillation_comes_much_nearer_to_the_posterior_than_its_start(short):
    bench = Bench(spiral_arms(), sigmas=(1.0, 3.0, 80.0), points=16, samples=128)
    for sigma, share in ((1.0, 0.6), (3.0, 0.6), (80.0, 0.6)):
        start = bench.row(sigma, bench.draw(short.start, sigma), "before")
        after = bench.row(sigma, bench.draw(short.generator, sigma, ts=(0, 10, 20, 30, 39)), "4 steps")
        assert after.energy < share * start.energy, sigma
        assert after.spread_ratio > 0.5


def test_training_repeats_and_a_file_restores_the_student(tmp_path, short):
    tiny = ToySettings(iterations=12, pretraining=5, batch=16, width=16)
    first, second = (train(spiral_arms(), tiny) for _ in range(2))
    y = points(5)
    assert torch.equal(
        first.generator(y, 0.3, randn_like=torch.ones_like), second.generator(y, 0.3, randn_like=torch.ones_like)
    )
    save_student(tmp_path / "a.safetensors", first)
    loaded = load_student(tmp_path / "a.safetensors")
    for name in ("generator", "start"):
        net, restored = getattr(first, name), getattr(loaded, name)
        assert torch.equal(net(y, 0.3, randn_like=torch.ones_like), restored(y, 0.3, randn_like=torch.ones_like))
    assert loaded.settings == tiny and loaded.curves == first.curves
    assert [entry["iteration"] for entry in loaded.curves] == list(range(1, 13))


def test_switches_take_their_ingredient_away():
    base = dict(iterations=20, pretraining=5, batch=32, width=16, g_delay=0.0, gan_start=0.0)
    y, other = points(5), points(5, 1)
    model = train(spiral_arms(), ToySettings(**base, control=False)).generator.model
    assert torch.equal(model(y, 0.4, y, 0.3), model(y, 0.4, other, 0.3))
    model = train(spiral_arms(), ToySettings(**base)).generator.model
    assert not torch.equal(model(y, 0.4, y, 0.3), model(y, 0.4, other, 0.3))
    for change in (dict(identity=False), dict(combined_score=False), dict(joint=False), dict(score_updates=2)):
        changed = train(spiral_arms(), ToySettings(**base, **change)).generator.model
        assert not torch.equal(model(y, 0.4, y, 0.3), changed(y, 0.4, y, 0.3)), change
    plain = train(spiral_arms(), ToySettings(**base, adversarial=False))
    assert all("gan" not in entry and "disc_real" not in entry for entry in plain.curves)
    deterministic = train(spiral_arms(), ToySettings(**base, gamma=0.0)).generator
    assert torch.equal(deterministic(y, 0.3), deterministic(y, 0.3))


def test_report_covers_the_grid_and_prints(short):
    result = report(spiral_arms(), short, points=4, samples=16)
    json.dumps(result, allow_nan=False)
    rows = result["posterior"]
    samplers = {(row["sampler"], row["zeta"]) for row in rows}
    assert {row["sigma"] for row in rows} == {0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 80.0} and len(rows) == 8 * 10
    assert samplers >= {("1 step", None), ("2 steps", 0.3), ("4 steps", 0.7), ("4 steps", 1.0), ("denoised mean", None)}
    assert all(row["energy_ratio"] == 1 for row in rows if row["sampler"] == "true posterior")
    assert next(row for row in rows if row["sampler"] == "denoised mean")["spread_ratio"] == 0
    text = tables(result)
    assert "4 steps, zeta 0.7" in text and "score identity" in text and "exact denoiser" in text


@pytest.mark.parametrize("wrong", [dict(iterations=0), dict(lr=float("nan")), dict(gamma=-1.0), dict(seed=-1)])
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(PresetError):
        ToySettings(**wrong)


def test_a_damaged_or_foreign_file_is_named(tmp_path, short):
    for name, content in {"empty": b"", "text": b"hello", "cut": None}.items():
        path = tmp_path / f"{name}.safetensors"
        if content is None:
            save_student(path, short)
            content = path.read_bytes()[:-100]
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.safetensors holds no trained student"):
            load_student(path)
