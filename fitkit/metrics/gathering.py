"""The metrics by name of one output: batches wait, bounded in number and size, and are summed up at once.

What sums them up, most often a class of torchmetrics, stands in names.py, and what it is given in readings.py.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from fitkit._types import OutputMeaning, Structure
from fitkit.errors import check_integer, show
from fitkit.metrics.names import NamedMetric
from fitkit.metrics.readings import (
    Given,
    Reading,
    Rows,
    check_classes,
    check_pair,
    check_scale,
    read_classes,
    read_values,
)
from fitkit.metrics.states import Keeper, apart, check_grown, join_into, load_into, state_of

# How many batches wait, and how many elements they hold together at most: half a MB of float32.
HELD_BATCHES = 256
HELD_ELEMENTS = 2**17
# On the CPU a batch of more elements does not wait: while it is in the cache, looking at it costs less than laying it
# aside.
CACHED_ELEMENTS = 2**13
# What waits is small and lies among the large tensors of later batches, so that their memory cannot be used again as a
# whole. Therefore no more batches wait than have so many bytes together.
BATCH_BYTES = 2**23
# How many elements of a larger batch are looked at together: 64 MB of float32.
PIECE_ELEMENTS = 2**24


class Gathering:
    """Metrics by name that read one output in the same way.

    Args:
        metrics: by log key; all of regression or all of classification.
        meaning: what the loss tells about the output.
        device: where the values are.
        weighted: whether the metrics weigh items by sample_weight.
        owns_targets: whether nobody writes into targets and weights after they were taken in.
    """

    by_name = True

    def __init__(
        self,
        metrics: Mapping[str, NamedMetric],
        meaning: OutputMeaning,
        device: torch.device,
        *,
        weighted: bool,
        owns_targets: bool = False,
    ) -> None:
        self._owns_targets = owns_targets
        self.keys = tuple(metrics)
        self._device = device
        self._named = dict(metrics)
        self._meaning = meaning
        self._weighted = weighted
        self._most_waiting = CACHED_ELEMENTS if device.type == "cpu" else HELD_ELEMENTS
        self._read = read_values if "regression" in next(iter(metrics.values())).tasks else read_classes
        self._names = ", ".join(repr(key) for key in metrics)
        self._batch_bytes = 0
        self.reset()

    def expect(self, batch_bytes: int) -> None:
        """Says how large batches are, before the first of a run is taken in."""
        self._batch_bytes = batch_bytes

    def reset(self) -> None:
        """Forgets everything."""
        self._reading: Reading | None = None
        self._shapes: object = None
        self._samples = 0
        self._batch_samples = self._batch_elements = self._most_batches = 0
        self._are_rows = False
        self._held: list[tuple[Tensor, ...]] = []
        self._held_elements = 0
        # The metric of each key, and those that are updated: metrics that inherit one update, and are given the same,
        # keep the same states, which one of them keeps for all.
        self._metrics: dict[str, tuple[Keeper, Keeper]] = {}
        self._keepers: dict[tuple[object, Given], Keeper] = {}
        # Whether one of them keeps the rows that it is given, and not their sums alone.
        self._keeps_rows = False

    @property
    def room(self) -> int:
        """How many batches like the latest may wait; none of those that are looked at while they are in the cache."""
        if self._batch_elements > self._most_waiting:
            return 0
        return min(self._most_batches, HELD_ELEMENTS // max(1, self._batch_elements))

    def update(self, output: Structure, target: Structure, weight: Tensor | None, *, are_kept: bool = False) -> None:
        """Takes in one batch; one without samples changes nothing."""
        # Batches like the one before need no second look.
        if not self._is_alike(output, target):
            output, target = check_pair(self._names, output, target)
            if not len(output):
                return
            self._decide(output, target)
            self._note(output, target)
        rows: tuple[Tensor, ...] = (output, target)
        if self._weighted:
            weight = torch.ones(len(output), device=output.device) if weight is None else weight
            rows = self._reading.align(output, target, weight)  # type: ignore[union-attr]  # it is decided
        elif not self._are_rows:
            rows = self._reading.align(output, target)  # type: ignore[union-attr]
        if self._held_elements + self._batch_elements > HELD_ELEMENTS:
            self._sum_up()
        # The first batch does not wait, so that what a metric refuses is refused there.
        waits = self._samples and self._batch_elements <= self._most_waiting
        self._samples += self._batch_samples
        if (waits or self._keeps_rows) and not are_kept:
            # Copies: a module may write its next output where it wrote this one, and so may a loader its next target.
            copies = (rows[0].clone(), *rows[1:]) if self._owns_targets else tuple([part.clone() for part in rows])
            rows = copies
        self._held.append(rows)
        self._held_elements += self._batch_elements
        if not waits or len(self._held) >= self._most_batches:
            self._sum_up()

    def _is_alike(self, output: Structure, target: Structure) -> bool:
        """Whether the batch has the shapes of the one before."""
        pair = isinstance(output, Tensor) and isinstance(target, Tensor)
        return pair and (output.shape, target.shape, target.dtype) == self._shapes

    def _note(self, output: Tensor, target: Tensor) -> None:
        """Notes what is the same for all batches of these shapes."""
        assert self._reading is not None  # it is decided
        rows = self._reading.align(output, target)
        self._are_rows = rows[0] is output and rows[1] is target
        self._batch_samples = len(output)
        self._batch_elements = sum(part.numel() for part in rows) + (rows[1].numel() if self._weighted else 0)
        self._shapes = (output.shape, target.shape, target.dtype)
        # Where algorithms must be deterministic, torchmetrics counts with classes x classes x rows of memory.
        waiting = 0 if torch.are_deterministic_algorithms_enabled() else BATCH_BYTES // max(1, self._batch_bytes)
        self._most_batches = max(1, min(HELD_BATCHES, waiting))

    def _decide(self, output: Tensor, target: Tensor) -> None:
        """Decides how batches of new shapes are read, and whether that fits the metrics and the batches before."""
        reading, before = self._read(self._names, output, target, self._meaning), self._reading
        if before is None:
            for key, metric in self._named.items():
                if reading.task not in metric.tasks:
                    raise ValueError(
                        f"Metric {key!r} is defined for {' and '.join(metric.tasks)} outputs, received a "
                        f"{reading.task} one: output of shape {tuple(output.shape)}, target of shape "
                        f"{tuple(target.shape)}."
                    )
                if reading.task in metric.needs_scale:
                    check_scale(key, reading)
            if reading.scale == "unknown":  # a loss of torch's refuses such targets by itself
                check_classes(self._names, reading, reading.align(output, target)[1])
            self._build(reading)
            return
        by_column = reading.task != "regression" or any(metric.given is Rows.columns for metric in self._named.values())
        if reading.task != before.task or (by_column and reading.columns != before.columns):
            raise ValueError(
                f"Expected batches that the metrics {self._names} can read as those before, {before.task} with "
                f"{before.columns} columns, received a {reading.task} one with {reading.columns}: output of shape "
                f"{tuple(output.shape)}, target of shape {tuple(target.shape)}."
            )
        if reading != before or reading.task == "regression":
            self._sum_up()
        self._reading = reading

    def _build(self, reading: Reading) -> None:
        self._reading = reading
        with apart():
            for key, named in self._named.items():
                metric = named.build(reading, self._device)
                keeper = self._keepers.setdefault((type(metric).update, named.given), metric)
                self._metrics[key] = (metric, keeper)
        states = [state for keeper in self._keepers.values() for state in keeper.metric_state.values()]
        self._keeps_rows = any(isinstance(state, list) for state in states)

    def _sum_up(self) -> None:
        if not self._held:
            return
        assert self._reading is not None  # nothing is held before the first look
        with apart():
            joined = self._joined()
            rows = max(1, PIECE_ELEMENTS * len(joined[0]) // self._held_elements)
            self._held, self._held_elements = [], 0
            pieces = [joined] if rows >= len(joined[0]) else zip(*(part.split(rows) for part in joined), strict=True)
            for piece in pieces:
                together = Rows(self._reading, *piece)
                try:
                    for (_, given), metric in self._keepers.items():
                        metric.update(*given(together))
                except (RuntimeError, IndexError):
                    check_classes(self._names, self._reading, together.target)
                    raise

    def _joined(self) -> tuple[Tensor, ...]:
        if len(self._held) == 1:
            return self._held[0]
        return tuple(torch.cat(parts) for parts in zip(*self._held, strict=True))

    def compute(self, keys: Collection[str]) -> dict[str, Tensor]:
        """The values over all since reset, 0-d, of those keys that are among these; empty before the first update."""
        if not self._samples:
            return {}
        with self._summed_up(), apart():
            return {key: self._value(key) for key in self.keys if key in keys}

    @contextmanager
    def _summed_up(self) -> Iterator[None]:
        """With nothing waiting, until all waits again: who looks, and when, moves no sum's last digit."""
        held, elements = self._held, self._held_elements
        kept = [state_of(metric) for metric in self._keepers.values()] if held else []
        self._sum_up()
        try:
            yield
        finally:
            for metric, state in zip(self._keepers.values(), kept, strict=bool(kept)):
                load_into(metric, state, self._device)
            self._held, self._held_elements = held, elements

    def _value(self, key: str) -> Tensor:
        named, (metric, keeper) = self._named[key], self._metrics[key]
        undefined = torch.full((), math.nan, device=self._device)
        if self._samples < named.least:
            return undefined
        if metric is not keeper:
            load_into(metric, state_of(keeper), self._device)
        try:
            return named.finish(metric.compute())
        except IndexError:  # so torchmetrics says that no row is left, as when every target is ignored
            return undefined

    def state(self) -> dict[str, Any]:
        """All that is kept: nested dicts and lists of tensors, numbers and strings."""
        with self._summed_up():
            return {
                "reading": None if self._reading is None else asdict(self._reading),
                "samples": self._samples,
                "metrics": [state_of(metric) for metric in self._keepers.values()],
            }

    def waiting_state(self) -> dict[str, Any]:
        """As `state`, but what waits goes on waiting: a save moves no sum's last digit."""
        held, elements, shapes = self._held, self._held_elements, self._shapes
        self._held = []
        waiting = {"held": [list(rows) for rows in held], "shapes": shapes, "batch_bytes": self._batch_bytes}
        kept = {**self.state(), **waiting}
        self._held, self._held_elements = held, elements
        return kept

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on where the state was made."""
        self.reset()
        samples = check_integer("samples", state["samples"], least=0)
        if not samples:
            return
        self._build(Reading(**state["reading"]))
        self._samples = samples
        self._batch_bytes = check_integer("batch_bytes", state.get("batch_bytes", 0), least=0)
        self._held = [tuple(part.to(self._device) for part in rows) for rows in state.get("held", ())]
        self._held_elements = sum(part.numel() for rows in self._held for part in rows)
        if state.get("shapes") is not None:
            output, target, dtype = state["shapes"]
            pair = (torch.empty(output, device="meta"), torch.empty(target, dtype=dtype, device="meta"))
            if self._read(self._names, *pair, self._meaning) != self._reading:
                raise ValueError(
                    f"Expected how batches of shapes {state['shapes']} are read, received {self._reading}."
                )
            self._note(*pair)
            self._check_held(*self._reading.align(*pair))
        for metric, kept in zip(self._keepers.values(), state["metrics"], strict=True):
            check_grown(kept, metric.metric_state)
            load_into(metric, kept, self._device)

    def _check_held(self, output: Tensor, target: Tensor) -> None:
        """Refuses rows that wait and are not like these."""
        like = (output, target, target) if self._weighted else (output, target)
        for rows in self._held:
            if [part.ndim for part in rows] != [part.ndim for part in like] or len(set(map(len, rows))) > 1:
                raise ValueError(f"Expected {len(like)} tensors of as many rows each, received {show(rows)}.")

    def check_loaded(self) -> None:
        """Refuses a state that no values come of, before more is added to it."""
        if any(value.shape for value in self.compute(self.keys).values()):
            raise ValueError("Expected sums of one number each.")

    def compute_across(self, states: Sequence[dict[str, Any]], keys: Collection[str]) -> dict[str, Tensor]:
        """The values over the data of all processes, on each of them, from the states of all."""
        states = [state for state in states if state["samples"]]
        if not states:
            return {}
        joined = Gathering(self._named, self._meaning, self._device, weighted=self._weighted)
        joined.load_state(states[0])
        joined._samples = sum(state["samples"] for state in states)
        for index, metric in enumerate(joined._keepers.values()):
            join_into(metric, [state["metrics"][index] for state in states], self._device)
        return joined.compute(keys)
