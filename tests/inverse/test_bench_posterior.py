import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

from bench_posterior import FOLDERS, Stopwatch, main  # noqa: E402


def test_the_innermost_stage_counts(monkeypatch):
    watch, clock = Stopwatch(torch.device("cpu")), [100.0]
    monkeypatch.setattr(watch, "_now", lambda: clock[0])

    def take(seconds):
        clock[0] += seconds

    def network():
        take(5)
        watch.timed("noise", take)(3)
        take(1)

    watch.start()
    watch.timed("network", network)()
    take(2)
    watch.timed("noise", take)(0.5)
    watch.enter("likelihood")
    assert watch.seconds == {"network": 6, "likelihood": 2, "noise": 3.5}


def test_shares_of_an_exact_and_of_a_langevin_task(tmp_path):
    out = tmp_path / "new" / "result.json"
    command = ["--device", "cpu", "--preset", "fashion16", "--batch", "2", "--steps", "3", "--out", str(out)]
    result = CliRunner().invoke(main, [*command, "--task", "super_resolution", "--task", "phase_retrieval"])
    assert result.exit_code == 0, result.output
    report = json.loads(out.read_text())
    exact, langevin = report["rows"]
    assert (exact["likelihood"], langevin["likelihood"]) == ("exact", "langevin")
    for row in report["rows"]:
        assert (
            sum(row["seconds"].values()) == pytest.approx(2 * row["s_per_image"]) and min(row["seconds"].values()) > 0
        )
    assert langevin["seconds"]["likelihood"] > exact["seconds"]["likelihood"]


@pytest.mark.parametrize("preset", sorted(FOLDERS))
def test_unknown_tasks_are_refused_with_the_known_ones(preset):
    result = CliRunner().invoke(main, ["--preset", preset, "--device", "cpu", "--task", "sharpen"])
    assert result.exit_code == 2 and "one of box_inpainting" in result.output and "demo/" not in result.output
