"""What compile makes of ``metrics`` and ``weighted_metrics``: log keys, each with what computes its value.

Everything that can be wrong without data is refused here; how an output is read is decided at its first batch.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch

from fitkit._types import OutputMeaning
from fitkit.errors import check_order, nearest, show
from fitkit.metrics.gathering import Gathering
from fitkit.metrics.names import NamedMetric, find_metric, weighable_names
from fitkit.metrics.objects import CallableMetric, TorchmetricsMetric, collection_names, is_torchmetrics
from fitkit.metrics.running import MetricGroup, RunningMetrics

if TYPE_CHECKING:
    from torchmetrics import Metric, MetricCollection

# Keys that logs and History use for something else.
TAKEN = ("loss", "batch_loss", "epoch", "learning_rate", "outputs")
FORMS = 'a name such as "accuracy", a torchmetrics metric or a callable(output, target)'


@dataclass(frozen=True)
class Entry:
    """One metric of one output, with its log keys: several for a torchmetrics collection."""

    keys: tuple[str, ...]
    output: int
    metric: NamedMetric | Metric | MetricCollection | Callable[..., Any]
    weighted: bool

    @property
    def kind(self) -> str:
        """The name, class or function that was given."""
        if isinstance(self.metric, NamedMetric):
            return self.metric.name
        return type(self.metric).__name__ if is_torchmetrics(self.metric) else _callable_name(self.metric)


@final
class CompiledMetrics:
    """The metrics of a model, checked as far as that needs no data.

    With one output, metrics are a list or tuple of metrics, or a dict of metrics by log key. With several, they are a
    list or tuple with one entry per output, or a dict by output name; each entry is a metric, a list, tuple or dict of
    metrics, or None. A metric is

    - a name, see names.py, in any case; its log key is the name as it was written. Means over items (accuracy, mae,
      mse, rmse) are summed here, all others are torchmetrics'; on what follows from the loss and from shapes:
      accuracy of classes is the share of items, that of labels the share of single labels; f1, precision, recall,
      specificity, jaccard, auroc and average_precision are means over classes or labels; regression is over all
      elements, but r2, explained_variance, pearson and spearman are means over columns;
    - a torchmetrics metric or collection: copied, and updated with each batch's output and target. Its key is its class
      name in snake case; a collection brings its own names. It must compute one number;
    - a callable ``(output, target)``: returns a number, the mean of the batch, or one value or more per sample. Its key
      is its ``__name__``.

    ``weighted_metrics`` divide by the sum of sample weights. They can be names of means over items, and callables that
    return one value per sample. Ignored targets stay out of all metrics of classification by name.

    Args:
        metrics: as above, or None.
        weighted_metrics: as above, or None.
        output_names: the outputs when loss was given for each; None for one output.

    Attributes:
        names: the log keys in order, those of weighted metrics last; with output names, ``<output>_<metric>``.
        are_by_name: whether all are; a user's metric sees each batch in its turn.

    Raises:
        ValueError: an unknown name, keys that repeat or are used otherwise, entries for other outputs than there are, a
            metric that cannot be weighted.
        TypeError: no list, tuple or dict, or something in it that is no metric.
    """

    def __init__(
        self, metrics: Any, weighted_metrics: Any = None, *, output_names: Sequence[str] | None = None
    ) -> None:
        self._output_names = None if output_names is None else list(output_names)
        self._entries = [
            *self._entries_of(metrics, "metrics", weighted=False),
            *self._entries_of(weighted_metrics, "weighted_metrics", weighted=True),
        ]
        self.names = [key for entry in self._entries for key in entry.keys]
        self.are_by_name = all(isinstance(entry.metric, NamedMetric) for entry in self._entries)
        self._check_keys()

    def start(
        self, meanings: Sequence[OutputMeaning], device: torch.device, *, owns_targets: bool = False
    ) -> RunningMetrics:
        """Fresh running values for one run, which share nothing with those of other runs.

        Args:
            meanings: what the loss tells about each output.
            device: where outputs and targets will be.
            owns_targets: whether nobody writes into targets after they were taken in.

        Raises:
            ValueError: another number of meanings than of outputs.
        """
        outputs = 1 if self._output_names is None else len(self._output_names)
        if len(meanings) != outputs:
            raise ValueError(f"Expected the meaning of {outputs} output(s), received {len(meanings)}.")
        groups: list[tuple[int, MetricGroup]] = []
        users: list[tuple[int, MetricGroup]] = []
        # Metrics by name that read an output alike share what waits.
        alike: dict[tuple[int, bool, bool], dict[str, NamedMetric]] = {}
        for entry in self._entries:
            metric, key = entry.metric, entry.keys[0]
            if isinstance(metric, NamedMetric):
                group = (entry.output, entry.weighted, "regression" in metric.tasks)
                alike.setdefault(group, {})[key] = metric
            elif is_torchmetrics(metric):
                users.append((entry.output, TorchmetricsMetric(entry.keys, metric, device)))
            else:
                users.append((entry.output, CallableMetric(key, metric, device, weighted=entry.weighted)))
        for (output, weighted, _), named in alike.items():
            # A metric of the user's may write into what it is given: it comes last, and what waits is a copy then.
            owns = owns_targets and not users
            groups.append((output, Gathering(named, meanings[output], device, weighted=weighted, owns_targets=owns)))
        return RunningMetrics(self.names, [*groups, *users], outputs, shared=len(users) > 1)

    @property
    def kinds(self) -> dict[str, str]:
        """What each metric is by its log key: the name or class."""
        return {key: entry.kind for entry in self._entries for key in entry.keys}

    @property
    def are_means_over_data(self) -> bool:
        """Whether the metrics cannot depend on how the data is cut into batches: they all have names."""
        return all(isinstance(entry.metric, NamedMetric) for entry in self._entries)

    def _entries_of(self, metrics: Any, argument: str, *, weighted: bool) -> list[Entry]:
        if metrics is None:
            return []
        if not isinstance(metrics, (list, tuple, Mapping)):
            written = repr(metrics) if isinstance(metrics, str) else "..."
            raise TypeError(
                f"Expected a list, tuple or dict of metrics, received {argument}={show(metrics)}. Write "
                f"{argument}=[{written}]."
            )
        if self._output_names is None:
            return _flat_entries(metrics, argument, "", 0, weighted)
        return [
            entry
            for index, (name, part) in enumerate(
                zip(self._output_names, self._per_output(metrics, argument), strict=True)
            )
            for entry in _flat_entries(
                part if isinstance(part, (list, tuple, Mapping)) else [] if part is None else [part],
                f"{argument}[{name if isinstance(metrics, Mapping) else index!r}]",
                f"{name}_",
                index,
                weighted,
            )
        ]

    def _per_output(self, metrics: Any, argument: str) -> list[Any]:
        """The entry of each output."""
        names = self._output_names or []
        if isinstance(metrics, Mapping):
            for key in metrics:
                if key not in names:
                    raise ValueError(
                        f"Expected outputs that loss has, {names}, as the keys of {argument}, received {key!r}."
                        f"{nearest(str(key), names)}"
                    )
            return [metrics.get(name) for name in names]
        if len(metrics) != len(names):
            raise ValueError(
                f"Expected {len(names)} entries in {argument}, one for each output {names} of loss, received "
                f"{len(metrics)}. Each is a metric, a list of metrics or None; or use a dict, "
                f"{argument}={{{names[0]!r}: [...]}}."
            )
        return list(metrics)

    def _check_keys(self) -> None:
        losses = [f"{name}_loss" for name in self._output_names or []]
        seen: set[str] = set()
        for key in self.names:
            advice = 'Name it with a dict: metrics={"another_name": ...}.'
            if key in TAKEN or key in losses or key.startswith("val_"):
                raise ValueError(f"The log key {key!r} of a metric is used for something else. {advice}")
            if key in seen:
                raise ValueError(f"The log key {key!r} stands for two metrics. {advice}")
            seen.add(key)


def _flat_entries(metrics: Any, argument: str, prefix: str, output: int, weighted: bool) -> list[Entry]:
    """The entries for one output's list, tuple or dict."""
    if not isinstance(metrics, Mapping):
        return [_entry(metric, None, f"{argument}[{i}]", prefix, output, weighted) for i, metric in enumerate(metrics)]
    for key in metrics:
        if not isinstance(key, str) or not key:
            raise TypeError(f"Expected log keys, strings, as the keys of {argument}, received {show(key)}.")
    return [_entry(metric, key, f"{argument}[{key!r}]", prefix, output, weighted) for key, metric in metrics.items()]


def _entry(metric: Any, key: str | None, argument: str, prefix: str, output: int, weighted: bool) -> Entry:
    if isinstance(metric, str):
        found = find_metric(argument, metric)
        if weighted and not found.takes_weights:
            raise _not_weighable(argument, metric)
        return Entry((prefix + (metric if key is None else key),), output, found, weighted)
    if inspect.isclass(metric):
        raise TypeError(
            f"Expected {FORMS}, received the class {argument}={metric.__name__}. Write {metric.__name__}(...)."
        )
    if isinstance(metric, (list, tuple, Mapping)):
        raise TypeError(
            f"Expected {FORMS}, received {argument}={show(metric)}. Metrics for each of several outputs need a loss "
            "for each, compile(loss=[...]) or compile(loss={name: ...})."
        )
    if is_torchmetrics(metric):
        if weighted:
            raise _not_weighable(argument, metric)
        names = collection_names(metric)
        if names is None:
            return Entry((prefix + (key or _snake_case(type(metric).__name__)),), output, metric, weighted)
        between = "" if key is None else f"{key}_"
        return Entry(tuple(prefix + between + name for name in names), output, metric, weighted)
    if not callable(metric):
        raise TypeError(f"Expected {FORMS}, received {argument}={show(metric)}.")
    check_order(argument, metric)
    return Entry((prefix + (key or _callable_name(metric)),), output, metric, weighted)


def _not_weighable(argument: str, metric: Any) -> ValueError:
    return ValueError(
        f"Expected a metric that is a mean over items, received {argument}={show(metric)}. weighted_metrics can be "
        f"{', '.join(weighable_names())}, or a callable(output, target) that returns one value per sample."
    )


def _callable_name(metric: Callable[..., Any]) -> str:
    """A function's own name, also inside functools.partial; the class of another object in snake case."""
    while isinstance(metric, functools.partial):
        metric = metric.func
    name = getattr(metric, "__name__", None)
    return name.strip("<>") if isinstance(name, str) else _snake_case(type(metric).__name__)


def _snake_case(name: str) -> str:
    """MulticlassF1Score is multiclass_f1_score, AUROC is auroc."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
