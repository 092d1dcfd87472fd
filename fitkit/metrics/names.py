"""The metrics that have a name: on what they can be computed, from which sums, and which direction is better.

The definitions are those of torchmetrics and scikit-learn, which the tests compare with: means over classes and labels
are macro except for accuracy, "mape" is a fraction, not a percentage. They are computed here, in float64 and without
reading the device: torchmetrics sums in float32 (its R2Score of targets around 1000 is off in the second digit), counts
classes that no item has as an auroc of 0, and takes seconds to import. What users bring is in objects.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from torch import Tensor

from fitkit.errors import unknown_name
from fitkit.metrics.formulas import (
    Curve,
    auroc,
    average_precision,
    balanced_accuracy,
    cohen_kappa,
    explained_variance,
    exponential_mean,
    f1,
    jaccard,
    largest,
    macro,
    matthews_corrcoef,
    mean,
    over_columns,
    pearson,
    precision,
    r2,
    recall,
    root_mean,
    spearman,
    specificity,
)
from fitkit.metrics.readings import Need, Reading, Rows, Task
from fitkit.metrics.sums import (
    Measure,
    State,
    absolute_errors,
    class_counts,
    cosines,
    every_row,
    hits,
    hits_of_top,
    largest_error,
    mean_of,
    moments,
    relative_errors,
    squared_errors,
    squared_log_errors,
    surprise,
)


@dataclass(frozen=True)
class NamedMetric:
    """A metric that has a name.

    Attributes:
        name: the name without alias.
        measure: what is kept of the data.
        result: the value from that, a 0-d tensor.
        tasks: on what kinds of output it is defined.
        need: what it takes from the output.
        higher_is_better: None when neither direction is better.
        weighted: what is kept when items have weights; None when it cannot take any.
    """

    name: str
    measure: Measure
    result: Callable[[State, Reading], Tensor]
    tasks: tuple[Task, ...]
    need: Need
    higher_is_better: bool | None
    weighted: Measure | None = None


DECISIONS: tuple[Task, ...] = ("binary", "multilabel", "multiclass")
REGRESSION: tuple[Task, ...] = ("regression",)


def _item_mean(
    name: str,
    items: Callable[[Rows], Tensor],
    *,
    tasks: tuple[Task, ...] = REGRESSION,
    need: Need = "values",
    higher: bool = False,
    result: Callable[[State, Reading], Tensor] = mean,
) -> NamedMetric:
    """A metric that is a mean over items, and so can weigh them."""
    return NamedMetric(name, mean_of(items), result, tasks, need, higher, mean_of(items, weighted=True))


def _from_counts(
    name: str, result: Callable[[State, Reading], Tensor], tasks: tuple[Task, ...] = DECISIONS
) -> NamedMetric:
    return NamedMetric(name, class_counts, result, tasks, "decisions", True)


def _from_curve(name: str, curve: Curve) -> NamedMetric:
    return NamedMetric(name, every_row, over_columns(curve), DECISIONS, "order", True)


_ALL = [
    _item_mean("accuracy", hits, tasks=DECISIONS, need="decisions", higher=True),
    _item_mean("perplexity", surprise, tasks=("multiclass",), need="probabilities", result=exponential_mean),
    _from_counts("f1", macro(f1)),
    _from_counts("precision", macro(precision)),
    _from_counts("recall", macro(recall)),
    _from_counts("specificity", macro(specificity)),
    _from_counts("jaccard", macro(jaccard)),
    _from_counts("balanced_accuracy", balanced_accuracy, ("binary", "multiclass")),
    _from_counts("cohen_kappa", cohen_kappa, ("binary", "multiclass")),
    _from_counts("matthews_corrcoef", matthews_corrcoef),
    _from_curve("auroc", auroc),
    _from_curve("average_precision", average_precision),
    _item_mean("mae", absolute_errors),
    _item_mean("mse", squared_errors),
    _item_mean("rmse", squared_errors, result=root_mean),
    _item_mean("mape", relative_errors),
    _item_mean("msle", squared_log_errors),
    NamedMetric("cosine_similarity", mean_of(cosines), mean, REGRESSION, "values", True),
    NamedMetric("max_error", largest_error, largest, REGRESSION, "values", False),
    NamedMetric("r2", moments, r2, REGRESSION, "values", True),
    NamedMetric("explained_variance", moments, explained_variance, REGRESSION, "values", True),
    NamedMetric("pearson", moments, pearson, REGRESSION, "values", True),
    NamedMetric("spearman", every_row, spearman, REGRESSION, "values", True),
]
NAMED = {metric.name: metric for metric in _ALL}
ALIASES = {
    "acc": "accuracy",
    "auc": "auroc",
    "roc_auc": "auroc",
    "f1_score": "f1",
    "iou": "jaccard",
    "kappa": "cohen_kappa",
    "mcc": "matthews_corrcoef",
    "mean_absolute_error": "mae",
    "mean_absolute_percentage_error": "mape",
    "mean_squared_error": "mse",
    "mean_squared_logarithmic_error": "msle",
    "pearson_corrcoef": "pearson",
    "r2_score": "r2",
    "root_mean_squared_error": "rmse",
    "spearman_corrcoef": "spearman",
}
_TOP = re.compile(r"top_([1-9][0-9]*)(_accuracy|_acc)?")


@cache
def _top_accuracy(k: int) -> NamedMetric:
    return _item_mean(f"top_{k}_accuracy", hits_of_top(k), tasks=("multiclass",), need="decisions", higher=True)


def find_metric(argument: str, name: str) -> NamedMetric:
    """The metric of that name, in any case, with spaces or hyphens for underscores.

    Args:
        argument: how the message names what was given.
        name: as the user wrote it.

    Raises:
        ValueError: there is no such metric; the message lists the names there are.
    """
    plain = re.sub(r"[\s-]+", "_", name.strip().lower())
    top = _TOP.fullmatch(plain)
    if top is not None:
        return _top_accuracy(int(top[1]))
    plain = ALIASES.get(plain, plain)
    if plain not in NAMED:
        raise unknown_name(argument, name, [*NAMED, *ALIASES, "top_5_accuracy"])
    return NAMED[plain]


def weighable_names() -> list[str]:
    """The names that ``weighted_metrics`` can take."""
    return [name for name, metric in NAMED.items() if metric.weighted is not None] + ["top_5_accuracy"]


def higher_is_better(name: str) -> bool | None:
    """Whether a larger value of the metric is the better one; None for what is no metric's name.

    >>> higher_is_better("accuracy"), higher_is_better("mae"), higher_is_better("loss")
    (True, False, None)
    """
    try:
        return find_metric("name", name).higher_is_better
    except ValueError:
        return None
