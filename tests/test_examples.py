"""Every example runs to its end without a warning, and the documentation says what it shows."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# These run in every environment, the others only where the long tests do.
QUICK = {"quickstart", "training_flags"}


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, id=path.stem, marks=[] if path.stem in QUICK else [pytest.mark.long]) for path in EXAMPLES],
)
def test_example_runs_without_a_warning(path: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", str(path)]
    # On a busy machine, several threads for models this small would mostly wait for each other.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.strip(), "nothing worth reading"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_says_what_it_shows_and_is_listed(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert f"](../examples/{path.name})" in (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
