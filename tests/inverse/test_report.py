import base64
import io
import math
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from generation.pictures import save_image
from inverse.evaluation import Results
from inverse.operators import Operator, get_operator
from inverse.report import colour_map, describe_task, write_report
from inverse.results import ImageResult
from inverse.tasks import Task

NAMES = ["00000", "<b>&amp;'\"", "img 2"]
NOTE = "put vgg16-397923af.pth into $NCVSD_DETECTORS"


@dataclass
class Given:
    """What a report is made of."""

    outdir: Path
    results: Results
    task: Task
    operator: Operator
    options: dict

    def report(self, **options):
        return write_report(self.outdir, self.results, self.task, self.operator, self.options, **options)


def write_results(outdir, *, runs=1, truth=True, lpips=True, images=None, names=NAMES, noise=0.05, shrink=4):
    """Write the pictures of posterior_sample.py where noisy copies of the images are the samples; return the rest."""
    rng = np.random.default_rng(0)
    if images is None:
        images = rng.uniform(-1, 1, (len(names), 3, 16, 16)).astype(np.float32)

    def save(image, *parts):
        save_image(outdir.joinpath(*parts), (image * 127.5 + 128).clip(0, 255).astype(np.uint8))

    def scores(sample, image):
        mse = float(np.square(sample - image).mean())
        record = {"residual": float(noise * rng.uniform(0.95, 1.1))}
        if truth:
            record |= {"psnr": -10 * np.log10(mse / 4), "ssim": 1 - 3 * mse}
            if lpips:
                record["lpips"] = 2 * mse
        return record

    records = []
    for name, image in zip(names, images, strict=True):
        file = f"{name}.png"
        samples = image + 0.15 * rng.standard_normal((runs, *image.shape)) * (1.1 - np.abs(image))
        samples = samples.clip(-1, 1).astype(np.float32)
        channels, height, width = image.shape
        small = image.reshape(channels, height // shrink, shrink, width // shrink, shrink).mean((2, 4))
        save(small + noise * rng.standard_normal(small.shape), "measurements", file)
        for run, sample in enumerate(samples):
            save(sample, "samples", f"run_{run}", file)
        record = ImageResult(name, [scores(s, image) for s in samples], 2 * (name == "img 2"), truth)
        if truth:
            save(image, "truth", file)
        if runs > 1:
            std = samples.std(axis=0, ddof=1)
            save(samples.mean(axis=0), "mean", file)
            save(std / std.max() * 2 - 1, "std", file)
            record.posterior_mean, record.std_max = scores(samples.mean(axis=0), image), float(std.max())
            record.chosen_run = int(np.argmin([result["residual"] for result in record.runs]))
            record.oracle_run = int(np.argmax([result["psnr"] for result in record.runs])) if truth else None
        records.append(record)

    def average(results):
        return {
            key: {"mean": float(np.mean([r[key] for r in results])), "std": float(np.std([r[key] for r in results]))}
            for key in results[0]
        }

    summary = {"sample": average([result for record in records for result in record.runs])}
    if runs > 1:
        summary["posterior_mean"] = average([record.posterior_mean for record in records])
        summary["chosen"] = average([record.runs[record.chosen_run] for record in records])
        if truth:
            summary["oracle"] = average([record.runs[record.oracle_run] for record in records])
    results = Results(
        task="super_resolution",
        num_images=len(names),
        runs=runs,
        has_truth=truth,
        lpips={
            "computed": truth and lpips,
            "name": "LPIPS-VGG v0.1, max pooling" if lpips else None,
            "note": None if lpips else NOTE,
        },
        langevin_retries=sum(record.retries for record in records),
        summary=summary,
        calibration={"interval": 0.9, "expected": 0.9, "coverage": 0.82, "runs": runs} if truth and runs > 1 else None,
        images=records,
    )
    task = Task({"name": "super_resolution", "factor": shrink}, 0.005, name="super_resolution", noise=noise)
    options = {"task": task.to_dict(), "net": "folder/net<1>.safetensors", "seed": 7, "runs": runs, "device": "cpu"}
    return Given(outdir, results, task, get_operator("super_resolution", factor=shrink), options)


class Page(HTMLParser):
    """Elements, text and pictures of a page; fails on unbalanced elements."""

    def __init__(self, path):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def images(self, start=""):
        return [a for tag, a in self.elements if tag == "img" and a["alt"].startswith(start)]

    def scores(self, index):
        return re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", self.source.split('<dl class="scores">')[1 + index])

    def pixels(self, start):
        data = self.images(start)[0]["src"].removeprefix("data:image/png;base64,")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


@pytest.mark.parametrize("runs", [1, 4])
@pytest.mark.parametrize("truth", [True, False])
def test_page(tmp_path, runs, truth):
    path = write_results(tmp_path, runs=runs, truth=truth).report()
    assert path == tmp_path / "report.html" and not list(tmp_path.glob(".*"))
    page = Page(path)
    assert all(a["src"].startswith("data:image/png;base64,") and a["alt"] for a in page.images())
    assert "<script" not in page.source and not re.search(r"(?:https?:)?//\w", re.sub(r'src="[^"]*"', "", page.source))
    for name in NAMES:
        assert page.text.count(name) == 1  # the heading: markup in names stays text
        assert any(name in a["alt"] for a in page.images())
    count = len(NAMES)
    assert len(page.images("Measurement of")) == count
    assert len(page.images("Ground truth of")) == len(page.images("Absolute error of")) == count * truth
    assert len(page.images("Posterior sample")) == count * min(runs, 3)
    assert len(page.images("Mean of")) == len(page.images("Standard deviation of")) == count * (runs > 1)
    assert ("PSNR" in page.text) and ("No ground truth was given" in page.text) == (not truth)
    assert ("Oracle: needs the truth" in page.text) == ("82.0 %" in page.text) == (truth and runs > 1)
    assert ("over-confident" in page.text) == (truth and runs > 1)
    assert page.text.count("chosen by residual") == count * (runs > 1)
    assert ("The noise is 0.05" in page.text) == ("noise 0.05" in page.text) == truth  # unknown for real measurements
    assert "net<1>.safetensors" in page.text and "task.operator.factor" in page.text
    assert "repeated with smaller ones: 2 times" in page.text
    for tag, attributes in page.elements:
        assert tag != "th" or attributes.get("scope") in ("row", "col")


def test_numbers_of_the_table_and_the_cards(tmp_path):
    given = write_results(tmp_path, runs=4)
    summary, runs = given.results.summary, given.results.images[0].runs
    summary["oracle"]["psnr"] = {"mean": math.inf, "std": math.nan}
    runs[0]["psnr"] = math.inf
    page = Page(given.report(samples_per_image=4))
    table = page.source.split("<tbody>")[1].split("</tbody>")[0]
    rows = re.findall(r"<tr.*?</tr>", table, re.DOTALL)
    for row, key in zip(rows, ("sample", "posterior_mean", "chosen", "oracle"), strict=True):
        cells = re.findall(r"<td>([^<]*)", row)
        values = [summary[key][metric]["mean"] for metric in ("psnr", "ssim", "lpips", "residual")]
        formats = zip(values, ("%.2f", "%.3f", "%.3f", "%.4f"), strict=True)
        assert cells == [form % value if math.isfinite(value) else "–" for value, form in formats]
    assert page.scores(0)[:2] == [("PSNR", "–"), ("SSIM", f"{runs[0]['ssim']:.3f}")]
    assert page.scores(1)[0] == ("PSNR", f"{runs[1]['psnr']:.2f}")


def test_marked_runs_are_shown_first(tmp_path):
    given = write_results(tmp_path, runs=4, names=["a"])
    given.results.images[0].chosen_run, given.results.images[0].oracle_run = 3, 2
    shown = [[a["alt"] for a in Page(given.report(samples_per_image=n)).images("Posterior")] for n in (1, 3)]
    chosen, oracle = "Posterior sample 3 of image a (chosen by residual)", "Posterior sample 2 of image a (oracle)"
    assert shown == [[chosen], ["Posterior sample 0 of image a", oracle, chosen]]


@pytest.mark.parametrize("runs", [1, 4])
def test_errors_and_deviations_share_one_scale(tmp_path, runs):
    given = write_results(tmp_path, runs=runs, names=["a"])
    page = Page(given.report())
    top = float(re.search(r"one scale from 0 to ([\d.]+),", page.text.replace("\n", " "))[1])
    estimate, truth = page.pixels("Mean" if runs > 1 else "Posterior sample"), page.pixels("Ground truth")
    error = np.abs(estimate.astype(float) - truth).mean(axis=2) / 127.5
    assert np.quantile(error, 0.99) <= top + 1e-6
    drawn = page.pixels("Absolute error").astype(int)
    assert np.abs(drawn - np.moveaxis(colour_map(error / top), 0, -1)).max() <= 1
    if runs > 1:
        std_max = given.results.images[0].std_max
        std = np.asarray(Image.open(tmp_path / "std" / "a.png")).mean(axis=2) / 255 * std_max
        drawn = page.pixels("Standard deviation").astype(int)
        assert np.abs(drawn - np.moveaxis(colour_map(std / top), 0, -1)).max() <= 1
    else:
        assert "|sample − truth|" in page.text


def test_colour_map_is_even_in_lightness():
    linear = colour_map(np.linspace(0, 1, 101)) / 255
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    cones = np.cbrt(
        np.array(
            [[0.41222147, 0.53633254, 0.05144599], [0.2119035, 0.6806996, 0.1073970], [0.0883025, 0.2817188, 0.6299787]]
        )
        @ linear
    )
    lightness = np.array([0.21045426, 0.79361779, -0.00407205]) @ cones
    assert np.allclose(lightness, np.linspace(0.16, 0.96, 101), atol=0.01)  # which also shows that no colour is clipped
    assert (colour_map(np.array([-1.0, 2.0])) == colour_map(np.array([0.0, 1.0]))).all()


def test_missing_lpips_and_images_that_are_not_shown_are_said(tmp_path):
    given = write_results(tmp_path, runs=4, lpips=False)
    given.results.calibration["coverage"] = 0.88
    page = Page(given.report(max_images=2))
    text = " ".join(page.text.split())
    assert f"LPIPS was not computed: {NOTE}" in text
    assert "The first 2 of 3 images are shown." in text and len(page.images("Measurement of")) == 2
    assert "88.0 % of the true pixels lie" in text and "about right" in text


def test_small_images_have_no_ssim(tmp_path):
    given = write_results(tmp_path)
    for record in (given.results.summary["sample"], *(image.runs[0] for image in given.results.images)):
        del record["ssim"]
    text = Page(given.report()).text
    assert "SSIM" not in text and text.count("PSNR") == 1 + len(NAMES)


def test_grey_images_kernel_and_mask(tmp_path):
    images = np.random.default_rng(1).uniform(-1, 1, (1, 1, 160, 160)).astype(np.float32)
    given = write_results(tmp_path, runs=2, names=["a"], images=images)
    save_image(tmp_path / "kernel.png", np.zeros((1, 61, 61), np.uint8))
    page = Page(given.report())
    assert page.pixels("Ground truth").shape == (160, 160) and page.pixels("Blur kernel of 61").shape == (61, 61)
    assert [a.get("class") for a in (page.images("Ground truth")[0], page.images("Measurement")[0])] == [
        None,
        "pixelated",
    ]
    assert not page.images("Mask of")


@pytest.mark.parametrize(
    "file", ["truth/a.png", "measurements/a.png", "samples/run_1/a.png", "mean/a.png", "std/a.png"]
)
def test_missing_and_damaged_files_are_named(tmp_path, file):
    given = write_results(tmp_path, runs=2, names=["a"])
    given.report()
    (tmp_path / "report.html").write_text("older")
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:60])
    with pytest.raises(ValueError, match=f"{file}: damaged"):
        given.report()
    (tmp_path / file).unlink()
    with pytest.raises(ValueError, match=f"{file}: missing"):
        given.report()
    assert (tmp_path / "report.html").read_text() == "older" and not list(tmp_path.glob(".*"))


def test_pictures_of_another_size_are_refused(tmp_path):
    given = write_results(tmp_path, runs=2, names=["a"])
    save_image(tmp_path / "mean" / "a.png", np.zeros((3, 8, 16), np.uint8))
    with pytest.raises(ValueError, match="mean/a.png: 16x8 pixels, where 16x16 are expected"):
        given.report()


def test_deviations_that_are_not_finite_are_left_out(tmp_path):
    given = write_results(tmp_path, runs=2, names=["a"])
    given.results.images[0].std_max = math.inf
    page = Page(given.report())
    assert not page.images("Standard deviation") and page.images("Absolute error")


@pytest.mark.parametrize(
    ("operator", "words"),
    [
        ({"name": "inpainting", "box": [4, 4, 8, 6]}, "A box of 8 × 6 pixels"),
        ({"name": "inpainting", "fraction": 0.7}, "70% of the pixels"),
        ({"name": "inpainting", "mask": np.eye(4)}, "outside a mask"),
        ({"name": "gaussian_blur_circ", "std": 1.5}, "Gaussian of 1.5 pixels"),
        ({"name": "motion_blur_circ"}, "camera shake"),
        ({"name": "motion_blur_circ", "kernel": [[1.0]]}, "by a given kernel"),
        ({"name": "super_resolution", "factor": 2}, "shrunk 2 times"),
        ({"name": "phase_retrieval"}, "magnitude"),
        ({"name": "high_dynamic_range", "scale": 2}, "multiplied by 2"),
        ({"name": "nonlinear_blur"}, "linear light"),
    ],
)
def test_tasks_in_words(operator, words):
    task = Task(operator, 1.0, name="my_task_circ")
    title, sentence = describe_task(task, get_operator(**operator))
    assert title == "My task" + (" ×2" if "factor" in operator else "") and words in sentence


def test_an_operator_without_words_leaves_them_to_the_task():
    class Halved(Operator):
        def forward(self, x):
            return x / 2

    task = Task({"name": "halved"}, 1.0, name="", description="Half of it.")
    assert describe_task(task, Halved()) == ("Halved", "Half of it.")
