import builtins
import io
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from metrics.collect import Collected
from metrics.distances import FeatureMoments
from metrics.features.detectors import LoadedDetector
from metrics.kinds import parse_metrics
from metrics.references import ReferenceFileError, check_reference, compute_metrics, load_reference, save_reference
from tests.memory_utils import HAS_LIMITS, run_script

DATA = Path(__file__).parents[1] / "data"
MU, SIGMA = np.array([1.0, -2.0, 0.5]), np.array([[2.0, 0.5, 0.0], [0.5, 1.0, 0.2], [0.0, 0.2, 3.0]])


def collected(dim, images, keep, sha256="ab" * 32, seed=0):
    features = torch.randn(images, dim, generator=torch.Generator().manual_seed(seed))
    moments = FeatureMoments(dim)
    moments.add(features)
    detector = LoadedDetector(torch.nn.Identity(), "x", dim, sha256)
    return Collected(detector, moments, features if keep else None, None), features


def own(**changes):
    """Arrays of an own file for the detector fid, with changes; None leaves one out."""
    arrays = {"num_images": np.array(10), "fid/mu": MU, "fid/sigma": SIGMA, "fid/sha256": np.array("cd" * 32)}
    arrays |= {"fid/features": np.ones((10, 3), np.float32)}
    changes = {key.replace("__", "/"): value for key, value in changes.items()}
    return {key: value for key, value in (arrays | changes).items() if value is not None}


def npz(arrays, save=np.savez):
    buffer = io.BytesIO()
    save(buffer, **arrays)
    return buffer.getvalue()


def member(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def archive(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def header(shape, descr="<f8"):
    """An .npy file that claims a shape and holds 64 bytes."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue() + bytes(64)


def flag(data, local, central, value):
    """A ZIP file with one byte of all its entries' headers changed."""
    data = bytearray(data)
    for mark, offset in ((b"PK\x03\x04", local), (b"PK\x01\x02", central)):
        start = data.find(mark)
        while start >= 0:
            data[start + offset] = value
            start = data.find(mark, start + 4)
    return bytes(data)


def test_own_file_round_trip(tmp_path):
    a, features = collected(5, 12, keep=True)
    b, _ = collected(3, 12, keep=False, sha256="12" * 32)
    path = tmp_path / "ref.npz"
    save_reference(path, {"fid": a, "my_net": b})
    reference = load_reference(path)
    assert list(reference.statistics) == ["fid", "my_net"] and reference.num_images == 12
    assert reference.source == str(path) and len(reference.sha256) == 64
    first, second = reference.statistics.values()
    np.testing.assert_array_equal(first.mu, a.moments.mean())
    np.testing.assert_array_equal(first.sigma, a.moments.cov())
    np.testing.assert_array_equal(first.features, features)
    assert first.features.dtype == np.float32 and first.mu.dtype == first.sigma.dtype == np.float64
    assert (first.sha256, second.sha256, second.features) == ("ab" * 32, "12" * 32, None)
    assert sorted(os.listdir(tmp_path)) == ["ref.npz"]


def test_one_image_gives_no_statistics_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "ref.npz"
    save_reference(path, {"fid": collected(4, 5, keep=False)[0]})
    before = path.read_bytes()
    with pytest.raises(ValueError, match="at least 2"):
        save_reference(path, {"fid": collected(4, 1, keep=False)[0]})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["ref.npz"]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_edm_file_is_for_fid(tmp_path, save, dtype):
    path = tmp_path / "edm.npz"
    path.write_bytes(npz({"mu": MU.astype(dtype), "sigma": SIGMA.astype(dtype)}, save))
    reference = load_reference(path)
    assert list(reference.statistics) == ["fid"] and reference.num_images is None
    np.testing.assert_array_equal(reference.statistics["fid"].mu, MU.astype(dtype))
    np.testing.assert_array_equal(reference.statistics["fid"].sigma, SIGMA.astype(dtype))


def test_edm2_pickle():
    reference = load_reference(DATA / "dataset-ref-tiny.pkl")
    assert list(reference.statistics) == ["fid"] and reference.num_images == 64
    statistics = reference.statistics["fid"]
    assert statistics.mu.shape == (32,) and statistics.sigma.shape == (32, 32)
    np.testing.assert_allclose(statistics.sigma, statistics.sigma.T)
    assert statistics.mu.dtype == np.float64 and np.diag(statistics.sigma).min() > 0


def test_edm2_pickle_of_several_metrics_whatever_its_name(tmp_path):
    path = tmp_path / "stats.npz"
    content = {"fid": {"mu": MU, "sigma": SIGMA}, "fd_dinov2": {"mu": MU[:2], "sigma": SIGMA[:2, :2]}}
    path.write_bytes(pickle.dumps(content | {"num_images": 50000}))
    reference = load_reference(path)
    assert list(reference.statistics) == ["fid", "fd_dinov2"] and reference.num_images == 50000
    np.testing.assert_array_equal(reference.statistics["fd_dinov2"].sigma, SIGMA[:2, :2])


class Runs:
    """Pickles to a program that calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def refused(path, words):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ReferenceFileError) as error:
            load_reference(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and len(message) < 500
    assert words in message


def test_pickled_programs_are_refused_and_do_not_run(tmp_path):
    ran = tmp_path / "ran"
    programs = [
        Runs(os.system, f"touch {ran}"),
        {"fid": {"mu": MU, "sigma": Runs(os.mkdir, str(ran))}, "num_images": 10},
        {"num_images": Runs(builtins.eval, f"open({str(ran)!r}, 'w')")},
    ]
    for program in programs:
        path = tmp_path / "ref.pkl"
        path.write_bytes(pickle.dumps(program))
        refused(path, "refused at byte")
    objects = np.array([Runs(os.mkdir, str(ran))], dtype=object)
    path = tmp_path / "ref.npz"
    for arrays in ({"mu": objects, "sigma": SIGMA}, own(fid__mu=objects), own(fid__features=objects)):
        path.write_bytes(npz(arrays))
        refused(path, "Object arrays cannot be loaded")
    path.write_bytes(archive(mu=pickle.dumps(programs[0]), sigma=member(SIGMA)))
    refused(path, "")
    assert not ran.exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fid__sigma": SIGMA + np.triu(np.ones((3, 3)), 1)}, "not symmetric"),
        ({"fid__sigma": SIGMA * np.nan}, "not finite"),
        ({"fid__mu": np.array([np.inf, 0, 0])}, "not finite"),
        ({"fid__sigma": SIGMA[:2]}, "[D,D]"),
        ({"fid__sigma": SIGMA[0]}, "[D,D]"),
        ({"fid__mu": MU[:2]}, "[D,D]"),
        ({"fid__mu": np.zeros((1, 3))}, "[D,D]"),
        ({"fid__mu": np.zeros(0), "fid__sigma": np.zeros((0, 0))}, "[D,D]"),
        ({"fid__mu": np.array(1.0)}, "[D,D]"),
        ({"fid__mu": np.array(["a", "b", "c"])}, "arrays of numbers"),
        ({"fid__sigma": SIGMA * 1j}, "arrays of numbers"),
        ({"fid__mu": np.zeros(3, [("x", "f8")])}, "arrays of numbers"),
        ({"fid__sigma": None}, "fid/sigma"),
        ({"fid__mu": None}, "no reference statistics"),
        ({"fid__sha256": np.array(["ab" * 32, "cd" * 32])}, "no SHA-256"),
        ({"fid__mu": None, "a\n\x1b[31m__mu": MU, "a\n\x1b[31m__sigma": SIGMA}, "is not a detector's name"),
        ({"num_images": np.array(1)}, "num_images is 1"),
        ({"num_images": np.array(-5)}, "num_images is -5"),
        ({"num_images": np.array([5, 6])}, "no usable reference statistics"),
        ({"num_images": np.array(np.inf)}, "no usable reference statistics"),
        ({"num_images": np.array("many")}, "no usable reference statistics"),
        ({"num_images": np.array(5j)}, "no usable reference statistics"),
        ({"fid__features": np.ones((10, 2), np.float32)}, "[N,3]"),
        ({"fid__features": np.ones(3, np.float32)}, "[N,3]"),
        ({"fid__features": np.full((10, 3), np.nan, np.float32)}, "features are not finite"),
        ({"fid__features": np.full((10, 3), "x")}, "no usable reference statistics"),
        ({"fid__features": np.ones((10, 3), np.complex64)}, "no usable reference statistics"),
    ],
)
def test_arrays_that_are_no_statistics_are_refused(tmp_path, changes, words):
    path = tmp_path / "ref.npz"
    path.write_bytes(npz(own()))
    load_reference(path)
    path.write_bytes(npz(own(**changes)))
    refused(path, words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "not a dict"),
        ("fid", "not a dict"),
        ({}, "no reference statistics"),
        ({"num_images": 50000}, "no reference statistics"),
        ({"fid": {"mu": MU}, "num_images": 10}, "no reference statistics"),
        ({"fid": {"mu": "0 0 0", "sigma": SIGMA}, "num_images": 10}, "arrays of numbers"),
        ({"fid": {"mu": MU.tolist(), "sigma": SIGMA}, "num_images": 10}, "arrays of numbers"),
        ({"fid": {"mu": MU, "sigma": SIGMA[:2]}, "num_images": 10}, "[D,D]"),
        ({"fid": {"mu": MU, "sigma": SIGMA}, "num_images": 1}, "num_images is 1"),
    ],
)
def test_pickles_of_other_things_are_refused(tmp_path, content, words):
    path = tmp_path / "ref.pkl"
    path.write_bytes(pickle.dumps(content))
    refused(path, words)


EDM = npz({"mu": MU, "sigma": SIGMA})
COMPRESSED = npz({"mu": MU, "sigma": SIGMA}, np.savez_compressed)
LONG_HEADER = b"\x93NUMPY\x02\x00" + (20000).to_bytes(4, "little") + b"{" + b" " * 19999


@pytest.mark.parametrize(
    "content",
    [
        b"",
        np.random.default_rng(0).bytes(500),
        EDM[: len(EDM) // 2],
        EDM[:-30],
        EDM.replace(MU.tobytes(), b"\xff" * MU.nbytes),
        pickle.dumps({"fid": {"mu": MU, "sigma": SIGMA}})[:-20],
        archive(),
        archive(mu=b"hello", sigma=b"world"),
        archive(mu=member(MU), sigma=header((10**6, 10**6))),
        archive(mu=member(MU), sigma=header((10**9, 10**9))),
        archive(mu=member(MU), sigma=header((10**30, 10**30))),
        archive(mu=member(MU), sigma=header((-3, -3))),
        archive(mu=member(MU), sigma=b"\x93NUMPY\x01\x00\x76\x00" + b"(" * 118),
        archive(mu=member(MU), sigma=LONG_HEADER),
        flag(EDM, 6, 8, 1),  # encrypted
        flag(EDM, 8, 10, 99),  # an unknown compression
        flag(COMPRESSED, 8, 10, zipfile.ZIP_LZMA),
        flag(COMPRESSED, 4, 6, 95),  # a version of the format that does not exist
        COMPRESSED[:80] + b"\xff" * 30 + COMPRESSED[110:],
    ],
)
def test_damaged_files_are_refused(tmp_path, content):
    path = tmp_path / "ref.npz"
    path.write_bytes(content)
    refused(path, "")


def test_an_archive_that_unpacks_to_more_than_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("metrics.references.MAX_BYTES", 10_000)
    path = tmp_path / "ref.npz"
    path.write_bytes(npz({"mu": np.zeros(100), "sigma": np.zeros((100, 100))}, np.savez_compressed))
    assert path.stat().st_size < 10_000
    refused(path, "more than the limit")


BOMBS = """
import pathlib, sys, zipfile
import numpy as np
from metrics.references import load_reference
from tests.memory_utils import refuse_all
from tests.metrics.test_references import header
from tests.datasets.test_hostile_datasets import large_directory

folder = pathlib.Path(sys.argv[1])

def bomb(name, **members):
    with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for key, (start, zeros) in ({"mu": (header((3,)), 0), "sigma": (header((3, 3)), 8)} | members).items():
            with file.open(f"fid/{key}.npy", "w", force_zip64=True) as stream:
                stream.write(start)
                for _ in range(zeros >> 20):
                    stream.write(bytes(1 << 20))
    return folder / name

files = {
    "dimension": bomb("a", mu=(header((60000,)), 1 << 20), sigma=(header((60000, 60000)), 1 << 30)),
    "no square": bomb("b", mu=(header((8000,)), 1 << 20), sigma=(header((4000, 16000)), 1 << 29)),
    "header": bomb("c", features=(b"\\x93NUMPY\\x02\\x00" + (1 << 29).to_bytes(4, "little"), 1 << 29)),
    "features": bomb("d", features=(header((1 << 30, 3)), 1 << 29)),
    "text": bomb("e", sha256=(header((), "<U99999999")[:-64], 400 << 20)),
    "texts": bomb("f", sha256=(header((1 << 26,))[:-64], 1 << 29)),
    "directory": large_directory(folder / "h"),
}
try:
    load_reference(bomb("g", sigma=(header((4, 3)), 0)))  # imports what is needed
except ValueError:
    pass
refuse_all(load_reference, files)
"""


@pytest.mark.skipif(not HAS_LIMITS, reason="needs Linux")
def test_bombs_are_cheap(tmp_path):
    run_script(BOMBS, tmp_path)


def test_dimensions_are_compared_before_eigenvalues(tmp_path, monkeypatch):
    """They take the cube of the dimension, which the file decides."""
    path = tmp_path / "ref.npz"
    path.write_bytes(npz(own(fid__sigma=SIGMA - 4 * np.eye(3))))
    metrics, calls = parse_metrics("fid"), []
    eigenvalues = np.linalg.eigvalsh
    monkeypatch.setattr(np.linalg, "eigvalsh", lambda sigma: [calls.append(1), eigenvalues(sigma)][1])
    reference = load_reference(path)
    with pytest.raises(ReferenceFileError, match="the reference has 3 feature dimensions and the detector 4"):
        check_reference(metrics, reference, {"fid": collected(4, 5, keep=False)[0].detector})
    assert not calls
    with pytest.raises(ReferenceFileError, match="negative eigenvalues"):
        check_reference(metrics, reference, {"fid": collected(3, 5, keep=False)[0].detector})
    with pytest.raises(ReferenceFileError, match="negative eigenvalues"):  # of a detector that did not know its own
        compute_metrics(metrics, {"fid": collected(3, 5, keep=False)[0]}, reference)
    assert calls == [1]


def test_nothing_but_regular_files_is_read(tmp_path):
    os.mkfifo(tmp_path / "ref.npz")
    for path in (tmp_path / "ref.npz", "/dev/zero"):
        with pytest.raises(ValueError, match=f"{path}: no such file|{path}: .*(not a|no) regular file"):
            load_reference(path)


def test_missing_files_and_folders_are_refused(tmp_path):
    for path in (tmp_path / "missing.npz", tmp_path):
        with pytest.raises(ValueError, match=str(path)) as error:
            load_reference(path)
        assert "\n" not in str(error.value)
