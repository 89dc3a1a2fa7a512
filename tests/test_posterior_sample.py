import csv
import io
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from generation.pictures import read_image
from inverse.operators import get_operator
from networks import GenerativeDenoiser, Precond, PrecondCondition, save
from networks.encoders import RGBEncoder
from posterior_sample import main
from tests import warm
from tests.conftest import TINY_NET, write_images
from tests.golden_utils import fill_by_name

ROOT = Path(__file__).parents[1]
NET16 = {**TINY_NET, "img_resolution": 16, "label_dim": 0}


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    """Paths of small random generative denoisers of 16x16 images, without and with 3 classes, and of a teacher."""
    folder = tmp_path_factory.mktemp("nets")
    for name, options, seed in (("plain", NET16, 2), ("classes", {**NET16, "label_dim": 3}, 3)):
        save(folder / name, GenerativeDenoiser(fill_by_name(PrecondCondition(**options), seed)).eval(), RGBEncoder())
    save(folder / "teacher", fill_by_name(Precond(**NET16), 4).eval(), RGBEncoder())
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A ZIP of three smooth grey 16x16 images with classes 0 to 2."""
    row = np.linspace(0, 3, 16)
    waves = [np.sin(row[:, None] * a + row * b) for a, b in ((1, 2), (2, 1), (3, 0.5))]
    images = np.stack([(127 + 120 * wave).astype(np.uint8) for wave in waves])
    return write_images(tmp_path_factory.mktemp("data") / "waves.zip", images, range(3))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    path = tmp_path_factory.mktemp("task") / "half.yaml"
    path.write_text("operator: {name: super_resolution, factor: 2}\nbeta: 5e-3\nsteps: 4\nruns: 3\nsigma_min: 0.05\n")
    return path


def run(*arguments, code=0):
    result = CliRunner().invoke(main, [*map(str, arguments), "--device", "cpu", "--quiet"])
    assert result.exit_code == code, (result.output, result.exception)
    if code:
        assert "Traceback" not in result.output
    return result.output


def contents(folder, *patterns):
    return {str(p.relative_to(folder)): p.read_bytes() for pattern in patterns for p in sorted(folder.rglob(pattern))}


@pytest.fixture(scope="module")
def finished(nets, data, task, tmp_path_factory):
    """The results of three images with three runs each."""
    out = tmp_path_factory.mktemp("finished") / "out"
    text = run("--net", nets / "plain", "--task", task, "--data", data, "--outdir", out, "--batch", 4)
    return out, text


def test_everything_is_written_and_the_numbers_are_those_of_the_files(finished):
    out, text = finished
    names = [f"00000-img{i:08d}" for i in range(3)]
    for folder in ("truth", "measurements", "mean", "std", "samples/run_0", "samples/run_1", "samples/run_2"):
        assert sorted(path.stem for path in (out / folder).glob("*.png")) == names, folder
    report = json.loads((out / "metrics.json").read_text())
    operator = get_operator("super_resolution", factor=2)
    psnrs = np.zeros((3, 3))
    for i, image in enumerate(report["images"]):
        assert image["name"] == names[i]
        truth = read_image(out / "truth" / f"{names[i]}.png") / 255
        y = torch.from_numpy(np.load(out / "measurements" / f"{names[i]}.npz", allow_pickle=False)["y"])[None]
        residuals = []
        for j, result in enumerate(image["runs"]):
            sample = read_image(out / f"samples/run_{j}/{names[i]}.png") / 255
            psnrs[i, j] = 10 * np.log10(1 / np.mean((sample - truth) ** 2))
            assert result["psnr"] == pytest.approx(psnrs[i, j], abs=1e-4)
            residual = operator.residual(torch.from_numpy(2 * sample - 1)[None].float(), y).item()
            assert result["residual"] == pytest.approx(residual, abs=5e-3)
            residuals.append(result["residual"])
        assert image["chosen_run"] == np.argmin(residuals) and image["oracle_run"] == psnrs[i].argmax()
    summary = report["summary"]
    assert summary["sample"]["psnr"]["mean"] == pytest.approx(psnrs.mean(), abs=1e-4)
    assert summary["oracle"]["psnr"]["mean"] == pytest.approx(psnrs.max(axis=1).mean(), abs=1e-4)
    assert summary["posterior_mean"]["psnr"]["mean"] > summary["sample"]["psnr"]["mean"]
    rows = list(csv.DictReader(io.StringIO((out / "metrics.csv").read_text())))
    assert len(rows) == 12 and sum("oracle" in row["role"] for row in rows) == 3
    assert report["lpips"]["computed"] is False and "vgg16" in report["lpips"]["note"]
    assert "best by truth (oracle)" in text and "calibration" in text and "LPIPS not computed" in text
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64") >= 3 * 7 and "<script" not in page


def test_a_second_call_finishes_what_is_missing_and_refuses_other_options(
    finished, nets, data, task, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    before = contents(out, "*.png", "*.npz", "metrics.json")
    (out / "records" / "00000-img00000001.json").unlink()
    kept = (out / "samples/run_0/00000-img00000000.png").stat().st_mtime_ns
    command = ["--net", nets / "plain", "--task", task, "--data", data, "--outdir", out]
    monkeypatch.setattr("networks.checkpoints.open_url", lambda url, **_: nets / "plain")
    command[1] = "https://me:secret@host/net?secret"
    assert "2 were finished before" in run(*command, "--batch", 5)
    assert json.loads((out / "options.json").read_text())["net"] == "https://host/net"
    after = contents(out, "*.png", "*.npz", "metrics.json")
    assert after.keys() == before.keys() and (out / "samples/run_0/00000-img00000000.png").stat().st_mtime_ns == kept
    pngs = [name for name in before if name.endswith(".png")]
    difference = [_pixels(before[name]).astype(int) - _pixels(after[name]) for name in pngs]
    assert max(np.abs(d).max() for d in difference) <= 1  # another batch: rounding
    message = run(*command, "--seed", 1, "--beta", 0.1, code=1)
    assert "seed: 0 there, 1 now" in message and "task.beta: 0.005 there, 0.1 now" in message
    assert contents(out, "*.png", "*.npz", "metrics.json") == after


def _pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def test_an_image_depends_on_its_name_and_the_seed_alone(finished, nets, data, task, tmp_path):
    command = ["--net", nets / "plain", "--task", task, "--data", data]
    run(*command, "--outdir", tmp_path / "one", "--num", 1, "--runs", 2, "--batch", 1)
    run(*command, "--outdir", tmp_path / "other", "--num", 1, "--runs", 2, "--seed", 9)
    for run_index in range(2):
        file = f"samples/run_{run_index}/00000-img00000000.png"
        reference = read_image(finished[0] / file).astype(int)
        assert np.abs(reference - read_image(tmp_path / "one" / file)).max() <= 1
        assert np.abs(reference - read_image(tmp_path / "other" / file)).max() > 1


def test_real_measurements_give_the_same_samples_without_the_truth(finished, nets, task, tmp_path):
    folder = tmp_path / "y"
    folder.mkdir()
    for path in (finished[0] / "measurements").glob("*.npz"):
        shutil.copy(path, folder)
    text = run("--net", nets / "plain", "--task", task, "--measurements", folder, "--outdir", tmp_path / "out")
    assert "PSNR" not in text and "residual" in text
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert not report["has_truth"] and set(report["summary"]["sample"]) == {"residual"}
    assert not (tmp_path / "out" / "truth").exists() and "oracle_run" not in report["images"][0]
    for path in finished[0].glob("samples/*/*.png"):
        same = read_image(tmp_path / "out" / path.relative_to(finished[0])).astype(int)
        assert np.abs(same - read_image(path)).max() <= 1
    assert (tmp_path / "out" / "report.html").exists()


def test_two_processes_share_the_images(finished, nets, data, task, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    command += ["posterior_sample.py", "--net", nets / "plain", "--task", task, "--data", data, "--device", "cpu"]
    done = warm.run(
        [*map(str, command), "--outdir", str(tmp_path / "out"), "--quiet"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    for path in finished[0].glob("samples/*/*.png"):
        other = read_image(tmp_path / "out" / path.relative_to(finished[0])).astype(int)
        assert np.abs(other - read_image(path)).max() <= 1
    assert len(json.loads((tmp_path / "out" / "metrics.json").read_text())["images"]) == 3


def test_overrides_few_steps_and_a_mask_of_ones_own(nets, data, tmp_path):
    mask = np.full((16, 16), 255, np.uint8)
    mask[3:6, 2:9] = 0
    Image.fromarray(mask).save(tmp_path / "mask.png")
    out = tmp_path / "out"
    settings = ["--beta", 0.01, "--steps", 3, "--ts", "10,22", "--zeta", 0.5, "--noise", 0.0, "--sigma-min", 0.1]
    command = ["--net", nets / "plain", "--task", "box_inpainting", "--mask", tmp_path / "mask.png", *settings]
    run(*command, "--data", data, "--num", 2, "--outdir", out)
    task = json.loads((out / "options.json").read_text())["task"]
    assert (task["beta"], task["steps"], task["ts"], task["zeta"], task["noise"]) == (0.01, 3, [10, 22, 39], 0.5, 0)
    assert task["ema_decay"] == 0.2  # the preset's
    assert np.array_equal(read_image(out / "mask.png")[0], mask)
    picture = read_image(out / "measurements/00000-img00000000.png")
    truth = read_image(out / "truth/00000-img00000000.png")
    assert np.array_equal(picture[0][mask > 0], truth[0][mask > 0]) and (picture[0][mask == 0] == 128).all()


def test_classes_come_from_the_option_or_the_data(nets, data, task, tmp_path):
    command = ["--net", nets / "classes", "--task", task, "--data", data]
    run(*command, "--class", "data", "--outdir", tmp_path / "data", "--runs", 1)
    run(*command, "--class", "1", "--outdir", tmp_path / "one", "--runs", 1)
    for i in range(3):
        file = f"samples/run_0/00000-img{i:08d}.png"
        a, b = read_image(tmp_path / "data" / file).astype(int), read_image(tmp_path / "one" / file)
        assert (np.abs(a - b).max() <= 1) == (i == 1)
    assert not (tmp_path / "one" / "mean").exists()
    assert "give one with --class" in run(*command, "--outdir", tmp_path / "x", code=1)
    assert "classes 0 to 2, and not 3" in run(*command, "--class", "3", "--outdir", tmp_path / "x", code=1)
    plain = ["--net", nets / "plain", "--task", task, "--data", data, "--outdir", tmp_path / "x"]
    assert "has no classes" in run(*plain, "--class", "1", code=1)
    assert not (tmp_path / "x").exists()


def test_images_of_another_size_need_resize(nets, task, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(np.tile(np.arange(48, dtype=np.uint8) * 5, (32, 1))).save(folder / "wide.jpg")
    command = ["--net", nets / "plain", "--task", task, "--data", folder, "--outdir", tmp_path / "out", "--runs", 1]
    message = run(*command, code=1)
    assert "wide.jpg: 48x32 pixels" in message and "--resize" in message
    assert not (tmp_path / "out").exists()
    run(*command, "--resize")
    truth = read_image(tmp_path / "out" / "truth" / "wide.png")[0].astype(int)
    assert (
        truth.shape == (16, 16) and np.abs(truth[8] - (np.arange(16) * 2 + 8.5) * 5).max() < 6
    )  # the middle 32 columns
    rgb = np.zeros((16, 16, 3), np.uint8)
    rgb[..., 0] = 200
    Image.fromarray(rgb).save(folder / "wide.jpg")
    assert "a colour image" in run(*command[:-4], "--outdir", tmp_path / "rgb", code=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--task", "superresolution"],
            "there is no task 'superresolution': give a .yaml file or one of box_inpainting",
        ),
        (["--net", "{nets}/teacher"], "inverse problems need a generative denoiser"),
        (["--data", "{tmp}/nowhere"], "no such folder or ZIP file"),
        (["--num", "4"], "holds 3 images, fewer than the 4 asked for"),
        (["--measurements", "{tmp}"], "give either --data"),
        (["--task", "box_inpainting"], "box [64, 64, 128, 128] reaches beyond images of 16x16 pixels"),
        (["--task", "phase_retrieval", "--likelihood", "exact"], "no exact likelihood step"),
        (["--mask", "{tmp}/mask.png"], "--mask belongs to inpainting"),
        (["--dtype", "fp16"], "--dtype fp16 needs a CUDA device, and this run is on cpu"),
        (["--sigma-min", "90"], "sigma_min 90.0 must be below sigma_max 80.0"),
        (["--ema-decay", "1"], "Error: ema_decay is a share"),
        (["--outdir", ""], "it is empty: name a folder"),
        (["--zeta", "0.5", "--ts", "39"], "ts"),
        (["--lpips-path", "{tmp}/vgg.pth"], "no vgg16-397923af.pth at"),
        (["--outdir", "{data}"], "is a file: name a folder"),
        (["--data", "{tmp}", "--outdir", "{tmp}/results"], "results would be taken for input"),
    ],
)
def test_bad_requests_get_one_line_and_write_nothing(arguments, message, nets, data, task, tmp_path):
    places = {"nets": nets, "tmp": tmp_path, "data": data}
    command = ["--net", nets / "plain", "--task", task, "--data", data, "--outdir", tmp_path / "out"]
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "grey.png")
    before = sorted(tmp_path.rglob("*"))
    usage = {"--measurements", "--mask", "--ts", "", "{data}"} & set(arguments)
    text = run(*command, *(argument.format(**places) for argument in arguments), code=2 if usage else 1)
    assert message in " ".join(text.split())
    assert sorted(tmp_path.rglob("*")) == before


def test_colour_photos_with_odd_names_and_one_run(tmp_path):
    options = {**NET16, "img_channels": 3}
    save(tmp_path / "net", GenerativeDenoiser(fill_by_name(PrecondCondition(**options), 5)).eval(), RGBEncoder())
    photos = tmp_path / "my photos"
    (photos / "größe 1").mkdir(parents=True)
    columns = np.zeros((20, 30, 3), np.uint8)
    columns[:, :15, 0] = 250
    names = ["größe 1/a\\b: 日本.png", "line\nbreak.png", "50% <b>.bmp"]
    for name in names:
        Image.fromarray(columns).save(photos / name)
    out = tmp_path / "out"
    run(
        "--net",
        tmp_path / "net",
        "--task",
        "random_inpainting",
        "--data",
        photos,
        "--outdir",
        out,
        "--steps",
        3,
        "--resize",
    )
    records = json.loads((out / "metrics.json").read_text())["images"]
    assert [record["name"] for record in records] == ["50% <b>", "größe 1-a-b- 日本", "line-break"]
    for record in records:
        truth = read_image(out / "truth" / f"{record['name']}.png")
        assert truth.shape == (3, 16, 16) and truth[0, 8, 1] > 240 and truth[0, 8, 14] < 10 and truth[1:].max() < 10
        assert len(record["runs"]) == 1 and "posterior_mean" not in record
    assert "größe 1-a-b- 日本" in (out / "report.html").read_text(encoding="utf-8")


def test_a_bad_image_or_measurement_is_told_before_anything_is_drawn(nets, data, task, tmp_path):
    folder, out = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    for name in ("a", "b"):
        Image.fromarray(np.full((16, 16), 90, np.uint8)).save(folder / f"{name}.png")
    whole = (folder / "b.png").read_bytes()
    (folder / "b.png").write_bytes(whole[:40])
    command = ["--net", nets / "plain", "--data", folder, "--outdir", out, "--steps", 3]
    assert "b.png" in run(*command, "--task", task, code=1) and not out.exists()
    y = tmp_path / "y"
    y.mkdir()
    np.savez(y / "a.npz", y=np.zeros((1, 8, 8)))
    np.savez(y / "b.npz", y=np.zeros((1, 8, 9)))
    message = run("--net", nets / "plain", "--task", task, "--measurements", y, "--outdir", out, code=1)
    assert "b.npz: a measurement of shape [1, 8, 9]" in message and not out.exists()


def test_diverged_langevin_is_told_in_one_line_and_recorded(nets, data, task, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "posterior_sample.py", "--net", nets / "plain", "--task", task, "--data", data]
    command += ["--likelihood", "langevin", "--langevin-c1", 3, "--langevin-steps", 20, "--num", 2, "--outdir", out]
    done = warm.run(
        [*map(str, command), "--device", "cpu", "--quiet"], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "metrics.json").read_text())
    count = report["langevin_retries"]
    assert count > 0 and count == sum(image["retries"] for image in report["images"])
    assert done.stdout.count(f"repeated with a smaller step size {count} times") == 1
    assert "Warning" not in done.stderr and "solve.py" not in done.stderr
    assert f"<b>{count} times</b>" in (out / "report.html").read_text()


def test_images_too_small_for_ssim_and_lpips(task, tmp_path):
    options = {**NET16, "img_resolution": 8}
    save(tmp_path / "net", GenerativeDenoiser(fill_by_name(PrecondCondition(**options), 6)).eval(), RGBEncoder())
    (tmp_path / "images").mkdir()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4).save(tmp_path / "images" / "a.png")
    out = tmp_path / "out"
    run("--net", tmp_path / "net", "--task", task, "--data", tmp_path / "images", "--outdir", out)
    report = json.loads((out / "metrics.json").read_text())
    assert set(report["summary"]["sample"]) == {"psnr", "residual"}
    assert "at least 16x16 pixels" in report["lpips"]["note"] and (out / "report.html").exists()
