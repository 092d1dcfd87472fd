"""The metrics by name of one output: batches wait, bounded in number and size, and are then summed up at once.

What is summed up stands in sums.py, what the values are in names.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, final

import torch
from torch import Tensor

from fitkit._types import OutputMeaning, Structure
from fitkit.metrics.names import NamedMetric
from fitkit.metrics.part import Part, map_tensors
from fitkit.metrics.readings import Reading, Rows, check_pair, check_scale, read_classes, read_values
from fitkit.metrics.sums import Measure, State

# How many batches wait, and how many elements they hold together at most: 4 MB of float32.
HELD_BATCHES = 64
HELD_ELEMENTS = 2**20
# How many elements of a larger batch are looked at together: 64 MB of float32.
PIECE_ELEMENTS = 2**24


@final
class Gathering(Part):
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
        super().__init__(list(metrics))
        self._metrics = dict(metrics)
        self._meaning = meaning
        self._device = device
        self._weighted = weighted
        self._read = read_values if "regression" in next(iter(metrics.values())).tasks else read_classes
        self._measures = dict.fromkeys(self._measure(metric) for metric in metrics.values())
        self._names = ", ".join(repr(key) for key in metrics)
        self.reset()

    def reset(self) -> None:
        self._reading: Reading | None = None
        # Of the latest batch: its shapes, whether they are those of rows already, and how many elements it holds.
        self._shapes: object = None
        self._are_rows = False
        self._elements = 0
        self._sums: dict[Measure, State] = {}
        self._held: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._held_elements = 0

    def _measure(self, metric: NamedMetric) -> Measure:
        return metric.weighted if self._weighted and metric.weighted is not None else metric.measure

    def update(self, output: Structure, target: Structure, weight: Tensor | None) -> None:
        if not isinstance(output, Tensor) or not isinstance(target, Tensor):
            output, target = check_pair(self._names, output, target)
        shapes = (output.shape, target.shape, target.dtype)
        if shapes != self._shapes:
            check_pair(self._names, output, target)
            if not output.shape[0]:
                return
            self._look(output, target)
            self._shapes = shapes
        assert self._reading is not None  # _look sets it
        weight = weight if self._weighted else None
        if self._held_elements + self._elements > HELD_ELEMENTS:
            self._sum_up()
        if self._elements > HELD_ELEMENTS:
            self._add_large(self._reading, output, target, weight)
            return
        if weight is not None or not self._are_rows:
            output, target, weight = self._reading.align(output, target, weight)
        # Copies: a loader may fill the same memory again, and so may a compiled module.
        self._held.append((output.clone(), target.clone(), None if weight is None else weight.clone()))
        self._held_elements += self._elements
        # The first batch does not wait, so that what a metric refuses is refused there.
        if len(self._held) >= HELD_BATCHES or not self._sums:
            self._sum_up()

    def _look(self, output: Tensor, target: Tensor) -> None:
        """Decides how a batch of new shapes is read, and whether that fits the metrics and the batches before."""
        reading = self._read(self._names, output, target, self._meaning)
        before = self._reading
        if before is None:
            for key, metric in self._metrics.items():
                if reading.task not in metric.tasks:
                    raise ValueError(
                        f"Metric {key!r} is defined for {' and '.join(metric.tasks)} outputs, received a "
                        f"{reading.task} one: output of shape {tuple(output.shape)}, target of shape "
                        f"{tuple(target.shape)}."
                    )
                check_scale(key, metric.need, reading)
        elif (reading.task, reading.columns) != (before.task, before.columns):
            raise ValueError(
                f"Expected batches that the metrics {self._names} can read as those before, {before.task} with "
                f"{before.columns} columns, received a {reading.task} one with {reading.columns}: output of shape "
                f"{tuple(output.shape)}, target of shape {tuple(target.shape)}."
            )
        if reading != before or reading.task == "regression":
            self._sum_up()
        self._reading = reading
        self._are_rows = reading.finds_rows(output, target)
        self._elements = output.numel() + target.numel() * (2 if self._weighted else 1)

    def _sum_up(self) -> None:
        if not self._held:
            return
        outputs, targets, weights = zip(*self._held, strict=True)
        self._held = []
        self._held_elements = 0
        weight = None
        if any(part is not None for part in weights):
            parts = [
                torch.ones_like(target, dtype=torch.float32) if part is None else part
                for target, part in zip(targets, weights, strict=True)
            ]
            weight = torch.cat(parts)
        self._add(torch.cat(outputs), torch.cat(targets), weight)

    def _add_large(self, reading: Reading, output: Tensor, target: Tensor, weight: Tensor | None) -> None:
        """Sums up a large batch in pieces, so that what is computed in float64 takes a bounded part of memory."""
        samples = max(1, len(output) * PIECE_ELEMENTS // self._elements)
        outputs, targets = output.split(samples), target.split(samples)
        weights = [None] * len(outputs) if weight is None else weight.split(samples)
        for piece in zip(outputs, targets, weights, strict=True):
            self._add(*reading.align(*piece))

    def _add(self, output: Tensor, target: Tensor, weight: Tensor | None) -> None:
        assert self._reading is not None  # nothing is held before the first look
        # The sums outlive an inference_mode that the run may be in.
        with torch.inference_mode(False), torch.no_grad():
            rows = Rows(output, target, weight, self._reading)
            for measure in self._measures:
                self._join(measure, measure.of(rows))

    def _join(self, measure: Measure, state: State) -> None:
        before = self._sums.get(measure)
        self._sums[measure] = state if before is None else measure.join(before, state)

    def compute(self) -> dict[str, Tensor]:
        self._sum_up()
        reading = self._reading
        if reading is None:
            return {}
        measured = {key: self._sums.get(self._measure(metric)) for key, metric in self._metrics.items()}
        with torch.no_grad():
            return {
                key: self._metrics[key].result(state, reading) for key, state in measured.items() if state is not None
            }

    def state(self) -> dict[str, Any]:
        self._sum_up()
        reading = None if self._reading is None else asdict(self._reading)
        return {"reading": reading, "sums": list(self._sums.values())}

    def add_state(self, state: dict[str, Any]) -> None:
        self._sum_up()
        if state["reading"] is None:
            return
        self._reading = self._reading or Reading(**state["reading"])
        sums = map_tensors(lambda tensor: tensor.to(self._device), state["sums"])
        for measure, added in zip(self._measures, sums, strict=True):
            self._join(measure, added)

    def compute_across(self, states: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        joined = Gathering(self._metrics, self._meaning, self._device, weighted=self._weighted)
        for state in states:
            joined.add_state(state)
        return joined.compute()
