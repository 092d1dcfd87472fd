"""Runs that are killed, in a process of their own, end as if nobody had disturbed them; killed_runs.py kills them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("killed_runs.py")
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks")


def torture(*arguments: str) -> dict[str, Any]:
    # What is killed has no lines to report, and would only be slower.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    ended = subprocess.run(
        [sys.executable, "-W", "error", str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=1200,
        env={**environment, "PYTHONPATH": str(ROOT)},
    )
    assert ended.stdout, ended.stderr
    figures: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return figures


def test_a_run_that_is_killed_at_random_ends_as_if_it_had_not_been() -> None:
    figures = torture("--kills", "4", "arrays", "windows")
    assert figures["kills"] >= 4
    assert figures["mismatches"] == []


@pytest.mark.long
def test_runs_of_all_kinds_that_are_killed_end_as_if_they_had_not_been() -> None:
    figures = torture("--kills", "55")
    print(figures)
    assert figures["kills"] >= 55
    assert figures["resumes"] >= 10
    assert figures["mismatches"] == []
