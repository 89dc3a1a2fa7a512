"""Options of train_edm2.py and train_ncvsd.py that change how, not what, they train."""

import itertools
import re

import torch

import networks
import train_edm2
import train_ncvsd
from dnnlib.download import DownloadError
from tests.test_train_scripts import SMALL, SMALL_NET, mistake, replaced, run
from training import loop


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
