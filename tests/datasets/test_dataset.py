"""Data sets: formats, labels, mirroring, subsets, processes, errors, and the resumable sampler."""

import io
import itertools
import json
import math
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.dataset import DatasetError, ImageDataset, InfiniteSampler

FASHION = Path(__file__).parents[2] / "assets" / "fashion16.zip"


def png(array, mode=None):
    stream = io.BytesIO()
    image = Image.fromarray(np.asarray(array, dtype=np.uint8))
    (image.convert(mode) if mode else image).save(stream, format="png")
    return stream.getvalue()


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def write(path, files):
    """`files` {name: bytes, or anything for JSON} as a ZIP or a folder."""
    files = {n: d if isinstance(d, bytes) else json.dumps(d).encode() for n, d in files.items()}
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        for name, data in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    return path


def random_images(count, *shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, [count, *shape], dtype=np.uint8)


def rgb_files(count=5, size=6, labels=None):
    images = random_images(count, size, size, 3)
    files = {f"00000/img{i:08d}.png": png(image) for i, image in enumerate(images)}
    if labels is not None:
        files["dataset.json"] = {"labels": [[f"00000/img{i:08d}.png", label] for i, label in enumerate(labels)]}
    return images, files


@pytest.mark.parametrize("name", ["data", "data.zip"])
@pytest.mark.parametrize("cache", [False, True])
def test_pixels_and_class_labels(tmp_path, name, cache):
    images, files = rgb_files(labels=[2, 0, 1, 1, 3])
    dataset = ImageDataset(write(tmp_path / name, files), resolution=6, cache=cache)
    assert len(dataset) == 5
    assert (dataset.name, dataset.image_shape, dataset.num_channels, dataset.resolution) == ("data", [3, 6, 6], 3, 6)
    assert dataset.has_onehot_labels and dataset.label_dim == 4
    for i, label in enumerate([2, 0, 1, 1, 3]):
        image, onehot = dataset[i]
        assert image.dtype == np.uint8 and np.array_equal(image, images[i].transpose(2, 0, 1))
        assert onehot.dtype == np.float32 and np.array_equal(onehot, np.eye(4)[label])
        assert dataset.get_raw_label(i) == label
    with pytest.raises(IndexError):
        dataset[5]
    assert json.loads(json.dumps(dataset.facts())) == {
        "name": "data", "num_images": 5, "resolution": 6, "channels": 3, "label_dim": 4, "xflip": False,
        "max_size": None,
    }  # fmt: skip


def test_without_labels_and_unconditional(tmp_path):
    _, files = rgb_files(labels=[2, 0, 1, 1, 3])
    dataset = ImageDataset(write(tmp_path / "a", files), use_labels=False)
    assert dataset.label_dim == 0 and dataset[0][1].shape == (0,) and not dataset.has_onehot_labels
    files["dataset.json"] = {"labels": None}
    assert ImageDataset(write(tmp_path / "b", files)).label_dim == 0
    del files["dataset.json"]
    assert ImageDataset(write(tmp_path / "c", files)).get_raw_label(0) is None


def test_vector_labels_are_kept(tmp_path):
    vectors = [[0.5, -1.0], [2, 3], [0.25, 0], [1, 1], [0, 8]]
    _, files = rgb_files(labels=vectors)
    dataset = ImageDataset(write(tmp_path / "v.zip", files))
    assert dataset.label_dim == 2 and not dataset.has_onehot_labels
    assert np.array_equal([dataset[i][1] for i in range(5)], np.float32(vectors))


def test_modes_alpha_palette_and_grey(tmp_path):
    rgba = random_images(1, 4, 4, 4)[0]
    la = random_images(1, 4, 4, 2)[0]
    grey = random_images(1, 4, 4)[0]
    dataset = ImageDataset(write(tmp_path / "rgba", {"a.png": png(rgba)}))
    assert np.array_equal(dataset[0][0], rgba[..., :3].transpose(2, 0, 1))
    dataset = ImageDataset(write(tmp_path / "la", {"a.png": png(la)}))
    assert np.array_equal(dataset[0][0], la[..., :1].transpose(2, 0, 1))
    dataset = ImageDataset(write(tmp_path / "l", {"a.png": png(grey)}))
    assert dataset.image_shape == [1, 4, 4] and np.array_equal(dataset[0][0][0], grey)
    palette = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4), mode="P")
    palette.putpalette([value for i in range(256) for value in (i, 2 * i % 256, 255 - i)])
    stream = io.BytesIO()
    palette.save(stream, format="png", transparency=0)
    dataset = ImageDataset(write(tmp_path / "p", {"a.png": stream.getvalue()}))
    i = np.arange(16).reshape(4, 4)
    assert np.array_equal(dataset[0][0], np.stack([i, 2 * i, 255 - i]))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_latents(tmp_path, dtype):
    latents = np.random.default_rng(0).standard_normal([3, 8, 4, 4]).astype(dtype)
    files = {f"00000/img-mean-std-{i:08d}.npy": npy(x) for i, x in enumerate(latents)}
    dataset = ImageDataset(write(tmp_path / "latents.zip", files), xflip=True)  # members compressed
    assert dataset.image_shape == [8, 4, 4] and dataset[0][0].dtype == np.float32
    assert np.array_equal(dataset[1][0], latents[1].astype(np.float32))
    assert np.array_equal(dataset[4][0], latents[1].astype(np.float32)[:, :, ::-1])
    fortran = {"a.npy": npy(np.asfortranarray(latents[0]))}
    assert np.array_equal(ImageDataset(write(tmp_path / "fortran", fortran))[0][0], latents[0].astype(np.float32))


def test_xflip_and_max_size(tmp_path):
    images, files = rgb_files(count=7, labels=range(7))
    path = write(tmp_path / "d", files)
    subset = ImageDataset(path, max_size=3, random_seed=1, xflip=True)
    assert len(subset) == 6 and subset.label_dim == 7
    order = np.arange(7)
    np.random.RandomState(1).shuffle(order)
    kept = sorted(order[:3])
    assert [subset.get_raw_label(i) for i in range(6)] == kept * 2
    for i in range(3):
        assert np.array_equal(subset[i][0], images[kept[i]].transpose(2, 0, 1))
        assert np.array_equal(subset[i + 3][0], images[kept[i]].transpose(2, 0, 1)[:, :, ::-1])
    assert len(ImageDataset(path, max_size=100)) == 7


def test_fingerprint_sees_changes(tmp_path):
    _, files = rgb_files(labels=[0, 1, 2, 3, 4])
    path = write(tmp_path / "a.zip", files)
    reference = ImageDataset(path).fingerprint()
    assert ImageDataset(write(tmp_path / "same.zip", files)).fingerprint() == reference
    options = ({"xflip": True}, {"max_size": 4}, {"use_labels": False})
    assert len({ImageDataset(path, **o).fingerprint() for o in options} | {reference}) == 4
    pixel = dict(files)
    other = np.zeros([6, 6, 3], dtype=np.uint8)
    pixel["00000/img00000002.png"] = png(other)
    assert ImageDataset(write(tmp_path / "pixel.zip", pixel)).fingerprint() != reference
    label = {**files, "dataset.json": {"labels": [[n, 4] for n in files if n.endswith("png")]}}
    assert ImageDataset(write(tmp_path / "label.zip", label)).fingerprint() != reference
    folder = write(tmp_path / "folder", files)
    assert ImageDataset(folder).fingerprint() == ImageDataset(folder).fingerprint()


def test_hidden_files_are_left_out(tmp_path):
    _, files = rgb_files(count=2)
    junk = {"__MACOSX/00000/._img00000000.png": b"x", ".cache/a.png": b"x", "00000/.a.png": b"x", "README.txt": b"x"}
    assert len(ImageDataset(write(tmp_path / "a.zip", {**files, **junk}))) == 2
    assert len(ImageDataset(write(tmp_path / "a", {**files, **junk}))) == 2


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_data_loader_workers(tmp_path, context):
    images, files = rgb_files(count=24, labels=[i % 3 for i in range(24)])
    dataset = ImageDataset(write(tmp_path / "w.zip", files))
    assert np.array_equal(dataset[3][0], images[3].transpose(2, 0, 1))  # the parent has the archive open
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=4,
        sampler=InfiniteSampler(len(dataset), seed=5),
        num_workers=2,
        multiprocessing_context=context,
    )
    expected = list(itertools.islice(InfiniteSampler(24, seed=5), 24))
    got, labels = zip(*itertools.islice(loader, 6), strict=True)
    assert torch.equal(torch.cat(got), torch.from_numpy(images.transpose(0, 3, 1, 2)[expected]))
    assert torch.cat(labels).argmax(1).tolist() == [i % 3 for i in expected]


def test_archive_is_not_pickled(tmp_path):
    images, files = rgb_files()
    dataset = ImageDataset(write(tmp_path / "w.zip", files))
    copy = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(copy[4][0], images[4].transpose(2, 0, 1))


def error(path, **options):
    """The one-line message of the DatasetError that opening and reading everything raises."""
    with pytest.raises(DatasetError) as info:
        dataset = ImageDataset(path, **options)
        for i in range(len(dataset)):
            dataset[i]
    assert "\n" not in str(info.value)
    return str(info.value)


def test_errors_of_sources(tmp_path):
    _, files = rgb_files()
    assert "missing" in error(tmp_path / "missing")
    (tmp_path / "text.zip").write_text("no archive")
    assert "text.zip" in error(tmp_path / "text.zip")
    (tmp_path / "empty").mkdir()
    assert "no images" in error(tmp_path / "empty")
    assert "mixes" in error(write(tmp_path / "mixed", {"a.png": png(np.zeros([2, 2])), "b.npy": b""}))
    path = write(tmp_path / "d", files)
    assert "6x6" in error(path, resolution=8)
    assert "max_size" in error(path, max_size=0)
    assert "4x2" in error(write(tmp_path / "wide", {"a.png": png(np.zeros([2, 4]))}))
    archive = write(tmp_path / "crc.zip", {"a.png": png(np.zeros([2, 2]))})
    data = bytearray(archive.read_bytes())
    data[40] ^= 0xFF  # within the first member
    archive.write_bytes(data)
    assert "crc.zip:a.png" in error(archive)


@pytest.mark.parametrize("name", ["d", "d.zip"])
def test_errors_of_images_name_the_file(tmp_path, name):
    _, files = rgb_files()
    third = "00000/img00000003.png"
    bad = {
        "text": b"hello",
        "empty": b"",
        "cut": files[third][:60],
        "small": png(np.zeros([5, 5, 3])),
        "grey": png(np.zeros([6, 6])),
        "deep": png(np.zeros([6, 6]), mode="I;16"),
    }
    for kind, data in bad.items():
        assert third in error(
            write(tmp_path / kind / name if name == "d" else tmp_path / f"{kind}.zip", {**files, third: data})
        )


def test_errors_of_latents_name_the_file(tmp_path):
    good = npy(np.zeros([8, 2, 2], dtype=np.float32))
    huge = good.replace(b"(8, 2, 2)", b"(8, 99999999, 99999999)")
    bad = {
        "text": b"hello",
        "cut": good[:-4],
        "header": good[:20],
        "huge": huge,
        "shape": npy(np.zeros([8, 4], dtype=np.float32)),
        "double": npy(np.zeros([8, 2, 2])),
        "object": npy(np.array([[[{}]]], dtype=object)),
        "nan": npy(np.full([8, 2, 2], np.nan, dtype=np.float32)),
        "size": npy(np.zeros([8, 3, 3], dtype=np.float32)),
    }
    for kind, data in bad.items():
        assert "b.npy" in error(write(tmp_path / f"{kind}.zip", {"a.npy": good, "b.npy": data})), kind


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([["a.png", 0]], "no label for b.png"),
        ([["a.png", 0], ["b.png", None]], "no label for b.png"),
        ([["a.png", 0], ["b.png", -1]], "b.png"),
        ([["a.png", 0], ["b.png", 1.5]], "b.png"),
        ([["a.png", 0], ["b.png", True]], "b.png"),
        ([["a.png", 0], ["b.png", 10**12]], "b.png"),
        ([["a.png", 0], ["b.png", [1.0]]], "b.png"),
        ([["a.png", [1.0, 2.0]], ["b.png", [1.0]]], "b.png"),
        ([["a.png", [1.0, 2.0]], ["b.png", [1.0, float("nan")]]], "b.png"),
        ([["a.png", [1.0, 2.0]], ["b.png", 3]], "b.png"),
        ([["a.png", "cat"], ["b.png", "dog"]], "a.png"),
        ([["a.png", 0], "b.png"], "entry 1"),
        ({"a.png": 0}, "must be"),
    ],
)
def test_errors_of_labels(tmp_path, labels, expected):
    image = png(np.zeros([2, 2]))
    message = error(write(tmp_path / "d.zip", {"a.png": image, "b.png": image, "dataset.json": {"labels": labels}}))
    assert expected in message and "dataset.json" in message


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1]", b"[" * 100_000])
def test_errors_of_dataset_json(tmp_path, content):
    assert "dataset.json" in error(write(tmp_path / "d", {"a.png": png(np.zeros([2, 2])), "dataset.json": content}))


def test_fashion_asset():
    dataset = ImageDataset(FASHION, resolution=16)
    assert len(dataset) == 20_000 and dataset.image_shape == [1, 16, 16] and dataset.label_dim == 10
    counts = np.bincount([dataset.get_raw_label(i) for i in range(len(dataset))])
    assert counts.min() > 1900
    assert [dataset.get_raw_label(i) for i in range(5)] == [9, 0, 0, 3, 0]  # the first labels of Fashion-MNIST


def take(count, *args, **options):
    return list(itertools.islice(InfiniteSampler(*args, **options), count))


def test_sampler_covers_each_epoch_and_shuffles():
    stream = take(30, 10, seed=3)
    epochs = [stream[i : i + 10] for i in (0, 10, 20)]
    assert all(sorted(e) == list(range(10)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 3
    assert stream == take(30, 10, seed=3) != take(30, 10, seed=4)


def test_the_order_of_images_is_the_same_for_good():
    """Runs that resume rely on it: another one needs another `InfiniteSampler.version`."""
    assert InfiniteSampler.version == 2
    assert take(12, 6, seed=1) == [3, 5, 2, 0, 1, 4, 0, 5, 3, 4, 2, 1]


def test_each_image_is_as_likely_everywhere_in_an_epoch():
    orders = np.array([InfiniteSampler(5, seed=seed).epoch(e) for seed in range(20) for e in range(100)])
    counts = np.stack([np.bincount(column, minlength=5) for column in orders.T])
    assert np.abs(counts - 400).max() < 5 * math.sqrt(400)


def test_more_processes_than_images_take_their_share():
    whole = take(60, 4, seed=2)
    assert [take(6, 4, seed=2, rank=r, num_replicas=10) for r in range(10)] == [whole[r::10] for r in range(10)]


@pytest.mark.parametrize("start", [0, 1, 9, 10, 37])
@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_sampler_resumes_exactly_on_any_number_of_ranks(start, replicas):
    whole = take(start + 30, 10, seed=7)[start:]
    ranks = [
        take(30 // replicas, 10, seed=7, start_index=start, rank=r, num_replicas=replicas) for r in range(replicas)
    ]
    assert [i for group in zip(*ranks, strict=True) for i in group] == whole


@pytest.mark.parametrize("options", [{"dataset_size": 0}, {"rank": 1}, {"rank": -1}, {"seed": -1}, {"start_index": -1}])
def test_sampler_errors(options):
    with pytest.raises(ValueError):
        InfiniteSampler(**{"dataset_size": 5, **options})


def test_a_folders_fingerprint_notices_other_content_of_the_same_size(tmp_path):
    for i in range(600):
        np.save(tmp_path / f"img-mean-std-{i:08d}.npy", np.full((8, 4, 4), i, dtype=np.float32))
    before = ImageDataset(tmp_path).fingerprint()
    assert ImageDataset(tmp_path).fingerprint() == before
    np.save(tmp_path / "img-mean-std-00000001.npy", np.full((8, 4, 4), 7, dtype=np.float32))
    assert ImageDataset(tmp_path).fingerprint() != before
