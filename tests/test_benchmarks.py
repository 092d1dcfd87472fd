"""The benchmarks run, and what they show beside times is right; no test here knows what a step takes."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.long

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# Loops by hand and fitkit: what runs without any peer installed.
OURS = ["--contestants", "raw", "fitkit", "by_hand"]
IN_FRESH_PROCESSES = {"import", "memory-arrays", "memory-loader", "memory-growth"}


def results_of(script: str, *arguments: str, folder: Path) -> dict[str, Any]:
    """Runs a script and reads the JSON that it wrote."""
    path = folder / "results.json"
    command = [sys.executable, str(BENCHMARKS / script), *arguments, "--json", str(path)]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(path.read_text(encoding="utf-8"))


def workload_names() -> set[str]:
    rows = runpy.run_path(str(BENCHMARKS / "workloads.py"), run_name="workloads")["workloads"](short=True)
    return {row.name for row in rows}


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The results of every workload that needs no process of its own, by workload and contestant."""
    names = sorted(workload_names() - IN_FRESH_PROCESSES)
    folder = tmp_path_factory.mktemp("short")
    return results_of("speed.py", "--short", *OURS, "--only", *names, folder=folder)["results"]


def failures(results: dict[str, dict[str, Any]]) -> list[Any]:
    """What stands as a text, an error, in the place of a number."""
    return [text for by_contestant in results.values() for text in by_contestant.values() if isinstance(text, str)]


def test_fitkit_gives_every_correct_number(tmp_path: Path) -> None:
    shown = results_of("exactness.py", "--only", "fitkit", folder=tmp_path)
    assert shown["given"]["fitkit"].keys() == shown["correct"].keys()
    for title, correct in shown["correct"].items():
        assert shown["given"]["fitkit"][title] == pytest.approx(correct, abs=1e-5), title


def test_every_workload_runs_in_short_mode(short_run: dict[str, dict[str, Any]]) -> None:
    assert not failures(short_run)
    assert short_run.keys() == workload_names() - IN_FRESH_PROCESSES
    assert all("fitkit" in by_contestant for by_contestant in short_run.values())


def test_a_step_of_fitkit_reads_nothing_from_the_device(short_run: dict[str, dict[str, Any]]) -> None:
    assert short_run["host-reads"]["fitkit"] == 0


def test_every_option_for_speed_runs_in_short_mode(tmp_path: Path) -> None:
    shown = results_of("options.py", "--short", folder=tmp_path)
    assert shown["results"].keys() == {"CNN", "MLP"}
    for rows in shown["results"].values():
        assert {"no option", "jit_compile=True", "channels_last=True"} <= rows.keys()
        assert rows["no option"]["training"]["median"] == 1.0


def test_every_workload_in_a_fresh_process_runs_in_short_mode(tmp_path: Path) -> None:
    names = sorted(IN_FRESH_PROCESSES)
    shown = results_of("speed.py", "--short", "--contestants", "fitkit", "--only", *names, folder=tmp_path)
    assert not failures(shown["results"])
    assert all("fitkit" in by_contestant for by_contestant in shown["results"].values())
