"""The metrics by name of one output: batches wait, bounded in number and size, and are given to torchmetrics at once.

Which class of torchmetrics that is stands in names.py, and what it is given in readings.py.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fitkit._types import OutputMeaning, Structure
from fitkit.metrics.names import NamedMetric
from fitkit.metrics.readings import Given, Reading, Rows, check_pair, check_scale, read_classes, read_values
from fitkit.metrics.states import apart, join_into, load_into, state_of

if TYPE_CHECKING:
    from torchmetrics import Metric

# How many batches wait, and how many elements they hold together at most: 4 MB of float32.
HELD_BATCHES = 64
HELD_ELEMENTS = 2**20
# How many elements of a larger batch are looked at together: 64 MB of float32.
PIECE_ELEMENTS = 2**24


class Gathering:
    """Metrics by name that read one output in the same way.

    Args:
        metrics: by log key; all of regression or all of classification.
        meaning: what the loss tells about the output.
        device: where the values are.
        weighted: whether the metrics weigh items by sample_weight.
    """

    def __init__(
        self, metrics: Mapping[str, NamedMetric], meaning: OutputMeaning, device: torch.device, *, weighted: bool
    ) -> None:
        self.keys = tuple(metrics)
        self._device = device
        self._named = dict(metrics)
        self._meaning = meaning
        self._weighted = weighted
        self._read = read_values if "regression" in next(iter(metrics.values())).tasks else read_classes
        self._names = ", ".join(repr(key) for key in metrics)
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self._reading: Reading | None = None
        self._shapes: object = None
        self._samples = 0
        self._held: list[tuple[Tensor, ...]] = []
        self._held_elements = 0
        # The metric of each key, and those that are updated: metrics that inherit one update, and are given the same,
        # keep the same states, which one of them keeps for all.
        self._metrics: dict[str, tuple[Metric, Metric]] = {}
        self._keepers: dict[tuple[object, Given], Metric] = {}

    def update(self, output: Structure, target: Structure, weight: Tensor | None) -> None:
        """Takes in one batch; one without samples changes nothing."""
        output, target = check_pair(self._names, output, target)
        if not len(output):
            return
        shapes = (output.shape, target.shape, target.dtype)
        if shapes != self._shapes:
            self._look(output, target)
            self._shapes = shapes
        assert self._reading is not None  # _look sets it
        if self._weighted and weight is None:
            weight = torch.ones(len(output), device=output.device)
        rows = self._reading.align(output, target, weight if self._weighted else None)
        elements = sum(part.numel() for part in rows)
        if self._held_elements + elements > HELD_ELEMENTS:
            self._sum_up()
        # The first batch does not wait, so that what a metric refuses is refused there. Nor does any where algorithms
        # must be deterministic: there torchmetrics counts with classes x classes x rows of memory.
        last = not self._samples or len(self._held) + 1 >= HELD_BATCHES or elements > HELD_ELEMENTS
        last = last or torch.are_deterministic_algorithms_enabled()
        # A copy, unless joining makes one now: a loader may fill the same memory again, and so may a compiled module.
        self._held.append(rows if last else tuple(part.clone() for part in rows))
        self._held_elements += elements
        if last:
            self._sum_up()
        self._samples += len(output)

    def _look(self, output: Tensor, target: Tensor) -> None:
        """Decides how a batch of new shapes is read, and whether that fits the metrics and the batches before."""
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

    def _sum_up(self) -> None:
        if not self._held:
            return
        assert self._reading is not None  # nothing is held before the first look
        with apart():
            joined = [torch.cat(parts) for parts in zip(*self._held, strict=True)]
            rows = max(1, PIECE_ELEMENTS * len(joined[0]) // self._held_elements)
            self._held, self._held_elements = [], 0
            for piece in zip(*(part.split(rows) for part in joined), strict=True):
                together = Rows(self._reading, *piece)
                for (_, given), metric in self._keepers.items():
                    metric.update(*given(together))

    def compute(self, keys: Collection[str]) -> dict[str, Tensor]:
        """The values over all since reset, 0-d, of those keys that are among these; empty before the first update."""
        self._sum_up()
        if not self._samples:
            return {}
        with apart():
            return {key: self._value(key) for key in self.keys if key in keys}

    def _value(self, key: str) -> Tensor:
        named, (metric, keeper) = self._named[key], self._metrics[key]
        undefined = torch.full((), math.nan, device=self._device)
        if self._samples < named.least:
            return undefined
        if metric is not keeper:
            metric.load_state_dict(keeper.metric_state)
        try:
            return named.finish(metric.compute())
        except IndexError:  # so torchmetrics says that no row is left, as when every target is ignored
            return undefined

    def state(self) -> dict[str, Any]:
        """All that is kept: nested dicts and lists of tensors, numbers and strings."""
        self._sum_up()
        return {
            "reading": None if self._reading is None else asdict(self._reading),
            "samples": self._samples,
            "metrics": [state_of(metric) for metric in self._keepers.values()],
        }

    def waiting_state(self) -> dict[str, Any]:
        """As `state`, but what waits goes on waiting: a save moves no sum's last digit."""
        held, elements, shapes = self._held, self._held_elements, self._shapes
        self._held = []
        kept = {**self.state(), "held": [list(rows) for rows in held], "shapes": shapes}
        self._held, self._held_elements = held, elements
        return kept

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on where the state was made."""
        self.reset()
        if not state["samples"]:
            return
        self._build(Reading(**state["reading"]))
        self._samples = state["samples"]
        self._held = [tuple(part.to(self._device) for part in rows) for rows in state.get("held", ())]
        self._held_elements = sum(part.numel() for rows in self._held for part in rows)
        self._shapes = state.get("shapes")
        for metric, kept in zip(self._keepers.values(), state["metrics"], strict=True):
            load_into(metric, kept, self._device)

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
