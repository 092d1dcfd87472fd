"""Two hosts give the numbers of one process; they are network namespaces, where the system has them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
NAMES = ("arrays", "a_loader", "accumulation", "clipping_and_norms", "predicting", "saved_in_mid_epoch")


def has_namespaces() -> bool:
    if not all(map(shutil.which, ("unshare", "ip", "bash"))):
        return False
    return subprocess.run(["unshare", "-rnm", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.long
@pytest.mark.skipif(not has_namespaces(), reason="needs network namespaces that anybody may make")
def test_two_hosts_give_the_numbers_of_one_process(launch: Any, tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("alone", "hosts")}
    for folder in folders.values():
        folder.mkdir()
    launch("cases.py", folders["alone"], *NAMES, processes=1)
    command = [
        "unshare",
        "-rnm",
        "bash",
        HERE / "hosts.sh",
        sys.executable,
        HERE / "cases.py",
        folders["hosts"],
        *NAMES,
    ]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    alone = flat(json.loads((folders["alone"] / "0.json").read_text()))
    for rank in range(4):
        found = flat(json.loads((folders["hosts"] / f"{rank}.json").read_text()))
        assert found == pytest.approx(alone, rel=1e-5, abs=1e-6)


def flat(value: Any) -> list[float]:
    """All numbers in a nest of dicts and lists."""
    if isinstance(value, dict):
        return [number for each in value.values() for number in flat(each)]
    if isinstance(value, list):
        return [number for each in value for number in flat(each)]
    return [value] if isinstance(value, float) else []
