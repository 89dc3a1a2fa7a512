"""Curves: what is read, round ticks, and that a line is where its numbers are."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from training.plot import COLOURS, MARGIN, PANEL, main, nice_ticks, read_curves, short_number


def write_run(folder, values, name="Loss/score"):
    folder.mkdir()
    lines = [json.dumps({"nimg": 100 * (i + 1), name: value, "Progress/lr": 0.1}) for i, value in enumerate(values)]
    (folder / "stats.jsonl").write_text("\n".join([*lines, '{"nimg": 900, "Loss/sc']))
    return str(folder)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 17.5), (1e-7, 2e-7), (5, 5), (0, 0), (1e6, 6.4e7)])
def test_ticks_are_round_and_cover_the_values(low, high):
    ticks = nice_ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 9
    steps = np.diff(ticks)
    assert steps.min() > 0 and np.allclose(steps, steps[0])
    assert f"{steps[0]:.6e}"[:3] in ("1.0", "2.0", "2.5", "5.0")


def test_labels():
    assert [short_number(v) for v in (0, 0.25, 1500, 6.4e7, -2e9)] == ["0", "0.25", "1.5k", "64M", "-2G"]


def test_null_cut_off_and_foreign_lines_are_left_out(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [
        '{"nimg": 8, "a": 1.5, "b": null}',
        '{"nimg": 16, "a": 2}',
        "[]",
        '{"a": 3}',
        '{"nimg": 24, "a": "x"}',
        "{",
    ]
    (folder / "stats.jsonl").write_text("\n".join(lines))
    assert read_curves(folder) == {"a": [(8, 1.5), (16, 2.0)]}


def test_two_runs_in_one_picture(tmp_path):
    first = write_run(tmp_path / "first", [0, 0, 0, 0])
    second = write_run(tmp_path / "second", [10, 10, 10, 10])
    result = CliRunner().invoke(main, [first, second, "--keys", "Loss/*"])
    assert result.exit_code == 0, result.output
    picture = np.asarray(Image.open(tmp_path / "first/curves.png"))
    legend = 22 * 2 + 16
    assert picture.shape == (PANEL[1] + legend, PANEL[0], 3)
    panel = picture[legend:, MARGIN[0] : -MARGIN[2]]
    rows = []
    for colour in COLOURS[:2]:
        rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        rows.append(np.argwhere((panel == rgb).all(axis=2))[:, 0].mean())
    assert abs(rows[0] - (PANEL[1] - MARGIN[3])) < 2 and abs(rows[1] - MARGIN[1]) < 2  # 0 at the bottom, 10 on top


def test_mistakes_end_in_one_line(tmp_path):
    run = write_run(tmp_path / "run", [1])
    for arguments, message in (
        ([str(tmp_path)], "has no stats.jsonl"),
        ([run, "--keys", "Los/*"], "no statistics match Los/*: known are Loss/score, Progress/lr"),
    ):
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 1 and message in result.output and result.output.count("\n") == 1
