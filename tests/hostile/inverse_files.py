"""Files of inverse problems for the campaign: tasks, measurements, masks and output folders, none of them right."""

import io
import os

import numpy as np
from PIL import Image


def _npy(array):
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def inverse_files(folder):
    """Yields name and content, None where it is written already."""
    for name, text in {
        "factor": "name: super_resolution, factor: four", "parts": "name: super_resolution, factor: 2.5",
        "colour": "name: super_resolution, colour: red", "box": "name: inpainting, box: 5",
        "outside": "name: inpainting, box: [0, 0, 32, 4]", "all": "name: inpainting, box: [0, 0, 16, 16]",
        "half": "name: inpainting, fraction: half", "nan": "name: inpainting, fraction: .nan",
        "mask": "name: inpainting, mask: mask.png", "ragged": "name: inpainting, mask: [[0, 1], [1]]",
        "both": "name: inpainting, fraction: 0.5, box: [1, 1, 1, 1]", "std": "name: gaussian_blur_circ, std: wide",
        "kernel": "name: motion_blur_circ, kernel: [[1, 2], [3]]", "path": "name: nonlinear_blur, kernel: k.png",
        "shake": "name: motion_blur_circ, intensity: strong", "pad": "name: phase_retrieval, oversample: 0.3",
        "wide": "name: phase_retrieval, oversample: wide", "gain": "name: high_dynamic_range, scale: [2]",
        "sharpen": "name: sharpen", "keys": "name: inpainting, 5: 6", "x2": "name: super_resolution, factor: 2",
    }.items():  # fmt: skip
        yield f"op-{name}.yaml", f"operator: {{{text}}}\nbeta: 0.005\n"
    for name, text in {
        "date": "beta: 2020-01-01", "steps": "beta: 1\nsteps: '50'", "bool": "beta: 1\nruns: true",
        "ts": "beta: 1\nts: 10,22,39", "long": f"beta: 1\nts: {[1] * 3000}", "two": "beta: 1\n---\nbeta: 2",
        "words": "beta: 1\ndescription: 5", "binary": "beta: !!binary aGVsbG8=", "list": "beta: 1\nlangevin: [1]",
    }.items():  # fmt: skip
        yield f"set-{name}.yaml", f"operator: {{name: super_resolution, factor: 2}}\n{text}\n"
    yield "utf16.yaml", "operator: {name: super_resolution}\nbeta: 1\n".encode("utf-16")
    y = np.zeros((3, 8, 8))
    for name, files in {
        "bool": {"a.npy": _npy(y.astype(bool))}, "dates": {"a.npy": _npy(y.astype("datetime64[s]"))},
        "fields": {"a.npy": _npy(np.zeros((3, 8, 8), [("a", "f4")]))}, "complex": {"a.npy": _npy(y.astype("c8"))},
        "last": {"a.npy": _npy(y.transpose(1, 2, 0))}, "scalar": {"a.npy": _npy(np.float32(1))},
        "same": {"a.npy": _npy(y), "a.npz": b"no"}, "latin": {b"caf\xe9.npy": _npy(y), b"caf\xe8.npy": _npy(y)},
        "broken": {b"caf\xe9.npy": b"no"},
    }.items():  # fmt: skip
        (folder / f"y-{name}").mkdir()
        for file, data in files.items():
            with open(os.path.join(os.fsencode(folder / f"y-{name}"), os.fsencode(file)), "wb") as stream:
                stream.write(data)
        yield f"y-{name}", None
    for name, mode, size in (("black", "L", 16), ("small", "1", 8), ("deep", "I;16", 16)):
        Image.new(mode, (size, size)).save(folder / f"mask-{name}.png")
        yield f"mask-{name}.png", None
    yield "mask.npy", _npy(np.ones((16, 16)))
    for name, file, text in (
        ("cut", "options.json", "{"),
        ("list", "options.json", "[]"),
        ("other", "options.json", '{"runs": 1}'),
        ("without", "records/a.json", "{}"),
    ):
        (folder / f"out-{name}" / file).parent.mkdir(parents=True)
        (folder / f"out-{name}" / file).write_text(text)
        yield f"out-{name}", None
