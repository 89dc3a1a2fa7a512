"""Two processes: the same gradients as one, divided optimizers and averages, another number of them on resume."""

import dataclasses
import subprocess
import sys

import pytest
import torch

import networks
from data.dataset import ImageDataset
from tests import warm
from tests.training.tiny_runs import (
    ROOT,
    command,
    compare_states,
    differing,
    execute,
    load_newest_state,
    make_task,
    run_training,
    stats,
    weights,
)
from tests.training.two_processes import GRADIENTS, STEPS
from training import phema

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_data, tiny_teacher):
    """Folder of the runs that `two_processes.py` makes."""
    out = tmp_path_factory.mktemp("two")
    command = [*TORCHRUN, "-m", "tests.training.two_processes", str(out), str(tiny_data), str(tiny_teacher)]
    plain = warm.environment(server=False)  # hash seeds differ
    subprocess.run(command, cwd=ROOT, env=plain, check=True, capture_output=True)
    return out


@pytest.fixture
def one_process(tmp_path, tiny_data, tiny_teacher):
    """Trains in this process alone."""

    def run(config, folder=tmp_path / "one"):
        return run_training(make_task(config, tiny_teacher), ImageDataset(tiny_data), config, folder)

    return run


def norm(tensors):
    return torch.stack([tensor.norm() for tensor in tensors]).norm()


def test_gradients_are_those_of_one_process_that_accumulates(runs, one_process, tmp_path):
    one_process(GRADIENTS)
    one, two = (load_newest_state(path)["optimizers"] for path in (tmp_path / "one", runs / "gradients"))
    for name in ("score", "disc", "gen"):  # after one update the first moment is a tenth of the gradient
        a, b = ({i: entry["exp_avg"] for i, entry in state[name]["state"].items()} for state in (one, two))
        assert a.keys() == b.keys() and norm(a.values()) > 0
        assert norm([a[i] - b[i] for i in a]) <= 1e-5 * norm(a.values()), name


def test_the_command_gives_the_result_of_one_process(tmp_path, tiny_data, tiny_teacher):
    for launcher, name in (([sys.executable], "one"), (TORCHRUN, "two")):
        execute([*launcher, *command(tmp_path / name, tiny_data, tiny_teacher, duration=16)])
    a, b = load_newest_state(tmp_path / "one"), load_newest_state(tmp_path / "two")
    assert a["nimg"] == b["nimg"] == 16
    for name in ("score", "disc", "gen"):
        for key, wanted in a["nets"][name].items():
            error = (b["nets"][name][key] - wanted).norm() / wanted.norm().clamp_min(1)
            assert error <= 1e-4, (name, key)
    assert len(stats(tmp_path / "two")) == 2  # one process writes


def test_divided_optimizers_and_averages_change_nothing(runs):
    compare_states(runs / "whole", runs / "divided")
    for std in ("0.050", "0.100"):
        name = f"network-snapshot-000000024-{std}.safetensors"
        a, b = (networks.load(runs / folder / name).net for folder in ("whole", "divided"))
        assert differing(weights(a), weights(b)) == []
    assert len(stats(runs / "divided")) == 3  # one process writes


def test_divided_optimizers_and_averages_resume_exactly(runs):
    assert "resuming at 16 images" in (runs / "resumed/log.txt").read_text()
    compare_states(runs / "whole", runs / "resumed")


def test_another_number_of_processes_goes_on(runs, one_process):
    longer = dataclasses.replace(STEPS, duration=32)
    one_process(longer, runs / "divided")
    assert "resuming at 24 images" in (runs / "divided/log.txt").read_text()
    state = load_newest_state(runs / "divided")
    assert state["nimg"] == 32 and {int(e["step"]) for e in state["optimizers"]["gen"]["state"].values()} == {4}


def test_a_signal_to_one_process_stops_both_at_the_same_image(runs):
    assert load_newest_state(runs / "signal")["nimg"] == 16
    assert "stopped (another process was told to)" in (runs / "signal/log.txt").read_text()


def test_tensors_are_divided_evenly():
    sizes = {f"w{i}": 100 + i for i in range(40)} | {"large": 2000}
    owners = phema.divide(sizes, 3)
    loads = [sum(size for name, size in sizes.items() if owners[name] == rank) for rank in range(3)]
    assert sum(loads) == sum(sizes.values()) and max(loads) - min(loads) < 150
    assert phema.divide(dict(reversed(sizes.items())), 3) == owners  # whatever the order
