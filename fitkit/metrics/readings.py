"""How metrics by name read one output and its target: as classes, labels or values, one row per item.

The reading follows from what the loss says about the output and from shapes and dtypes, never from values:
a batch of logits that happen to lie between 0 and 1 is still a batch of logits. This file knows no metric.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from fitkit._types import OutputMeaning, Scale, Structure
from fitkit.device import sum_dtype
from fitkit.errors import show

Task = Literal["binary", "multilabel", "multiclass", "regression"]
# What a metric takes from an output: what it decides, the order of its scores, its probabilities, or its numbers.
Need = Literal["decisions", "order", "probabilities", "values"]


@dataclass(frozen=True)
class Reading:
    """How an output and its target are read.

    Attributes:
        task: the rows of "multiclass" are an output ``(M, C)`` and a target ``(M,)``, those of "multilabel" ``(M, L)``
            twice, those of "binary" ``(M,)`` twice; "regression" keeps the output's shape.
        columns: the number of classes or labels; 1 for binary, 0 for regression.
        scale: what the numbers in the output are.
        ignore_index: the target value that is left out; None when there is none.
    """

    task: Task
    columns: int
    scale: Scale = "unknown"
    ignore_index: int | None = None

    def finds_rows(self, output: Tensor, target: Tensor) -> bool:
        """Whether the two are rows already, so that aligning them would change nothing."""
        if self.task == "multiclass":
            return output.ndim == 2 and target.ndim == 1
        if self.task == "regression":
            return output.shape == target.shape
        return output.ndim == target.ndim == (1 if self.task == "binary" else 2)

    def align(self, output: Tensor, target: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Output, target and weight as rows; the weight gets the target's shape."""
        if self.task == "multiclass":
            if target.shape == output.shape:
                target = target.argmax(1)
            elif target.ndim == output.ndim:
                target = target.squeeze(1)
        elif target.ndim != output.ndim:
            output, target = output.reshape(-1), target.reshape(-1)
        if weight is not None:
            weight = spread_weight(weight, target.shape)
            weight = weight.reshape(-1) if self.task == "multiclass" else self._rows(weight)
        return self._rows(output), target.reshape(-1) if self.task == "multiclass" else self._rows(target), weight

    def _rows(self, tensor: Tensor) -> Tensor:
        """The tensor with one row per item: classes or labels, dimension 1, come last and the others become one."""
        if self.task == "regression":
            return tensor
        if self.task == "binary":
            return tensor.reshape(-1)
        return tensor if tensor.ndim == 2 else tensor.movedim(1, -1).reshape(-1, self.columns)


@dataclass
class Rows:
    """Some batches of one output joined, and what several metrics want to know about them.

    Attributes:
        output: the shape that the reading says.
        target: the shape that the reading says.
        weight: what each item weighs, in the target's shape; None when all weigh 1.
        reading: how the rows are to be understood.
    """

    output: Tensor
    target: Tensor
    weight: Tensor | None
    reading: Reading

    @cached_property
    def dtype(self) -> torch.dtype:
        """The dtype of sums: float64 where the device has it."""
        return sum_dtype(self.output.device)

    @cached_property
    def valid(self) -> Tensor | None:
        """A mask in the target's shape that is False where the target is ignored; None when none can be."""
        index = self.reading.ignore_index
        return None if index is None or self.reading.task == "regression" else self.target != index

    @cached_property
    def truth(self) -> Tensor:
        """The target: class indices, 0 where ignored; or bools, True above 0.5 so that soft labels count too."""
        if self.reading.task != "multiclass":
            return self.target > 0.5
        classes = self.target.long()
        return classes if self.valid is None else classes.masked_fill(~self.valid, 0)

    @cached_property
    def decision(self) -> Tensor:
        """What the output decides: class indices; or bools, True for a probability above 0.5."""
        if self.reading.task == "multiclass":
            return self.output.argmax(1)
        threshold = {"logits": 0.0, "log_probabilities": math.log(0.5)}.get(self.reading.scale, 0.5)
        return self.output > threshold

    @cached_property
    def log_probabilities(self) -> Tensor:
        """Log-probabilities of the classes, shape ``(M, C)``."""
        if self.reading.scale == "logits":
            return self.values.log_softmax(1)
        return self.values.log() if self.reading.scale == "probabilities" else self.values

    @cached_property
    def values(self) -> Tensor:
        """The output in the dtype of sums."""
        return self.output.to(self.dtype)

    @cached_property
    def expected(self) -> Tensor:
        """The target in the dtype of sums."""
        return self.target.to(self.dtype)


def spread_weight(weight: Tensor, shape: torch.Size) -> Tensor:
    """The weight in the items' shape, from that shape or from one weight per sample.

    Raises:
        ValueError: the weight has neither shape.
    """
    if weight.shape == shape:
        return weight
    if weight.ndim and weight.shape[0] == shape[0] == weight.numel():
        return weight.reshape(-1, *(1 for _ in shape[1:])).expand(shape)
    raise ValueError(
        f"Expected sample_weight of shape ({shape[0]},) or of the items' shape {tuple(shape)}, received sample_weight "
        f"of shape {tuple(weight.shape)}."
    )


def check_pair(names: str, output: Structure, target: Structure) -> tuple[Tensor, Tensor]:
    """Returns output and target when they are tensors with as many samples each.

    Raises:
        ValueError: they are not; the message says what metrics by name can read.
    """
    if target is None:
        raise ValueError(f"The metrics {names} compare outputs with targets, received y=None. Pass y, or no metrics.")
    for word, value in (("output", output), ("target", target)):
        if not isinstance(value, Tensor):
            raise ValueError(
                f"The metrics {names} read one tensor, received {word}={show(value)}. Give a loss and metrics for each "
                "output, as a list or a dict, or pass a callable(output, target) instead of a name."
            )
    if output.ndim == 0 or target.ndim == 0 or output.shape[0] != target.shape[0]:
        raise ValueError(_misfit(names, output, target, "as many targets as outputs"))
    return output, target


def read_classes(names: str, output: Tensor, target: Tensor, meaning: OutputMeaning) -> Reading:
    """How metrics of classification read the pair.

    Integer targets ``(N, ...)`` or ``(N, 1, ...)`` beside an output ``(N, C, ...)`` name classes; so do targets of the
    output's shape (one-hot or probabilities) when the loss compares classes. Otherwise targets of the output's
    shape are binary, or multilabel when dimension 1 holds more than one label.

    Raises:
        ValueError: the shapes fit no reading, or the pair is one of regression.
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
    """How metrics of regression read the pair: equal shapes, where ``(N,)`` and ``(N, 1)`` count as equal.

    Raises:
        ValueError: the shapes differ otherwise, also where torch would broadcast them.
    """
    if not _same_items(output, target):
        hint = " The loss compares classes: is a metric such as 'accuracy' meant?" if meaning.classes else ""
        raise ValueError(_misfit(names, output, target, "targets of the output's shape (nothing is broadcast)") + hint)
    return Reading("regression", 0, meaning.scale)


def check_scale(name: str, need: Need, reading: Reading) -> None:
    """Refuses a metric that would have to guess whether outputs are logits.

    Raises:
        ValueError: the loss does not tell what the metric needs to know.
    """
    if reading.task == "multiclass":
        # The largest logit is the largest probability; only comparing samples with each other needs more.
        told = need == "decisions" or reading.scale not in ("unknown", "values")
        example = f"torchmetrics.classification.MulticlassAUROC(num_classes={reading.columns})"
    else:
        told = need != "decisions" or reading.scale != "unknown"
        kind = "Binary" if reading.task == "binary" else "Multilabel"
        example = f"torchmetrics.classification.{kind}Accuracy({'' if kind == 'Binary' else reading.columns})"
    if not told:
        raise ValueError(
            f"Metric {name!r}: the loss does not tell whether the outputs are logits or probabilities, and values are "
            f"not guessed from. Give the loss by name, such as 'bce_with_logits', or pass a torchmetrics metric such "
            f"as {example}, or a callable(output, target)."
        )


def _same_items(output: Tensor, target: Tensor) -> bool:
    """Whether the shapes are equal, ``(N,)`` against ``(N, 1)`` included."""
    if output.shape == target.shape:
        return True
    return {output.ndim, target.ndim} == {1, 2} and output.numel() == target.numel() == output.shape[0]


def _misfit(names: str, output: Tensor, target: Tensor, expected: str) -> str:
    return (
        f"The metrics {names} expect {expected}, received output of shape {tuple(output.shape)} and target of shape "
        f"{tuple(target.shape)} and {target.dtype}."
    )
