"""What metrics by name keep of the data: sums that join exactly, so that any slicing gives the same value.

A `Measure` says what some rows add and how two such states become one. States are dicts of tensors on the device
(lists of tensors where every row must be kept); no function here asks the device for a number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fitkit.metrics.readings import Rows

State = dict[str, Any]


def add(first: State, second: State) -> State:
    """Sums are added, lists are joined."""
    return {name: first[name] + second[name] for name in first}


@dataclass(frozen=True)
class Measure:
    """One kind of state, shared by all metrics of an output that are computed from it.

    Attributes:
        of: the state of some rows.
        join: the state of two sets of rows from the states of each.
    """

    of: Callable[[Rows], State]
    join: Callable[[State, State], State] = add


@cache
def mean_of(items: Callable[[Rows], Tensor], *, weighted: bool = False) -> Measure:
    """The sum over items that are not ignored, and their number; weighted: both multiplied by the weights."""

    def of(rows: Rows) -> State:
        values = items(rows)
        if rows.valid is not None:
            values = values.masked_fill(~rows.valid, 0)
        if weighted and rows.weight is not None:
            weight = rows.weight.to(rows.dtype)
            weight = weight if rows.valid is None else weight.masked_fill(~rows.valid, 0)
            return {"total": (values.to(rows.dtype) * weight).sum(), "count": weight.sum()}
        total = values.sum(dtype=rows.dtype)
        if rows.valid is None:
            return {"total": total, "count": torch.full_like(total, values.numel())}
        return {"total": total, "count": rows.valid.sum(dtype=rows.dtype)}

    return Measure(of)


def hits(rows: Rows) -> Tensor:
    """Whether each item is decided rightly."""
    return rows.decision == rows.truth


def hits_of_top(k: int) -> Callable[[Rows], Tensor]:
    """Whether the true class is among the k with the highest scores."""

    def items(rows: Rows) -> Tensor:
        if k > rows.reading.columns:
            raise ValueError(f"Expected at least {k} classes for 'top_{k}_accuracy', received {rows.reading.columns}.")
        return (rows.output.topk(k, dim=1).indices == rows.truth.unsqueeze(1)).any(1)

    return items


def surprise(rows: Rows) -> Tensor:
    """The negative log-probability of the true class."""
    return -rows.log_probabilities.gather(1, rows.truth.unsqueeze(1)).squeeze(1)


def absolute_errors(rows: Rows) -> Tensor:
    """How far each value is off."""
    return (rows.values - rows.expected).abs()


def squared_errors(rows: Rows) -> Tensor:
    """The square of how far each value is off."""
    return (rows.values - rows.expected).square()


def relative_errors(rows: Rows) -> Tensor:
    """The error over the target's size; targets smaller than 1.17e-6 count as that, as in torchmetrics."""
    return absolute_errors(rows) / rows.expected.abs().clamp(min=1.17e-6)


def squared_log_errors(rows: Rows) -> Tensor:
    """The squared difference of log(1 + value)."""
    return (rows.values.log1p() - rows.expected.log1p()).square()


def cosines(rows: Rows) -> Tensor:
    """The cosine between output and target along the last dimension."""
    if rows.output.ndim < 2:
        raise ValueError(
            f"Expected vectors, output of shape (N, ..., D), for 'cosine_similarity', received output of shape "
            f"{tuple(rows.output.shape)}."
        )
    return F.cosine_similarity(rows.values, rows.expected, dim=-1)


def _count_classes(rows: Rows) -> State:
    truth, decision, valid = rows.truth, rows.decision, rows.valid
    if rows.reading.task == "multiclass":
        present = torch.ones_like(truth) if valid is None else valid.long()

        def per_class(classes: Tensor, counted: Tensor) -> Tensor:
            return counted.new_zeros(rows.reading.columns).index_add_(0, classes, counted)

        hit = present * (truth == decision)
        return {
            "hit": per_class(truth, hit),
            "decided": per_class(decision, present),
            "true": per_class(truth, present),
            "total": present.sum().unsqueeze(0),
        }
    present = torch.ones_like(truth) if valid is None else valid
    truth, decision = truth & present, decision & present
    counts = {"hit": truth & decision, "decided": decision, "true": truth, "total": present}
    return {name: counted.reshape(-1, rows.reading.columns).sum(0) for name, counted in counts.items()}


# For each class or label, the number of items that are rightly so, decided so, truly so, and in all.
class_counts = Measure(_count_classes)


def _moments(rows: Rows) -> State:
    output, target = rows.values.reshape(len(rows.output), -1), rows.expected.reshape(len(rows.output), -1)
    columns = torch.stack([target, output, output - target])
    mean = columns.mean(1)
    centred = columns - mean.unsqueeze(1)
    return {
        "count": torch.full_like(mean[0, 0], len(output)),
        "mean": mean,
        "spread": centred.square().sum(1),
        "product": (centred[0] * centred[1]).sum(0),
    }


def _join_moments(first: State, second: State) -> State:
    if first["mean"].shape != second["mean"].shape:
        raise ValueError(
            f"Expected batches with as many columns as the first, {first['mean'].shape[1]}, for metrics that look at "
            f"each column ('r2', 'explained_variance', 'pearson'), received one with {second['mean'].shape[1]}."
        )
    count = first["count"] + second["count"]
    apart = second["mean"] - first["mean"]
    share = first["count"] * second["count"] / count
    return {
        "count": count,
        "mean": first["mean"] + apart * (second["count"] / count),
        "spread": first["spread"] + second["spread"] + apart.square() * share,
        "product": first["product"] + second["product"] + apart[0] * apart[1] * share,
    }


# Of target, output and error: the mean, and the summed squares around it, which nothing cancels out of; and the
# summed products of target and output. One column for each column of the output.
moments = Measure(_moments, _join_moments)


def _largest_error(rows: Rows) -> State:
    return {"error": absolute_errors(rows).amax()}


def _join_largest(first: State, second: State) -> State:
    return {"error": torch.maximum(first["error"], second["error"])}


largest_error = Measure(_largest_error, _join_largest)


def _keep(rows: Rows) -> State:
    # The rows may be the caller's own memory.
    return {"output": [rows.output.clone()], "target": [rows.target.clone()]}


# Every row, for metrics that compare all items with each other: memory grows with the data.
every_row = Measure(_keep)
