"""Prepared files of the campaign: honest ones that commands need, and hostile ones."""

import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

import networks
from networks.encoders import RGBEncoder
from tests.conftest import TINY_NET, write_images
from tests.hostile.inverse_files import inverse_files

ROOT = Path(__file__).resolve().parents[2]
DEEP = "[" * 100_000


class Program:
    """Pickles as a shell command, which would write the file `ran`."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.system, (f"touch {self.folder}/ran",)


def make_files(folder):
    """Writes all into an empty folder; returns what {NAME} stands for in command lines. `new`, `file` are not there."""
    names = {"root": ROOT, "new": folder / "new", "none": folder / "none", "long": folder / ("n" * 300)}
    names |= {"fashion": ROOT / "assets/fashion16.zip", "student": ROOT / "tests/data/ncvsd-tiny-0000000-0.050.pkl"}
    names |= {"teacher": ROOT / "assets/demo/teacher.safetensors", "toy": ROOT / "assets/toy/student.safetensors"}
    names |= {"nines": "9" * 5000, "ones": "1," * 3000 + "39"}
    for make in (_plain, _networks, _images, _labels, _references, _texts, _runs, inverse_files):
        for name, data in make(folder):
            names[name] = path = folder / name
            if isinstance(data, str):
                path.write_text(data)
            elif data is not None:
                path.write_bytes(data)
    latin = os.fsencode(folder) + b"/caf\xe9.zip"
    shutil.copy(names["images.zip"], latin)
    return {name: str(path) for name, path in names.items()} | {"latin": os.fsdecode(latin)}


def _plain(folder):
    for name in ("empty", "empty.png", "empty.zip", "empty.npz", "empty.json", "empty.yaml", "empty.safetensors"):
        yield name, b""
    yield "text", "This is not what you are looking for.\n"
    yield "zeros", bytes(4096)
    yield "program.pkl", pickle.dumps(Program(folder))
    for name in ("folder", "folder.json", "folder.png", "folder.npz", "folder.zip"):
        (folder / name).mkdir()
        yield name, None
    for name, target in (("dangling", "nothing"), ("loop", "loop"), ("zero", "/dev/zero"), ("null", "/dev/null")):
        (folder / name).symlink_to(target)
        yield name, None
    for name in ("fifo", "fifo.png", "fifo.json"):
        os.mkfifo(folder / name)
        yield name, None


def _networks(folder):
    net = networks.Precond(**TINY_NET)
    path = folder / "tiny.safetensors"
    networks.save(path, net, RGBEncoder())
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    description = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["ncvsd"])
    state = {name: value.clone() for name, value in net.state_dict().items()}
    yield "tiny.safetensors", None
    yield "cut.safetensors", data[: len(data) // 2]
    yield "cut.pkl", (ROOT / "tests/data/ncvsd-tiny-0000000-0.050.pkl").read_bytes()[:100_000]
    yield "header.safetensors", (2**62).to_bytes(8, "little") + b"{}"
    yield "deep.safetensors", len(DEEP).to_bytes(8, "little") + DEEP.encode()
    texts = {
        "list": "[]", "number": "1", "text": "no JSON", "nested": DEEP, "digits": "9" * 10_000,
        "classes": json.dumps(_changed(description, "label_dim", 10**9)),
        "bool": json.dumps(_changed(description, "num_blocks", True)),
        "pixels": json.dumps(_changed(description, "img_resolution", 8192)),
    }  # fmt: skip
    for name, text in texts.items():
        save_file(state, folder / f"{name}.safetensors", metadata={"ncvsd": text})
        yield f"{name}.safetensors", None
    save_file(state, folder / "undescribed.safetensors")
    yield "undescribed.safetensors", None
    nan = {name: torch.full_like(value, float("nan")) for name, value in state.items()}
    save_file(nan, folder / "nan.safetensors", metadata={"ncvsd": json.dumps(description)})
    yield "nan.safetensors", None
    few = dict(list(state.items())[:-1])
    save_file(few, folder / "few.safetensors", metadata={"ncvsd": json.dumps(description)})
    yield "few.safetensors", None
    torch.save({"a": torch.zeros(2)}, folder / "torch.pt")
    yield "torch.pt", None


def _changed(description, key, value):
    """The description with another value where the key stands, however deep."""
    if not isinstance(description, dict):
        return description
    return {k: value if k == key else _changed(v, key, value) for k, v in description.items()}


def _png(width=8, height=8):
    stream = io.BytesIO()
    Image.fromarray(np.zeros([height, width], np.uint8)).save(stream, "png")
    return stream.getvalue()


def _npy(array, allow_pickle=False):
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=allow_pickle)
    return stream.getvalue()


def _zip(files):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return stream.getvalue()


def _images(folder):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, [12, 8, 8], dtype=np.uint8)
    write_images(folder / "images.zip", images, np.arange(12) % 3)
    write_images(folder / "unlabelled.zip", images)
    write_images(folder / "rgb16.zip", rng.integers(0, 256, [4, 16, 16, 3], dtype=np.uint8))
    for name in ("images.zip", "unlabelled.zip", "rgb16.zip"):
        yield name, None
    good = (folder / "images.zip").read_bytes()
    yield "cut.zip", good[: len(good) // 2]
    yield "text.zip", "no archive"
    yield "climbing.zip", _zip({"../a.png": _png(), "../../b.png": _png()})
    yield "nothing.zip", _zip({})
    yield "texts.zip", _zip({"a.txt": b"a"})
    yield "damaged.zip", _zip({"a.png": b"no image"})
    huge = bytearray(_png())
    huge[16:24] = b"\x7f\xff\xff\xff" * 2
    yield "huge.png", bytes(huge)
    yield "huge.zip", _zip({"a.png": bytes(huge)})
    yield "sizes.zip", _zip({"a.png": _png(), "b.png": _png(16, 16)})
    yield "oblong.zip", _zip({"a.png": _png(8, 16)})
    yield "oblong.png", _png(8, 16)
    yield "object.zip", _zip({"a.npy": _npy(np.array([Program(folder)], object), True)})
    yield "object.npy", _npy(np.array([Program(folder)], object), True)
    shape = _npy(np.zeros([1, 8, 8], np.float32)).replace(b"(1, 8, 8), }       ", b"(99999, 9999, 9), }")
    yield "shape.zip", _zip({"a.npy": shape})
    yield "shape.npy", shape
    yield "nan.zip", _zip({"a.npy": _npy(np.full([8, 8, 8], np.nan, np.float32))})
    yield "latents.zip", _zip({"a.npy": _npy(np.zeros([8, 8, 8], np.float32))})
    for name in ("zero", "fifo", "dangling"):
        source = folder / f"holds-{name}"
        source.mkdir()
        if name == "fifo":
            os.mkfifo(source / "a.png")
        else:
            (source / "a.png").symlink_to("/dev/zero" if name == "zero" else "nothing")
        yield source.name, None
    yield "idx-ubyte", b"\0\0\x08\x03" + b"\x7f\xff\xff\xff" * 3
    yield "huge-idx3-ubyte", b"\0\0\x08\x03" + b"\x7f\xff\xff\xff" * 3


def _labels(folder):
    labels = {
        "list": [], "number": 1, "null": None, "none": {}, "text": {"labels": "abc"}, "dict": {"labels": {"a.png": 1}},
        "bool": {"labels": [["a.png", True]]}, "huge": {"labels": [["a.png", 10**9]]},
        "negative": {"labels": [["a.png", -1]]}, "fraction": {"labels": [["a.png", 0.5]]},
        "nan": {"labels": [["a.png", float("nan")]]}, "vector": {"labels": [["a.png", [0.5, 0.5]]]},
        "triple": {"labels": [["a.png", 1, 2]]}, "nested": {"labels": [["a.png", [[[[1]]]]]]},
        "digits": {"labels": [["a.png", 10**400]]}, "names": {"labels": [[1, 1]]},
    }  # fmt: skip
    for name, value in labels.items():
        yield f"labels-{name}.zip", _zip({"a.png": _png(), "dataset.json": json.dumps(value)})
    yield "labels-deep.zip", _zip({"a.png": _png(), "dataset.json": DEEP})
    yield "labels-binary.zip", _zip({"a.png": _png(), "dataset.json": b"\xff\xfe\x00"})
    yield "labels-empty.zip", _zip({"a.png": _png(), "dataset.json": b""})


def _npz(**arrays):
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def _references(folder):
    eye = np.eye(64)
    good = {"fd_demo/mu": np.zeros(64), "fd_demo/sigma": eye, "num_images": np.array(100)}
    yield "good.npz", _npz(**good)
    yield "dimension.npz", _npz(**good | {"fd_demo/mu": np.zeros(5), "fd_demo/sigma": np.eye(5)})
    yield "unequal.npz", _npz(**good | {"fd_demo/mu": np.zeros(5)})
    yield "nan.npz", _npz(**good | {"fd_demo/mu": np.full(64, np.nan)})
    yield "inf.npz", _npz(**good | {"fd_demo/sigma": np.where(eye > 0, np.inf, 0)})
    yield "asymmetric.npz", _npz(**good | {"fd_demo/sigma": np.triu(np.ones([64, 64]))})
    yield "negative.npz", _npz(**good | {"fd_demo/sigma": -eye})
    yield "texts.npz", _npz(**good | {"fd_demo/mu": np.array(["a"] * 64)})
    yield "one.npz", _npz(**good | {"num_images": np.array(1)})
    yield "count.npz", _npz(**good | {"num_images": np.array([1, 2])})
    yield "flat.npz", _npz(**good | {"fd_demo/sigma": np.zeros(64)})
    yield "arrays.npz", _npz(a=np.zeros(3))
    yield "only-mu.npz", _npz(**{"fd_demo/mu": np.zeros(64)})
    yield "climbing.npz", _npz(**{"../a/mu": np.zeros(2), "../a/sigma": np.eye(2)})
    yield "object.npz", _zip({"mu.npy": _npy(np.array([Program(folder)], object), True), "sigma.npy": _npy(eye)})
    yield "cut.npz", _npz(**good)[:500]
    yield "fid.npz", _npz(mu=np.zeros(2048), sigma=np.zeros([2, 2]))


def _texts(folder):
    presets = {
        "list": [], "number": 1, "unknown": {"kind": "ncvsd", "colour": 1}, "duration": {"duration": "many"},
        "nan": {"ref_lr": float("nan")}, "bool": {"batch": True}, "digits": {"duration": 10**400},
        "negative": {"batch": -1}, "stds": {"ema_stds": "wide"}, "null": {"duration": None},
        "kind": {"kind": "gan"}, "dict": {"eval_ts": {}},
    }  # fmt: skip
    for name, value in presets.items():
        if isinstance(value, dict) and value.get("kind") is None:
            value = {"kind": "ncvsd", **value}
        yield f"preset-{name}.json", json.dumps(value)
    yield "preset-deep.json", DEEP
    yield "preset-binary.json", b"\xff\xfe\x00"
    task = "operator: super_resolution\nfactor: 4\nnoise: 0.05\n"
    yield "task-list.yaml", "- 1\n- 2\n"
    yield "task-deep.yaml", "[" * 8000
    yield "task-digits.yaml", f"{task}beta: {'9' * 400}\n"
    yield "task-unknown.yaml", "operator: sharpen\n"
    yield "task-key.yaml", f"{task}colour: red\n"
    yield "task-python.yaml", f"operator: !!python/object/apply:os.system ['touch {folder}/ran']\n"
    yield "task-binary.yaml", b"\xff\xfe\x00"
    yield "task-nan.yaml", f"{task}beta: .nan\n"
    yield "task-bool.yaml", f"{task}steps: true\n"
    levels = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
    yield "task-bomb.yaml", f"a0: &a0 [x]\n{levels}"


def _runs(folder):
    for name, lines in {
        "run": '{"Progress/kimg": {"mean": 1}}\n', "run-text": "no JSON\n", "run-list": "[1]\n",
        "run-deep": DEEP + "\n", "run-good": '{"nimg": 8, "Loss/score": 1.0}\n',
        "run-binary": "\0\x80\n" * 9, "run-huge": '{"nimg": 8, "a": 1e999, "b": ' + "9" * 5000 + "}\n",
    }.items():  # fmt: skip
        (folder / name).mkdir()
        (folder / name / "stats.jsonl").write_text(lines)
        yield name, None
    report = {"net": "a", "fd_demo": 1.0}
    for name, value in {
        "list": [], "number": 1, "dict": {}, "records": [1], "empty": [{}], "some": [report],
        "metrics": [{"metrics": "a"}], "none": {"results": []}, "count": {"results": 5}, "words": {"results": "abc"},
        "bare": {"results": [{}]}, "null": {"results": [{"metrics": None}]}, "other": {"results": [{"metrics": []}]},
        "text": {"results": [{"metrics": [{"name": "fd_demo", "value": "low"}], "evaluations": "two"}]},
    }.items():  # fmt: skip
        yield f"report-{name}.json", json.dumps(value)
    yield "report-deep.json", DEEP
