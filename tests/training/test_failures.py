"""Errors end all processes of a run, with one message; what several processes rely on."""

import dataclasses
import errno
import os
import shutil
import sys
import zipfile

import pytest
import torch

from data.dataset import ImageDataset
from tests import warm
from tests.training.tiny_runs import (
    NCVSD,
    ROOT,
    command,
    compare_states,
    environment,
    execute,
    load_newest_state,
    make_task,
    run_training,
    stats,
)
from torch_utils import distributed
from training import loop
from training.run import parallel, state
from training.run.state import StateError, StateWriter, list_states

PROCESSES = [sys.executable, "quick_start/processes.py", "--standalone", "--nproc-per-node", "2", "--"]


def fails(arguments):
    """What a command that must fail, and end, says on stderr."""
    result = warm.run(arguments, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode == 1, result
    return result.stderr


def test_an_error_ends_a_run_with_loader_processes(tmp_path, tiny_images, tiny_teacher):
    with zipfile.ZipFile(tiny_images(tmp_path / "good.zip", (16, 8, 8), 3)) as archive:
        archive.extractall(tmp_path / "images")
    (tmp_path / "images/00000/img00000003.png").write_bytes(b"no image")
    options = dict(duration=80, workers=1)
    said = fails([sys.executable, *command(tmp_path / "run", tmp_path / "images", tiny_teacher, **options)])
    assert "img00000003.png: damaged" in said and said.count("\n") == 1


def test_an_error_of_one_process_ends_both(tmp_path, tiny_data, tiny_teacher):
    arguments = command(tmp_path / "run", tiny_data, tiny_teacher, duration=800, workers=1)[1:]
    said = fails([*PROCESSES, "-m", "tests.training.one_fails", *arguments])
    assert "nope.zip: damaged" in said and said.count("\n") == 1, said


def test_two_processes_measure_divide_and_recompute_as_one(tmp_path, some_fashion):
    values = []
    for launcher, options in (([sys.executable], []), (PROCESSES, ["--shard", "--checkpoint-activations"])):
        folder = tmp_path / str(len(values))
        arguments = command(
            folder,
            some_fashion,
            ROOT / "assets/demo/teacher.safetensors",
            duration=64,
            batch=64,
            batch_gpu=32,
            eval_num=16,
        )
        execute([*launcher, *arguments, *options, "--preset=fashion16", "--eval-metric=fd_demo"])
        (found,) = [line for line in stats(folder) if line["nimg"] == 64 and "Metrics/fd_demo_1step" in line]
        values.append(found["Metrics/fd_demo_ts20_39"])
    assert values[1] == pytest.approx(values[0], rel=1e-3)


# ----------------------------------------------------------------------------
# what replicas, states and masks are made of


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_replicas_exchange_gradients_in_the_last_round_from_one_buffer(group):
    net = torch.nn.Linear(3, 3)
    net.register_buffer("constant", torch.ones(3))
    replica = parallel.Replica(net)
    assert not replica.broadcast_buffers and replica.gradient_as_bucket_view
    places = []
    for _ in range(3):
        for last in (False, True):
            with parallel.accumulate(replica, last=last):
                assert replica.require_backward_grad_sync == last
                replica(torch.ones(2, 3)).sum().backward()
            places.append([p.grad.data_ptr() for p in net.parameters()])
        replica.zero_grad(set_to_none=False)
    assert places[2] == places[3] == places[4] == places[5]


def test_moments_of_another_memory_layout_are_converted():
    torch.manual_seed(0)
    grad, device = torch.randn(4, 4, 3, 3), torch.device("cpu")
    net = torch.nn.Conv2d(4, 4, 3, bias=False)
    optimizer = parallel.build_optimizer(net, device)
    for _ in range(2):
        state, before = parallel.optimizer_state(optimizer), net.weight.detach().clone()
        net.weight.grad = grad.clone()
        optimizer.step()
    other = torch.nn.Conv2d(4, 4, 3, bias=False).to(memory_format=torch.channels_last)
    with torch.no_grad():
        other.weight.copy_(before)
    optimizer = parallel.build_optimizer(other, device)
    parallel.load_optimizer_state(optimizer, state)
    assert state["state"][0]["exp_avg"].stride() == (36, 9, 3, 1) != other.weight.stride()
    assert optimizer.state[other.weight]["exp_avg"].stride() == other.weight.stride()
    other.weight.grad = grad.to(memory_format=torch.channels_last)
    optimizer.step()
    assert torch.allclose(other.weight, net.weight, atol=1e-7)


def test_networks_and_images_are_channels_last(tmp_path, tiny_data, tiny_teacher, monkeypatch):
    import train_ncvsd
    from training.run import launch

    seen = []

    def train(task, *rest):
        nets = [p.net for p in task.phases] + [task.teacher]
        seen.extend(w for net in nets for w in net.parameters() if w.ndim == 4 and min(w.shape[1:]) > 1)
        raise ValueError("seen enough")

    monkeypatch.setattr(launch, "train", train)
    with pytest.raises(SystemExit):
        train_ncvsd.main(command(tmp_path / "run", tiny_data, tiny_teacher, duration=8)[1:])
    assert len(seen) > 20 and all(w.is_contiguous(memory_format=torch.channels_last) for w in seen)


def test_dropout_masks_differ_between_processes_and_iterations(monkeypatch):
    seeds = set()
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    for rank in range(4):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        for iteration in range(3):
            loop.seed_dropout(0, iteration)
            seeds.add(torch.initial_seed())
    assert len(seeds) == 12


def test_states_are_flushed_before_they_are_renamed_and_kept_as_asked(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(state.os, "fsync", lambda handle: (events.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(state.os, "replace", lambda a, b: (events.append("replace"), replace(a, b))[1])
    writer = StateWriter(tmp_path, keep_every=20)
    for nimg in range(10, 60, 10):
        writer.start({"nimg": nimg}, nimg)
        writer.wait()
    assert events[:3] == ["fsync", "replace", "fsync"]  # the file, its name, the folder
    assert sorted(map(state.state_nimg, list_states(tmp_path))) == [20, 40, 50]


# ----------------------------------------------------------------------------
# which run a folder holds


@pytest.fixture
def trained(tmp_path, dataset, tiny_teacher):
    """Trains in a folder; returns the folder."""

    def run(config, **options):
        run_training(make_task(config, tiny_teacher), dataset, config, tmp_path / "run", **options)
        return tmp_path / "run"

    return run


def test_states_know_their_run_without_run_json(trained):
    (trained(NCVSD) / "run.json").unlink()
    other = dataclasses.replace(NCVSD, duration=16, gamma=0.9)
    with pytest.raises(StateError, match="gamma is 0.414, now 0.9"):
        trained(other)
    folder = trained(dataclasses.replace(NCVSD, duration=16))
    assert load_newest_state(folder)["nimg"] == 16 and (folder / "run.json").exists()


def test_the_end_of_a_cooldown_is_a_setting(trained):
    trained(dataclasses.replace(NCVSD, cooldown_mimg=1e-5))
    with pytest.raises(StateError, match="duration is 8, now 16"):
        trained(dataclasses.replace(NCVSD, cooldown_mimg=1e-5, duration=16))


def test_other_profiles_can_be_forced(trained):
    wider = dataclasses.replace(NCVSD, duration=16, ema_stds=(0.05, 0.2))
    folder = trained(NCVSD)
    before = (folder / "run.json").read_text()
    with pytest.raises(StateError, match="ema_stds is"):
        trained(wider)
    assert (folder / "run.json").read_text() == before
    trained(wider, force_resume=True)
    assert load_newest_state(folder)["ema"]["stds"] == [0.05, 0.2]


def test_a_forced_resume_that_fails_leaves_the_run(trained, tmp_path, dataset, tiny_teacher):
    folder = trained(NCVSD)
    before = (folder / "run.json").read_text()
    other = dataclasses.replace(NCVSD, duration=16, gamma=0.5)
    task = make_task(other, tiny_teacher)
    task.phases.pop()
    task.phases[0].name = "renamed"
    with pytest.raises(StateError, match="does not fit this run"):
        run_training(task, dataset, other, folder, force_resume=True)
    assert (folder / "run.json").read_text() == before


def first_moments(state):
    return next(iter(state["optimizers"]["gen"]["state"].values()))


SPOILT = {  # what a state may hold besides its own parts -> what is said
    "nets are a list": (lambda s: s.update(nets=[1]), "something else stands where a part should be"),
    "a network is a tensor": (lambda s: s["nets"].update(gen=torch.zeros(3)), "something else"),
    "nets are missing": (lambda s: s.pop("nets"), "no 'nets' in it"),
    "moments are a list": (lambda s: s["optimizers"]["gen"].update(state=[1]), "something else"),
    "moments of another shape": (lambda s: first_moments(s).update(exp_avg=torch.zeros(2)), "moments of parameter"),
    "moments are missing": (lambda s: first_moments(s).pop("exp_avg"), "moments of parameter"),
    "averages of another shape": (
        lambda s: s["ema"].update(averages=[dict.fromkeys(a, torch.zeros([])) for a in s["ema"]["averages"]]),
        "the average of",
    ),
    "averages are numbers": (lambda s: s["ema"].update(averages=[1.0, 2.0]), "something else"),
    "health is text": (lambda s: s["health"]["gen"].update(streak="ill"), "invalid literal"),
    "endless time": (lambda s: s.update(seconds=10**400), "something else"),
    "identity is a tensor": (lambda s: s.update(identity=torch.zeros(2)), "does not say whose it is"),
    "identity holds tensors": (lambda s: s["identity"].update(gamma=torch.zeros(2)), "does not say whose it is"),
}  # fmt: skip


@pytest.fixture(scope="module")
def a_run(tmp_path_factory, tiny_data, tiny_teacher):
    folder = tmp_path_factory.mktemp("spoilt") / "run"
    run_training(make_task(NCVSD, tiny_teacher), ImageDataset(tiny_data), NCVSD, folder)
    return folder


@pytest.mark.parametrize("case", SPOILT)
def test_states_with_something_else_in_them_are_refused_in_one_line(case, a_run, tmp_path, dataset, tiny_teacher):
    change, message = SPOILT[case]
    content = load_newest_state(a_run)
    change(content)
    (tmp_path / "run").mkdir()
    state.save_state(tmp_path / "run", content, 8)
    longer = dataclasses.replace(NCVSD, duration=16)
    with pytest.raises(StateError, match=message) as error:
        run_training(make_task(longer, tiny_teacher), dataset, longer, tmp_path / "run")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_state_that_the_disk_does_not_give_is_passed_over(trained, monkeypatch):
    folder = trained(dataclasses.replace(NCVSD, duration=16, checkpoint=8))
    newest, before = list_states(folder)
    read = state.file_sha256

    def refuse(path):
        if path == newest:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read(path)

    monkeypatch.setattr(state, "file_sha256", refuse)
    warnings = []
    assert load_newest_state(folder, warnings.append)["nimg"] == 8
    assert "cannot be read (Input/output error); the one before is used" in warnings[0] and newest.exists()
    before.unlink()
    with pytest.raises(StateError, match="no valid training state is left.*Input/output error"):
        load_newest_state(folder, warnings.append)


def test_states_and_curves_go_on_in_a_copy_of_the_states_alone(trained, tmp_path, dataset, tiny_teacher):
    folder = trained(NCVSD)
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(list_states(folder)[0], copy)
    longer = dataclasses.replace(NCVSD, duration=16)
    run_training(make_task(longer, tiny_teacher), dataset, longer, copy)
    trained(longer)
    compare_states(folder, copy)
