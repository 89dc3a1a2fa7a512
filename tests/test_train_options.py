"""Options of train_edm2.py and train_ncvsd.py that change how, not what, they train."""

import dataclasses
import itertools
import json
import re

import pytest
import torch

import networks
import train_edm2
import train_ncvsd
from dnnlib.download import DownloadError
from networks.encoders import RGBEncoder
from tests.conftest import TINY_NET
from tests.golden_utils import fill_by_name
from tests.train_commands import SMALL, SMALL_NET, mistake, replaced, run
from tests.training.tiny_runs import NCVSD
from training import loop, tasks


def test_an_unconditional_run_of_labelled_data(tmp_path, tiny_data):
    result = run(
        train_edm2,
        "--data",
        tiny_data,
        "--outdir",
        tmp_path,
        *SMALL,
        *SMALL_NET,
        "--duration=8",
        "--eval-steps=2",
        "--cond=no",
    )
    assert result.exit_code == 0, result.output
    assert networks.load(tmp_path / "network-snapshot-000000008-0.050.safetensors").net.label_dim == 0


def test_a_setting_has_two_names(distil):
    result = run(train_ncvsd, *distil, "--ts=10,39", "-n")
    assert '"eval_ts": [[20, 39], [10, 39]]' in result.output, result.output


def test_time_that_is_over_ends_training_with_code_0(tmp_path, distil, monkeypatch):
    monkeypatch.setattr("training.run.stop.clock", itertools.count(0, 1000).__next__)  # each look takes 1000 seconds
    assert "--max-time leaves no time" in mistake(train_ncvsd, *distil, "--duration=80000", "--max-time=1s")
    result = run(train_ncvsd, *distil, "--duration=80000", "--snapshot=80000", "--max-time=3h")
    assert result.exit_code == 0, result.output
    assert "stopped (--max-time is nearly over)" in (tmp_path / "run/log.txt").read_text()
    assert "soon' is not a length of time" in mistake(train_ncvsd, *distil, "--max-time=soon")


def test_deterministic_runs_use_nothing_else(tmp_path, distil, monkeypatch):
    seen = []
    real = loop.seed_dropout
    monkeypatch.setattr(
        loop, "seed_dropout", lambda *a: (seen.append(torch.are_deterministic_algorithms_enabled()), real(*a))
    )
    for options, wanted in ((["--deterministic"], True), (["--duration=16"], False)):
        assert run(train_ncvsd, *distil, *options).exit_code == 0
        assert seen.pop() == wanted and not seen


def test_saving_memory_changes_nothing(tmp_path, distil):
    saving = ["--checkpoint-activations", "--ema-device=cpu", "--shard"]
    for name, options in (("plain", []), ("saving", saving)):
        result = run(train_ncvsd, *replaced(distil, outdir=tmp_path / name), *options)
        assert result.exit_code == 0, result.output
        assert re.search(r"together +[\d.]+ MiB on the device", result.output)
    a, b = (tmp_path / f"{name}/network-snapshot-000000008-0.050.safetensors" for name in ("plain", "saving"))
    a, b = networks.load(a).net.state_dict(), networks.load(b).net.state_dict()
    assert [key for key in a if not torch.equal(a[key], b[key])] == []


def test_snapshots_can_be_measured(tmp_path, distil):
    line = mistake(train_ncvsd, *distil, "--eval-metric=fd_other")
    assert "no metric 'fd_other'" in line
    line = mistake(train_ncvsd, *distil, "--eval-metric=fd_demo")  # a detector of 16x16 images
    assert "fd_demo takes uint8 images [N,1,16,16]" in line


def test_missing_detectors_are_explained_as_it_fits_the_script(distil, monkeypatch):
    def offline(*_, **__):
        raise DownloadError("no network")

    monkeypatch.setattr("metrics.features.weights.open_url", offline)
    monkeypatch.delenv("NCVSD_DETECTORS", raising=False)
    line = mistake(train_ncvsd, *distil, "--eval-metric=fid")
    assert "put it in a folder named by the environment variable NCVSD_DETECTORS" in line
    assert "or name it with --detector-path where the script has that option" in line


@pytest.fixture(scope="module")
def weaker(tmp_path_factory):
    """Path of another teacher for `tiny_data`."""
    path = tmp_path_factory.mktemp("weaker") / "weaker.safetensors"
    networks.save(path, fill_by_name(networks.Precond(**TINY_NET), 12), RGBEncoder())
    return path


def test_the_target_is_that_of_the_guided_teacher(tiny_teacher, weaker, monkeypatch):
    """net alone with guidance 1, gnet alone with 0, gnet + 3·(net - gnet) with 3; without gnet, net without labels."""
    teacher, guide = (networks.load(path).net for path in (tiny_teacher, weaker))
    x, sigma, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 2.0]), torch.eye(3)[:2]
    with torch.no_grad():
        strong, weak, blind = teacher(x, sigma, labels), guide(x, sigma, labels), teacher(x, sigma)
    cases = [(1.0, None, strong), (0.0, guide, weak), (3.0, guide, weak + 3 * (strong - weak))]
    for guidance, gnet, wanted in (*cases, (2.0, None, 2 * strong - blind)):
        seen = []
        monkeypatch.setattr(tasks, "distillation_phases", lambda target, *_, seen=seen: seen.append(target))
        task = tasks.distillation_task(teacher, dataclasses.replace(NCVSD, guidance=guidance), gnet)
        torch.testing.assert_close(seen[0](x, sigma, labels), wanted)
        assert list(task.frozen.values()) == [teacher, *([gnet] if gnet else [])]


def test_a_run_with_a_guided_teacher(tmp_path, distil, weaker):
    result = run(train_ncvsd, *distil, "--gnet", weaker, "--guidance=2", "--direction=sid", "--scale=abs")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "run/run.json").read_text())["guidance"] == 2
    longer = [*replaced(distil, outdir=tmp_path / "run"), "--duration=16", "--direction=sid", "--scale=abs"]
    assert "teacher" in mistake(train_ncvsd, *longer, "--guidance=2")  # another one without --gnet
    other = replaced(distil, outdir=tmp_path / "other")
    assert "a guiding network has no effect at guidance 1" in mistake(train_ncvsd, *other, "--gnet", weaker)
    student = tmp_path / "run/network-snapshot-000000008-0.050.safetensors"
    assert "must be a teacher (Precond)" in mistake(train_ncvsd, *other, "--gnet", student, "--guidance=2")
    assert not (tmp_path / "other").exists()
