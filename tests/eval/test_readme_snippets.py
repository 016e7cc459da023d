"""README's section on analysing the rows: its Python runs, one block after the other, and prints what the rows say."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_evaluations import episodes, write_csv

from vlatune.eval.results import EpisodeRow

README = Path(__file__).parents[2] / "README.md"
BETWEEN = "-----"


def section(text: str) -> list[str]:
    """The Python blocks of `## Analysing the rows`."""
    found = re.search(r"^## Analysing the rows\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found is not None, "README has no such section"
    return re.findall(r"```python\n(.*?)```", found[1], re.DOTALL)


@pytest.fixture
def rows(tmp_path, monkeypatch) -> dict[str, list[EpisodeRow]]:
    """Two runs with different objectives in runs/a and runs/b below the working folder; their episodes of the report half."""
    monkeypatch.chdir(tmp_path)
    settings = [(n, h) for n in (1, 10) for h in (4, 8)]
    selection = {
        "a": [
            row
            for n, h in settings
            for row in episodes("a", "step_000300", 0.5, split="selection", num_sampling_steps=n, num_executed_steps=h)
        ],
        "b": episodes("b", "step_000300", 0.5, split="selection", objective="l1", num_sampling_steps=1),
    }
    selection["a"] += episodes("a", "step_000100", 0.0, split="selection")
    report = {
        "a": episodes("a", "step_000300", 0.9),
        "b": episodes("b", "step_000300", 0.4, objective="l1", num_sampling_steps=1),
    }
    for run, judged in report.items():
        blind = episodes(run, "step_000300", 0.0, actor="blind")
        write_csv(Path("runs") / run / "evaluation" / "episodes.csv", selection[run] + judged + blind)
    return report


def test_the_python_runs(rows):
    blocks = section(README.read_text())
    assert len(blocks) >= 5 and max(block.count("\n") for block in blocks) <= 8
    script = f"print({BETWEEN!r})\n".join(blocks)
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    rates, paired, grid, steps, failures, seconds = finished.stdout.split(f"{BETWEEN}\n")
    wins = {run: [row.success for row in of_run] for run, of_run in rows.items()}
    for run in rows:
        assert re.search(rf"{run} +libero_spatial +30 +{sum(wins[run])} +0 ", rates)
    difference = (sum(wins["a"]) - sum(wins["b"])) / 30
    assert paired.startswith(f"a - b: {difference:+.1%} (")
    assert [line.split()[0] for line in grid.splitlines()[-2:]] == ["4", "8"] and "NaN" not in grid
    fast = sum((row.steps_to_success or 999) <= 100 for row in rows["a"])
    assert re.search(rf"flow +[\d.]+ +{fast / 30:.2f}\n", steps)
    assert "missed_grasp" in failures and "libero_spatial_task_0" in failures
    assert re.search(rf"a +{sum(row.wall_s for row in rows['a']) / 30:.2f} ", seconds)
