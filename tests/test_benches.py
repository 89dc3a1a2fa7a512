"""Plain mistakes on the benches' command lines are told before anything is measured; a run without any works."""

import json
import sys
import warnings
from pathlib import Path

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import bench_busy  # noqa: E402
import bench_loader  # noqa: E402
import bench_shard  # noqa: E402
import bench_state  # noqa: E402
import bench_toy  # noqa: E402
import bench_train  # noqa: E402
import recipes  # noqa: E402

NO_GPU = "device cuda:99 does not exist"


@pytest.mark.parametrize(
    "bench, arguments, problem",
    [
        (bench_busy, ["--busy", "0"], "0 is not in the range x>=1"),
        (bench_busy, ["--out", str(ROOT)], "this is a folder"),
        (bench_loader, ["--data", "nope.zip"], "Error: nope.zip: no such folder or ZIP file"),
        (bench_loader, ["--workers", "x"], "'x': write whole numbers of 0 or more"),
        (bench_loader, ["--workers=1,-1"], "'1,-1': write whole numbers of 0 or more"),
        (bench_loader, ["--out", str(ROOT / "README.md" / "x")], "README.md cannot be written to: name another file"),
        (bench_state, ["--dir", "/nope"], "Directory '/nope' does not exist"),
        (bench_state, ["--device", "cuda:99"], NO_GPU),
        (bench_state, ["--gib", "-1"], "-1.0 is not in the range"),
        (bench_train, ["--device", "cpu", "--variants", "fp16"], "'fp16': fp16 needs a CUDA device"),
        (bench_train, ["--device", "cpu", "--variants", "bf16+compile", "--backend", "nope"], "'nope': one of"),
        (bench_train, ["--device", "cuda:99"], NO_GPU),
        (bench_train, ["--device", "cpu", "--state-dir", str(ROOT / "README.md")], "README.md: File exists"),
        (bench_shard, [], "start it with torchrun"),
        (bench_toy, ["--out", str(ROOT)], "this is a folder"),
        (recipes, ["toy", "--out", str(ROOT / "README.md")], "README.md is not a table of this bench"),
        (recipes, ["toy", "--out", "new.json", "--only", "nope"], "there is no recipe 'nope': use one of published"),
        (recipes, ["toy", "--out", "new.json", "--seeds", "x"], "'x' is neither a number nor a range"),
        (
            recipes,
            ["toy", "--out", str(ROOT / "bench/results/recipes_toy.json"), "--iterations=9"],
            "has other settings",
        ),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(bench, arguments, problem, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    result = CliRunner().invoke(bench.main, arguments)
    assert result.exit_code in (1, 2) and isinstance(result.exception, SystemExit), result.exception
    told = [line for line in result.output.splitlines() if not line.startswith(("Usage: ", "Try ")) and line]
    assert len(told) == 1 and problem in told[0], result.output


def test_a_damaged_image_is_told_in_one_line_also_by_a_loader_process(tmp_path, tiny_data):
    damaged = tmp_path / "damaged.zip"
    content = bytearray(tiny_data.read_bytes())
    at = content.index(b"IDAT")
    content[at + 4 : at + 12] = bytes(8)
    damaged.write_bytes(content)
    result = CliRunner().invoke(bench_loader.main, ["--data", str(damaged), "--batch", "20", "--workers", "1"])
    assert result.exit_code == 1 and result.output.count("\n") == 1 and "img00000000.png" in result.output


def test_the_loader_bench_prints_its_table_alone(tmp_path, tiny_data):
    out = tmp_path / "new" / "loader.json"
    arguments = ["--data", str(tiny_data), "--images", "16", "--batch", "8", "--workers", "0,3", "--out", str(out)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = CliRunner().invoke(bench_loader.main, arguments)
    assert result.exit_code == 0 and len(result.output.splitlines()) == 3, result.output
    assert not [w for w in caught if "DataLoader" in str(w.message)]
    assert [row["workers"] for row in json.loads(out.read_text())["rows"]] == [0, 3]


def test_the_bench_beside_busy_processes_compares_policies(tmp_path, monkeypatch):
    seconds = {"OMP_WAIT_POLICY": [1.0, 2.0], "GOMP_SPINCOUNT": [2.0, 8.0], "": [0.5, 2.0]}
    calls = []

    def measure(policy, num, batch, threads):
        calls.append(policy)
        return seconds["".join(policy)][len(calls) > 3], 0.5, 2

    monkeypatch.setattr(bench_busy, "measure", measure)
    out = tmp_path / "busy.json"
    result = CliRunner().invoke(bench_busy.main, ["--num", "8", "--repeats", "1", "--out", str(out)])
    assert result.exit_code == 0 and len(result.output.splitlines()) == 8, result.output
    rows = json.loads(out.read_text())["rows"]
    assert [(row["busy"], row["policy"], row["ratio"]) for row in rows] == [
        (0, "asleep", 1.0), (0, "spinning", 0.5), (0, "scripts", 2.0),
        (1, "asleep", 1.0), (1, "spinning", 0.25), (1, "scripts", 1.0),
    ]  # fmt: skip


def test_a_recipe_is_measured_once_and_shown_in_a_table(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "TOY_SIGMAS", (0.1, 10.0))
    listed, out = tmp_path / "recipes.json", tmp_path / "out.json"
    listed.write_text(
        json.dumps({"toy": {"small": dict(pretraining=2, batch=16, width=8, direction="sid", scale="abs")}})
    )
    arguments = ["toy", "--recipes", str(listed), "--out", str(out), "--seeds", "0,1", "--iterations", "3"]
    first = CliRunner().invoke(recipes.main, arguments)
    assert first.exit_code == 0, first.output
    assert first.output.count("small, seed") == 2 and "| small | " in first.output and "±" in first.output
    content = out.read_text()
    assert json.loads(content)["small"]["settings"]["iterations"] == 3
    again = CliRunner().invoke(recipes.main, arguments)
    assert again.exit_code == 0 and "small, seed" not in again.output and out.read_text() == content
