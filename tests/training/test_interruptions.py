"""Runs that are cut off: SIGKILL at any moment, signals that ask to stop, time that runs out, disks that refuse."""

import contextlib
import dataclasses
import errno
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest

import networks
from data.dataset import ImageDataset
from tests import warm
from tests.training.tiny_runs import (
    NCVSD,
    ROOT,
    command,
    compare_states,
    differing,
    environment,
    execute,
    load_newest_state,
    make_task,
    run_training,
    stats,
    weights,
)
from training.optim import DivergenceError
from training.run import state
from training.run.state import StateError, list_states, load_state
from training.run.stop import StopRequest

KILLS = int(os.environ.get("NCVSD_KILLS", "4"))  # 20 for a thorough test
# train_ncvsd.py with states that take a good part of a second to write, so that many kills hit a write
SLOW_WRITES = """
import time
from training.run import state
write = state.HashingFile.write
state.HashingFile.write = lambda self, data: (time.sleep(4e-4), write(self, data))[1]
import train_ncvsd
train_ncvsd.main()
"""


def during(task, actions):
    """Have functions called while the iterations that begin at given image counts are going on."""
    phase = task.phases[-1]
    real = phase.loss

    def loss(batch, net):
        actions.get(batch.nimg, lambda: None)()
        return real(batch, net)

    phase.loss = loss
    return task


# ----------------------------------------------------------------------------
# SIGKILL


def count_lines(path):
    """Of a log: beginnings and statistics."""
    return len(re.findall("training for|resuming at|img/s", path.read_text())) if path.exists() else 0


@pytest.mark.timeout(300 + 60 * KILLS)
def test_a_run_killed_again_and_again_goes_on_to_the_same_result(tmp_path, tiny_data, tiny_teacher):
    folder, duration = tmp_path / "killed", 8 * (12 + 8 * KILLS)
    options = dict(duration=duration, dropout=0.1, checkpoint=8)
    slow = [sys.executable, "-c", SLOW_WRITES, *command(folder, tiny_data, tiny_teacher, **options)[1:]]
    log = folder / "log.txt"
    rng, during_write, reached = random.Random(0), 0, 0
    for kill in range(KILLS):
        wanted = count_lines(log) + rng.randint(1, 6)
        with warm.Popen(slow, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 120
            while count_lines(log) < wanted and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.5))
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
        during_write += bool(list(folder.glob(".training-state-*.new")))
        states = list_states(folder)
        now = load_state(states[0])["nimg"] if states else 0  # whole, whatever the moment
        assert now >= reached, kill
        reached = now
    assert 0 < reached < duration and during_write > 0
    print(f"{KILLS} kills, {during_write} of them during a write, the last at {reached} of {duration} images")
    plain = warm.environment(server=False)  # with a hash seed of its own
    last = [sys.executable, *command(folder, tiny_data, tiny_teacher, **options)]
    subprocess.run(last, cwd=ROOT, env=plain, check=True, capture_output=True)
    options["checkpoint"] = duration
    execute([sys.executable, *command(tmp_path / "whole", tiny_data, tiny_teacher, **options)])
    assert f"resuming at {reached} images" in (folder / "log.txt").read_text()
    assert not list(folder.glob(".training-state-*"))
    assert [line["nimg"] for line in stats(folder)] == list(range(8, duration + 1, 8))
    for std in ("0.050", "0.100"):
        name = f"network-snapshot-{duration:09d}-{std}.safetensors"
        a, b = (networks.load(path / name).net for path in (tmp_path / "whole", folder))
        assert differing(weights(a), weights(b)) == []
    compare_states(tmp_path / "whole", folder)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.9999])
def test_a_truncated_newest_state_costs_one_interval(tmp_path, dataset, tiny_teacher, share):
    config = dataclasses.replace(NCVSD, duration=24, checkpoint=8)
    run_training(make_task(config, tiny_teacher), dataset, config, tmp_path / "run")
    newest, before = list_states(tmp_path / "run")
    os.truncate(newest, int(share * newest.stat().st_size))
    config = dataclasses.replace(config, duration=32)
    resumed = run_training(make_task(config, tiny_teacher), dataset, config, tmp_path / "run")
    log = (tmp_path / "run/log.txt").read_text()
    assert "resuming at 16 images" in log and f"set aside as {newest.with_suffix('.damaged').name}" in log
    whole = run_training(make_task(config, tiny_teacher), dataset, config, tmp_path / "whole")
    assert differing(weights(whole), weights(resumed)) == []


def test_a_folder_in_use_is_refused_until_its_run_has_ended(tmp_path, tiny_data, tiny_teacher):
    folder = tmp_path / "run"
    options = dict(duration=80000, checkpoint=8, workers=1)
    arguments = [sys.executable, *command(folder, tiny_data, tiny_teacher, **options)]
    with warm.Popen(arguments, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL) as first:
        deadline = time.monotonic() + 120
        while not list_states(folder) and time.monotonic() < deadline:
            time.sleep(0.05)
        second = warm.run(arguments, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
        assert first.poll() is None, "the second run ended the first"
        first.kill()  # its loader process lives on for a while
    assert second.returncode == 1 and f"{folder} is in use by another run (process {first.pid} on " in second.stderr
    options["duration"] = load_state(list_states(folder)[0])["nimg"] + 8
    execute([sys.executable, *command(folder, tiny_data, tiny_teacher, **options)])
    assert "finished" in (folder / "log.txt").read_text()


# ----------------------------------------------------------------------------
# requests to stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_lets_the_step_finish_and_saves(tmp_path, dataset, tiny_teacher, number):
    before = signal.getsignal(number)
    config = dataclasses.replace(NCVSD, duration=32)
    task = during(make_task(config, tiny_teacher), {8: lambda: os.kill(os.getpid(), number)})
    with pytest.raises(KeyboardInterrupt) if number == signal.SIGINT else contextlib.nullcontext():
        run_training(task, dataset, config, tmp_path / "run")
    assert load_newest_state(tmp_path / "run")["nimg"] == 16 and signal.getsignal(number) == before
    assert f"stopped ({number.name})" in (tmp_path / "run/log.txt").read_text()
    resumed = run_training(make_task(config, tiny_teacher), dataset, config, tmp_path / "run")
    whole = run_training(make_task(config, tiny_teacher), dataset, config, tmp_path / "whole")
    assert differing(weights(whole), weights(resumed)) == []


def test_a_signal_before_the_first_step_ends_the_run_with_code_0(tmp_path, tiny_data, tiny_teacher):
    early = """
import os, signal
from training.run import options
real = options.load_config
options.load_config = lambda *a: (os.kill(os.getpid(), signal.SIGTERM), real(*a))[1]  # before torch is imported
import train_ncvsd
train_ncvsd.main()
"""
    arguments = command(tmp_path / "run", tiny_data, tiny_teacher, duration=80)[1:]
    plain = warm.environment(server=False)
    subprocess.run([sys.executable, "-c", early, *arguments], cwd=ROOT, env=plain, check=True, capture_output=True)
    assert "stopped (SIGTERM): the same command goes on at 0 images" in (tmp_path / "run/log.txt").read_text()
    assert not list(tmp_path.glob("run/network-*")) and not list_states(tmp_path / "run")
    execute([sys.executable, "train_ncvsd.py", *arguments])
    assert load_newest_state(tmp_path / "run")["nimg"] == 80


def test_ctrl_c_before_the_first_step_aborts():
    with pytest.raises(KeyboardInterrupt), StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)


def test_a_second_ctrl_c_aborts(tmp_path, dataset, tiny_teacher):
    config = dataclasses.replace(NCVSD, duration=32, checkpoint=8)

    def interrupt_twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        run_training(during(make_task(config, tiny_teacher), {16: interrupt_twice}), dataset, config, tmp_path)
    assert [load_newest_state(tmp_path)["nimg"], len(list_states(tmp_path))] == [16, 2]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_to_all_processes_of_a_job_saves_and_its_exit_code_tells(
    number, code, tmp_path, tiny_data, tiny_teacher
):
    options = dict(duration=8000, checkpoint=8000, workers=1)
    arguments = [sys.executable, *command(tmp_path / "run", tiny_data, tiny_teacher, **options)]
    with warm.Popen(
        arguments, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run/stats.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(process.pid, number)
        assert process.wait(timeout=60) == code
    assert load_newest_state(tmp_path / "run")["nimg"] == stats(tmp_path / "run")[-1]["nimg"] < 8000


def test_training_saves_and_stops_before_its_time_is_over(tmp_path, dataset, tiny_teacher, monkeypatch):
    monkeypatch.setattr("training.run.stop.clock", itertools.count(0, 100).__next__)  # each look takes 100 seconds
    config, deadline = dataclasses.replace(NCVSD, duration=8000), 1_500
    run_training(make_task(config, tiny_teacher), dataset, config, tmp_path, stop=StopRequest(deadline))
    iterations = load_newest_state(tmp_path)["nimg"] / config.batch
    assert 0 < iterations * 100 < deadline
    assert "stopped (--max-time is nearly over)" in (tmp_path / "log.txt").read_text()


# ----------------------------------------------------------------------------
# disks that refuse


def refuse_states(monkeypatch, code):
    """Make creating a state's file fail with an error of the file system."""

    def refuse(path, mode):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(state, "open", refuse, raising=False)


def limit_files(size):
    """Let no file of this process grow beyond so many bytes: to a writer, a full disk."""
    resource = pytest.importorskip("resource")
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_training_survives_a_disk_that_is_full_for_a_while(tmp_path, dataset, tiny_teacher):
    config = dataclasses.replace(NCVSD, duration=48, checkpoint=8, snapshot=24)
    task = during(make_task(config, tiny_teacher), {16: lambda: limit_files(60_000), 32: lambda: limit_files(-1)})
    try:
        run_training(task, dataset, config, tmp_path)
    finally:
        limit_files(-1)
    log = (tmp_path / "log.txt").read_text()
    assert log.count("state could not be written") == 2 and "failure 2 of 3" in log and "goes on and tries again" in log
    assert "the previous one stays (training-state-000000016" in log
    assert log.count("the snapshot at 24 images could not be written") == 2
    assert {path.name[17:26] for path in tmp_path.glob("network-*")} == {"000000000", "000000048"}
    assert [load_state(path)["nimg"] for path in list_states(tmp_path)] == [48, 40]
    assert not list(tmp_path.glob(".training-state-*"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_three_failures_end_training_and_name_the_state_that_is_left(
    tmp_path, dataset, tiny_teacher, monkeypatch, code
):
    config = dataclasses.replace(NCVSD, duration=80, checkpoint=8)
    task = during(make_task(config, tiny_teacher), {16: lambda: refuse_states(monkeypatch, code)})
    with pytest.raises(OSError, match=r"states cannot be written to .*training-state-000000016.*same command") as error:
        run_training(task, dataset, config, tmp_path)
    assert "\n" not in str(error.value)
    assert load_newest_state(tmp_path)["nimg"] == 16 and 40 <= stats(tmp_path)[-1]["nimg"] <= 56
    assert os.strerror(code) in (tmp_path / "log.txt").read_text()


def test_a_last_state_that_cannot_be_written_is_an_error(tmp_path, dataset, tiny_teacher, monkeypatch):
    task = make_task(NCVSD, tiny_teacher)
    refuse_states(monkeypatch, errno.ENOSPC)
    with pytest.raises(OSError, match="there is no state"):
        run_training(task, dataset, NCVSD, tmp_path)


def test_an_error_waits_for_the_state_that_is_being_written(tmp_path, dataset, tiny_teacher, monkeypatch):
    config = dataclasses.replace(NCVSD, duration=80, checkpoint=16)
    real = state.save_state
    monkeypatch.setattr(state, "save_state", lambda *a, **k: (time.sleep(1), real(*a, **k))[1])

    def fail():
        raise ValueError("a corrupt image")

    with pytest.raises(ValueError, match="a corrupt image"):
        run_training(during(make_task(config, tiny_teacher), {16: fail}), dataset, config, tmp_path)
    assert load_newest_state(tmp_path)["nimg"] == 16


# ----------------------------------------------------------------------------
# resuming what should not be resumed


def test_every_difference_is_listed_and_can_be_overridden(tmp_path, dataset, tiny_teacher, tiny_images):
    run_training(make_task(NCVSD, tiny_teacher), dataset, NCVSD, tmp_path / "run")
    other = dataclasses.replace(NCVSD, duration=16, ref_lr=0.02, gamma=0.3)
    data = ImageDataset(tiny_images(tmp_path / "other.zip", (21, 8, 8), 3))
    with pytest.raises(StateError) as error:
        run_training(make_task(other, tiny_teacher), data, other, tmp_path / "run")
    for part in ("data is ", "gamma is 0.414, now 0.3", "ref_lr is 0.01, now 0.02", "--force-resume"):
        assert part in str(error.value)
    run_training(make_task(other, tiny_teacher), data, other, tmp_path / "run", force_resume=True)
    assert load_newest_state(tmp_path / "run")["nimg"] == 16
    assert "resuming with other settings" in (tmp_path / "run/log.txt").read_text()
    run_training(make_task(other, tiny_teacher), data, other, tmp_path / "run")  # they are now the run's settings


def test_divergence_names_the_last_good_state(tmp_path, dataset, tiny_teacher):
    config = dataclasses.replace(NCVSD, duration=80, nonfinite_limit=3, checkpoint=8)
    task = make_task(config, tiny_teacher)
    phase, real = task.phases[0], task.phases[0].loss

    def loss(batch, net):
        terms = real(batch, net)
        terms.total = terms.total * (float("nan") if batch.nimg >= 16 else 1)
        return terms

    phase.loss = loss
    with pytest.raises(DivergenceError, match="last good state is .*training-state-000000016") as error:
        run_training(task, dataset, config, tmp_path)
    assert "non-finite for 3 updates" in str(error.value)
    assert [line["Nonfinite/score_total"] for line in stats(tmp_path)] == [0, 0, 1, 2]


def test_a_state_with_weights_that_are_not_finite_is_not_written(tmp_path, dataset, tiny_teacher):
    config = dataclasses.replace(NCVSD, duration=40, checkpoint=8)
    task = make_task(config, tiny_teacher)

    def damage():
        task.phases[1].net.out_conv.weight.data.fill_(float("inf"))

    with pytest.raises(DivergenceError, match="weights of the disc network.*training-state-000000016"):
        run_training(during(task, {16: damage}), dataset, config, tmp_path)
    assert load_newest_state(tmp_path)["nimg"] == 16
