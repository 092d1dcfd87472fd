"""What every kind of data becomes: something that gives batches, epoch after epoch.

`Batches` is what a file of this folder implements for its kind; `EpochPlan` is what the loop is given: one epoch's
iterator at a time, with limits and with plain words when the data runs dry.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Generator, Iterator
from typing import Any, final

import torch


class Batches(abc.ABC):
    """One kind of data as batches.

    Attributes:
        length: batches in one pass; None when the data does not tell.
        again: whether a second pass is possible. A generator gives one.
        owned: whether nobody writes into the memory of a batch after it was given.
        parts: 1 for batches of x, 2 for (x, y), 3 for (x, y, sample_weight); None where only a batch tells.
    """

    length: int | None = None
    again: bool = True
    owned: bool = False
    parts: int | None = None

    @abc.abstractmethod
    def __iter__(self) -> Iterator[Any]:
        """One pass over the data, which draws from the random generators what a DataLoader would draw."""

    def in_order(self) -> Batches:
        """The same data unshuffled, in the same batches at each pass."""
        return self

    def kept_on(self, device: torch.device, most_bytes: int) -> Batches:
        """The same batches, `Placed` there, from data that stays there; itself for data that is no arrays, or larger.

        Args:
            device: where the module is.
            most_bytes: that the data may take there.
        """
        return self

    def in_large_batches(self) -> Batches:
        """The same data in larger batches, where nobody chose their size and the numbers do not depend on it."""
        return self


def known_length(data: Any) -> int | None:
    """The length that data tells; None when it tells none."""
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None


@final
class EpochPlan:
    """The batches of a run, an epoch at a time.

    Data of known length starts anew at each epoch; with a limit, the epoch ends after so many batches. Data of
    unknown length with a limit goes on where it was, over the end of a pass if need be.

    Args:
        batches: the data.
        limit: batches in an epoch; None is one pass.
        argument: how messages name the data, "data" or "validation_data".
        limit_argument: how messages name the limit, such as "steps_per_epoch".
        anew: whether each epoch starts anew wherever the data can, as validations do to stay comparable.
    """

    def __init__(
        self, batches: Batches, limit: int | None, argument: str, limit_argument: str, *, anew: bool = False
    ) -> None:
        self._goes_on = not (anew and batches.again)
        self._batches = batches
        self._limit = limit
        self._argument = argument
        self._limit_argument = limit_argument
        self._open: Iterator[Any] | None = None
        if batches.length == 0:
            raise ValueError(
                f"Expected at least one batch, received {argument} that holds none. Check what made it, and drop_last "
                "if it is a DataLoader."
            )
        if batches.length is not None and limit is not None and limit > batches.length:
            raise ValueError(
                f"Expected {limit_argument} of at most {batches.length}, the batches in {argument}, received "
                f"{limit_argument}={limit}. Lower it, or leave it out to take all of them."
            )

    @property
    def length(self) -> int | None:
        """Batches in one epoch; None when it is not known."""
        return self._limit if self._limit is not None else self._batches.length

    def check_epochs(self, epochs: int) -> None:
        """Refuses one-shot data for several passes, before the first batch."""
        if not self._batches.again and self._limit is None and epochs > 1:
            raise ValueError(
                f"Expected {self._argument} that can be read once for each of {epochs} epochs, received a generator, "
                f"which can be read once. Pass {self._limit_argument}=..., or epochs=1, or data that can be iterated "
                "again."
            )

    def epoch(self) -> Generator[Any, None, None]:
        """The batches of the next epoch.

        Raises:
            ValueError: there is no batch, or there are fewer than the limit.
        """
        if self._limit is not None and self._batches.length is None and self._goes_on:
            return self._going_on(self._limit)
        return self._anew()

    def _anew(self) -> Generator[Any, None, None]:
        given = 0
        for given, batch in enumerate(itertools.islice(self._batches, self._limit), start=1):  # noqa: B007
            yield batch
        if given == 0:
            raise ValueError(self._none_at_all())
        if self._limit is not None and given < self._limit:
            raise ValueError(self._too_few(given))

    def _none_at_all(self) -> str:
        why = "Check what made it; what is iterated again at each epoch must give a new iterator each time."
        if not self._batches.again:
            why = "It is a generator that an earlier epoch or run has used up: make a new one."
        return f"Expected at least one batch, received {self._argument} that gave none. {why}"

    def _going_on(self, limit: int) -> Generator[Any, None, None]:
        given = 0
        fresh = False
        while given < limit:
            if self._open is None:
                self._open = iter(self._batches)
                fresh = True
            for batch in self._open:
                given += 1
                try:
                    yield batch
                except GeneratorExit:
                    # Only a run that ends closes an epoch in its middle: workers and open files end with it.
                    self._open = None
                    raise
                if given == limit:
                    return
            self._open = None
            if fresh or not self._batches.again:
                raise ValueError(self._too_few(given))

    def _too_few(self, given: int) -> str:
        return (
            f"{self._argument} ran dry: it gave {given} batches of the {self._limit} that {self._limit_argument}="
            f"{self._limit} asks for in an epoch. Lower {self._limit_argument}, or give more data."
        )
