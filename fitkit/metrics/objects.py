"""The metrics that users bring: callables ``(output, target)``, and metrics and collections of torchmetrics.

They are called once per batch with that batch's own output and target. Metrics by name are in names.py.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, final

import torch
from torch import Tensor

from fitkit._types import Structure
from fitkit.batch import count_samples
from fitkit.device import sum_dtype
from fitkit.errors import show
from fitkit.metrics.part import Part, map_tensors
from fitkit.metrics.readings import spread_weight

if TYPE_CHECKING:
    from torchmetrics import Metric, MetricCollection

# How many batches' values wait until they are summed up; each is a 0-d tensor.
HELD = 64


@final
class CallableMetric(Part):
    """The mean of what a callable returns for each batch.

    Args:
        key: the log key.
        function: called as ``function(output, target)`` without gradients. A single number is taken for the batch's
            mean, weighted by its samples; a tensor that has one entry or more per sample is averaged over all entries.
        device: where the values are.
        weighted: whether entries are weighted by sample_weight, and the sum divided by the sum of weights.
    """

    def __init__(self, key: str, function: Callable[..., Any], device: torch.device, *, weighted: bool) -> None:
        super().__init__([key])
        self._function = function
        self._device = device
        self._weighted = weighted
        self.reset()

    def reset(self) -> None:
        self._values: list[Tensor] = []
        self._weights: list[float | Tensor] = []
        self._sums: dict[str, Tensor] | None = None

    def update(self, output: Structure, target: Structure, weight: Tensor | None) -> None:
        samples = count_samples(output, target)
        if not samples:
            return
        with torch.no_grad():
            value, counts = self._mean(self._function(output, target), samples, weight)
        self._values.append(value)
        self._weights.append(counts)
        if len(self._values) >= HELD:
            self._sum_up()

    def _mean(self, result: Any, samples: int, weight: Tensor | None) -> tuple[Tensor, float | Tensor]:
        """The batch's mean as a tensor of its own, and what it counts."""
        dtype = sum_dtype(self._device)
        if not isinstance(result, Tensor):
            if not hasattr(type(result), "__float__"):
                raise TypeError(
                    f"Expected metric {self.keys[0]!r} to return a tensor or a number, received {show(result)}."
                )
            result = torch.tensor(float(result), dtype=dtype)
        result = result.detach().to(self._device)
        per_item = result.ndim > 0 and result.shape[0] == samples
        if not per_item and result.numel() != 1:
            raise ValueError(
                f"Expected metric {self.keys[0]!r} to return one number, or one or more for each of {samples} samples, "
                f"received shape {tuple(result.shape)}."
            )
        if not self._weighted or weight is None:
            # A copy, as the callable may give the same tensor again; a mean over items is one by itself.
            value = result.mean(dtype=dtype) if per_item else result.reshape(()).to(dtype, copy=True)
            return value, float(result.numel() if per_item else samples)
        if not per_item:
            raise ValueError(
                f"Expected metric {self.keys[0]!r} of weighted_metrics to return one value per sample, since there are "
                f"sample weights, received a single number. Return a tensor of shape ({samples},)."
            )
        weights = spread_weight(weight, result.shape).to(dtype)
        counted = weights.sum()
        return torch.where(counted == 0, 0.0, (result.to(dtype) * weights).sum() / counted), counted

    def _sum_up(self) -> None:
        if not self._values:
            return
        dtype = sum_dtype(self._device)
        if any(isinstance(weight, Tensor) for weight in self._weights):
            weights = torch.stack(
                [torch.as_tensor(weight, dtype=dtype, device=self._device) for weight in self._weights]
            )
        else:
            weights = torch.tensor(self._weights, dtype=dtype).to(self._device, non_blocking=True)
        added = {"total": (torch.stack(self._values) * weights).sum(), "count": weights.sum()}
        self._values, self._weights = [], []
        self._join(added)

    def _join(self, added: dict[str, Tensor]) -> None:
        self._sums = added if self._sums is None else {name: self._sums[name] + added[name] for name in added}

    def compute(self) -> dict[str, Tensor]:
        self._sum_up()
        return {} if self._sums is None else {self.keys[0]: self._sums["total"] / self._sums["count"]}

    def state(self) -> dict[str, Any]:
        self._sum_up()
        return {"sums": self._sums}

    def add_state(self, state: dict[str, Any]) -> None:
        self._sum_up()
        if state["sums"] is not None:
            self._join(map_tensors(lambda tensor: tensor.to(self._device), state["sums"]))

    def compute_across(self, states: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        joined = CallableMetric(self.keys[0], self._function, self._device, weighted=self._weighted)
        for state in states:
            joined.add_state(state)
        return joined.compute()


@final
class TorchmetricsMetric(Part):
    """A copy of a user's torchmetrics metric or collection; the user's own is never updated.

    Args:
        keys: one log key, or one for each metric of a collection in its order.
        metric: what the user made.
        device: where the values are.
    """

    def __init__(self, keys: Sequence[str], metric: Metric | MetricCollection, device: torch.device) -> None:
        super().__init__(keys)
        self._names = collection_names(metric)
        self._metric = copy.deepcopy(metric).to(device)
        self._device = device
        for part in self._parts():
            part.compute_with_cache = False
            # Without this, reading a running value in one process would wait for all the others.
            part.distributed_available_fn = _never
            part.persistent(True)
        self.reset()

    def _parts(self) -> list[Metric]:
        from torchmetrics import Metric

        return [module for module in self._metric.modules() if isinstance(module, Metric)]

    def reset(self) -> None:
        self._metric.reset()
        self._has_data = False

    def update(self, output: Structure, target: Structure, weight: Tensor | None) -> None:
        if not count_samples(output, target):
            return
        # Its states outlive an inference_mode that the run may be in.
        with torch.inference_mode(False), torch.no_grad():
            self._metric.update(output, target)
        self._has_data = True

    def compute(self) -> dict[str, Tensor]:
        if not self._has_data:
            return {}
        with torch.no_grad(), warnings.catch_warnings():
            # What was loaded, or updated in another process, counts as an update too.
            warnings.filterwarnings("ignore", "The ``compute`` method of metric", UserWarning)
            computed: Any = self._metric.compute()
        if self._names is None:
            return {self.keys[0]: self._scalar(self.keys[0], computed)}
        return {
            key: self._scalar(key, computed.get(name, computed))
            for key, name in zip(self.keys, self._names, strict=True)
        }

    def _scalar(self, key: str, value: Any) -> Tensor:
        if isinstance(value, Tensor) and value.numel() == 1:
            return value.detach().reshape(()).to(self._device)
        if isinstance(value, (int, float)):
            return torch.tensor(value, dtype=sum_dtype(self._device), device=self._device)
        raise ValueError(
            f"Expected metric {key!r} to compute one number, since logs hold numbers, received {show(value)}. Choose "
            "an average, or wrap it in a callable(output, target) that returns one number."
        )

    def state(self) -> dict[str, Any]:
        return {"has_data": self._has_data, "metric": map_tensors(torch.clone, self._metric.state_dict())}

    def add_state(self, state: dict[str, Any]) -> None:
        # torchmetrics cannot add states in general: this replaces what there is, and is called after reset only.
        if not state["has_data"]:
            return
        self._metric.load_state_dict(map_tensors(lambda tensor: tensor.to(self._device), state["metric"]))
        self._has_data = True

    def compute_across(self, states: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        here = self._has_data
        for part in self._parts():
            part.distributed_available_fn = _always
        self._has_data = any(state["has_data"] for state in states)
        try:
            return self.compute()
        finally:
            self._has_data = here
            for part in self._parts():
                part.distributed_available_fn = _never


def is_torchmetrics(value: object) -> TypeGuard[Metric | MetricCollection]:
    """Whether the value is a metric or a collection of torchmetrics, without importing it."""
    torchmetrics = sys.modules.get("torchmetrics")
    return torchmetrics is not None and isinstance(value, (torchmetrics.Metric, torchmetrics.MetricCollection))


def collection_names(metric: Metric | MetricCollection) -> list[str] | None:
    """The names in a collection; None for a single metric."""
    from torchmetrics import MetricCollection

    return [str(name) for name in metric] if isinstance(metric, MetricCollection) else None


def _never() -> bool:
    return False


def _always() -> bool:
    return True
