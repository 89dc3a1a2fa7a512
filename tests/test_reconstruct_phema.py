"""Post-hoc EMA against measured coefficients, against averages tracked in training, and on other people's files."""

import dataclasses
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import networks
import reconstruct_phema
from data.dataset import ImageDataset
from networks.encoders import RGBEncoder
from tests.training.tiny_runs import EDM2, make_task, run_training
from training.phema import std_to_exp
from training.reconstruction import ReconstructionError, find_snapshots, plan_reconstruction, reconstruct

DATA = Path(__file__).parent / "data"


def run(*arguments):
    return CliRunner().invoke(reconstruct_phema.main, [str(argument) for argument in arguments] + ["--quiet"])


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, tiny_data, tiny_teacher):
    """Folder of a short run with snapshots of two profiles, and the average of a third one tracked in training."""
    folder = tmp_path_factory.mktemp("tracked")
    config = dataclasses.replace(EDM2, duration=8 * 48, snapshot=8 * 4, ref_lr=3e-2, status=1 << 20)
    run_training(make_task(config, tiny_teacher), ImageDataset(tiny_data), config, folder / "run")
    third = dataclasses.replace(config, ema_stds=(0.08,), snapshot=1 << 20)
    direct = run_training(make_task(third, tiny_teacher), ImageDataset(tiny_data), third, folder / "third")
    return folder / "run", direct


def distance(a, b):
    """Relative distance of two networks' weights."""
    pairs = [(p, dict(b.named_parameters())[name]) for name, p in a.named_parameters()]
    norm = torch.stack([q.norm() for _, q in pairs]).norm()
    return float(torch.stack([(p - q).norm() for p, q in pairs]).norm() / norm)


def test_a_profile_that_was_not_stored_comes_out_as_if_it_had_been_tracked(tracked, tmp_path):
    folder, direct = tracked
    result = run(folder, "--std", "0.08,0.05", "--outdir", tmp_path, "--dtype", "float32")
    assert result.exit_code == 0, result.output
    rebuilt = networks.load(tmp_path / "phema-000000384-0.080.safetensors")
    stored = [networks.load(folder / f"network-snapshot-000000384-{std}.safetensors").net for std in ("0.050", "0.100")]
    nearest = min(distance(net, direct) for net in stored)
    assert distance(rebuilt.net, direct) < 0.1 * nearest
    assert rebuilt.config["provenance"]["ema_std"] == 0.08 and rebuilt.config["provenance"]["images_seen"] == 384
    same = networks.load(
        tmp_path / "phema-000000384-0.050.safetensors"
    ).net  # a stored profile is its own reconstruction
    assert distance(same, stored[0]) < 1e-5
    for path in tmp_path.glob("phema-*"):  # no snapshots of training, although their names are alike
        shutil.copy(path, folder)
    assert not [s for s in find_snapshots([folder]) if s.path.name.startswith("phema")]
    result = run(*tmp_path.glob("phema-*"), "--std", "0.08", "--outdir", tmp_path)
    assert result.exit_code == 1 and "was itself reconstructed" in result.output


def test_an_earlier_end_uses_what_came_before(tracked, tmp_path):
    folder, _ = tracked
    result = run(folder, "--std", "0.1", "--nimg", "192", "--outdir", tmp_path)
    assert result.exit_code == 0 and "from 12 snapshots" in result.output
    wanted = networks.load(folder / "network-snapshot-000000192-0.100.safetensors").net
    assert distance(networks.load(tmp_path / "phema-000000192-0.100.safetensors").net, wanted) < 1e-3


def test_coefficients_are_the_measured_ones(tmp_path, tiny_teacher):
    with np.load(DATA / "schedules.npz", allow_pickle=False) as golden:
        nimg, stds = golden["phema_in_ofs"], golden["phema_in_std"]
        for n, std in zip(nimg, stds, strict=True):
            shutil.copy(tiny_teacher, tmp_path / f"network-snapshot-{int(n):09d}-{std:.3f}.safetensors")
        found = find_snapshots([tmp_path])
        plan = plan_reconstruction(found, golden["phema_out_std"].tolist(), max_error=1)
        order = np.lexsort((stds, nimg))
        np.testing.assert_allclose(plan.coefficients, golden["phema_coeff"][order], rtol=1e-4, atol=1e-6)
        assert plan.errors[1] < 1e-6  # of a stored profile


def test_profile_errors_are_those_of_the_integral(tmp_path, tiny_teacher):
    """Against sums over a fine grid of the profiles (γ+1)·τ^γ/T^(γ+1)."""
    for n, std in ((400, 0.05), (400, 0.1), (800, 0.05), (800, 0.1)):
        shutil.copy(tiny_teacher, tmp_path / f"network-snapshot-{n:09d}-{std:.3f}.safetensors")
    found = find_snapshots([tmp_path])
    plan = plan_reconstruction(found, [0.03, 0.08, 0.2], max_error=1)
    tau = (np.arange(200_000) + 0.5) / 200_000 * 800

    def profile(end, std):
        exp = std_to_exp(std)
        return np.where(tau <= end, (exp + 1) / end * (tau / end) ** exp, 0)

    mixes = np.stack([profile(s.nimg, s.std) for s in found]).T @ plan.coefficients
    for mix, std, error in zip(mixes.T, (0.03, 0.08, 0.2), plan.errors, strict=True):
        wanted = profile(800, std)
        assert error == pytest.approx(np.linalg.norm(wanted - mix) / np.linalg.norm(wanted), rel=1e-3)


def save_snapshot(folder, net, nimg, std, seed=0, dataset=None, **settings):
    facts = {"seed": seed, "config": {"batch": 8, "duration": 64, **settings}}
    path = folder / f"network-snapshot-{nimg:09d}-{std:.3f}.safetensors"
    networks.save(path, net, RGBEncoder(), dataset=dataset, provenance=facts)
    return path


def test_snapshots_of_two_runs_are_not_mixed(tmp_path, tiny_teacher):
    net, one, two = networks.load(tiny_teacher).net, tmp_path / "one", tmp_path / "two"
    for std in (0.05, 0.1):
        save_snapshot(one, net, 512, std, dataset={"name": "shoes", "num_images": 20})
    for seed, settings, data, problem in (
        (1, {}, 20, "seed is 1, there 0"),
        (0, {"batch": 16}, 20, "batch is 16, there 8"),
        (0, {}, 30, "dataset num_images is 30, there 20"),
    ):
        facts = dict(seed=seed, dataset={"name": "shoes", "num_images": data}, **settings)
        paths = [save_snapshot(two, net, 1024, std, **facts) for std in (0.05, 0.1)]
        result = run(one, two, "--std", "0.08", "--outdir", tmp_path / "out")
        assert result.exit_code == 1 and problem in result.output and str(paths[0]) in result.output, result.output
        assert result.output.count("\n") == 1 and not (tmp_path / "out").exists()
    for std in (0.05, 0.1):  # of the run, made longer, with data in another place
        save_snapshot(two, net, 1024, std, dataset={"name": "moved", "num_images": 20}, duration=128)
    result = run(one, two, "--std", "0.08", "--outdir", tmp_path / "out")
    assert result.exit_code == 0 and "profile error 4.93%" in result.output, result.output


def test_profiles_that_snapshots_cannot_make_are_refused(tmp_path, tiny_teacher):
    net, out = networks.load(tiny_teacher).net, tmp_path / "out"
    for nimg in (512, 1024):
        for std in (0.05, 0.1):
            save_snapshot(tmp_path, net, nimg, std)
    only = [tmp_path / "network-snapshot-000000512-0.050.safetensors"]
    for paths, options, problem in (
        ([tmp_path], ["--std", "0.08", "--nimg", "900"], "none is at 900 images (nearest: 512 and 1024)"),
        (only, ["--std", "0.08"], "the profile of width 0.08 would be 43.4% off"),
        ([tmp_path], ["--std", "0.08,0.001"], "the profile of width 0.001 would be 139.2% off"),
        ([tmp_path], ["--std", "1e-9"], "widths are at least 0.001"),
    ):
        result = run(*paths, *options, "--outdir", out)
        assert result.exit_code != 0 and problem in result.output, result.output
        assert not out.exists()


@pytest.mark.parametrize("outdir", ["file", "file/below"])
def test_a_folder_that_cannot_be_is_told_before_reading(outdir, tmp_path, tiny_teacher, monkeypatch):
    (tmp_path / "file").write_text("kept")
    save_snapshot(tmp_path, networks.load(tiny_teacher).net, 512, 0.05)
    monkeypatch.setattr(networks, "load", lambda path: pytest.fail("was read"))
    result = run(tmp_path, "--std", "0.05", "--outdir", tmp_path / outdir)
    assert result.exit_code == 2 and f"'--outdir': {tmp_path / 'file'} is a file: name a folder" in result.output
    assert result.output.count("Error") == 1 and (tmp_path / "file").read_text() == "kept"


def test_edm2_pickles_are_read(tmp_path):
    source = DATA / "edm2-tiny-0000000-0.100.pkl"
    for kimg, std in ((1000, 0.05), (1000, 0.1), (2000, 0.05), (2000, 0.1)):
        shutil.copy(source, tmp_path / f"network-snapshot-{kimg:07d}-{std:.3f}.pkl")
    result = run(tmp_path, "--std", "0.07", "--outdir", tmp_path / "out", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    net = networks.load(tmp_path / "out/phema-002000000-0.070.safetensors").net
    assert distance(net, networks.load(source).net) < 1e-5  # all the same network: the coefficients sum to 1


def test_memory_holds_one_snapshot_and_the_results(tmp_path, tiny_teacher, monkeypatch):
    alive, most = set(), []
    real = networks.load

    def load(path):
        loaded = real(path)
        alive.add(path)
        weakref.finalize(loaded.net, alive.discard, path)
        most.append(len(alive))
        return loaded

    monkeypatch.setattr(networks, "load", load)
    for n in range(1, 6):
        shutil.copy(tiny_teacher, tmp_path / f"network-snapshot-{n:06d}000-0.100.safetensors")
    reconstruct(plan_reconstruction(find_snapshots([tmp_path]), [0.1, 0.05], max_error=1))
    assert len(most) == 5 and max(most) == 1


def test_mistakes_end_in_one_line(tmp_path, tiny_teacher):
    folder = tmp_path / "run"
    folder.mkdir()
    assert "no snapshots in" in run(folder, "--std", "0.1", "--outdir", tmp_path).output
    shutil.copy(tiny_teacher, folder / "network-snapshot-000001000-0.100.safetensors")
    assert "write numbers with commas" in run(folder, "--std", "wide", "--outdir", tmp_path).output
    assert "must lie in (0, 0.2886]" in run(folder, "--std", "0.5", "--outdir", tmp_path).output
    assert (
        "none is at 2000 images (nearest: 1000)"
        in run(folder, "--std", "0.1", "--nimg", "2k", "--outdir", tmp_path).output
    )
    assert "no such file" in run(tmp_path / "absent", "--std", "0.1", "--outdir", tmp_path).output
    assert "a snapshot's name ends in" in run(tiny_teacher, "--std", "0.1", "--outdir", tmp_path).output
    other = networks.Precond(8, 1, 0, model_channels=16, channel_mult=[1], num_blocks=1)
    networks.save(folder / "network-snapshot-000002000-0.100.safetensors", other, RGBEncoder())
    result = run(folder, "--std", "0.1", "--outdir", tmp_path)
    assert result.exit_code == 1 and "another kind of network" in result.output and result.output.count("\n") == 1
    shutil.copy(tiny_teacher, folder / "copy-000001000-0.100.safetensors")
    with pytest.raises(ReconstructionError, match="are the same profile"):
        find_snapshots([folder])
