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


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-3.2, 17.5), (1e-7, 2e-7), (5, 5), (0, 0), (1e6, 6.4e7), (-1e300, 1e300), (1, 1 + 2e-16)]
)
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


def test_numbers_and_lines_that_cannot_be_drawn_are_left_out(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    lines = [
        '{"nimg": 8, "a": 1e308, "b": 1, "c": 1e-320}',
        '{"nimg": 16, "a": -1e308, "b": ' + "9" * 400 + ', "c": 0}',
        '{"nimg": ' + "9" * 400 + ', "b": 2}',
        '{"nimg": -8, "b": 2}',
        '{"nimg": true, "b": 2}',
        '{"nimg": 24, "a": 5, "b": [], "c": 1e-320}',
        "[" * 100_000,
    ]
    (folder / "stats.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"nimg": 32, "a": 6, "d": "\xff"}\r\n')
    assert read_curves(folder) == {"a": [(24, 5), (32, 6)], "b": [(8, 1)], "c": [(8, 0), (16, 0), (24, 0)]}
    result = CliRunner().invoke(main, [str(folder), "--keys", "*"])
    assert result.exit_code == 0, result.output


def test_no_two_runs_look_the_same(tmp_path):
    runs = [write_run(tmp_path / str(i), [0, 1]) for i in range(2 * len(COLOURS) + 1)]
    result = CliRunner().invoke(main, [*runs, "--keys", "Loss/*"])
    assert result.exit_code == 0, result.output
    picture = np.asarray(Image.open(tmp_path / "0/curves.png"))
    samples = {picture[8 + 22 * i : 28 + 22 * i, 10:50].tobytes() for i in range(len(runs))}  # of the legend
    assert len(samples) == len(runs)


def test_a_dashed_line_follows_its_numbers(tmp_path):
    runs = [write_run(tmp_path / str(i), [1, 1] if i < len(COLOURS) else [0, 0]) for i in range(len(COLOURS) + 1)]
    assert CliRunner().invoke(main, [*runs, "--keys", "Loss/*"]).exit_code == 0
    picture = np.asarray(Image.open(tmp_path / "0/curves.png"))[22 * len(runs) + 16 :]
    rgb = [int(COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)]
    rows, columns = np.nonzero((picture == rgb).all(axis=2))
    below = rows > PANEL[1] / 2  # the ninth run; the first one's line is hidden by others
    assert set(rows[below]) <= {PANEL[1] - MARGIN[3] + i for i in (-1, 0, 1)}
    width = np.ptp(columns[below]) + 1
    assert width > (PANEL[0] - MARGIN[0] - MARGIN[2]) / 2 - 12 and len(set(columns[below])) < 0.8 * width


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


def test_statistics_are_not_replaced_by_a_picture(tmp_path):
    stats = tmp_path / "stats.jsonl"
    stats.write_text('{"nimg": 64, "Loss/score": 1.0}\n')
    result = CliRunner().invoke(main, [str(tmp_path), "--out", str(stats)])
    assert result.exit_code == 1 and "this is to be a .png file" in result.output
    assert stats.read_text().startswith("{")
