import numpy as np
import pytest
import torch

from generation.images import count_evaluations, generate_images, image_path, split_seeds
from generation.pictures import read_image
from networks import Discriminator, GenerativeDenoiser, Precond, PrecondCondition
from networks.encoders import RGBEncoder
from sampling.ode import heun_sampler
from sampling.seeds import SeededNoise
from tests.conftest import TINY_NET
from tests.golden_utils import fill_by_name, golden_arrays, golden_config, golden_json

TINY = TINY_NET | {"img_channels": 3}
SEEDS = list(range(100, 108))


def tiny_generator(label_dim=4):
    model = fill_by_name(PrecondCondition(**TINY | {"label_dim": label_dim}), 5)
    return GenerativeDenoiser(model).eval()


def tiny_teacher(label_dim=4, seed=6):
    return fill_by_name(Precond(**TINY | {"label_dim": label_dim}), seed).eval()


def collect(net, seeds, **options):
    """Latents, images and labels of every seed, in the order of `seeds`."""
    batches = list(generate_images(net, seeds=seeds, **options))
    assert [seed for batch in batches for seed in batch.seeds] == list(seeds)
    labels = None if batches[0].labels is None else torch.cat([batch.labels for batch in batches])
    return torch.cat([b.latents for b in batches]), torch.cat([b.images for b in batches]), labels


@pytest.mark.parametrize("start", ["noise", "observation"])
def test_few_steps_match_golden(start):
    data = golden_arrays()
    model = fill_by_name(PrecondCondition(**golden_config()), golden_json()["seed"] + 1)
    net = GenerativeDenoiser(model).eval()
    draws = iter(data["noise"])

    def randn_like(x):
        return next(draws)

    with torch.no_grad():
        if start == "noise":
            noise, wanted = data["gd_multistep_init"], data["gd_multistep_ts_10_22_39"]
            drawn = net(net.init_sigma * noise, net.init_sigma, data["labels"], ts=[10, 22, 39], randn_like=randn_like)
        else:
            wanted = data["gd_multistep_y_ts_0_14_39"]
            drawn = net(data["y"], data["sigma"], data["labels"], ts=[0, 14, 39], randn_like=randn_like)
    assert (drawn - wanted).abs().max() <= 1e-4 * wanted.abs().max()


OPTIONS = [
    ("generator", {}),
    ("generator", {"ts": [10, 22, 39]}),
    ("generator", {"ts": [0, 10, 20, 39], "zeta": 0.6}),
    ("teacher", {"num_steps": 12}),
    ("teacher", {"num_steps": 12, "guidance": 1.7, "gnet_labels": False}),
]


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_a_seed_means_one_image_in_any_batch(kind, options):
    net = tiny_generator() if kind == "generator" else tiny_teacher()
    whole, images, labels = collect(net, SEEDS, batch=8, **options)
    assert whole.std() > 0.05 and (whole[0] - whole[1]).abs().max() > 0.05
    for batch in (1, 3):
        latents, _, same_labels = collect(net, SEEDS, batch=batch, **options)
        assert (latents - whole).abs().max() <= 1e-5
        assert torch.equal(same_labels, labels)
    backwards, _, _ = collect(net, SEEDS[::-1], batch=3, **options)
    assert (backwards.flip(0) - whole).abs().max() <= 1e-5
    assert torch.equal(images, RGBEncoder().decode(whole))


def test_the_parts_of_all_processes_are_the_whole():
    net = tiny_generator()
    whole, _, _ = collect(net, SEEDS, ts=[10, 39])
    for world_size in (2, 3):
        parts = [
            batch
            for rank in range(world_size)
            for batch in generate_images(net, seeds=SEEDS, batch=2, ts=[10, 39], rank=rank, world_size=world_size)
        ]
        by_seed = {seed: latent for batch in parts for seed, latent in zip(batch.seeds, batch.latents, strict=True)}
        assert (torch.stack([by_seed[seed] for seed in SEEDS]) - whole).abs().max() <= 1e-5


def test_the_global_generator_plays_no_part():
    net = tiny_generator()
    torch.manual_seed(0)
    first, _, _ = collect(net, SEEDS[:2], ts=[10, 22, 39])
    torch.manual_seed(1)
    assert torch.equal(first, collect(net, SEEDS[:2], ts=[10, 22, 39])[0])


def test_without_ts_a_generator_makes_one_direct_evaluation():
    net = tiny_generator(label_dim=0)
    drawn, _, labels = collect(net, [7])
    source = SeededNoise([7])
    with torch.no_grad():
        wanted = net(80 * source.randn([1, 3, 8, 8]), 80.0, randn_like=source.randn_like)
    assert labels is None and torch.equal(drawn, wanted)


def test_a_teacher_is_sampled_by_heun():
    net = tiny_teacher()
    drawn, _, labels = collect(net, [7], num_steps=5, class_idx=2)
    noise = SeededNoise([7]).randn([1, 3, 8, 8])
    with torch.no_grad():
        wanted = heun_sampler(lambda x, sigma: net(x, sigma, labels), noise, num_steps=5)
    assert labels.tolist() == [[0, 0, 1, 0]] and torch.equal(drawn, wanted)


def test_guidance_uses_the_guiding_network():
    net, gnet = tiny_teacher(), tiny_teacher(label_dim=0, seed=9)
    plain, _, _ = collect(net, SEEDS[:2], num_steps=3)
    guide_alone, _, _ = collect(net, SEEDS[:2], num_steps=3, gnet=gnet, guidance=0.0)
    guided, _, _ = collect(net, SEEDS[:2], num_steps=3, gnet=gnet, guidance=2.0)
    only, _, _ = collect(gnet, SEEDS[:2], num_steps=3)
    assert (guide_alone - only).abs().max() < 1e-5
    assert (guided - plain).abs().max() > 1e-3


def test_classes_come_from_the_seed_and_asking_for_one_changes_nothing_else():
    net = tiny_generator()
    latents, _, labels = collect(net, range(64), ts=[10, 39])
    assert labels.sum(dim=1).eq(1).all() and labels.sum(dim=0).min() > 4
    own = int(labels[5].argmax())
    asked, _, asked_labels = collect(net, [5], ts=[10, 39], class_idx=own)
    assert (asked[0] - latents[5]).abs().max() < 1e-5 and torch.equal(asked_labels[0], labels[5])
    other, _, _ = collect(net, [5], ts=[10, 39], class_idx=(own + 1) % 4)
    assert (other[0] - latents[5]).abs().max() > 1e-3


def test_networks_keep_their_mode_and_weights():
    net = tiny_teacher().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    latents, _, _ = collect(net, [1], num_steps=2)
    assert net.training and not latents.requires_grad
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_bf16_is_close_to_float32():
    net = tiny_generator()
    exact, _, _ = collect(net, SEEDS, ts=[10, 39])
    rough, _, _ = collect(net, SEEDS, ts=[10, 39], dtype=torch.bfloat16)
    assert net.compute_dtype == torch.bfloat16 and rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().mean() < 0.1 * exact.std()


def test_images_are_written_where_users_look(tmp_path):
    net = tiny_generator(label_dim=0)
    seeds = [0, 7, 123, 1000, 1234567]
    batches = list(generate_images(net, seeds=seeds, batch=2, outdir=tmp_path / "flat"))
    paths = [path for batch in batches for path in batch.paths]
    names = ["000000.png", "000007.png", "000123.png", "001000.png", "1234567.png"]
    assert sorted(path.name for path in (tmp_path / "flat").iterdir()) == sorted(names)
    assert [path.name for path in paths] == names
    images = torch.cat([batch.images for batch in batches]).numpy()
    assert all(np.array_equal(read_image(path), image) for path, image in zip(paths, images, strict=True))
    list(generate_images(net, seeds=seeds, outdir=tmp_path / "sub", subdirs=True))
    assert image_path(tmp_path / "sub", 123, subdirs=True) == tmp_path / "sub/000000/000123.png"
    written = {str(path.relative_to(tmp_path / "sub")) for path in (tmp_path / "sub").rglob("*.png")}
    assert written == {
        "000000/000000.png",
        "000000/000007.png",
        "000000/000123.png",
        "001000/001000.png",
        "1234000/1234567.png",
    }


@pytest.mark.parametrize(("count", "batch", "world_size"), [(10, 8, 1), (7, 3, 2), (2, 4, 3), (0, 4, 2), (100, 1, 7)])
def test_split_seeds_deals_out_every_seed_once(count, batch, world_size):
    seeds = list(range(count))
    parts = [split_seeds(seeds, batch, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(seed for part in parts for chunk in part for seed in chunk) == seeds
    sizes = [len(chunk) for part in parts for chunk in part]
    assert all(1 <= size <= batch for size in sizes) and (not sizes or max(sizes) - min(sizes) <= 1)


def test_count_evaluations():
    assert count_evaluations(tiny_teacher()) == 63
    assert count_evaluations(tiny_teacher(), num_steps=4) == 7
    assert count_evaluations(tiny_generator()) == 1
    assert count_evaluations(tiny_generator(), ts=[0, 10, 20, 30, 39]) == 4


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("generator", {"guidance": 2.0}, "guidance and gnet apply to teachers only"),
        ("generator", {"gnet_labels": False}, "guidance and gnet apply to teachers only"),
        ("generator", {"num_steps": 8}, "steps apply to teachers only"),
        ("generator", {"ts": [10]}, "at least two entries"),
        ("generator", {"ts": [10, 39], "zeta": 1.5}, "zeta"),
        ("generator", {"zeta": 0.5}, "give ts as well"),
        ("generator", {"class_idx": 4}, "classes 0 to 3"),
        ("generator", {"batch": 0}, "batch size"),
        ("generator", {"seeds": [3, -1]}, "must lie between 0"),
        ("generator", {"outdir": __file__}, "is a file"),
        ("generator", {"dtype": torch.float16}, "float16 needs a CUDA device"),
        ("teacher", {"ts": [10, 39]}, "this network is a teacher"),
        ("teacher", {"zeta": 0.5}, "this network is a teacher"),
        ("teacher", {"num_steps": 1}, "at least 2 steps"),
        ("teacher", {"guidance": float("nan")}, "finite"),
        ("teacher", {"guidance": 2.0}, "needs a guiding network"),
        ("teacher", {"gnet": "other classes", "gnet_labels": False}, "no effect at guidance 1: give --guidance"),
        ("teacher", {"gnet": "teacher"}, "no effect at guidance 1: give --guidance"),
        ("teacher", {"gnet_labels": False}, "no effect at guidance 1: give --guidance"),
        ("teacher", {"gnet": "generator"}, "must be a teacher"),
        ("teacher", {"gnet": "other classes", "guidance": 2.0}, "7 classes"),
        ("teacher", {"gnet": "other size", "guidance": 2.0}, "1x8x8"),
        ("unconditional", {"class_idx": 0}, "has no classes"),
        ("unconditional", {"guidance": 2.0, "gnet_labels": False}, "needs a guiding network"),
        ("discriminator", {}, "cannot sample from a Discriminator"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_drawn(kind, options, message):
    nets = {
        "generator": tiny_generator,
        "teacher": tiny_teacher,
        "unconditional": lambda: tiny_teacher(label_dim=0),
        "discriminator": lambda: Discriminator(**TINY | {"label_dim": 0}),
        "other classes": lambda: tiny_teacher(label_dim=7),
        "other size": lambda: Precond(**TINY | {"label_dim": 4, "img_channels": 1}),
    }
    options = {"seeds": [0], **options}
    if "gnet" in options:
        options["gnet"] = nets[options["gnet"]]()
    with pytest.raises(ValueError, match=message):
        generate_images(nets[kind](), **options)
