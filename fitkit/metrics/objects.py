"""The metrics that users bring: callables ``(output, target)``, and metrics and collections of torchmetrics.

They are called once per batch with that batch's own output and target. Metrics by name are in names.py.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard, final

import torch
from torch import Tensor

from fitkit._types import OutputMeaning, Structure
from fitkit.batch import count_samples, mapped
from fitkit.device import sum_dtype
from fitkit.errors import show
from fitkit.metrics.gathering import Gathering
from fitkit.metrics.names import NamedMetric
from fitkit.metrics.readings import weighed
from fitkit.metrics.states import check_grown, join_into, load_into

if TYPE_CHECKING:
    from torchmetrics import Metric, MetricCollection

MEAN = NamedMetric("mean", None, weighed(lambda rows: rows.values), ("regression",))


@final
class CallableMetric(Gathering):
    """The mean of what a callable returns for each batch.

    Args:
        key: the log key.
        function: called as ``function(output, target)`` without gradients. A single number is taken for the batch's
            mean, weighted by its samples; a tensor that has one entry or more per sample is averaged over all entries.
        device: where the values are.
        weighted: whether entries are weighted by sample_weight, and the sum divided by the sum of weights.
    """

    by_name = False

    def __init__(self, key: str, function: Callable[..., Any], device: torch.device, *, weighted: bool) -> None:
        super().__init__({key: MEAN}, OutputMeaning("values"), device, weighted=True)
        self._function = function
        self._takes_weights = weighted

    def update(self, output: Structure, target: Structure, weight: Tensor | None, *, are_kept: bool = False) -> None:
        samples = count_samples(output, target)
        if not samples:
            return
        with torch.no_grad():
            value = self._function(output, target)
        if not isinstance(value, Tensor):
            if not hasattr(type(value), "__float__"):
                raise TypeError(
                    f"Expected metric {self.keys[0]!r} to return a tensor or a number, received {show(value)}."
                )
            value = torch.full((), float(value), dtype=sum_dtype(self._device))
        value = value.detach().to(self._device)
        weight = weight if self._takes_weights else None
        if value.ndim == 0 or value.shape[0] != samples:
            if value.numel() != 1 or weight is not None:
                many = "one value or more" if weight is not None else "one number, or one or more"
                raise ValueError(
                    f"Expected metric {self.keys[0]!r} to return {many} for each of {samples} samples, received shape "
                    f"{tuple(value.shape)}."
                )
            value = value.reshape(1)
            weight = torch.full((1,), float(samples), device=self._device)
        super().update(value, value, weight)


@final
class TorchmetricsMetric:
    """A copy of a user's torchmetrics metric or collection; the user's own is never updated.

    Args:
        keys: one log key, or one for each metric of a collection in its order.
        metric: what the user made.
        device: where the values are.
    """

    by_name = False

    def __init__(self, keys: Sequence[str], metric: Metric | MetricCollection, device: torch.device) -> None:
        self.keys = tuple(keys)
        self._device = device
        self._names = collection_names(metric)
        self._metric = copy.deepcopy(metric).to(device)
        for part in self._parts().values():
            part.compute_with_cache = False
            # Without this, reading a value in one process would wait for all the others.
            part.distributed_available_fn = _never
            part.persistent(True)
        self.reset()

    def _parts(self) -> dict[str, Metric]:
        from torchmetrics import Metric

        return {name: module for name, module in self._metric.named_modules() if isinstance(module, Metric)}

    def expect(self, batch_bytes: int) -> None:
        """Nothing waits here."""

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

    def compute(self, keys: Collection[str]) -> dict[str, Tensor]:
        if not self._has_data:
            return {}
        with torch.no_grad(), warnings.catch_warnings():
            # What was loaded, or updated in another process, counts as an update too.
            warnings.filterwarnings("ignore", "The ``compute`` method of metric", UserWarning)
            computed: Any = self._metric.compute()
        names = self.keys if self._names is None else self._names
        found = {self.keys[0]: computed} if self._names is None else computed
        return {key: self._scalar(key, found.get(name, found)) for key, name in zip(self.keys, names, strict=True)}

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
        return {"has_data": self._has_data, "metric": mapped(torch.clone, self._metric.state_dict())}

    def waiting_state(self) -> dict[str, Any]:
        return self.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.reset()
        if state["has_data"]:
            check_grown(state["metric"], self._metric.state_dict())
            load_into(self._metric, state["metric"], self._device)
            self._has_data = True

    def check_loaded(self) -> None:
        """Nothing is computed: a user's metric may need more data than there is yet."""

    def compute_across(self, states: Sequence[dict[str, Any]], keys: Collection[str]) -> dict[str, Tensor]:
        found = [state["metric"] for state in states if state["has_data"]]
        if not found:
            return {}
        own, here = self.state()["metric"], self._has_data
        try:
            for prefix, part in self._parts().items():
                join_into(part, [_under(prefix, state, part) for state in found], self._device)
            self._has_data = True
            return self.compute(keys)
        finally:
            load_into(self._metric, own, self._device)
            self._has_data = here


def _under(prefix: str, state: Mapping[str, Any], part: Metric) -> dict[str, Any]:
    """What one metric keeps, of the state of all that it is a part of."""
    return {name: state[f"{prefix}.{name}" if prefix else name] for name in part.metric_state}


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
