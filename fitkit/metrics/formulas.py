"""From what metrics by name have summed up to their values; the sums are in sums.py, the names in names.py.

Every function takes the state of a measure and how the output was read, and gives a 0-d tensor on the device. What is
not defined, as it lacks items of a class or has too few samples, is NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fitkit.device import sum_dtype
from fitkit.metrics.readings import Reading, Rows
from fitkit.metrics.sums import State, moments

# ---------------------------------------------------------------------------------------------------------------------
# Means over items
# ---------------------------------------------------------------------------------------------------------------------


def mean(state: State, reading: Reading) -> Tensor:
    """The sum over items over their number, or over the sum of their weights."""
    value: Tensor = state["total"] / state["count"]
    return value


def root_mean(state: State, reading: Reading) -> Tensor:
    """The square root of the mean."""
    return mean(state, reading).sqrt()


def exponential_mean(state: State, reading: Reading) -> Tensor:
    """The mean as an exponent of e."""
    return mean(state, reading).exp()


# ---------------------------------------------------------------------------------------------------------------------
# Counts of classes and labels
# ---------------------------------------------------------------------------------------------------------------------


def macro(score: Callable[[State], Tensor]) -> Callable[[State, Reading], Tensor]:
    """The mean over labels, or over those classes that some item is, or is decided to be; binary: the score itself."""

    def result(state: State, reading: Reading) -> Tensor:
        counts = _as_numbers(state)
        if reading.task == "multiclass":
            return _mean_where(score(counts), counts["true"] + counts["decided"] > 0)
        return _mean_where(score(counts), counts["total"] > 0)

    return result


def f1(counts: State) -> Tensor:
    """The harmonic mean of precision and recall."""
    return _ratio(2 * counts["hit"], counts["true"] + counts["decided"])


def precision(counts: State) -> Tensor:
    """The share of what is decided so that is so."""
    return _ratio(counts["hit"], counts["decided"])


def recall(counts: State) -> Tensor:
    """The share of what is so that is decided so."""
    return _ratio(counts["hit"], counts["true"])


def specificity(counts: State) -> Tensor:
    """The share of what is not so that is not decided so."""
    negative = counts["total"] - counts["true"]
    return _ratio(negative - counts["decided"] + counts["hit"], negative)


def jaccard(counts: State) -> Tensor:
    """What is both so and decided so, among what is either."""
    return _ratio(counts["hit"], counts["true"] + counts["decided"] - counts["hit"])


def balanced_accuracy(state: State, reading: Reading) -> Tensor:
    """The mean recall of the classes that some item is; a binary label makes two classes."""
    counts = _as_classes(state, reading)
    return _mean_where(recall(counts), counts["true"] > 0)


def cohen_kappa(state: State, reading: Reading) -> Tensor:
    """The agreement beyond that by chance, among what could be; NaN when chance alone agrees wholly."""
    counts = _as_classes(state, reading)
    total = counts["total"].sum()
    by_chance = (counts["true"] * counts["decided"]).sum() / total.square()
    kappa: Tensor = (counts["hit"].sum() / total - by_chance) / (1 - by_chance)
    return kappa


def matthews_corrcoef(state: State, reading: Reading) -> Tensor:
    """The correlation of truth and decision."""
    if reading.task == "multilabel":
        # The labels are pooled, as in torchmetrics.
        state = {name: count.sum(0, keepdim=True) for name, count in state.items()}
    counts = _as_classes(state, reading)
    total = counts["total"].sum()
    covariance = counts["hit"].sum() * total - (counts["true"] * counts["decided"]).sum()
    true, decided = (total.square() - counts[name].square().sum() for name in ("true", "decided"))
    # Without any variance among truths or decisions the correlation is 0, as in scikit-learn.
    return torch.where(total > 0, _ratio(covariance, (true * decided).sqrt()), torch.nan)


def _as_numbers(state: State) -> State:
    return {name: _floats(count) for name, count in state.items()}


def _as_classes(state: State, reading: Reading) -> State:
    """The counts per class, where a binary label makes two classes; the total has one entry."""
    counts = _as_numbers(state)
    if reading.task == "multiclass":
        return counts
    total = counts["total"]
    negative = {
        "hit": total - counts["true"] - counts["decided"] + counts["hit"],
        "decided": total - counts["decided"],
        "true": total - counts["true"],
    }
    return {name: torch.cat([count, counts[name]]) for name, count in negative.items()} | {"total": total}


# ---------------------------------------------------------------------------------------------------------------------
# Ranks
# ---------------------------------------------------------------------------------------------------------------------


# What a curve gives for one class or label: the value, and whether there were the items to define it.
Curve = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def over_columns(curve: Curve) -> Callable[[State, Reading], Tensor]:
    """The mean over classes (one against the rest) or labels of curve(scores, positive, valid), where it is defined."""

    def result(state: State, reading: Reading) -> Tensor:
        rows = Rows(torch.cat(state["output"]), torch.cat(state["target"]), None, reading)
        valid = torch.ones_like(rows.target, dtype=torch.bool) if rows.valid is None else rows.valid
        if reading.task != "multiclass":
            columns = [tensor.reshape(-1, reading.columns).unbind(1) for tensor in (rows.values, rows.truth, valid)]
            curves = [curve(*column) for column in zip(*columns, strict=True)]
        else:
            probabilities = rows.values if reading.scale == "probabilities" else rows.log_probabilities.exp()
            curves = [curve(column, rows.truth == index, valid) for index, column in enumerate(probabilities.unbind(1))]
        values, defined = (torch.stack(column) for column in zip(*curves, strict=True))
        return _mean_where(values.where(defined, 0), defined)

    return result


def auroc(scores: Tensor, positive: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The share of pairs of a positive and a negative item that the scores put in order; a tie is half a pair."""
    positive, negative = positive & valid, ~positive & valid
    below, up_to = _places(scores)
    negatives = _running_count(negative, scores)
    ordered = ((negatives[below] + negatives[up_to]) * positive).sum()
    pairs = _floats(positive.sum()) * _floats(negative.sum())
    return _unless_nan(scores, _floats(ordered) / (2 * pairs)), pairs > 0


def average_precision(scores: Tensor, positive: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over positive items of the precision among all items that score at least as high."""
    positive = positive & valid
    below, _ = _places(scores)
    found = positive.sum() - _running_count(positive, scores)[below]
    among = valid.sum() - _running_count(valid, scores)[below]
    precisions = _floats(found) / _floats(among.clamp(min=1))
    return _unless_nan(scores, (precisions * positive).sum() / _floats(positive.sum())), positive.any()


def spearman(state: State, reading: Reading) -> Tensor:
    """The correlation of ranks, the mean over columns; NaN where target or output is constant."""
    output, target = (torch.cat(state[name]).reshape(sum(map(len, state[name])), -1) for name in ("output", "target"))
    ranks = [torch.stack([_ranks(column) for column in tensor.unbind(1)], 1) for tensor in (output, target)]
    return pearson(moments.of(Rows(ranks[0], ranks[1], None, reading)), reading)


def _ranks(values: Tensor) -> Tensor:
    """The place of each value among all, from 1; equal values share the mean of their places."""
    below, up_to = _places(values)
    return _unless_nan(values, _floats(below + up_to + 1) / 2)


def _places(values: Tensor) -> tuple[Tensor, Tensor]:
    """For each value, how many are smaller, and how many are not larger."""
    values = values.contiguous()
    ordered = values.sort().values
    return torch.searchsorted(ordered, values), torch.searchsorted(ordered, values, right=True)


def _running_count(marked: Tensor, values: Tensor) -> Tensor:
    """Entry n is how many of the n smallest values are marked, shape ``(M + 1,)``."""
    counted = marked[values.argsort()].long().cumsum(0)
    return torch.cat([counted.new_zeros(1), counted])


# ---------------------------------------------------------------------------------------------------------------------
# Moments
# ---------------------------------------------------------------------------------------------------------------------


def r2(state: State, reading: Reading) -> Tensor:
    """The share of the target's spread that is explained, the mean over columns; NaN for fewer than two samples."""
    residual = state["spread"][2] + state["count"] * state["mean"][2].square()
    return _explained(state, residual)


def explained_variance(state: State, reading: Reading) -> Tensor:
    """The same as r2 after a constant error is taken off."""
    return _explained(state, state["spread"][2])


def _explained(state: State, residual: Tensor) -> Tensor:
    # A constant target has nothing to explain: as in scikit-learn 1 when there is no residual, else 0.
    without_spread = (residual > 0).to(residual.dtype)
    share = torch.where(_is_constant(state, 0), without_spread, residual / state["spread"][0])
    return torch.where(state["count"] > 1, (1 - share).mean(), torch.nan)


def pearson(state: State, reading: Reading) -> Tensor:
    """The correlation, the mean over columns; NaN where target or output is constant."""
    correlation = state["product"] / (state["spread"][0] * state["spread"][1]).sqrt()
    constant = _is_constant(state, 0) | _is_constant(state, 1)
    return torch.where(constant, torch.nan, correlation.clamp(-1, 1)).mean()


def _is_constant(state: State, index: int) -> Tensor:
    """Whether what spread there is comes from rounding the mean."""
    rounding = 4 * torch.finfo(state["mean"].dtype).eps * state["mean"][index]
    constant: Tensor = state["spread"][index] <= state["count"] * rounding.square()
    return constant


def largest(state: State, reading: Reading) -> Tensor:
    """The largest error of all elements."""
    error: Tensor = state["error"]
    return error


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic
# ---------------------------------------------------------------------------------------------------------------------


def _floats(counts: Tensor) -> Tensor:
    return counts.to(sum_dtype(counts.device))


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """The quotient, 0 where there is nothing to divide by."""
    return torch.where(whole > 0, part / whole, torch.zeros_like(whole))


def _mean_where(values: Tensor, counted: Tensor) -> Tensor:
    """The mean of the values that count; NaN when none does."""
    return (values * counted).sum() / counted.sum()


def _unless_nan(scores: Tensor, value: Tensor) -> Tensor:
    """The value, NaN as soon as one score is NaN: NaN has no place in an order."""
    return torch.where(scores.isnan().any(), torch.nan, value)
