import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from inverse.evaluation import evaluate, format_summary
from inverse.operators import get_operator
from inverse.results import ResultsError, ResultsFolder, coverage
from inverse.solve import Problem, Solution, simulate, stream


def uint8(x):
    return x.clamp(1, 254).to(torch.uint8)


@pytest.mark.parametrize(("runs", "interval"), [(2, 1 / 3), (8, 7 / 9), (19, 0.9), (39, 0.9), (59, 0.9)])
def test_coverage_of_calibrated_over_and_underconfident_samples(runs, interval):
    generator = torch.Generator().manual_seed(0)

    def draw(count, std):
        return uint8(127 + std * torch.randn([count, 1, 120, 120], generator=generator))

    truth = draw(1, 30)[0]
    found = coverage(draw(runs, 30), truth)
    assert found["interval"] == pytest.approx(interval)
    assert found["coverage"] == pytest.approx(interval, abs=0.01)
    assert coverage(draw(runs, 15), truth)["coverage"] < interval - 0.05
    assert coverage(draw(runs, 60), truth)["coverage"] > interval + 0.04


def test_coverage_splits_ties_at_random():
    truth = torch.tensor([[[0, 100, 255, 200]]], dtype=torch.uint8)
    samples = torch.tensor([[[[0, 90, 255, 10]]], [[[0, 110, 255, 20]]]], dtype=torch.uint8)
    found = coverage(samples, truth)
    assert found["coverage"] == pytest.approx((1 / 3 + 1 + 1 / 3 + 0) / 4)
    generator = torch.Generator().manual_seed(0)  # mostly black images: ties all over
    draws = (torch.randn([20, 1, 100, 100], generator=generator) * 2).clamp(0, 255).to(torch.uint8)
    assert coverage(draws[:19], draws[19])["coverage"] == pytest.approx(0.9, abs=0.01)


def test_streams_differ_by_seed_name_run_and_purpose():
    found = {stream(*key) for key in [(0, "a"), (0, "a", 0), (0, "a", 1), (1, "a", 0), (0, "b", 0), (0, "1/a", 0)]}
    assert len(found) == 6


def test_simulated_measurements_have_the_stated_noise():
    truth = torch.zeros(1, 64, 64)
    y = simulate(get_operator("gaussian_blur_circ"), truth, 0.05, seed=3, name="a")
    assert y.std().item() == pytest.approx(0.05, rel=0.05)
    assert torch.equal(y, simulate(get_operator("gaussian_blur_circ"), truth, 0.05, seed=3, name="a"))
    assert not torch.equal(y, simulate(get_operator("gaussian_blur_circ"), truth, 0.05, seed=3, name="b"))


def test_inpainting_measures_nothing_where_pixels_are_removed():
    operator = get_operator("inpainting", box=[0, 0, 8, 4])
    x = torch.ones(1, 1, 8, 8)
    y = operator.measure(x, 0.1)
    assert (y[..., :4] == 0).all() and (y[..., 4:] != 0).all()
    x_other = torch.where(torch.arange(8) < 4, 5.0, 1.5).expand(1, 1, 8, 8)
    assert operator.residual(x_other, torch.where(torch.arange(8) < 4, 0.0, 1.0).expand(1, 1, 8, 8)).item() == 0.5


def test_folders_of_others_are_left_alone(tmp_path):
    operator = get_operator("super_resolution", factor=2)
    (tmp_path / "samples").mkdir()
    with pytest.raises(ResultsError, match="results without options.json"):
        ResultsFolder(tmp_path).begin({"seed": 1}, operator, (8, 8))
    (tmp_path / "options.json").write_text("{broken")
    with pytest.raises(ResultsError, match="damaged"):
        ResultsFolder(tmp_path).begin({"seed": 1}, operator, (8, 8))
    assert (tmp_path / "options.json").read_text() == "{broken"
    (tmp_path / "options.json").write_text('{"batch": 64}')
    with pytest.raises(ResultsError, match="not of posterior_sample.py"):
        ResultsFolder(tmp_path).begin({"seed": 1}, operator, (8, 8))
    for name in ("truth", "mask.png"):
        folder = tmp_path / name / "own"
        (folder / name).mkdir(parents=True)
        with pytest.raises(ResultsError, match="results without options.json"):
            ResultsFolder(folder).begin({"seed": 1}, operator, (8, 8))


def test_options_may_change_until_the_first_image_is_written(tmp_path):
    options = {"task": {}, "net_sha256": "0", "seed": 1, "batch": 4}
    folder = ResultsFolder(tmp_path)
    folder.begin(options, get_operator("inpainting", fraction=0.5), (8, 8))
    assert (tmp_path / "mask.png").exists()
    blur = get_operator("gaussian_blur_circ", kernel_size=3)
    folder.begin({**options, "seed": 2}, blur, (8, 8))
    assert (tmp_path / "kernel.png").exists() and not (tmp_path / "mask.png").exists()
    folder.write(Solution(Problem("a", torch.zeros(1, 8, 8)), torch.zeros(1, 1, 8, 8), retries=0), blur)
    folder.begin({**options, "seed": 2, "batch": 8}, blur, (8, 8))
    with pytest.raises(ResultsError, match="seed: 2 there, 1 now"):
        folder.begin(options, blur, (8, 8))


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"name": "a"}',
        '{"name": "a", "runs": [], "retries": 0}',
        '{"name": "a", "runs": [{"residual": 1}], "retries": -1}',
        '{"name": "a", "runs": [{"residual": 1}], "retries": 0, "coverage": 2, "interval": 0.9}',
        '{"name": "a", "runs": [{"residual": 1}], "retries": 0, "std_max": -1}',
        '{"name": "a", "runs": [{}], "retries": 0}',
        '{"name": "a", "runs": [{"residual": "text"}], "retries": 0}',
        '{"name": "a", "runs": [{"residual": [1]}], "retries": 0}',
        '{"name": "a", "runs": [{"residual": NaN}], "retries": 0}',
        '{"name": "a", "runs": [{"residual": 1' + "0" * 400 + '}], "retries": 0}',
        '{"name": "a", "runs": [{"residual": 1}], "retries": 0, "coverage": 0.5}',
        '{"name": "a", "runs": [{"residual": 1}], "retries": 0, "coverage": null, "interval": 0.9}',
        '{"name": "a", "runs": [{"residual": 1}, {"residual": 1}], "retries": 0, "mean_residual": "1"}',
        "[" * 100000,
        '{"name": "b", "runs": [{"residual": 1}], "retries": 0}',
        '{"name": "a", "runs": [{"residual": 1}, {"residual": 2}], "retries": 0}',
    ],
)
def test_a_damaged_record_is_told_and_kept(text, tmp_path):
    file = tmp_path / "records" / "a.json"
    file.parent.mkdir()
    file.write_text(text)
    with pytest.raises(ResultsError, match="a.json: damaged.*remove it, and the image is drawn again"):
        ResultsFolder(tmp_path).record("a")
    assert file.read_text() == text


def test_maps_of_several_runs(tmp_path):
    from generation.pictures import read_image

    samples = torch.zeros(2, 1, 4, 4)
    samples[0, 0, 0, 0], samples[1, 0, 0, 0] = 0.5, -0.5
    samples[:, 0, 1, 1] = 3.0  # an overshoot counts as white
    operator = get_operator("inpainting", fraction=0.0)
    solution = Solution(Problem("a", torch.zeros(1, 4, 4), torch.zeros(1, 4, 4)), samples, retries=2)
    ResultsFolder(tmp_path).write(solution, operator)
    record = ResultsFolder(tmp_path).record("a")
    assert record.std_max == pytest.approx(0.5**0.5) and record.retries == 2
    assert record.runs[0]["residual"] == pytest.approx(((0.25 + 1) / 16) ** 0.5)
    std = read_image(tmp_path / "std" / "a.png")[0]
    assert std[0, 0] == 255 and (np.delete(std.ravel(), 0) == 0).all()
    assert read_image(tmp_path / "mean" / "a.png")[0, 1, 1] == 255
    assert ResultsFolder(tmp_path).record("b") is None
    with pytest.raises(ResultsError, match="a.json: damaged, of 2 runs where the task has 3; remove it"):
        ResultsFolder(tmp_path, runs=3).record("a")
    for folder in ("truth", "mean", "samples/run_1"):  # an image that lacks a picture is drawn again
        (tmp_path / folder / "a.png").rename(tmp_path / "kept.png")
        assert ResultsFolder(tmp_path).record("a") is None
        (tmp_path / "kept.png").rename(tmp_path / folder / "a.png")


def test_a_folder_that_another_process_writes_to_is_refused(tmp_path):
    hold = "import sys; from dnnlib.files import *; held = lock_folder(sys.argv[1]); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline() == "1\n"
        operator = get_operator("inpainting", fraction=0.5)
        with pytest.raises(ValueError, match=f"is in use by another run .process {other.pid} "):
            ResultsFolder(tmp_path).begin({"task": 1, "net_sha256": 2}, operator, (8, 8))
        assert not (tmp_path / "options.json").exists()
        other.communicate("\n")
    ResultsFolder(tmp_path).begin({"task": 1, "net_sha256": 2}, operator, (8, 8))
    assert (tmp_path / "options.json").exists()


def test_a_record_whose_coverage_was_removed_leaves_the_calibration_to_the_others(tmp_path):
    for name, more in (("a", ""), ("b", ', "coverage": 0.5, "interval": 0.8')):
        for path in (f"records/{name}.json", f"samples/run_0/{name}.png"):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(f'{{"name": "{name}", "runs": [{{"residual": 1}}], "retries": 0{more}}}')
    results = evaluate(ResultsFolder(tmp_path, 1), ["a", "b"], "task", has_truth=False)
    assert results.calibration == {"interval": 0.8, "expected": 0.8, "coverage": 0.5, "runs": 1}
    assert "50.0% of the true pixels lie in the central 80%" in format_summary(results)
