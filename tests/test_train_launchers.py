"""The launchers of the published settings, end to end on the CPU, with tiny stand-ins under the published names."""

import contextlib
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

import networks
from networks.encoders import RGBEncoder
from tests import warm
from tests.edm2_pickles import write_edm2_pickle
from tests.golden_utils import fill_by_name
from tests.servers import serving
from tests.training.tiny_runs import execute, load_newest_state

ROOT = Path(__file__).parents[1]
TEACHERS = {
    "img64-s": "edm2-img64-s-1073741-0.075",
    "img64-m": "edm2-img64-m-2147483-0.060",
    "img64-l": "edm2-img64-l-1073741-0.040",
    "img512-s": "edm2-img512-s-2147483-0.130",
    "img512-m": "edm2-img512-m-2147483-0.100",
    "img512-l": "edm2-img512-l-1879048-0.085",
    "ffhq256-xs": "edm2-ffhq256-xs",
}
DATA = {"img64": "img64.zip", "img512": "img512-sd.zip", "ffhq256": "ffhq256.zip"}
SHORT = ["--batch=8", "--batch-gpu=8", "--duration=8", "--status=8", "--quiet"]
VARIABLES = ("DATA_DIR", "MODEL_ZOO", "OUT", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "DEVICE", "VAE")


def environment(python=Path(sys.executable).parent, **variables):
    kept = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    kept |= {"PATH": f"{python}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return kept | {k: str(v) for k, v in variables.items()}


def launch(script, *arguments, **variables):
    command = ["bash", str(ROOT / "quick_start" / script), *map(str, arguments)]
    return subprocess.run(
        command, env=warm.environment(environment(**variables)), capture_output=True, text=True, timeout=280
    )


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Twelve random pictures in folders of three classes, as ImageNet has them."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(12):
        path = folder / f"n{i % 3:08d}" / f"{i:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, photos, vae):
    """MODEL_ZOO and DATA_DIR with every file that the launchers look for; the data by data_prep.sh."""
    folder = tmp_path_factory.mktemp("edm2")
    zoo, data = folder / "zoo", folder / "data"
    zoo.mkdir()
    for name, options in (("img64", ["--rgb"]), ("img512", []), ("ffhq256", ["--labels=none", "--filter=box"])):
        resolution = 16 if name == "img512" else 8
        source = photos
        if name == "ffhq256":  # square pictures: the published recipe only scales
            source = folder / "square"
            source.mkdir()
            for path in photos.glob("*/*.png"):
                Image.open(path).resize((16, 16)).save(source / path.name)
        result = launch(
            "data_prep.sh", name, source, *options, DATA_DIR=data, VAE=vae, RESOLUTION=f"{resolution}x{resolution}"
        )
        assert result.returncode == 0, result.stderr
    small = dict(model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4], channels_per_head=16)
    for preset, name in TEACHERS.items():
        latent, label_dim = preset.startswith("img512"), 0 if preset.startswith("ffhq") else 3
        net = fill_by_name(networks.Precond(8, 4 if latent else 3, label_dim, **small), 11)
        write_edm2_pickle(zoo / f"{name}.pkl", net, "sd-vae" if latent else "rgb", str(vae))
    return dict(MODEL_ZOO=zoo, DATA_DIR=data)


class Means(torch.nn.Module):
    """A detector that takes images of any size: their mean colours."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=[2, 3]) / 255


@pytest.fixture(scope="session")
def detector(tmp_path_factory):
    """Path of a TorchScript detector."""
    path = tmp_path_factory.mktemp("detector") / "means.pt"
    torch.jit.script(Means()).save(str(path))
    return path


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of the detector
@pytest.mark.parametrize("preset", TEACHERS)
def test_a_launcher_names_its_preset_teacher_and_data(preset):
    words = (ROOT / f"quick_start/train-{preset}.sh").read_text().splitlines()[-1].split()
    assert words[4:] == ["train", preset, f"{TEACHERS[preset]}.pkl", DATA[preset.split("-")[0]], '"$@"']
    assert (ROOT / "presets" / f"{preset}.json").is_file()


@pytest.mark.parametrize("preset", ["img64-s", "img512-m", "ffhq256-xs"])  # one of each data set: sizes differ in names
def test_from_the_launcher_to_a_snapshot_and_its_evaluation(preset, prepared, detector, tmp_path):
    out = tmp_path / "run"
    result = launch(f"train-{preset}.sh", 0, *SHORT, OUT=out, **prepared)
    assert result.returncode == 0, result.stderr
    run = json.loads((out / "run.json").read_text())
    published = json.loads((ROOT / "presets" / f"{preset}.json").read_text())
    for name in ("ref_lr", "ref_batches", "gan_warmup_kimg", "s_p_mean", "s_p_std", "loss_scaling"):
        assert run[name] == published.get(name, 1.0), name
    snapshot = out / "network-snapshot-000000008-0.050.safetensors"
    assert isinstance(networks.load(snapshot).net, networks.GenerativeDenoiser)
    assert len(list(out.glob("grid-000000008-*.png"))) == 4 and (out / "grid-teacher.png").is_file()
    if preset == "ffhq256-xs":  # one evaluation in pixels, one of latents
        return
    data, report = preset.split("-")[0], tmp_path / "report.json"
    reference = prepared["DATA_DIR"] / f"{data}.npz"
    own = ["--detector", detector, "--detector-name", "means"]
    if not reference.exists():
        metrics = ["ref", "--data", reference.with_suffix(".zip"), "--dest", reference, "--metrics", "fd:means"]
        execute([sys.executable, "calculate_metrics.py", *metrics, "--device", "cpu", *own])
    evaluation = dict(REF=reference, METRICS="fd:means", NUM=8, BATCH=8, OUT=report)
    result = launch(f"eval-{data}.sh", 0, "12,39", snapshot, "--quiet", *own, **evaluation)
    assert result.returncode == 0, result.stderr
    assert json.loads(report.read_text())["results"][0]["num_images"] == 8


def test_several_nodes_get_torchruns_options(prepared, fake_python, tmp_path):
    nodes = dict(NNODES=4, NODE_RANK=3, MASTER_ADDR="node0", MASTER_PORT=1234, OUT=tmp_path / "run")
    result = launch("train-img512-m.sh", 8, "--batch-gpu", "16", python=fake_python, **nodes, **prepared)
    assert result.returncode == 0, result.stderr
    launched = (tmp_path / "launched").read_text().splitlines()
    script = launched.index(str(ROOT / "train_ncvsd.py"))
    wanted = "--nproc-per-node 8 --nnodes 4 --node-rank 3 --master-addr node0 --master-port 1234 --"
    assert launched[:script] == [str(ROOT / "quick_start/processes.py"), *wanted.split()]
    assert launched[script + 1 :] == [
        *("--preset", "img512-m", "--net", str(prepared["MODEL_ZOO"] / f"{TEACHERS['img512-m']}.pkl")),
        *("--data", str(prepared["DATA_DIR"] / "img512-sd.zip"), "--outdir", str(tmp_path / "run")),
        *("--device", "cuda", "--batch-gpu", "16"),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-gpu=3"], "batch 8 must be a multiple of batch_gpu 3"),  # before the processes have met
        (["--eval-metric=fd_other"], "no metric 'fd_other'"),
    ],
)
def test_a_mistake_is_told_once_by_several_processes(options, message, prepared, tmp_path):
    small = ["--batch=8", "--batch-gpu=4", "--duration=8", "--quiet", *options]
    result = launch("train-img64-s.sh", 2, *small, OUT=tmp_path / "run", DEVICE="cpu", **prepared)
    assert result.returncode == 1 and message in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_two_nodes_train_together(prepared, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out, script = tmp_path / "run", str(ROOT / "quick_start/train-ffhq256-xs.sh")
    options = ["--batch=8", "--batch-gpu=4", "--duration=16", "--status=8", "--quiet"]
    master = dict(OUT=out, DEVICE="cpu", NNODES=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    nodes = [
        subprocess.Popen(
            ["bash", script, "1", *options],
            env=warm.environment(environment(**master, NODE_RANK=rank, **prepared)),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [node.communicate(timeout=250)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0]
    assert "2 process(es)" in outputs[0] and "finished" not in outputs[1]  # one process prints and writes
    assert load_newest_state(out)["nimg"] == 16


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ([], {}, "usage: bash quick_start/train-img64-s.sh NUM_GPUS"),
        (["many"], {}, "NUM_GPUS is 'many'"),
        ([9], {}, "NUM_GPUS is 9, and PyTorch sees 8"),
        ([8], {"NNODES": 2}, "name the host of node 0 in MASTER_ADDR"),
        ([8], {"NNODES": 2, "NODE_RANK": 2}, "NODE_RANK is 2: with NNODES=2 the nodes are 0 to 1"),
        ([8], {"MODEL_ZOO": "/absent"}, "no teacher /absent/edm2-img64-s-1073741-0.075.pkl: fetch it"),
        ([8], {"DATA_DIR": "/absent"}, "no data /absent/img64.zip: make it"),
    ],
)
def test_what_is_missing_is_said_in_one_line(arguments, variables, message, prepared, fake_python, tmp_path):
    result = launch("train-img64-s.sh", *arguments, python=fake_python, **{**prepared, **variables})
    assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "launched").exists()


def processes(run_dir, group):
    """Command lines of the processes of a run, and of the process group that the launcher leads."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        with contextlib.suppress(ProcessLookupError):
            mine = str(run_dir) in words or os.getpgid(process.pid) == group
            if mine and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(words)
    return found


@pytest.mark.parametrize(
    ("moment", "number", "code"),
    [
        ("torchrun starts", signal.SIGTERM, 0),
        ("its processes start", signal.SIGTERM, 0),
        ("training", signal.SIGTERM, 0),
        ("training", signal.SIGINT, 130),
    ],
)
def test_a_signal_to_the_launcher_saves_and_the_exit_code_tells(moment, number, code, prepared, tmp_path):
    out = tmp_path / "run"
    options = ["--batch=8", "--batch-gpu=4", "--duration=8000", "--status=8", "--checkpoint=8000", "--quiet"]
    command = ["bash", str(ROOT / "quick_start/train-img64-s.sh"), "2", *options]
    variables = warm.environment(environment(OUT=out, DEVICE="cpu", **prepared), server=False)
    with subprocess.Popen(command, env=variables, stdout=subprocess.DEVNULL, start_new_session=True) as process:

        def reached():
            if moment == "training":
                return (out / "stats.jsonl").exists()
            started = [words for words in processes(out, process.pid) if str(out) in words]
            if moment == "its processes start":  # and do not handle signals yet
                started = [words for words in started if not any("processes.py" in word for word in words)]
            return started != []

        deadline = time.monotonic() + 120
        while not reached() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(timeout=100) == code
    assert processes(out, process.pid) == []
    if moment == "training":
        assert 0 < load_newest_state(out)["nimg"] < 8000
    assert re.search(r"stopped \((SIGUSR1|another process was told to)\)", (out / "log.txt").read_text())


# ----------------------------------------------------------------------------
# downloads


@pytest.fixture
def shelf(tmp_path):
    """Serves a folder on this machine; returns the folder and its URL."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with serving(handler) as server:
        yield folder, server.url


def test_a_download_is_checked_noted_and_compared_again(shelf, tmp_path, tiny_teacher):
    folder, url = shelf
    shutil.copy(tiny_teacher, folder / "teacher.pkl")
    size = (folder / "teacher.pkl").stat().st_size
    for name in ("list", "short", "hash"):
        content = {"list": f"{size} -", "short": f"{size + 1} -", "hash": f"- {'0' * 64}"}[name]
        (tmp_path / f"{name}.txt").write_text(f"# files\nteacher {url}/teacher.pkl {content}\n")
    zoo = tmp_path / "zoo"
    result = launch("download.sh", "teacher", EDM2_LIST=tmp_path / "list.txt", MODEL_ZOO=zoo)
    assert result.returncode == 0, result.stderr
    assert "CC BY-NC-SA 4.0" in result.stdout and (zoo / "teacher.pkl").stat().st_size == size
    assert re.match(r"[0-9a-f]{64}  teacher.pkl\n", (zoo / "teacher.pkl.sha256").read_text())
    with open(zoo / "teacher.pkl", "r+b") as file:  # damage shows when the same command runs again
        file.write(b"\0\0\0\0")
    result = launch("download.sh", "teacher", EDM2_LIST=tmp_path / "list.txt", MODEL_ZOO=zoo)
    assert result.returncode == 1 and "remove the file and fetch it again" in result.stderr
    for name, message in (("short", f"expected {size + 1}"), ("hash", "wrong SHA-256")):
        result = launch("download.sh", "teacher", EDM2_LIST=tmp_path / f"{name}.txt", MODEL_ZOO=tmp_path / name)
        assert result.returncode == 1 and message in result.stderr, result.stderr
        assert not (tmp_path / name / "teacher.pkl").exists()


def test_the_list_has_every_launchers_teacher():
    lines = [line.split() for line in (ROOT / "quick_start/edm2.txt").read_text().splitlines() if line[0] != "#"]
    assert sorted(fields[0] for fields in lines) == sorted(TEACHERS.values())
    assert all(len(fields) == 4 and fields[1].endswith(f"/{fields[0]}.pkl") for fields in lines)
    result = launch("download.sh", "edm2-img64-xl")
    assert result.returncode == 2 and "does not list 'edm2-img64-xl'" in result.stderr


def test_pickles_of_the_fixture_hold_what_was_written(tmp_path, tiny_teacher):
    net = networks.load(tiny_teacher).net
    write_edm2_pickle(tmp_path / "net.pkl", net)
    loaded = networks.load(tmp_path / "net.pkl")
    assert isinstance(loaded.encoder, RGBEncoder) and loaded.net.init_kwargs == net.init_kwargs
    for key, tensor in net.state_dict().items():
        assert torch.equal(loaded.net.state_dict()[key], tensor.half().float())
