"""Curves: what is read, and that a line is where its numbers are."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from training.plot import main
from training.run.curves import COLOURS, DPI, PANEL, draw, png, read_curves


def write_run(folder, values, name="Loss/score"):
    folder.mkdir()
    lines = [json.dumps({"nimg": 100 * (i + 1), name: value, "Progress/lr": 0.1}) for i, value in enumerate(values)]
    (folder / "stats.jsonl").write_text("\n".join([*lines, '{"nimg": 900, "Loss/sc']))
    return str(folder)


def drawn(*runs, keys="Loss/*"):
    return draw({run: read_curves(run) for run in runs}, keys.split(","))


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


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (1e-7, 2e-7), (5, 5), (0, 0), (1e6, 6.4e7), (-1e300, 1e300), (1, 1 + 2e-16), (0, 1e-300)]
)
def test_all_numbers_can_be_drawn(low, high, tmp_path):
    figure = drawn(write_run(tmp_path / "run", [low, high]))
    with Image.open(io.BytesIO(png(figure))) as picture:
        assert picture.format == "PNG" and picture.width == round(PANEL[0] * DPI)
    bottom, top = figure.axes[0].get_ylim()
    assert bottom <= low <= high <= top and figure.axes[0].get_xlim() == (0, 200)


def test_no_two_runs_look_the_same(tmp_path):
    runs = [write_run(tmp_path / str(i), [0, 1]) for i in range(2 * len(COLOURS) + 1)]
    figure = drawn(*runs)
    looks = {str((line.get_color(), line._dash_pattern)) for line in figure.axes[0].lines}
    assert len(looks) == len(figure.axes[0].lines) == len(runs)
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == runs
    assert looks == {str((line.get_color(), line._dash_pattern)) for line in legend.get_lines()}


def test_several_runs_and_quantities_in_one_picture(tmp_path):
    first = write_run(tmp_path / "first", [0, 0, 1])
    second = write_run(tmp_path / "second", [10], name="Loss/$gan")
    figure = drawn(first, second, keys="Loss/*,Progress/lr")
    assert [axes.get_title("left") for axes in figure.axes] == ["Loss/score", "Loss/$gan", "Progress/lr"]
    assert [len(axes.lines) for axes in figure.axes] == [1, 1, 2]
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_xydata(), [[100, 0], [200, 0], [300, 1]])
    (single,) = figure.axes[1].lines  # a point, in the colour of its run
    assert single.get_marker() == "o" and single.get_color() == COLOURS[1]
    figure.canvas.draw()
    labels = [text.get_text() for text in figure.axes[2].get_xticklabels()]
    assert labels[0] == "0" and "300" in labels


def test_names_are_shown_as_they_are(tmp_path, capfd):
    names = ["_hidden", "$x_$1$", "\u6587\u4ef6", "a\\b{", "\udce9"]
    figure = draw({name: {"a": [(1, 1.0)]} for name in names}, ["*"])
    assert png(figure)[:4] == b"\x89PNG"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*names[:-1], "?"]
    assert capfd.readouterr().err == ""


def test_without_matplotlib_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = CliRunner().invoke(main, [write_run(tmp_path / "run", [1])])
    assert result.exit_code == 1 and "pip install matplotlib" in result.output and result.output.count("\n") == 1
    assert not (tmp_path / "run/curves.png").exists()


def test_the_script_imports_nothing_heavy_for_its_help():
    code = "import sys, training.plot; print({'matplotlib', 'torch', 'numpy', 'PIL'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


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
