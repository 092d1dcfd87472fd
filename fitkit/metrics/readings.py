"""How metrics by name read one output and its target: as classes, labels or values, one row per item.

The reading follows from what the loss says about the output and from shapes and dtypes, never from values:
a batch of logits that happen to lie between 0 and 1 is still a batch of logits. This file knows no metric; what
torchmetrics is given of the rows stands at its end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

import torch
from torch import Tensor

from fitkit._types import OutputMeaning, Scale, Structure
from fitkit.device import sum_dtype
from fitkit.errors import classes_last, show

Task = Literal["binary", "multilabel", "multiclass", "regression"]
# What stands in the place of an ignored target, whatever value the loss ignores.
IGNORED = -1


@dataclass(frozen=True)
class Reading:
    """How an output and its target are read.

    Attributes:
        task: the rows of "multiclass" are an output ``(M, C)`` and a target ``(M,)``, those of "multilabel" ``(M, L)``
            twice, those of "binary" ``(M,)`` twice; "regression" keeps the output's shape.
        columns: the number of classes, of labels, or of values per sample; 1 for binary.
        scale: what the numbers in the output are.
        ignore_index: the target value that is left out; None when there is none.
    """

    task: Task
    columns: int
    scale: Scale = "unknown"
    ignore_index: int | None = None

    def align(self, output: Tensor, target: Tensor, weight: Tensor | None = None) -> tuple[Tensor, ...]:
        """Output and target as rows, and the weight, where there is one, in the target's shape."""
        shape = target.shape
        if self.task == "multiclass":
            # Classes may be given as one-hot rows, or with a dimension of 1 that the output has for classes.
            classes = target.argmax(1) if shape == output.shape else target
            rows = (self._rows(output), _flat(classes))
            shape = output.shape[:1] + output.shape[2:]
        elif target.ndim != output.ndim:
            rows = (_flat(output), _flat(target))
            shape = rows[1].shape
        else:
            rows = (self._rows(output), self._rows(target))
        if weight is None:
            return rows
        weight = spread_weight(weight, shape)
        return (*rows, _flat(weight) if self.task == "multiclass" else self._rows(weight))

    def _rows(self, tensor: Tensor) -> Tensor:
        """The tensor with one row per item: classes or labels, dimension 1, come last and the others become one."""
        if self.task == "regression":
            return tensor
        if self.task == "binary":
            return _flat(tensor)
        return tensor if tensor.ndim == 2 else tensor.movedim(1, -1).reshape(-1, self.columns)


def check_classes(names: str, reading: Reading, target: Tensor) -> None:
    """Refuses targets that are none of the output's classes, and not what the loss says it ignores."""
    if reading.task != "multiclass" or target.is_floating_point() or not target.numel():
        return
    known = target if reading.ignore_index is None else target[target != reading.ignore_index]
    outside = known[(known < 0) | (known >= reading.columns)]
    if outside.numel():
        value = int(outside[0])
        raise ValueError(
            f"The metrics {names} expect classes from 0 to {reading.columns - 1}, as many as the output has, received "
            f"the target {value}. If the loss ignores it, let it say so: nn.CrossEntropyLoss(ignore_index={value}), or "
            f"of a loss of your own an attribute, loss.ignore_index = {value}."
        )


def _flat(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 1 else tensor.reshape(-1)


def spread_weight(weight: Tensor, shape: torch.Size) -> Tensor:
    """The weight in the items' shape, from that shape or from one weight per sample; any other is a ValueError."""
    if weight.shape == shape:
        return weight
    if weight.ndim and weight.shape[0] == shape[0] == weight.numel():
        return weight.reshape(-1, *(1 for _ in shape[1:])).expand(shape)
    raise ValueError(
        f"Expected sample_weight of shape ({shape[0]},) or of the items' shape {tuple(shape)}, received sample_weight "
        f"of shape {tuple(weight.shape)}."
    )


def check_pair(names: str, output: Structure, target: Structure) -> tuple[Tensor, Tensor]:
    """Returns output and target when they are tensors with as many samples each, all that metrics by name can read."""
    if target is None:
        raise ValueError(f"The metrics {names} compare outputs with targets, received y=None. Pass y, or no metrics.")
    for word, value in (("output", output), ("target", target)):
        if not isinstance(value, Tensor):
            raise ValueError(
                f"The metrics {names} read one tensor, received {word}={show(value)}. Give a loss and metrics for each "
                "output, as a list or a dict, or pass a callable(output, target) instead of a name."
            )
    if output.is_complex() or target.is_complex():
        raise ValueError(
            f"The metrics {names} compare real numbers, received output of {output.dtype} and target of "
            f"{target.dtype}. Pass a callable(output, target) that returns a real number."
        )
    if output.ndim == 0 or target.ndim == 0 or output.shape[0] != target.shape[0]:
        raise ValueError(_misfit(names, output, target, "as many targets as outputs"))
    return output, target


def read_classes(names: str, output: Tensor, target: Tensor, meaning: OutputMeaning) -> Reading:
    """How metrics of classification read the pair.

    Integer targets ``(N, ...)`` or ``(N, 1, ...)`` beside an output ``(N, C, ...)`` name classes; so do targets of the
    output's shape (one-hot or probabilities) when the loss compares classes. Otherwise targets of the output's
    shape are binary, or multilabel when dimension 1 holds more than one label. What fits none of these is a ValueError.
    """
    columns = output.shape[1] if output.ndim > 1 else 1
    floating = target.is_floating_point()
    if output.ndim > 1 and (meaning.classes or (meaning.scale == "unknown" and columns > 1)):
        items = output.shape[:1] + output.shape[2:]
        if not floating and target.shape in (items, (*items[:1], 1, *items[1:])):
            return Reading("multiclass", columns, meaning.scale, meaning.ignore_index)
        if meaning.classes and target.shape == output.shape:
            return Reading("multiclass", columns, meaning.scale)
    if meaning.classes:
        raise ValueError(_misfit(names, output, target, "class indices (N, ...) of an integer dtype for (N, C, ...)"))
    if not _same_items(output, target):
        raise ValueError(_misfit(names, output, target, "targets of the output's shape"))
    if meaning.scale == "values" and floating:
        raise ValueError(
            f"The metrics {names} are of classification, but the loss compares values and the targets are "
            f"{target.dtype}. Use a metric of regression such as 'mae' or 'r2', or a loss such as 'cross_entropy' or "
            "'bce_with_logits'."
        )
    if output.ndim != target.ndim or columns == 1:
        return Reading("binary", 1, meaning.scale, meaning.ignore_index)
    return Reading("multilabel", columns, meaning.scale, meaning.ignore_index)


def read_values(names: str, output: Tensor, target: Tensor, meaning: OutputMeaning) -> Reading:
    """How metrics of regression read the pair: shapes must be equal, where ``(N,)`` and ``(N, 1)`` count as equal."""
    if not _same_items(output, target):
        hint = " The loss compares classes: is a metric such as 'accuracy' meant?" if meaning.classes else ""
        raise ValueError(_misfit(names, output, target, "targets of the output's shape (nothing is broadcast)") + hint)
    return Reading("regression", math.prod(output.shape[1:]), meaning.scale)


def check_scale(name: str, reading: Reading) -> None:
    """Refuses a metric that would have to guess whether outputs are logits."""
    # Decisions about labels are taken at 0.5 where a loss compares values; probabilities of classes cannot be made.
    if reading.scale == "unknown" or (reading.scale == "values" and reading.task == "multiclass"):
        example = {
            "binary": "BinaryAccuracy()",
            "multilabel": f"MultilabelAccuracy({reading.columns})",
            "multiclass": f"MulticlassAUROC(num_classes={reading.columns})",
        }[reading.task]
        raise ValueError(
            f"Metric {name!r}: the loss does not tell whether the outputs are logits or probabilities, and values are "
            f"not guessed from. Give the loss by name, such as 'bce_with_logits', or pass a torchmetrics metric such "
            f"as torchmetrics.classification.{example}, or a callable(output, target)."
        )


def _same_items(output: Tensor, target: Tensor) -> bool:
    """Whether the shapes are equal, ``(N,)`` against ``(N, 1)`` included."""
    if output.shape == target.shape:
        return True
    return {output.ndim, target.ndim} == {1, 2} and output.numel() == target.numel() == output.shape[0]


def _misfit(names: str, output: Tensor, target: Tensor, expected: str) -> str:
    return (
        f"The metrics {names} expect {expected}, received output of shape {tuple(output.shape)} and target of shape "
        f"{tuple(target.shape)} and {target.dtype}.{classes_last(output, target)}"
    )


# What a metric's update is called with.
Given = Callable[["Rows"], tuple[Tensor, Tensor | None]]


@dataclass
class Rows:
    """Batches laid together, and what torchmetrics is given of them: nothing that it would take for logits.

    Attributes:
        reading: how the rows are to be understood.
        output: as the reading's task says.
        target: as the reading's task says.
        weight: what each item weighs, in the target's shape; None when all weigh 1.
    """

    reading: Reading
    output: Tensor
    target: Tensor
    weight: Tensor | None = None

    @cached_property
    def truth(self) -> Tensor:
        """Class indices, or 1 and 0 for labels, where a soft label is what it is nearer to; `IGNORED` where ignored."""
        truth = (self.target if self.reading.task == "multiclass" else self.target > 0.5).long()
        index = self.reading.ignore_index
        return truth if index is None else truth.masked_fill(self.target == index, IGNORED)

    @cached_property
    def decision(self) -> Tensor:
        """What the output decides: class indices, or 1 for a label whose probability is above 0.5."""
        if self.reading.task == "multiclass":
            return self.output.max(1).indices  # argmax takes two to four times as long on the CPU
        threshold = {"logits": 0.0, "log_probabilities": math.log(0.5)}.get(self.reading.scale, 0.5)
        return (self.output > threshold).long()

    @cached_property
    def values(self) -> Tensor:
        """The output in float64 where the device has it, so that sums over millions of items stay exact."""
        return self.output.to(sum_dtype(self.output.device)).contiguous()

    @cached_property
    def expected(self) -> Tensor:
        """The target in the same type."""
        return self.target.to(sum_dtype(self.target.device)).contiguous()

    def hits(self, k: int) -> Tensor:
        """Whether the truth of each item or label is what is decided, or is among the k classes that score highest.

        What is said of an ignored item means nothing.
        """
        if k == 1 and self.reading.task == "multiclass":
            return self.decision == self.target
        if k == 1:
            return self.decision == self.truth
        if k > self.reading.columns:
            raise ValueError(f"Expected at least {k} classes for 'top_{k}_accuracy', received {self.reading.columns}.")
        return (self.output.topk(k, dim=1).indices == self.truth.unsqueeze(1)).any(1)

    def labels(self) -> tuple[Tensor, Tensor]:
        """What is decided, and what is so."""
        return self.decision, self.truth

    def scores(self) -> tuple[Tensor, Tensor]:
        """Probabilities, and what is so. Labels of an unknown scale come into (0, 1) too: only their order counts."""
        if self.reading.scale == "probabilities":
            probabilities = self.values
        elif self.reading.scale == "log_probabilities":
            probabilities = self.values.exp()
        else:
            probabilities = self.values.softmax(1) if self.reading.task == "multiclass" else self.values.sigmoid()
        return probabilities.clamp(0, 1), self.truth

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Logits, or log-probabilities, and classes: as one sequence."""
        logits = self.values.log() if self.reading.scale == "probabilities" else self.values
        return logits.unsqueeze(0), self.truth.unsqueeze(0)

    def pair(self) -> tuple[Tensor, Tensor]:
        """Output and target."""
        return self.values, self.expected

    def columns(self) -> tuple[Tensor, Tensor]:
        """Output and target, one column for each value of a sample."""
        shape = (-1,) if self.reading.columns == 1 else (-1, self.reading.columns)
        return self.values.reshape(shape), self.expected.reshape(shape)

    def vectors(self) -> tuple[Tensor, Tensor]:
        """Output and target, one row for each vector along the last dimension; torchmetrics refuses what has none."""
        if self.values.ndim < 2:
            return self.values, self.expected
        return self.values.flatten(0, -2), self.expected.flatten(0, -2)


@cache
def weighed(items: Callable[[Rows], Tensor]) -> Given:
    """The value of each item, and what it weighs: nothing where it is ignored, None where all weigh 1."""

    def given(rows: Rows) -> tuple[Tensor, Tensor | None]:
        value = items(rows)
        if rows.reading.ignore_index is None:
            return value, rows.weight
        counted = rows.target != rows.reading.ignore_index
        return value, counted if rows.weight is None else rows.weight.masked_fill(~counted, 0)

    return given
