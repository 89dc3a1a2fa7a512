"""What the scripts beside it start, after every check. Needs the standard library alone; --help tells of a command."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).absolute().parents[1]
sys.path.insert(0, str(ROOT))

from quick_start.environment import use_environment  # noqa: E402
from quick_start.processes import supervise  # noqa: E402

REFERENCES = "https://nvlabs-fi-cdn.nvidia.com/edm2/dataset-refs"  # EDM2's published statistics
LICENCE = "CC BY-NC-SA 4.0 (its authors'; not for commercial use), https://creativecommons.org/licenses/by-nc-sa/4.0/"
ANYWHERE = "a file, a URL or hf://owner/repo/file"
PROBE = """
import sys, torch
from sampling.grids import parse_ts
try:
    list(map(parse_ts, sys.argv[1:]))
    print(torch.cuda.device_count())
except ValueError as error:
    print(error)
"""
CHECK = """
import sys
from dataset_tool import convert
from torch_utils.errors import user_errors

def check(**options):
    (size,) = [value for value in options.values() if isinstance(value, tuple)]
    with user_errors("BATCH"):
        if sys.argv[1]:
            import torch
            from networks.encoders import StabilityVAEEncoder
            from torch_utils.distributed import device_for
            encoder = StabilityVAEEncoder(sys.argv[1], batch_size=1).to(device_for("auto"))
            encoder.encode_pixels(torch.zeros(1, 3, *size[::-1], dtype=torch.uint8))

convert.callback = check
convert.main(sys.argv[2:], prog_name="dataset_tool.py convert")
"""  # refuses options that `dataset_tool.py convert` does not take, and an autoencoder that does not take such pictures


def need(fulfilled: object, message: str) -> None:
    """Where a script was not called as it must be, end with one line and code 2."""
    if not fulfilled:
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def variable(name: str, default: object = "") -> str:
    """Value of an environment variable; the default where it is empty too."""
    return os.environ.get(name) or str(default)


def count(name: str, text: str, least: int = 0, most: int = 10**18 - 1, advice: str = "") -> int:
    """The number `text`. Refuses, with the advice, what is none or lies outside least..most."""
    good = re.fullmatch("[0-9]{1,18}", text) and least <= int(text) <= most
    need(good, f"{name} is '{text}': give {advice or f'a whole number, at least {least}'}")
    return int(text)


def found(path: str, schemes: str = "https?|hf") -> bool:
    """Whether it is a file, with #sha256=HEX or not, or on another machine."""
    return re.match(f"({schemes})://", path) is not None or os.path.isfile(path.partition("#sha256=")[0])


def folder(name: str, default: str) -> str:
    """Folder that a variable names, by default one of the clone."""
    path = variable(name, ROOT / default)
    need(not os.path.isfile(path), f"{name}={path} is a file: name a folder")
    return path


def do(command: list[str], **variables: str) -> None:
    """Run a command; where it fails, end with its code."""
    code = subprocess.call(command, env=os.environ | variables)
    if code:
        sys.exit(code if code > 0 else 128 - code)


def become(command: list[str]) -> None:
    """Run a command in place of this process."""
    sys.stdout.flush()
    os.execv(command[0], command)


def launcher(gpus: int, device: str, zero: str, *nodes: object, ts: str | None = None) -> list[str]:
    """The words to put before a script and its options, for so many processes; 0 is one without torchrun. `zero` says
    in a message what the caller makes of 0, `nodes` are torchrun's options where there are several nodes, and the
    schedule `ts` is checked here, before there are several processes to complain of it.
    """
    python = use_environment("run")
    if gpus == 0:
        return [python]
    if device == "cuda" or ts:
        code = [python, "-c", PROBE, *([ts] if ts else [])]
        probe = subprocess.run(code, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        said = probe.stdout.strip()
        if probe.returncode:
            sys.exit(probe.returncode)
        need(said.isdecimal(), said)
        sees = f"NUM_GPUS is {gpus}, and PyTorch sees {said} CUDA device(s): give at most that many (0 {zero})"
        need(device != "cuda" or gpus <= int(said), sees)
    os.environ["OMP_NUM_THREADS"] = variable("OMP_NUM_THREADS", 4)
    options = [*([] if nodes else ["--standalone"]), "--nproc-per-node", gpus, *nodes]
    # after the dashes torchrun takes no option (say --num) for an abbreviation of its own (--numa-binding)
    return [python, str(ROOT / "quick_start/processes.py"), *map(str, options), "--"]


def train(preset: str, teacher: str, data: str, *words: str) -> None:
    """Distil a teacher of EDM2 with the published settings."""
    script = f"bash quick_start/train-{preset}.sh"
    need(words and words[0][:1] != "-", f"usage: {script} NUM_GPUS [OPTION ...], as in: {script} 8")
    gpus = count("NUM_GPUS", words[0], 0, 65535)
    nodes = count("NNODES", variable("NNODES", 1), 1, 65535)
    node = count("NODE_RANK", variable("NODE_RANK", 0), 0, 65535)
    port, address = count("MASTER_PORT", variable("MASTER_PORT", 29500), 1, 65535), variable("MASTER_ADDR")
    need(node < nodes, f"NODE_RANK is {node}: with NNODES={nodes} the nodes are 0 to {nodes - 1}")
    need(nodes == 1 or address, f"NNODES is {nodes}: name the host of node 0 in MASTER_ADDR")
    need(nodes == 1 or gpus, "NUM_GPUS is 0: several nodes need at least 1 process each")
    net = f"{variable('MODEL_ZOO', ROOT / '../model_zoo/edm2')}/{teacher}"
    images = f"{variable('DATA_DIR', ROOT / '../data/edm2')}/{data}"
    fetch = f"fetch it with 'bash quick_start/download.sh {teacher.removesuffix('.pkl')}'"
    need(os.path.isfile(net), f"no teacher {net}: {fetch}, or name its folder in MODEL_ZOO")
    make = "make it with 'bash quick_start/data_prep.sh'"
    need(os.path.isfile(images), f"no data {images}: {make}, or name its folder in DATA_DIR")
    out, device = folder("OUT", f"training-runs/{preset}"), variable("DEVICE", "cuda") if gpus else "cpu"
    several = ["--nnodes", nodes, "--node-rank", node, "--master-addr", address, "--master-port", port]
    command = launcher(gpus, device, "runs on the CPU", *(several if nodes > 1 else []))
    print(f"teacher: {net}\nrun folder: {out}", flush=True)
    command += [str(ROOT / "train_ncvsd.py"), "--preset", preset, "--net", net, "--data", images, "--outdir", out]
    command += ["--device", device, *words[1:]]
    sys.exit(supervise(command) if gpus else become(command))


def newest_snapshot(runs: Path, preset: str) -> str:
    """Network with most images and narrowest average of the run that wrote last; runs named as the preset go first."""
    files = [p for p in sorted(runs.rglob("network-snapshot-*.safetensors")) if p.is_file() and p.parent != runs]
    files = [p for p in files if preset in str(p.parent.relative_to(runs))] or files
    newest = max(files, key=lambda path: path.stat().st_mtime_ns, default=None)
    counts = {p: p.name.split("-")[2] for p in files if newest and p.parent == newest.parent}
    numbered = [path for path, text in counts.items() if re.fullmatch("[0-9]{1,18}", text)]
    return str(max(numbered, key=lambda path: int(counts[path]), default=""))


def evaluate(preset: str, metrics: str, *words: str) -> None:
    """FID and FD-DINOv2 (FFHQ: FID) of a network, from 50,000 images in as many steps as TS has below 39."""
    script, make = f"bash quick_start/eval-{preset}.sh", "python calculate_metrics.py ref"
    need(len(words) >= 2, f"usage: {script} NUM_GPUS TS [NET] [OPTION ...], as in: {script} 8 12,39")
    ts, net, options, runs = words[1], variable("NET"), list(words[2:]), ROOT / "training-runs"
    if options and options[0][:1] != "-":
        net = options.pop(0) or net
    gpus = count("NUM_GPUS", words[0], advice="the number of GPUs, 0 for the CPU")
    num = count("NUM", variable("NUM", 50000), 2, advice="the number of images, at least 2")
    seed = count("SEED", variable("SEED", 123456789), advice="the first seed, a whole number")
    batch = count("BATCH", variable("BATCH", 64), 1, advice="the number of images per process and batch")
    out = variable("OUT", ROOT / f"out/eval-{preset}-{ts}.json")
    need(not os.path.isdir(out), f"OUT={out} is a folder: name a .json file")
    need(out.endswith(".json"), f"OUT={out}: the report is a .json file")
    net = net or newest_snapshot(runs, preset)
    need(net, f"no snapshot under {runs}: name the network as the third argument or in NET")
    need(found(net), f"no network {net}: name {ANYWHERE} as the third argument or in NET")
    ref = variable("REF", "" if preset == "ffhq256" else f"{REFERENCES}/{preset}.pkl")
    own = f"make them with '{make} --data DATA.zip --dest {preset}.npz' and name them in REF"
    need(ref, f"no reference statistics are published for {preset}: {own}")
    need(found(ref, "https?"), f"no reference statistics {ref}: name a file or URL in REF, or make one with '{make}'")
    command = launcher(gpus, "cuda", "runs on the CPU", ts=ts)
    print(f"network: {net}\nreport: {out}")
    command += [str(ROOT / "calculate_metrics.py"), "gen", "--net", net, "--ref", ref, "--ts", ts]
    command += ["--num-images", str(num), "--seed", str(seed), "--batch", str(batch)]
    command += ["--metrics", variable("METRICS", metrics), "--out", out, "--device", "cuda" if gpus else "cpu"]
    become([*command, *options])


def posterior(*words: str) -> None:
    """Solve one inverse problem on a folder of images, and write a page that shows the results."""
    tasks = sorted(path.stem for path in (ROOT / "presets/task").glob("*.yaml"))
    script, known = "bash quick_start/posterior-sample.sh", f"one of {', '.join(tasks)}"
    need(words, f"usage: {script} TASK_NAME [OPTION ...], with TASK_NAME {known}")
    task, options = words[0], list(words[1:])
    need(task in tasks, f"there is no task '{task}': use {known}")
    gpus = count("NUM_GPUS", variable("NUM_GPUS", 0), 0, 99999, "a number, 0 for one process")
    preset, batch, num, place, known = task, 25, 100, "../model_zoo/ncvsd/ncvsd-ffhq256-xs.pkl", "../data/test/ffhq_val"
    if demo := variable("DEMO") == "1":
        preset, batch, num, options = f"demo/{task}", 64, 16, ["--class", "data", *options]
        place, known = "assets/demo/student.safetensors", "assets/fashion16-test.zip"
    net, data = variable("NET", ROOT / place), variable("DATA", ROOT / known)
    instead = f"DEMO=1 {script} {task} runs the task on the embedded model and images"
    put = "put the authors' ncvsd-ffhq256-xs.pkl there (their repository links it)"
    need(demo or found(net), f"no network {net}: {put}, or name {ANYWHERE} in NET; {instead}")
    put = "put validation images of FFHQ at 256x256 there (100 in the published tables)"
    need(demo or os.path.exists(data), f"no images {data}: {put}, or name a folder or ZIP in DATA; {instead}")
    out = variable("OUT", ROOT / "out/posterior" / preset.replace("/", "-"))
    command = launcher(gpus, "cuda", "is one process")
    command += [str(ROOT / "posterior_sample.py"), "--net", net, "--data", data, "--task", preset, "--outdir", out]
    command += ["--batch", variable("BATCH", batch), "--num", variable("NUM", num)]
    become([*command, *(["--device", "cuda"] if gpus else []), *options])


def download(*names: str) -> None:
    """Fetch teachers that edm2.txt lists into MODEL_ZOO (../model_zoo/edm2)."""
    lines = Path(variable("EDM2_LIST", ROOT / "quick_start/edm2.txt")).read_text(encoding="utf-8").splitlines()
    listed = {w[0]: w[1:] for w in (line.split() for line in lines if line[:1] != "#") if len(w) == 4}
    need(names, f"usage: bash quick_start/download.sh NAME [NAME ...], of: {' '.join(listed)}")
    for name in names:
        need(name in listed, f"edm2.txt does not list '{name}': use one of {' '.join(listed)}")
    zoo = folder("MODEL_ZOO", "../model_zoo/edm2")
    python = use_environment("run")
    print(f"licence: {LICENCE}", flush=True)
    for name in names:
        url, size, sha256 = listed[name]
        file = ["--url", url, "--dest", f"{zoo}/{name}.pkl", "--bytes", size, "--sha256", sha256]
        do([python, str(ROOT / "quick_start/fetch.py"), *file])


def archived(path: str) -> bool:
    """Whether the archive is there already. Refuses what only has its name."""
    there = os.path.exists(path)
    cut = f"{path} is no ZIP archive, or one cut short: remove it, and it is made again"
    need(not there or zipfile.is_zipfile(path), cut)
    print(f"{path} is there\n" if there else "", end="", flush=True)
    return there


def prepare(*words: str) -> None:
    """Make the training data that the train-*.sh scripts look for, in DATA_DIR (../data/edm2), as EDM2 does."""
    need(len(words) >= 2, "usage: bash quick_start/data_prep.sh img64|img512|ffhq256 SOURCE [OPTION ...]")
    name, source, *options = words
    sizes = {"img64": 64, "img512": 512, "ffhq256": 256}
    need(name in sizes, f"there is no data set '{name}': use img64, img512 or ffhq256")
    need(os.path.exists(source), f"no images {source}: name the folder or ZIP of the original images")
    place = folder("DATA_DIR", "../data/edm2")
    batch = count("BATCH", variable("BATCH", 16), 1, 999, "a whole number from 1 to 999")
    python, script = use_environment("run"), str(ROOT / "dataset_tool.py")
    pixels, latents, vae = f"{place}/{name}.zip", f"{place}/{name}-sd.zip", ""
    call = ["--source", source, "--dest", pixels, "--resolution", variable("RESOLUTION", sizes[name])]
    call += [*([] if name == "ffhq256" else ["--transform", "center-crop-dhariwal"]), *options]
    converted = archived(pixels)
    if name == "img512" and not archived(latents):
        vae = variable("VAE", "stabilityai/sd-vae-ft-mse")
    do([python, "-c", CHECK, vae, *call], PYTHONPATH=str(ROOT))
    try:
        os.makedirs(place, exist_ok=True)
    except OSError:
        need(False, f"the folder {place} cannot be made: name another one in DATA_DIR")
    if not converted:
        do([python, script, "convert", *call])
    elif options:
        print(f"options of its conversion, without effect on what is there: {' '.join(options)}", flush=True)
    if vae:
        do([python, script, "encode", "--source", pixels, "--dest", latents, "--vae", vae, "--batch", str(batch)])


def main(name: str, *words: str) -> None:
    """Run a command; with --help first, or anywhere where no script gets the options, show README's section of it."""
    command = {f.__name__: f for f in (train, evaluate, posterior, download, prepare)}[name]
    given, all_own = {"train": 3, "evaluate": 2}.get(name, 0), name in ("download", "prepare")
    try:
        if {"--help", "-h"}.intersection(words if all_own else words[given : given + 1]):
            text = (ROOT / "quick_start/README.md").read_text(encoding="utf-8")
            print(text.split(f"\n## {name}: ")[1].split("\n## ")[0])
        else:
            command(*words)
    except OSError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main(*sys.argv[1:])
