"""What several processes do beside computing: who writes, whose the group is, how an error ends all of them."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import fitkit


@pytest.mark.parametrize(("failing", "by_torchrun"), [(0, False), (1, True)])
def test_an_error_in_one_process_ends_all_promptly_with_its_message(
    launch: Any, tmp_path: Path, failing: int, by_torchrun: bool
) -> None:
    began = time.monotonic()
    ended = launch("endings.py", "an_error", tmp_path, failing, processes=2, seconds=60, by_torchrun=by_torchrun)
    assert ended.code != 0
    assert "ValueError: a bad sample" in ended.output
    assert "This came up in epoch 1 (index 0), batch 4 (index 3)." in ended.output
    assert time.monotonic() - began < 45


def test_the_others_say_whose_error_it_was(launch: Any, tmp_path: Path) -> None:
    ended = launch("endings.py", "an_error_that_is_caught", tmp_path, 1, processes=2, seconds=60)
    assert "[1] caught ValueError: a bad sample" in ended.output
    assert re.search(r"(?s)\[0\] caught RuntimeError: .*process 1 of 2 failed: ValueError: a bad sample", ended.output)
    assert ended.output.count("prompt") == ended.output.count("no group is left") == 2


def test_a_process_that_hangs_ends_the_others_by_their_timeout(launch: Any, tmp_path: Path) -> None:
    ended = launch("endings.py", "a_process_that_hangs", tmp_path, processes=2, seconds=90)
    assert re.search(r"\[0\] ended promptly: .*[Tt]imed out", ended.output), ended.output


@pytest.fixture(scope="module")
def together(launch: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What two processes wrote that did all that follows, one thing after the other, and the folder of their files."""
    folder = tmp_path_factory.mktemp("endings")
    names = "no_group_of_the_users,writing,single,refused,a_group_of_the_users"
    ended = launch("endings.py", names, folder, processes=2)
    assert ended.code == 0, ended.output
    return ended.output, folder


def test_a_group_of_the_users_is_used_and_left_alone(together: tuple[str, Path]) -> None:
    assert sorted(re.findall(r"\[\d\] kept .*", together[0])) == ["[0] kept True 2", "[1] kept True 2"]


def test_a_group_that_a_run_made_is_gone_after_it(together: tuple[str, Path]) -> None:
    assert together[0].count("left False") == 4, together[0]


def test_rank_0_alone_prints_and_writes_while_all_see_the_same_logs(together: tuple[str, Path]) -> None:
    for line in (
        "Epoch 1/2 - ",
        "Epoch 2/2 - ",
        "Evaluating - ",
        "Size of parameters",
        "epoch-1.fitkit.",
        "epoch-2.fitkit.",
    ):
        assert together[0].count(line) == 1, together[0]
    logs = re.findall(r"\[\d\] logs (.*)", together[0])
    assert len(logs) == 2
    assert logs[0] == logs[1]
    assert len((together[1] / "log.csv").read_text().splitlines()) == 3
    assert sorted(each.name for each in together[1].iterdir()) == [
        *("epoch-1.fitkit", "epoch-2.fitkit", "log.csv", "weights.pt")
    ]


def test_single_works_alone_in_each_process(together: tuple[str, Path]) -> None:
    losses = re.findall(r"\[\d\] loss (.*)", together[0])
    assert len(set(losses)) == 2


def test_what_processes_cannot_share_is_refused(together: tuple[str, Path]) -> None:
    lengths = ("the number of samples=56, .* in process 1", "the number of batches=2 in process 0")
    for words in ("one that trains by itself", "DistributedSampler", "find_learning_rate", *lengths):
        assert len(re.findall(f"refused .*{words}", together[0])) == 2, together[0]


def test_a_backup_that_not_all_processes_find_is_refused(launch: Any, tmp_path: Path) -> None:
    ended = launch("endings.py", "a_backup_that_one_process_finds", tmp_path, processes=2, seconds=60)
    words = r"refused Expected all processes to find the same file .* received one in \[0\] of 2"
    assert len(re.findall(words, ended.output)) == 2, ended.output


def test_ddp_without_other_processes_is_refused() -> None:
    with pytest.raises(ValueError, match=r'strategy="ddp" needs several processes, .*torchrun'):
        fitkit.Model(torch.nn.Linear(1, 1), device="cpu", strategy="ddp")


def test_an_unknown_strategy_is_refused() -> None:
    with pytest.raises(ValueError, match="strategy"):
        fitkit.Model(torch.nn.Linear(1, 1), device="cpu", strategy="dpp")
