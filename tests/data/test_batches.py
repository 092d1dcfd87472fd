"""EpochPlan: which batches an epoch has, and what is said when the data runs dry."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fitkit.data import EpochPlan
from fitkit.data.batches import Batches, known_length


class Counted(Batches):
    """Batches 0, 1, 2, ...; tells its length or not, and can be read again or not."""

    def __init__(self, count: int, *, sized: bool = True, again: bool = True) -> None:
        self.length = count if sized else None
        self.again = again
        self._once = iter(range(count))
        self._count = count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._count)) if self.again else (batch for batch in self._once)


def plan(batches: Batches, limit: int | None = None) -> EpochPlan:
    return EpochPlan(batches, limit, "data", "steps_per_epoch")


def epochs(of: EpochPlan, count: int) -> list[list[int]]:
    return [list(of.epoch()) for _ in range(count)]


def test_without_a_limit_an_epoch_is_one_pass() -> None:
    for sized in (True, False):
        assert epochs(plan(Counted(3, sized=sized)), 2) == [[0, 1, 2]] * 2


def test_sized_data_starts_anew_at_each_epoch() -> None:
    assert epochs(plan(Counted(10), 4), 3) == [[0, 1, 2, 3]] * 3


def test_unsized_data_goes_on_where_it_was() -> None:
    given = epochs(plan(Counted(10, sized=False), 9), 4)
    assert [len(epoch) for epoch in given] == [9, 9, 9, 9]
    assert given[1] == [9, 0, 1, 2, 3, 4, 5, 6, 7]


def test_an_epoch_that_ends_with_the_pass_is_followed_by_a_new_pass() -> None:
    assert epochs(plan(Counted(4, sized=False), 2), 3) == [[0, 1], [2, 3], [0, 1]]
    assert epochs(plan(Counted(4, sized=False), 4), 2) == [[0, 1, 2, 3]] * 2


def test_a_generator_goes_on_and_nothing_of_it_is_lost() -> None:
    batches = Counted(10, sized=False, again=False)
    assert epochs(plan(batches, 3), 3) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert list(batches) == [9]


@pytest.mark.parametrize("again", [True, False])
def test_fewer_batches_than_asked_for_is_an_error(again: bool) -> None:
    epoch = plan(Counted(3, sized=False, again=again), 4).epoch()
    assert [next(epoch) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"data ran dry: it gave 3 batches of the 4 that steps_per_epoch=4 asks for"):
        next(epoch)


def test_data_that_gives_fewer_batches_than_it_told_is_an_error() -> None:
    batches = Counted(2)
    batches.length = 5
    with pytest.raises(ValueError, match=r"it gave 2 batches of the 3 .*Lower steps_per_epoch, or give more data"):
        list(plan(batches, 3).epoch())


def test_a_spent_generator_is_an_error_at_the_next_epoch() -> None:
    of = plan(Counted(4, sized=False, again=False), 4)
    assert list(of.epoch()) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"data ran dry: it gave 0 batches of the 4"):
        list(of.epoch())


def test_a_spent_generator_is_an_error_in_the_next_run() -> None:
    batches = Counted(2, sized=False, again=False)
    assert list(plan(batches).epoch()) == [0, 1]
    with pytest.raises(ValueError, match=r"gave none\. It is a generator that .* used up: make a new one"):
        list(plan(batches).epoch())


@pytest.mark.parametrize("limit", [None, 2])
def test_data_that_turns_out_empty_is_an_error(limit: int | None) -> None:
    with pytest.raises(ValueError, match=r"data that gave none|it gave 0 batches of the 2"):
        list(plan(Counted(0, sized=False), limit).epoch())


def test_data_that_tells_that_it_is_empty_is_an_error_at_once() -> None:
    with pytest.raises(ValueError, match=r"Expected at least one batch, received data that holds none\. Check what"):
        plan(Counted(0))


def test_more_steps_than_there_are_batches_is_an_error_at_once() -> None:
    with pytest.raises(ValueError, match=r"steps_per_epoch of at most 3, .* received steps_per_epoch=4\. Lower it"):
        plan(Counted(3), 4)


def test_a_generator_without_a_limit_is_for_one_epoch() -> None:
    once = plan(Counted(3, sized=False, again=False))
    once.check_epochs(1)
    with pytest.raises(ValueError, match=r"for each of 2 epochs, received a generator, .*Pass steps_per_epoch=\.\.\."):
        once.check_epochs(2)


@pytest.mark.parametrize(("batches", "limit"), [(Counted(3), None), (Counted(3, again=False), 2)])
def test_other_data_may_have_several_epochs(batches: Batches, limit: int | None) -> None:
    plan(batches, limit).check_epochs(1000)


def test_the_length_is_the_limit_or_what_the_data_tells() -> None:
    assert plan(Counted(3)).length == 3
    assert plan(Counted(3), 2).length == 2
    assert plan(Counted(3, sized=False), 7).length == 7
    assert plan(Counted(3, sized=False)).length is None


class Watched(Counted):
    """Notes when its passes are closed."""

    def __init__(self, count: int, *, sized: bool) -> None:
        super().__init__(count, sized=sized)
        self.closed = 0

    def __iter__(self) -> Iterator[int]:
        try:
            yield from range(self._count)
        finally:
            self.closed += 1


@pytest.mark.parametrize("sized", [True, False])
def test_an_epoch_that_is_cut_short_closes_its_pass(sized: bool) -> None:
    batches = Watched(10, sized=sized)
    of = plan(batches, 5)
    epoch = of.epoch()
    assert (next(epoch), next(epoch)) == (0, 1)
    assert batches.closed == 0
    epoch.close()
    assert batches.closed == 1


def test_a_pass_that_goes_on_stays_open_between_epochs() -> None:
    batches = Watched(10, sized=False)
    of = plan(batches, 5)
    assert list(of.epoch()) == [0, 1, 2, 3, 4]
    assert batches.closed == 0


class Unhelpful:
    """As some samplers are."""

    def __len__(self) -> int:
        raise NotImplementedError


@pytest.mark.parametrize(("data", "length"), [([1, 2], 2), (iter([1, 2]), None), (Unhelpful(), None)])
def test_a_length_is_known_where_the_data_tells_it(data: Any, length: int | None) -> None:
    assert known_length(data) == length


def test_a_validation_of_a_stream_judges_the_same_batches_each_time() -> None:
    stream = EpochPlan(Counted(5, sized=False), 2, "validation_data", "validation_steps", anew=True)
    assert epochs(stream, 3) == [[0, 1]] * 3
