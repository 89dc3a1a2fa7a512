"""What can be watched: losses by noise level, accuracy, norms, views, metrics of snapshots, the status line."""

import dataclasses
import importlib.machinery
import importlib.util
import math
import re

import pytest
import torch

import training.run
from data.dataset import ImageDataset
from generation.pictures import read_image
from tests.training.tiny_runs import EDM2, NCVSD, ROOT, make_task, run_training, stats
from training.noise import LogNormalSigma, training_noise
from training.run import session
from training.run.evaluation import snapshot_metrics
from training.run.record import RunningMeans, by_level, status_line


def test_values_are_parted_by_level():
    values, levels = torch.tensor([1.0, 2, 3, 4]), torch.tensor([0.05, 0.5, 0.1, 7]).reshape(4, 1, 1, 1)
    parts = {label: (float(total), int(count)) for label, total, count in by_level(values, levels, (0.1, 1, 3))}
    assert parts == {"t0-0.1": (1, 1), "t0.1-1": (5, 2), "t1-3": (0, 0), "t3-inf": (4, 1)}


def test_quartiles_part_the_draws_evenly():
    sampler = LogNormalSigma(-0.8, 1.6)
    draws = sampler.sample(training_noise(0, range(4000)), 4000).flatten()
    shares = [float((draws < edge).float().mean()) for edge in sampler.quartiles()]
    assert shares == pytest.approx([0.25, 0.5, 0.75], abs=0.03)


def test_means_of_sums_and_of_nothing():
    means = RunningMeans()
    means.add("a", torch.tensor(6.0), torch.tensor(2))
    means.add("a", 0, 1)
    means.add("empty", 0.0, 0)
    assert means.read() == {"a": 2.0} and means.read() == {}


def test_a_distillation_reports_everything(tmp_path, tiny_data, tiny_teacher):
    config = dataclasses.replace(NCVSD, duration=32, gan_warmup_kimg=0, batch_gpu=4)
    run_training(make_task(config, tiny_teacher), ImageDataset(tiny_data), config, tmp_path)
    lines = stats(tmp_path)
    last = lines[-1]
    for loss in ("score", "disc_fake", "disc_real", "vsd", "gan"):
        parts = [key for line in lines for key in line if key.startswith(f"Levels/{loss}_t")]
        assert len(set(parts)) == 4, loss  # the smallest batches leave some empty
    for name in ("score", "disc", "gen"):
        assert last[f"Weights/{name}_norm"] > 0 and math.isfinite(last[f"Gradients/{name}_norm"])
        assert last[f"Nonfinite/{name}_total"] == 0
    assert last["Rates/gen"] == pytest.approx(0.1 * last["Progress/lr"])
    assert all(0 <= last[f"Discriminator/accuracy_{kind}"] <= 1 for kind in ("fake", "real"))
    skips = [key for key in last if key.startswith("Control/gen_skip")]
    assert len(skips) == len(make_task(config, tiny_teacher).result.model.dec.additional_skips_weight)
    assert 0 <= last["Control/score_x"] <= 1
    status = (tmp_path / "log.txt").read_text().splitlines()[-2]
    assert re.search(
        r"32 of 32 images  [\d.]+ img/s  ETA 0s  memory [\d.]+ [MG]iB.*score .*disc_fake .*vsd .*gan", status
    )
    for name in ("000000032-score_view", "000000032-teacher_view", "000000032-1step", "teacher"):
        assert read_image(tmp_path / f"grid-{name}.png").ndim == 3


def test_level_sums_make_up_the_loss(tmp_path, tiny_data, tiny_teacher):
    run_training(make_task(EDM2, tiny_teacher), ImageDataset(tiny_data), EDM2, tmp_path)
    (line,) = stats(tmp_path)
    parts = [value for key, value in line.items() if key.startswith("Levels/edm2_")]
    assert 1 < len(parts) <= 4 and min(parts) <= line["Loss/edm2"] <= max(parts)


def test_snapshots_are_measured(tmp_path):
    config = dataclasses.replace(NCVSD, duration=8, snapshot=8)
    task = make_task(config, ROOT / "assets/demo/teacher.safetensors")  # 16x16, as the detector wants
    dataset = ImageDataset(ROOT / "assets/fashion16.zip", max_size=64)
    device = torch.device("cpu")
    options = dict(run_dir=tmp_path, batch=8, schedules=task.schedules)
    evaluate = snapshot_metrics("fd_demo", 12, dataset, device, **options)
    (reference,) = tmp_path.glob("eval-reference-*.npz")
    run_training(task, dataset, config, tmp_path, evaluate=evaluate)
    for name in ("1step", "ts20_39"):
        key = f"Metrics/fd_demo_{name}"
        found = [(line["nimg"], line[key]) for line in stats(tmp_path) if key in line]
        assert [nimg for nimg, _ in found] == [0, 8] and all(value > 0 for _, value in found)
    written = reference.stat().st_mtime_ns
    snapshot_metrics("fd_demo", 12, dataset, device, **options)
    assert reference.stat().st_mtime_ns == written  # used again
    other = ImageDataset(ROOT / "assets/fashion16.zip", max_size=32)
    for metrics, data in (("kid:fd_demo", dataset), ("fd_demo", other)):
        before = set(tmp_path.glob("eval-reference-*.npz"))
        snapshot_metrics(metrics, 12, data, device, **options)
        assert len(set(tmp_path.glob("eval-reference-*.npz")) - before) == 1  # of its own
    with pytest.raises(ValueError, match="no metric 'fd_other'"):
        snapshot_metrics("fd_other", 12, dataset, device, **options)


def test_half_precision_on_the_cpu_stays_finite(tmp_path, tiny_data, tiny_teacher):
    config = dataclasses.replace(NCVSD, duration=24, gan_warmup_kimg=0)
    task = make_task(config, tiny_teacher)
    for net in (task.teacher, *(phase.net for phase in task.phases)):
        net.compute_dtype = torch.bfloat16
    run_training(task, ImageDataset(tiny_data), config, tmp_path)
    last = stats(tmp_path)[-1]
    assert all(math.isfinite(last[f"Loss/{name}"]) for name in ("score", "disc_real", "vsd", "gan"))


def test_status_line():
    values = {"Progress/img_per_s": 100.0, "Memory/host_gib": 2.0, "Memory/gpu_gib": 30.5, "Loss/score": 0.123456}
    line = status_line(1000, 361_000, values)
    assert line == "1000 of 361000 images  100 img/s  ETA 1h 00m  memory 2.0 GiB  GPU 30.5 GiB  score 0.1235"


def test_sheets_show_64_images_and_the_teachers_63_evaluations(tmp_path, dataset, tiny_teacher, monkeypatch):
    spec = importlib.machinery.PathFinder.find_spec("training.run.session", training.run.__path__)
    real = importlib.util.module_from_spec(spec)  # the other tests change it: tests/startup/sitecustomize.py
    spec.loader.exec_module(real)
    monkeypatch.setattr(session, "GRID_SEEDS", real.GRID_SEEDS)
    monkeypatch.setattr(session, "draw", real.draw)
    task, calls = make_task(NCVSD, tiny_teacher), []
    task.teacher.register_forward_hook(lambda *_: calls.append(1))
    run_training(task, dataset, NCVSD, tmp_path)
    whole = session.image_grid(torch.zeros(64, 1, 8, 8, dtype=torch.uint8)).shape
    assert {read_image(path).shape for path in tmp_path.glob("grid-*.png")} == {whole}
    batches = 64 // NCVSD.batch_gpu
    assert len(calls) == batches * 63 + 2 * batches + 1  # its sheet, two views of the student, one update
