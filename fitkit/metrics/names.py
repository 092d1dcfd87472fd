"""The metrics that have a name: what computes each, a class of torchmetrics or a plain mean, and from what.

A value is what torchmetrics' class defines: means over classes and labels are macro, "mape" is a fraction and not a
percentage. How an output is read, so that nothing is guessed from values, is in readings.py; what users bring is in
objects.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fitkit.errors import unknown_name
from fitkit.metrics.readings import IGNORED, Given, Reading, Rows, Task, weighed
from fitkit.metrics.states import Keeper, build
from fitkit.metrics.weighted_mean import WeightedMean


@dataclass(frozen=True)
class NamedMetric:
    """A metric that has a name.

    Attributes:
        name: the name without alias.
        computed_by: the class in torchmetrics, or None for a mean over items (weighted_mean.py).
        given: what its update is called with.
        tasks: on what kinds of output it is defined.
        arguments: what the class is made with, besides what the reading says.
        read_as: the task that torchmetrics is told, where it is another than the reading's.
        needs_scale: for which tasks the loss must tell whether outputs are logits.
        least: how many samples it needs; the value of fewer is NaN.
        finish: from what is computed to one number.
    """

    name: str
    computed_by: str | None
    given: Given
    tasks: tuple[Task, ...]
    arguments: dict[str, Any] = field(default_factory=dict)
    read_as: Task | None = None
    needs_scale: tuple[Task, ...] = ()
    least: int = 1
    finish: Callable[[Tensor], Tensor] = Tensor.mean

    @property
    def takes_weights(self) -> bool:
        """Whether it is a mean over items, and so can weigh them."""
        return self.computed_by is None

    def build(self, reading: Reading, device: torch.device) -> Keeper:
        """What computes the metric of such rows."""
        if self.computed_by is None:
            return WeightedMean(device)
        return build(self.computed_by, device, **self._sizes(reading), **self.arguments)

    def _sizes(self, reading: Reading) -> dict[str, Any]:
        if self.computed_by in ("PearsonCorrCoef", "SpearmanCorrCoef"):
            return {"num_outputs": reading.columns}
        if reading.task == "regression":
            return {}
        # Where nothing is ignored, torchmetrics is spared a filter that waits for the device.
        ignored = {"ignore_index": None if reading.ignore_index is None else IGNORED}
        if self.computed_by == "text.Perplexity":
            return ignored
        task = self.read_as or reading.task
        classes = {"num_classes": max(2, reading.columns)} if task == "multiclass" else {}
        classes = {"num_labels": reading.columns} if task == "multilabel" else classes
        return {"task": task, **classes, **ignored, "validate_args": False}


LABELS: tuple[Task, ...] = ("binary", "multilabel", "multiclass")
CLASSES: tuple[Task, ...] = ("binary", "multiclass")
MACRO = {"average": "macro"}


def _accuracy(name: str, k: int, tasks: tuple[Task, ...]) -> NamedMetric:
    """The share of hits, which is what MulticlassAccuracy computes as micro."""
    return NamedMetric(name, None, weighed(lambda rows: rows.hits(k)), tasks, needs_scale=("binary", "multilabel"))


def _mean_error(name: str, items: Callable[[Rows], Tensor], **more: Any) -> NamedMetric:
    return NamedMetric(name, None, weighed(items), ("regression",), **more)


def _decided(name: str, computed_by: str, tasks: tuple[Task, ...] = LABELS, **more: Any) -> NamedMetric:
    return NamedMetric(name, computed_by, Rows.labels, tasks, needs_scale=("binary", "multilabel"), **more)


def _ranked(name: str, computed_by: str) -> NamedMetric:
    return NamedMetric(name, computed_by, Rows.scores, LABELS, MACRO, needs_scale=("multiclass",))


def _error(name: str, computed_by: str, **more: Any) -> NamedMetric:
    return NamedMetric(name, computed_by, Rows.pair, ("regression",), **more)


def _agreement(name: str, computed_by: str, given: Given = Rows.columns, **more: Any) -> NamedMetric:
    return NamedMetric(name, computed_by, given, ("regression",), **more)


def _absolute(rows: Rows) -> Tensor:
    return (rows.values - rows.expected).abs()


def _squared(rows: Rows) -> Tensor:
    return (rows.values - rows.expected).square()


_ALL = [
    _accuracy("accuracy", 1, LABELS),
    _decided("f1", "F1Score", arguments=MACRO),
    _decided("precision", "Precision", arguments=MACRO),
    _decided("recall", "Recall", arguments=MACRO),
    _decided("specificity", "Specificity", arguments=MACRO),
    _decided("jaccard", "JaccardIndex", arguments=MACRO),
    _decided("balanced_accuracy", "Recall", CLASSES, arguments=MACRO, read_as="multiclass"),
    _decided("cohen_kappa", "CohenKappa", CLASSES),
    _decided("matthews_corrcoef", "MatthewsCorrCoef"),
    _ranked("auroc", "AUROC"),
    _ranked("average_precision", "AveragePrecision"),
    NamedMetric("perplexity", "text.Perplexity", Rows.tokens, ("multiclass",), needs_scale=("multiclass",)),
    _mean_error("mae", _absolute),
    _mean_error("mse", _squared),
    _mean_error("rmse", _squared, finish=Tensor.sqrt),
    _error("mape", "MeanAbsolutePercentageError"),
    _error("msle", "MeanSquaredLogError"),
    _agreement("r2", "R2Score", least=2),
    _agreement("explained_variance", "ExplainedVariance", least=2),
    _agreement("pearson", "PearsonCorrCoef", least=2),
    _agreement("spearman", "SpearmanCorrCoef", least=2),
    _agreement("cosine_similarity", "CosineSimilarity", Rows.vectors, arguments={"reduction": "mean"}),
]
NAMED = {metric.name: metric for metric in _ALL}
ALIASES = {
    "acc": "accuracy",
    "auc": "auroc",
    "roc_auc": "auroc",
    "f1_score": "f1",
    "iou": "jaccard",
    "mean_iou": "jaccard",
    "miou": "jaccard",
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
    return _accuracy(f"top_{k}_accuracy", k, ("multiclass",))


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
    return [name for name, metric in NAMED.items() if metric.takes_weights] + ["top_5_accuracy"]
