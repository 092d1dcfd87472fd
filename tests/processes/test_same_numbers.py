"""The same script gives the same numbers in one, two and three processes; cases.py has the scripts."""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fitkit.errors import CheckpointError

CASES = re.findall(r"@case\ndef (\w+)", Path(__file__).with_name("cases.py").read_text())
# History is compared by this; weights and outputs, which are float32 and may be near 0, by the other.
RELATIVE, ROUNDING = 1e-6, 1e-5
# Adam divides a gradient by its own size: the smallest difference of a gradient near 0 may become one of a weight.
Found = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By number of processes, where they write."""
    return {processes: tmp_path_factory.mktemp("processes") for processes in (1, 2, 3)}


@pytest.fixture(scope="module")
def found(launch: Any, folders: dict[int, Path]) -> Found:
    """By number of processes, what each of them found."""

    def run(processes: int) -> list[dict[str, Any]]:
        folder = folders[processes]
        # Those of torchrun itself have sets of strings in orders of their own, which forks share.
        ended = launch("cases.py", folder, processes=processes, by_torchrun=processes == 2)
        assert ended.code == 0, ended.output
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]

    with ThreadPoolExecutor() as pool:
        return dict(zip((1, 2, 3), pool.map(run, (1, 2, 3)), strict=True))


def differences(one: Any, other: Any, place: str = "") -> Iterator[str]:
    """Where two results differ."""
    if isinstance(one, dict):
        assert list(one) == list(other), place
        for key in one:
            yield from differences(one[key], other[key], f"{place}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), place
        for index, (first, second) in enumerate(zip(one, other, strict=True)):
            yield from differences(first, second, f"{place}/{index}")
    elif isinstance(one, float) and isinstance(other, float):
        rounds = "/history/" not in place
        if not math.isclose(one, other, rel_tol=ROUNDING if rounds else RELATIVE, abs_tol=1e-6 if rounds else 0.0):
            yield f"{place}: {one} and {other}"
    elif one != other:
        yield f"{place}: {one} and {other}"


@pytest.mark.parametrize("processes", [2, 3])
@pytest.mark.parametrize("name", CASES)
def test_more_processes_give_the_numbers_of_one(found: Found, name: str, processes: int) -> None:
    assert [list(differences(found[1][0][name], each[name])) for each in found[processes]] == [[]] * processes


@pytest.mark.parametrize("processes", [2, 3])
def test_all_processes_have_the_same_numbers_to_the_last_bit(found: Found, processes: int) -> None:
    first, *others = (json.dumps(each) for each in found[processes])
    assert all(other == first for other in others)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_run_saved_in_mid_epoch_goes_on_as_if_it_had_not_stopped(found: Found, processes: int) -> None:
    for each in found[processes]:
        case = each["saved_in_mid_epoch"]
        assert list(differences(case["undisturbed"], case["resumed"])) == []


def cases() -> Any:
    spec = importlib.util.spec_from_file_location("cases", Path(__file__).with_name("cases.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("processes", [2, 3])
def test_one_process_goes_on_from_what_several_saved_at_an_epochs_end(
    found: Found, folders: dict[int, Path], processes: int
) -> None:
    made = cases()
    model = made.compiled()
    path = folders[processes] / "saved.fitkit"
    model.fit(*made.classes(), epochs=3, batch_size=16, verbose=0, resume_from=path)
    assert list(differences(found[1][0]["saved_and_resumed"], made.result(model))) == []


def test_a_file_of_mid_epoch_is_for_as_many_processes(found: Found, folders: dict[int, Path]) -> None:
    made = cases()
    options = {"epochs": 3, "batch_size": 7, "accumulate_grad_batches": 2, "verbose": 0}
    with pytest.raises(CheckpointError, match=r"in the midst of an epoch by 2 process.*received 1"):
        made.compiled().fit(*made.classes(), resume_from=folders[2] / "middle.fitkit", **options)
