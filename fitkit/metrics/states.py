"""What computes a metric is made here, and what it keeps is copied, loaded and joined. Names are in names.py."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Union

import torch

from fitkit.batch import mapped
from fitkit.device import sum_dtype
from fitkit.errors import show
from fitkit.metrics.weighted_mean import WeightedMean

if TYPE_CHECKING:
    from torchmetrics import Metric, MetricCollection

# What keeps the sums or rows of a metric by name.
Keeper = Union["Metric", WeightedMean]


def build(name: str, device: torch.device, **arguments: Any) -> Metric:
    """A metric of torchmetrics by its class; it communicates with other processes only when it is told to."""
    import torchmetrics  # takes a second, and is not needed before there is data

    arguments.update(sync_on_compute=False, compute_with_cache=False)
    metric: Metric = attrgetter(name)(torchmetrics)(**arguments).to(device)
    # Sums and quotients are float64 then; so are counts, which stay exact up to 2**53.
    return metric.set_dtype(torch.float64) if sum_dtype(device) == torch.float64 else metric


@contextmanager
def apart() -> Iterator[None]:
    """Apart from the run: states outlive an inference_mode that it may be in; what is undefined warns nobody."""
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def state_of(metric: Keeper) -> dict[str, Any]:
    """A copy of what a metric keeps, its lists of rows each as one tensor."""
    kept = metric.metric_state
    return {name: [torch.cat(value)] if isinstance(value, list) else value.clone() for name, value in kept.items()}


def load_into(metric: Keeper | MetricCollection, state: dict[str, Any], device: torch.device) -> None:
    """Gives a metric a copy of such a state, which may be updated in place in and out of an inference_mode."""
    with torch.inference_mode(False):
        metric.load_state_dict(mapped(lambda tensor: tensor.to(device, copy=True), state))


def check_grown(found: Mapping[str, Any], empty: Mapping[str, Any]) -> None:
    """Refuses states that those of a metric without data do not become: of another kind, number type or shape.

    Args:
        found: what a file holds.
        empty: the states before any data. What is neither tensor nor list is not looked at.

    Raises:
        ValueError: a state is missing, or none of that metric.
    """
    for name, before in empty.items():
        state = found.get(name)
        if isinstance(before, list):
            fits = isinstance(state, list)
        elif isinstance(before, torch.Tensor):
            fits = (
                isinstance(state, torch.Tensor)
                and torch.can_cast(before.dtype, state.dtype)
                and torch.broadcast_shapes(before.shape, state.shape) == state.shape
            )
        else:
            continue
        if not fits:
            raise ValueError(f"Expected what {show(before)} becomes as {name}, received {show(state)}.")


def join_into(metric: Keeper, states: Sequence[Mapping[str, Any]], device: torch.device) -> None:
    """Gives a metric what those of several processes keep, joined by torchmetrics' own sync.

    The states are gathered before, as torchmetrics' own way to do it breaks where a process has no rows.

    Args:
        metric: keeps what is joined in place of what it kept.
        states: what each process keeps, by name; of those that have data.
        device: where the metric is.
    """
    if isinstance(metric, WeightedMean):
        load_into(metric, {name: sum(state[name] for state in states) for name in metric.metric_state}, device)
        return
    everywhere = [mapped(lambda tensor: tensor.to(device), dict(state)) for state in states]
    of_all = {name: [each for state in everywhere for each in _listed(state[name])] for name in metric.metric_state}
    # The first entry of a list stands for all, of which not every process needs to have as many.
    are_lists = {name: isinstance(kept, list) for name, kept in everywhere[0].items()}
    load_into(metric, {name: all_[:1] if are_lists[name] else all_[0] for name, all_ in of_all.items()}, device)
    gathered = {id(mine): of_all[name] for name, kept in metric.metric_state.items() for mine in _listed(kept)}
    # Of a list that is empty everywhere, torchmetrics makes an empty tensor, which stays what it is.
    metric.sync(dist_sync_fn=lambda mine, group: gathered.get(id(mine), [mine]), distributed_available=lambda: True)
    joined = metric.metric_state
    metric.unsync()
    metric.load_state_dict(joined)


def _listed(kept: Any) -> list[Any]:
    return kept if isinstance(kept, list) else [kept]
