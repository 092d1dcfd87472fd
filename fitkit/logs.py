"""The running numbers of an epoch: kept on the device, summed up late, read only when somebody asks.

`Mean` is one weighted running mean; `Tally` holds those of one run by name; `BatchLogs` is the lazy mapping that
callbacks are given. Metrics keep their own states (metrics/); what a number means is not decided here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, final

import torch
from torch import Tensor

from fitkit.device import move, sum_dtype

# How many batches are summed up at once. Each held value is a 0-d tensor.
HELD = 256


@final
class Mean:
    """A mean over data: the sum of value x weight over the sum of weight, exact for any slicing of the data.

    Values wait, as tensors on the device, until 256 of them are summed in one go; weights that the host knows are
    summed on the host. A weight of 0 takes its value out, also when that is NaN (a batch without any target).

    Args:
        device: where the values are.
        adds_up: values are sums already, to be divided by the sum of the weights only.
    """

    __slots__ = (
        "_adds_up",
        "_indices",
        "_device",
        "_first_bad",
        "_host_weight",
        "_values",
        "_weight",
        "_weights",
        "_sum",
    )

    def __init__(self, device: torch.device, *, adds_up: bool = False) -> None:
        self._device = device
        self._adds_up = adds_up
        self._values: list[Tensor] = []
        self._weights: list[float | Tensor] = []
        self._indices: list[int] = []
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self._values.clear()
        self._weights.clear()
        self._indices.clear()
        self._sum: Tensor | None = None
        self._host_weight = 0.0
        self._weight: Tensor | None = None
        self._first_bad: Tensor | None = None

    def add(self, value: Tensor, weight: float | Tensor, index: int) -> None:
        """Takes one value in.

        Args:
            value: 0-d, detached, on the device.
            weight: a number, or a 0-d tensor on the device.
            index: of the batch that it belongs to.
        """
        self._values.append(value)
        self._weights.append(weight)
        self._indices.append(index)
        if len(self._values) >= HELD:
            self._flush()

    def _flush(self) -> None:
        if not self._values:
            return
        dtype = sum_dtype(self._device)
        values = torch.stack(self._values).to(dtype)
        first = self._weights[0]
        if (
            not isinstance(first, Tensor)
            and first > 0
            and all(weight is first or weight == first for weight in self._weights)
        ):
            # The usual case: batches of equal weight need no tensor of weights.
            self._host_weight += float(first) * len(self._weights)
            summed = values.sum() if self._adds_up else values.sum() * first
        else:
            weights = self._weight_tensor(dtype)
            values = torch.where(weights > 0, values, torch.zeros_like(values))
            summed = values.sum() if self._adds_up else (values * weights).sum()
        self._note_bad(values)
        self._sum = summed if self._sum is None else self._sum + summed
        self._values.clear()
        self._weights.clear()
        self._indices.clear()

    def _weight_tensor(self, dtype: torch.dtype) -> Tensor:
        """The waiting weights on the device; their sum goes to the host where the host knows them all."""
        known = [weight for weight in self._weights if not isinstance(weight, Tensor)]
        if len(known) == len(self._weights):
            self._host_weight += math.fsum(known)
            return torch.tensor(known, dtype=dtype).to(self._device, non_blocking=True)
        weights = torch.stack(
            [torch.as_tensor(weight, dtype=dtype).to(self._device, non_blocking=True) for weight in self._weights]
        )
        self._weight = weights.sum() if self._weight is None else self._weight + weights.sum()
        return weights

    def _note_bad(self, values: Tensor) -> None:
        """Keeps, on the device, the index of the first batch whose value is not finite (-1: none)."""
        bad = ~values.isfinite()
        first = bad.to(torch.uint8).argmax()
        start = self._indices[0]
        if self._indices == list(range(start, start + len(self._indices))):
            index = first + start
        else:  # several parts of one batch, or batches of which this process has no sample
            indices = torch.tensor(self._indices).to(self._device, non_blocking=True)
            index = indices.index_select(0, first.reshape(1)).reshape(())
        index = torch.where(bad.any(), index, -1)
        self._first_bad = index if self._first_bad is None else torch.where(self._first_bad < 0, index, self._first_bad)

    def _summed_up(self) -> Mean:
        """This mean with nothing waiting. Here all goes on waiting: who looks, and when, moves no sum's last digit."""
        if not self._values:
            return self
        other = Mean(self._device, adds_up=self._adds_up)
        other._values, other._weights, other._indices = list(self._values), list(self._weights), list(self._indices)
        other._sum, other._first_bad = self._sum, self._first_bad
        other._host_weight, other._weight = self._host_weight, self._weight
        other._flush()
        return other

    def value(self) -> Tensor:
        """The mean so far as a 0-d tensor on the device; NaN before the first value."""
        so_far = self._summed_up()
        if so_far._sum is None:
            return torch.full((), math.nan, dtype=sum_dtype(self._device), device=self._device)
        if so_far._weight is not None:
            return so_far._sum / (so_far._weight + so_far._host_weight)
        return so_far._sum / so_far._host_weight if so_far._host_weight else so_far._sum * math.nan

    def sums(self) -> tuple[float, float, int]:
        """The sum of what came so far, its weight, and the index of the first batch that is not finite (-1: none)."""
        self._flush()
        weight = self._host_weight + (0.0 if self._weight is None else float(self._weight))
        return 0.0 if self._sum is None else float(self._sum), weight, int(self.first_bad())

    def first_bad(self) -> Tensor:
        """The index of the first batch whose value is not finite, -1 when there is none, as a 0-d tensor."""
        found = self._summed_up()._first_bad
        return torch.full((), -1, device=self._device) if found is None else found

    def state_dict(self) -> dict[str, Any]:
        """All that is kept. What waits goes on waiting: a save moves no sum's last digit."""
        alike = len({value.dtype for value in self._values}) == 1
        return {
            "adds_up": self._adds_up,
            "values": torch.stack(self._values) if alike else list(self._values),
            "weights": list(self._weights),
            "indices": list(self._indices),
            "sum": self._sum,
            "host_weight": self._host_weight,
            "weight": self._weight,
            "first_bad": self._first_bad,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where the state was made.

        Raises:
            ValueError: the values and what belongs to each differ in number. What is no number raises what torch does.
        """
        if len({len(state[name]) for name in ("values", "weights", "indices")}) > 1:
            raise ValueError("Expected a weight and an index for each value that waits.")
        self._adds_up = bool(state["adds_up"])
        self._values = [value.to(self._device) for value in state["values"]]
        self._weights = [move(weight, self._device) for weight in state["weights"]]
        self._indices = list(state["indices"])
        self._sum = move(state["sum"], self._device)
        self._host_weight = state["host_weight"]
        self._weight = move(state["weight"], self._device)
        self._first_bad = move(state["first_bad"], self._device)
        # Here and now, instead of somewhere in the epoch.
        if (self.value() + self.first_bad()).shape:
            raise ValueError("Expected sums of one number each.")


@final
class Tally:
    """The running means of one run by name; a name appears when it is first added.

    Args:
        device: where the values are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.means: dict[str, Mean] = {}

    def mean(self, name: str, *, adds_up: bool = False) -> Mean:
        """The mean of that name, made on its first use."""
        if name not in self.means:
            self.means[name] = Mean(self.device, adds_up=adds_up)
        return self.means[name]

    def reset(self) -> None:
        """Starts an epoch: what is not added in it has no mean."""
        self.means.clear()

    def sums(self) -> dict[str, tuple[float, float, int]]:
        """Of every mean so far the sum, the weight, and the index of the first batch that is not finite."""
        return {name: mean.sums() for name, mean in self.means.items()}

    def values(self) -> dict[str, Tensor]:
        """Every mean so far, as 0-d tensors on the device."""
        return {name: mean.value() for name, mean in self.means.items()}

    def state_dict(self) -> dict[str, Any]:
        """Every mean's state by its name."""
        return {name: mean.state_dict() for name, mean in self.means.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where the state was made."""
        self.reset()
        for name, kept in state.items():
            self.mean(name).load_state_dict(kept)


def joined(
    everywhere: Sequence[Mapping[str, tuple[float, float, int]]], device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """The means over what several tallies hold, and the index of the first batch with a loss that is not finite.

    Args:
        everywhere: their sums.
        device: where the means go.
    """
    found: dict[str, list[tuple[float, float, int]]] = {}
    for sums in everywhere:
        for name, each in sums.items():
            found.setdefault(name, []).append(each)
    means = {}
    for name, of_name in found.items():
        weight = sum(each[1] for each in of_name)
        mean = sum(each[0] for each in of_name) / weight if weight else math.nan
        means[name] = torch.full((), mean, dtype=sum_dtype(device), device=device)
    judged = [each[2] for name, of_name in found.items() for each in of_name if name.endswith("loss") and each[2] >= 0]
    return means, torch.full((), min(judged, default=-1), device=device)


def read(values: Mapping[str, Tensor]) -> dict[str, float]:
    """All numbers in one transfer from the device."""
    if not values:
        return {}
    dtype = sum_dtype(next(iter(values.values())).device)
    numbers = torch.stack([value.detach().to(dtype) for value in values.values()]).tolist()
    return dict(zip(values, numbers, strict=True))


class RunningNumbers(Protocol):
    """What batch logs read from."""

    def names(self) -> list[str]:
        """The names that have a number now."""

    def number(self, name: str) -> Tensor:
        """The number of that name as a 0-d tensor."""

    def first_bad(self) -> Tensor:
        """The index of the first batch whose loss is not finite, -1 when there is none, as a 0-d tensor."""


@final
class BatchLogs(Mapping[str, float]):
    """The logs of a batch: reads the device only for the key that is read.

    "loss" and metrics are the running means of the epoch, "batch_loss" is that of the batch alone. Valid while the
    hook runs that it is given to; keep ``float(logs["loss"])``, not the mapping.

    Args:
        numbers: the running numbers of the run.
    """

    __slots__ = ("_numbers",)

    def __init__(self, numbers: RunningNumbers) -> None:
        self._numbers = numbers

    def __getitem__(self, key: str) -> float:
        return float(self._numbers.number(key))

    def __contains__(self, key: object) -> bool:
        return key in self._numbers.names()

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers.names())

    def __len__(self) -> int:
        return len(self._numbers.names())

    def first_nonfinite(self) -> int | None:
        """The index of the epoch's first batch whose loss was NaN or infinite, None when all were finite.

        A batch without any target has no loss, and none that is not finite. Asking reads the device once. An evaluation
        on an accelerator, which judges up to 64 batches at once, says the first of these.
        """
        index = int(self._numbers.first_bad())
        return None if index < 0 else index

    def __repr__(self) -> str:
        return repr(dict(self))
