"""Workers that are killed with kill -9, and started anew by torchrun, end as if nothing had happened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


def run(launch: Any, folder: Path, kills: int) -> list[dict[str, Any]]:
    folder.mkdir()
    ended = launch("elastic.py", folder, kills, processes=2, options=("--max-restarts=3",), by_torchrun=True)
    assert ended.output.count(f"] attempt {kills}") == 2, ended.output
    assert ended.code == 0
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def flat(value: Any) -> list[float]:
    if isinstance(value, dict):
        return [number for each in value.values() for number in flat(each)]
    return [number for each in value for number in flat(each)] if isinstance(value, list) else [value]


@pytest.mark.long
@pytest.mark.parametrize("kills", [1, 2])
def test_workers_that_are_killed_in_mid_epoch_end_as_if_they_had_not_been(
    launch: Any, tmp_path: Path, kills: int
) -> None:
    undisturbed = run(launch, tmp_path / "undisturbed", 0)
    disturbed = run(launch, tmp_path / "disturbed", kills)
    for one, other in zip(undisturbed, disturbed, strict=True):
        assert flat(other["history"]) == pytest.approx(flat(one["history"]), rel=1e-6)
        assert flat(other["weights"]) == pytest.approx(flat(one["weights"]), rel=1e-5, abs=1e-7)
