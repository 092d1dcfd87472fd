"""What every kind of data becomes: something that gives batches, epoch after epoch.

`Batches` is what a file of this folder implements for its kind; `EpochPlan` is what the loop is given: one epoch's
iterator at a time, with limits and with plain words when the data runs dry.
"""

from __future__ import annotations

import abc
import contextlib
import itertools
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, final

import torch

from fitkit.batch import Share, part_of, samples_of
from fitkit.data.drawing import DrawingAlike
from fitkit.data.inputs import Input
from fitkit.device import random_state, restore_random_state
from fitkit.distributed import Processes


class Batches(abc.ABC):
    """One kind of data as batches.

    Attributes:
        length: batches in one pass; None when the data does not tell.
        again: whether a second pass is possible. A generator gives one.
        owned: whether nobody writes into the memory of a batch after it was given.
        self_contained: whether nothing of the user's is called to make a batch.
        parts: 1 for batches of x, 2 for (x, y), 3 for (x, y, sample_weight); None where only a batch tells.
    """

    length: int | None = None
    again: bool = True
    owned: bool = False
    self_contained: bool = False
    parts: int | None = None

    @abc.abstractmethod
    def __iter__(self) -> Iterator[Any]:
        """One pass over the data, which draws from the random generators what a DataLoader would draw."""

    def after(self, done: int) -> Iterator[Any]:
        """One pass from its batch ``done`` on, above 0. What the pass draws before that batch is drawn at once.

        Kinds that can tell their batches apart go there by arithmetic; here the batches are taken and dropped.
        """
        iterator = iter(self)
        for _ in range(done):
            next(iterator, None)
        return iterator

    def shares(self, processes: Processes, done: int) -> Iterator[Share]:
        """One pass, from its batch ``done`` on, of which each process is given its part of every batch.

        Kinds that can load a part alone do; here the whole batch is read, and the part taken from it. What the pass
        draws before its first batch is drawn at once.
        """
        whole = self.after(done) if done else iter(self)
        return _shares_of(whole if processes.world == 1 else DrawingAlike(whole), processes)

    def facts(self) -> dict[str, Any]:
        """What the numbers of a run depend on, by the argument that sets it: the number of batches, their size."""
        return {} if self.length is None else {"the number of batches": self.length}

    @property
    def inputs(self) -> Sequence[Input]:
        """The arrays of x; none where only a batch tells."""
        return ()

    @property
    def extent(self) -> tuple[int, int] | None:
        """Samples in one pass, and in each of its batches but a smaller last one; None where the data does not tell."""
        return None

    @property
    def generators(self) -> list[torch.Generator]:
        """Generators of the data's own, beside torch's global one, from which passes draw."""
        return []

    @property
    def source(self) -> Any:
        """What tells by state_dict where a pass is, and goes there by load_state_dict; None where nothing does."""
        return None

    @property
    def keeps_workers(self) -> bool:
        """Whether workers of an earlier pass are there, so that the next one begins without a draw for them."""
        return False

    def start_workers(self) -> None:  # noqa: B027 (most kinds have none)
        """Makes `keeps_workers` true where it can be. The caller puts back what this draws."""

    @property
    def chosen(self) -> list[Any] | None:
        """The indices that `in_order` has drawn, once and for all; None where it drew none."""
        return None

    def choose(self, chosen: list[Any]) -> None:  # noqa: B027 (most kinds draw none)
        """Takes the indices that `in_order` drew in the run that is resumed."""

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

    def nonfinite(self) -> str | None:
        """A sentence that says where the data hold NaN or infinity; None where they do not, or only a batch tells."""
        return None

    def some_targets(self) -> Any:  # noqa: B027 (of most kinds only a batch tells)
        """The targets of some samples as a batch has them; None where only a batch tells. Nothing is drawn for it."""

    def in_large_batches(self) -> Batches:
        """The same data in larger batches, where nobody chose their size and the numbers do not depend on it."""
        return self


def _shares_of(whole: Iterator[Any], processes: Processes) -> Iterator[Share]:
    for batch in whole:
        samples = samples_of(batch)
        start, stop = processes.part(samples)
        part = part_of(batch, samples, start, stop) if stop > start else None
        yield Share(part, processes.count(samples), samples)


def known_length(data: Any) -> int | None:
    """The length that data tells; None when it tells none."""
    try:
        return len(data)
    except (TypeError, NotImplementedError):
        return None


def keeps_its_place(data: Any) -> bool:
    """Whether the data itself tells where it is and goes there again, as torchdata's StatefulDataLoader does."""
    return callable(getattr(data, "state_dict", None)) and callable(getattr(data, "load_state_dict", None))


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
        device: whose random state a pass may draw from, beside those of the CPU.

    Attributes:
        given: batches of the epoch that have been given so far.
        noted: whether the random state is noted from which a pass begins, for a file that goes on in its midst.
        failed: whether the data raised an error in place of the next batch.
    """

    def __init__(
        self,
        batches: Batches,
        limit: int | None,
        argument: str,
        limit_argument: str,
        *,
        anew: bool = False,
        device: torch.device | None = None,
    ) -> None:
        self.given = 0
        self.failed = False
        self.noted = True
        self._goes_on = not (anew and batches.again)
        self._device = device or torch.device("cpu")
        # What draws were made from when the present pass began, and its batches that earlier epochs took.
        self._start: dict[str, Any] | None = None
        self._had_workers = False
        self._before = 0
        # An epoch that was left in its midst, and what is left of it.
        self._in_epoch = False
        self._resumed: Iterator[Any] | None = None
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

    @property
    def data(self) -> Batches:
        """What gives the batches."""
        return self._batches

    @property
    def sizes(self) -> tuple[int, int] | None:
        """Samples in an epoch's batches, and in its last one; None where the data does not tell."""
        if self._batches.extent is None or self.length is None:
            return None
        samples, size = self._batches.extent
        return min(size, samples), min(size, samples - (self.length - 1) * size)

    def check_epochs(self, epochs: int) -> None:
        """Refuses one-shot data for several passes, before the first batch."""
        if not self._batches.again and self._limit is None and epochs > 1:
            raise ValueError(
                f"Expected {self._argument} that can be read once for each of {epochs} epochs, received a generator, "
                f"which can be read once. Pass {self._limit_argument}=..., or epochs=1, or data that can be iterated "
                "again."
            )

    def epoch(self) -> Generator[Any, None, None]:
        """The batches of the next epoch, or the rest of the one that `load_state_dict` goes on with.

        Raises:
            ValueError: there is no batch, or there are fewer than the limit.
        """
        if not self._in_epoch:
            self._before += self.given if self._is_going_on else 0
            self.given = 0
        self._in_epoch = self.failed = False
        return self._going_on(self._limit or 0) if self._is_going_on else self._anew()

    @property
    def _is_going_on(self) -> bool:
        """Whether a pass may be longer or shorter than an epoch."""
        return self._limit is not None and self._batches.length is None and self._goes_on

    def facts(self) -> dict[str, Any]:
        """What the numbers of a run depend on, by the argument that sets it."""
        limit = {} if self._limit is None else {self._limit_argument: self._limit}
        return {**self._batches.facts(), **limit}

    def state_dict(self, *, in_epoch: bool) -> dict[str, Any]:
        """Where the present pass is, and from which random state it began.

        Args:
            in_epoch: whether this is in the midst of an epoch.
        """
        source = self._batches.source if in_epoch or self._is_going_on else None
        return {
            "given": self.given,
            "taken": self._before + self.given,
            "start": self._start,
            "own": [generator.get_state() for generator in self._batches.generators],
            "workers": self._had_workers if in_epoch or self._is_going_on else self._batches.keeps_workers,
            "chosen": self._batches.chosen,
            "source": None if source is None else source.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], *, in_epoch: bool, ends_here: bool = False) -> None:
        """Goes to where a pass was. The caller puts back the global random state afterwards.

        Args:
            state: what `state_dict` returned.
            in_epoch: whether the epoch goes on from there; otherwise the next one begins.
            ends_here: whether the epoch has no further batch, since it was told to stop.
        """
        if state["workers"]:
            self._batches.start_workers()
        if state["chosen"] is not None:
            self._batches.choose(state["chosen"])
        self.given, self._before, self._in_epoch = state["given"], state["taken"] - state["given"], in_epoch
        if ends_here:
            self._resumed = iter(())
        elif (in_epoch or self._is_going_on) and state["start"] is not None:
            self._start, self._had_workers = state["start"], state["workers"]
            restore_random_state(state["start"], self._device)
            self._set_generators(state["start"]["own"])
            iterator = self._from(state["taken"], state["source"])
            if self._is_going_on:
                self._open = iterator
            else:
                self._resumed = iterator
        self._set_generators(state["own"])

    def _from(self, taken: int, source_state: Any) -> Iterator[Any]:
        source = self._batches.source
        if source is None or source_state is None:
            return self._batches.after(taken)
        source.load_state_dict(source_state)
        return iter(()) if taken == self._batches.length else iter(self._batches)

    def _set_generators(self, states: Sequence[torch.Tensor]) -> None:
        for generator, state in zip(self._batches.generators, states, strict=True):
            generator.set_state(state)

    def _begin_pass(self) -> Iterator[Any]:
        self._before = -self.given
        if self.noted or self._is_going_on:
            own = [generator.get_state() for generator in self._batches.generators]
            self._start = {**random_state(self._device), "own": own}
            self._had_workers = self._batches.keeps_workers
        return iter(self._batches)

    @contextlib.contextmanager
    def _noting_errors(self) -> Iterator[None]:
        """Around an epoch: what is raised in it comes from the data, since the loop only ever closes it."""
        try:
            yield
        except Exception:
            self.failed = True
            raise

    def _anew(self) -> Generator[Any, None, None]:
        is_resumed = self._resumed is not None
        with self._noting_errors():
            left = None if self._limit is None else self._limit - self.given
            # Nothing else may hold the pass: its workers end when the epoch is closed, also in Python 3.10.
            for batch in itertools.islice(self._pass(), left):
                self.given += 1
                yield batch
            if self.given == 0:
                raise ValueError(self._none_at_all())
            if self._limit is not None and self.given < self._limit and not is_resumed:
                raise ValueError(self._too_few(self.given))

    def _pass(self) -> Iterator[Any]:
        """The pass that the epoch goes through."""
        resumed, self._resumed = self._resumed, None
        return self._begin_pass() if resumed is None else resumed

    def _none_at_all(self) -> str:
        why = "Check what made it; what is iterated again at each epoch must give a new iterator each time."
        if not self._batches.again:
            why = "It is a generator that an earlier epoch or run has used up: make a new one."
        return f"Expected at least one batch, received {self._argument} that gave none. {why}"

    def _going_on(self, limit: int) -> Generator[Any, None, None]:
        fresh = False
        if self._resumed is not None:  # the epoch was told to stop
            limit, self._resumed = self.given, None
        with self._noting_errors():
            while self.given < limit:
                if self._open is None:
                    self._open = self._begin_pass()
                    fresh = True
                for batch in self._open:
                    self.given += 1
                    try:
                        yield batch
                    except GeneratorExit:
                        # Only a run that ends closes an epoch in its middle: workers and open files end with it.
                        self._open = None
                        raise
                    if self.given == limit:
                        return
                self._open = None
                if fresh or not self._batches.again:
                    raise ValueError(self._too_few(self.given))

    def _too_few(self, given: int) -> str:
        return (
            f"{self._argument} ran dry: it gave {given} batches of the {self._limit} that {self._limit_argument}="
            f"{self._limit} asks for in an epoch. Lower {self._limit_argument}, or give more data."
        )
