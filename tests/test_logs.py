"""Running means: exact for any slicing, read late, and honest about NaN."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fitkit
from fitkit.callbacks import LambdaCallback
from fitkit.logs import HELD, BatchLogs, Mean, Tally, read

CPU = torch.device("cpu")


def _mean(pairs: list[tuple[float, float]], *, on_device: bool = False, adds_up: bool = False) -> Mean:
    mean = Mean(CPU, adds_up=adds_up)
    for index, (value, weight) in enumerate(pairs):
        mean.add(torch.tensor(value), torch.tensor(weight) if on_device else weight, index)
    return mean


@pytest.mark.parametrize("on_device", [True, False])
@given(st.lists(st.tuples(st.floats(-100, 100, width=32), st.integers(0, 9)), min_size=1, max_size=3 * HELD))
def test_the_mean_is_weighted_exactly(on_device: bool, pairs: list[tuple[float, int]]) -> None:
    total = sum(weight for _, weight in pairs)
    value = float(_mean(pairs, on_device=on_device).value())  # type: ignore[arg-type]
    if total == 0:
        assert math.isnan(value)
    else:
        expected = math.fsum(value * weight for value, weight in pairs) / total
        assert value == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_32_ones_and_one_hundred_are_four() -> None:
    assert float(_mean([(1.0, 32), (100.0, 1)]).value()) == 4.0


def test_sums_are_divided_by_the_weights_only() -> None:
    assert float(_mean([(6.0, 2), (3.0, 1)], adds_up=True).value()) == 3.0


@pytest.mark.parametrize("on_device", [True, False])
def test_a_nan_without_weight_does_not_count(on_device: bool) -> None:
    mean = _mean([(1.0, 2), (math.nan, 0), (3.0, 2)], on_device=on_device)
    assert float(mean.value()) == 2.0
    assert int(mean.first_bad()) == -1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("index", [0, 5, HELD, 2 * HELD + 3])
def test_the_first_bad_batch_is_found(bad: float, index: int) -> None:
    pairs = [(1.0, 1.0)] * index + [(bad, 1.0)] * 2 + [(1.0, 1.0)] * 3
    mean = _mean(pairs)
    assert int(mean.first_bad()) == index
    assert not math.isfinite(float(mean.value()))


def test_parts_of_a_batch_share_its_index() -> None:
    mean = Mean(CPU)
    for index, value in [(0, 1.0), (0, 1.0), (1, 1.0), (1, math.nan), (2, 1.0)]:
        mean.add(torch.tensor(value), 1, index)
    assert int(mean.first_bad()) == 1


def test_reading_in_between_changes_nothing() -> None:
    mean = _mean([(1.0, 2), (4.0, 1)])
    assert float(mean.value()) == 2.0
    mean.add(torch.tensor(10.0), 1, 2)
    assert float(mean.value()) == 4.0


def test_what_waits_is_bounded() -> None:
    mean = _mean([(1.0, 1.0)] * (5 * HELD + 1))
    assert len(mean._values) < HELD


def test_nothing_has_no_mean() -> None:
    assert math.isnan(float(Mean(CPU).value()))


def test_a_tally_starts_anew() -> None:
    tally = Tally(CPU)
    tally.mean("loss").add(torch.tensor(3.0), 1, 0)
    tally.reset()
    tally.mean("loss").add(torch.tensor(5.0), 1, 0)
    assert read(tally.values()) == {"loss": 5.0}


def test_reading_nothing_is_nothing() -> None:
    assert read({}) == {}


class Losses:
    """Running numbers of which only the first bad one is asked."""

    def __init__(self, *values: float) -> None:
        self.mean = _mean([(value, 1.0) for value in values])

    def names(self) -> list[str]:
        return ["loss"]

    def number(self, name: str) -> torch.Tensor:
        return self.mean.value()

    def first_bad(self) -> torch.Tensor:
        return self.mean.first_bad()


def test_batch_logs_tell_the_first_loss_that_is_not_finite() -> None:
    assert BatchLogs(Losses(1.0, math.nan, math.inf)).first_nonfinite() == 1
    assert BatchLogs(Losses(1.0, 2.0)).first_nonfinite() is None


def test_a_state_of_sums_that_are_no_numbers_is_refused() -> None:
    state = _mean([(1.0, 1)]).state_dict()
    with pytest.raises(ValueError, match="Expected sums of one number each"):
        Mean(CPU).load_state_dict({**state, "sum": torch.ones(2)})


def test_the_numbers_of_a_batch_print_as_a_dict() -> None:
    printed: list[tuple[str, str]] = []
    model = fitkit.Model(torch.nn.Linear(1, 1), device="cpu")
    model.compile("sgd", "mse")
    see = LambdaCallback(on_train_batch_end=lambda batch, logs: printed.append((repr(logs), repr(dict(logs)))))
    model.fit(torch.ones(2, 1), torch.ones(2, 1), callbacks=see, verbose=0)
    assert printed[0][0] == printed[0][1] != "{}"


@pytest.mark.parametrize("indices", [[0, 1, 2], [3, 4, 5], [0, 0, 1], [0, 0, 2], [1, 5, 5]])
def test_the_first_bad_batch_is_found_among_parts_and_skipped_batches(indices: list[int]) -> None:
    mean = Mean(torch.device("cpu"))
    for index, value in zip(indices, (1.0, math.nan, math.nan), strict=True):
        mean.add(torch.tensor(value), 1.0, index)
    assert int(mean.first_bad()) == indices[1]
