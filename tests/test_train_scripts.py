"""train_edm2.py and train_ncvsd.py from the command line: what they write, and what they say to mistakes."""

import json
import re
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import networks
import train_edm2
import train_ncvsd
from generation.images import generate_images
from generation.pictures import read_image
from tests.train_commands import SMALL, SMALL_NET, mistake, replaced, run

ROOT = Path(__file__).parents[1]


def test_every_documented_option_is_there():
    text = run(train_ncvsd, "--help").output
    wanted = "outdir net data cond preset ts duration batch batch-gpu dtype ls status snapshot checkpoint seed device"
    for name in [*wanted.split(), "workers", "dry-run", "g-lr-scaling", "gan-warmup-kimg", "nonfinite", "rampup-mimg"]:
        assert f"--{name} " in text or f"--{name}," in text, name
    assert "-n, --dry-run" in text and "fashion16-teacher" not in text  # a teacher's preset is none of this script's


def test_a_dry_run_writes_nothing(tmp_path, distil, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_ncvsd.py", "--net=https://me:secret@host/t.pkl?token=secret"])
    result = run(train_ncvsd, *distil, "-n", "--duration", "2Ki", "--preset", "img64-s", "--gamma", "0.3")
    assert result.exit_code == 0, result.output
    settings = json.loads(next(line for line in result.output.splitlines() if line.startswith("settings"))[8:])
    assert settings["duration"] == 2048 and settings["gamma"] == 0.3 and settings["batch"] == 8
    assert settings["ref_batches"] == 35000  # of the preset
    assert "command   train_ncvsd.py --net=https://host/t.pkl\n" in result.output
    assert "dry run" in result.output and not (tmp_path / "run").exists()


def test_a_dry_run_refuses_what_a_run_refuses(tmp_path, distil):
    folder = tmp_path / "run"
    for given, message in (
        (["--eval-metric=x"], "no metric 'x'"),
        (["--eval-metric=fd_demo"], r"fd_demo takes uint8 images \[N,1,16,16\]"),  # of 8x8 images
        (["--eval-metric=kid:x"], "kid:x"),
    ):
        told = [mistake(train_ncvsd, *distil, *given, *dry) for dry in ([], ["-n"])]
        assert all(re.search(message, line) for line in told), told
        assert not folder.exists()
    assert run(train_ncvsd, *distil).exit_code == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
    other = [mistake(train_ncvsd, *distil, "--g-lr-scaling=0.5", *dry) for dry in ([], ["-n"])]
    assert other[0] == other[1] and "g_lr_scaling is 0.01, now 0.5" in other[0]
    result = run(train_ncvsd, *distil, "-n", "--duration=16")
    assert result.exit_code == 0 and "it would resume at 8 images" in result.output
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"} == before
    state = next(folder.glob("training-state-*"))
    state.write_bytes(b"damaged")
    assert "no valid training state is left" in mistake(train_ncvsd, *distil, "-n")
    assert state.read_bytes() == b"damaged"


def test_a_short_run_of_a_small_preset_changes_the_student(tmp_path):
    paths = ["--net", ROOT / "assets/demo/teacher.safetensors", "--data", ROOT / "assets/fashion16.zip"]
    arguments = [*paths, "--outdir", tmp_path, "--preset", "fashion16", "--duration"]
    result = run(train_ncvsd, *arguments, "128", "--eval-ts=20,39")
    assert result.exit_code == 0 and "warning" not in result.output, result.output
    first, last = (networks.load(tmp_path / f"network-snapshot-000000{n}-0.050.safetensors") for n in ("000", "128"))
    weights = [loaded.net.state_dict() for loaded in (first, last)]
    assert any(not torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_a_run_whose_generator_never_learns_says_so(tmp_path, distil):
    for dry in (["-n"], []):
        result = run(train_ncvsd, *distil, "--g-delay-kimg=1", *dry)
        assert result.exit_code == 0 and "warning   the generator never learns" in result.output
    assert "warning   the generator never learns" in (tmp_path / "run/log.txt").read_text()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (".lock", r"Error: .*\.lock: Is a directory"),
        ("run.json", r"Error: .*run\.json: Is a directory"),
        ("log.txt", r"log\.txt could not be written \(Is a directory\)"),
        ("stats.jsonl", r"stats\.jsonl could not be written \(Is a directory\)"),
        (
            "network-snapshot-000000000-0.050.safetensors",
            r"snapshot at 0 images could not be written \(Is a directory\)",
        ),
        ("grid-000000000-1step.png", r"snapshot at 0 images could not be written \(Is a directory\)"),
        ("training-state-000000008-00000000.pt", r"Error: no valid training state is left .*Is a directory"),
    ],
)
def test_a_folder_where_a_file_should_be_is_told_in_one_line(name, message, tmp_path, distil):
    (tmp_path / "run" / name).mkdir(parents=True)
    result = run(train_ncvsd, *distil)
    assert result.exit_code == (1 if message.startswith("Error") else 0), result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert len([line for line in result.output.splitlines() if re.search(message, line)]) == 1, result.output
    assert (tmp_path / "run" / name).is_dir()


def test_a_distillation_leaves_what_it_should(tmp_path, distil, tiny_data, tiny_teacher):
    result = run(train_ncvsd, *distil, "--eval-ts=30,39", "--duration=24", "--seed=3", "--gan-warmup-kimg=0.008")
    assert result.exit_code == 0, result.output
    folder = tmp_path / "run"
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("events"))
    states = [name for name in names if name.startswith("training-state")]
    assert [name[:24] for name in states] == ["training-state-000000016", "training-state-000000024"]
    snapshots = [f"network-snapshot-{n:09d}-{std}.safetensors" for n in (0, 8, 16, 24) for std in ("0.050", "0.100")]
    views = ("1step", "ts20_39", "ts30_39", "score_view", "teacher_view")
    grids = ["grid-teacher.png", *(f"grid-{n:09d}-{name}.png" for n in (0, 8, 16, 24) for name in views)]
    assert names == sorted([*states, *snapshots, *grids, ".lock", "log.txt", "run.json", "stats.jsonl"])
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1
    assert "finished at 24 images" in (folder / "log.txt").read_text()

    lines = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    assert [line["nimg"] for line in lines] == [8, 16, 24]
    for name in ("Loss/score", "Loss/vsd", "Loss/gan", "Loss/disc_real", "Loss/disc_fake", "Progress/img_per_s"):
        assert isinstance(lines[-1][name], float), name

    for name in grids:
        assert read_image(folder / name).shape[0] in (1, 3)
    loaded = networks.load(folder / snapshots[-1])
    assert isinstance(loaded.net, networks.GenerativeDenoiser) and loaded.net.gamma == 0.414
    facts = loaded.config["provenance"]
    assert (facts["images_seen"], facts["ema_std"], facts["seed"]) == (24, 0.10, 3)
    assert facts["config"]["batch"] == 8 and loaded.config["dataset"]["num_images"] == 20
    assert "command" in facts and "git_commit" in facts
    drawn = next(iter(generate_images(loaded.net, loaded.encoder, seeds=range(4), batch=4, ts=(10, 22, 39))))
    assert drawn.images.shape == (4, 1, 8, 8) and drawn.images.dtype == torch.uint8


def test_pretraining_and_then_distilling(tmp_path, tiny_data):
    teacher_folder, student_folder = tmp_path / "teacher", tmp_path / "student"
    result = run(
        train_edm2,
        "--data",
        tiny_data,
        "--outdir",
        teacher_folder,
        *SMALL,
        *SMALL_NET,
        "--duration=16",
        "--eval-steps=3",
    )
    assert result.exit_code == 0, result.output
    assert (teacher_folder / "grid-000000016-heun5.png").is_file()
    teacher = teacher_folder / "network-snapshot-000000016-0.100.safetensors"
    assert isinstance(networks.load(teacher).net, networks.Precond)
    result = run(
        train_ncvsd,
        "--net",
        teacher,
        "--data",
        tiny_data,
        "--outdir",
        student_folder,
        *SMALL,
        "--duration=8",
        "--ts=20",
    )
    assert result.exit_code == 0, result.output
    assert (student_folder / "network-snapshot-000000008-0.050.safetensors").is_file()
    assert (student_folder / "grid-000000008-ts20_39.png").is_file()  # the schedule's end was added


def test_the_same_command_again_goes_on(tmp_path, distil):
    for duration in (8, 24):
        result = run(train_ncvsd, *distil, f"--duration={duration}")
        assert result.exit_code == 0, result.output
    log = (tmp_path / "run/log.txt").read_text()
    assert "resuming at 8 images" in log and "finished at 24 images" in log


def test_resuming_with_other_settings_names_the_setting(tmp_path, distil):
    assert run(train_ncvsd, *distil).exit_code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    line = mistake(train_ncvsd, *distil, "--duration=16", "--g-lr-scaling=0.5")
    assert "g_lr_scaling is 0.01, now 0.5" in line and "another --outdir" in line
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


@pytest.mark.parametrize(
    ("shape", "classes", "message"),
    [
        ((6, 8, 8, 3), 3, "has images of 3 channels at 8x8.*works on 1 channels at 8x8"),
        ((6, 16, 16), 3, "1 channels at 16x16.*1 channels at 8x8"),
        ((6, 8, 8), 2, "has 2 classes, the teacher has 3"),
        ((6, 8, 8), 0, "the teacher has 3 classes and .* has no labels"),
    ],
)
def test_data_that_does_not_fit_the_teacher(tmp_path, distil, tiny_images, shape, classes, message):
    path = tiny_images(tmp_path / "other.zip", shape, classes)
    line = mistake(train_ncvsd, *replaced(distil, data=path))
    assert re.search(message, line), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("channels", [1, 4])
def test_latents_for_networks_in_pixel_space(tmp_path, distil, channels):
    (tmp_path / "latents").mkdir()
    for i in range(6):
        np.save(tmp_path / f"latents/{i}.npy", np.zeros([channels, 8, 8], np.float32))
    line = mistake(train_ncvsd, *replaced(distil, data=tmp_path / "latents"))
    assert re.search("latents holds latents, and the teacher .* works on pixels", line), line
    line = mistake(train_edm2, "--data", tmp_path / "latents", "--outdir", tmp_path / "run", *SMALL, *SMALL_NET)
    assert re.search(f"latents holds latents of {channels} channels, not 8", line), line
    assert not (tmp_path / "run").exists()


def test_mistakes_on_the_command_line(tmp_path, distil, tiny_data):
    assert "--dtype fp16 needs a CUDA device" in mistake(train_ncvsd, *distil, "--dtype", "fp16")
    assert "no preset 'img65-s'" in mistake(train_ncvsd, *distil, "--preset", "img65-s")
    assert "is no preset for this script" in mistake(train_ncvsd, *distil, "--preset", "fashion16-teacher")
    assert "duration: 'soon' is not valid" in mistake(train_ncvsd, *distil, "--duration", "soon")
    assert "batch 8 must be a multiple of batch_gpu 3" in mistake(train_ncvsd, *distil, "--batch-gpu", "3")
    assert "must increase strictly" in mistake(train_ncvsd, *distil, "--eval-ts", "22,10,39")
    assert "g_p_mean must lie between -20 and 20, got 100000.0" in mistake(train_ncvsd, *distil, "--g-p-mean", "1e5")
    assert "eval-ts: 'ten' is not valid" in mistake(train_ncvsd, *distil, "--eval-ts", "ten")
    assert "absent.zip" in mistake(train_ncvsd, *replaced(distil, data=tmp_path / "absent.zip"))
    assert "absent.pkl" in mistake(train_ncvsd, *replaced(distil, net=tmp_path / "absent.pkl"))
    assert "Missing option '--net'" in mistake(train_ncvsd, "--data", tiny_data, "--outdir", tmp_path / "run")
    teacher_run = ["--data", tiny_data, "--outdir", tmp_path / "run"]
    assert "is no preset for this script" in mistake(train_edm2, *teacher_run, "--preset", "img64-s")
    assert not (tmp_path / "run").exists()


def test_a_student_is_no_teacher(tmp_path, distil):
    student = ROOT / "tests/data/ncvsd-tiny-0000000-0.050.pkl"
    assert "--net takes a teacher" in mistake(train_ncvsd, *replaced(distil, net=student))


def test_architectures_that_the_data_does_not_allow(tmp_path, tiny_data):
    line = mistake(train_edm2, "--data", tiny_data, "--outdir", tmp_path / "run", *SMALL, "--channel-mult=1,2,2,2,2")
    assert "img_resolution 8 cannot be halved 4 times" in line
    assert not (tmp_path / "run").exists()


def test_an_outdir_that_is_a_file(tmp_path, distil):
    (tmp_path / "run").write_text("in the way")
    assert "run is a file: name a folder" in mistake(train_ncvsd, *distil)
    assert (tmp_path / "run").read_text() == "in the way"


def test_a_corrupt_image_ends_training_in_one_line(tmp_path, distil, tiny_data):
    shutil.copy(tiny_data, tmp_path / "bad.zip")
    data = bytearray((tmp_path / "bad.zip").read_bytes())
    position = data.find(b"IDAT", len(data) // 2)
    data[position + 6 : position + 20] = bytes(14)
    (tmp_path / "bad.zip").write_bytes(data)
    line = mistake(train_ncvsd, *replaced(distil, data=tmp_path / "bad.zip"))
    assert "bad.zip" in line and ".png" in line


def test_corrupt_image_in_a_loader_process_gives_one_line(tmp_path, distil, tiny_images):
    folder = tmp_path / "images"
    with zipfile.ZipFile(tiny_images(tmp_path / "good.zip", (6, 8, 8), 3)) as archive:
        archive.extractall(folder)
    (folder / "00000" / "img00000003.png").write_bytes(b"no image")
    line = mistake(train_ncvsd, *replaced(distil, data=folder), "--workers=1", "--duration=64")
    assert "img00000003.png" in line
