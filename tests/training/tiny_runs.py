"""Runs on the tiny problem of the fixtures, in this process or as a command, and comparisons of what they leave."""

import json
from pathlib import Path

import torch

import networks
from networks.encoders import RGBEncoder
from tests import warm
from training.loop import train
from training.presets import EDM2Config, NCVSDConfig
from training.run.options import RunOptions
from training.run.state import newest_state
from training.tasks import distillation_task, pretraining_task

ROOT = Path(__file__).parents[2]
COMMON = dict(batch=8, batch_gpu=8, rampup_mimg=0, status=8, snapshot=1 << 20, checkpoint=1 << 20)
NCVSD = NCVSDConfig(
    duration=8, ref_lr=1e-2, g_lr_scaling=0.1, d_lr_scaling=0.1, gan_warmup_kimg=0.008, eval_ts=((20, 39),), **COMMON
)
EDM2 = EDM2Config(duration=8, ref_lr=1e-2, eval_steps=2, **COMMON)


def make_task(config, teacher_path):
    """A fresh task for the tiny networks, from the same seed every time."""
    torch.manual_seed(0)
    teacher = networks.load(teacher_path).net
    if isinstance(config, NCVSDConfig):
        return distillation_task(teacher, config)
    arguments = {**teacher.init_kwargs, "dropout": config.dropout}
    return pretraining_task(networks.Precond(**arguments), config)


def run_training(task, dataset, config, folder, **options):
    """Train in this process; options are those of `RunOptions`."""
    folder.mkdir(exist_ok=True)
    options = RunOptions(str(folder), "", quiet=True, **options)
    return train(task, dataset, RGBEncoder(), config, options, torch.device("cpu"))


def load_newest_state(folder, warn=print):
    return newest_state(folder, warn)[1]


def weights(net):
    return {key: tensor.clone() for key, tensor in net.state_dict().items()}


def differing(a, b):
    assert a.keys() == b.keys()
    return [key for key in a if not torch.equal(a[key], b[key])]


def stats(folder):
    return [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]


def compare_states(a, b):
    a, b = load_newest_state(a), load_newest_state(b)
    assert a["nimg"] == b["nimg"]
    for name in a["nets"]:
        assert differing(a["nets"][name], b["nets"][name]) == []
        for index, entry in a["optimizers"][name]["state"].items():
            assert differing(entry, b["optimizers"][name]["state"][index]) == []
    for first, second in zip(a["ema"]["averages"], b["ema"]["averages"], strict=True):
        assert differing(first, second) == []


def command(folder, tiny_data, tiny_teacher, **options):
    """Command line of train_ncvsd.py on the tiny problem."""
    settings = dict(
        batch=8, batch_gpu=4, rampup_mimg=0, ref_lr="1e-3", gan_warmup_kimg=0.008, eval_ts="20,39", snapshot="1Mi"
    )
    settings |= dict(checkpoint=8, status=8) | options
    arguments = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
    paths = ["--net", str(tiny_teacher), "--data", str(tiny_data), "--outdir", str(folder)]
    return ["train_ncvsd.py", *paths, "--device", "cpu", "--quiet", *arguments]


def execute(arguments, **options):
    """Run a command in the repository's root; it must succeed."""
    result = warm.run(arguments, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=280, **options)
    assert result.returncode == 0, result.stderr
    return result


def environment():
    return warm.environment()
