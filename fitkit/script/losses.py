"""The compiled loss as a script writes it: the value of a batch, and what the value weighs."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import nn

from fitkit.loss_names import CLASS_LOSSES
from fitkit.losses import Loss
from fitkit.script.expressions import importable, literal, module_expression, unknown
from fitkit.script.sources import Source, may_be_ignored, some_class

# Longer lists of class weights do not belong into a script that is to be read.
MOST_CLASSES = 100


@final
@dataclass
class LossText:
    """The loss in a script.

    Attributes:
        plain: the expression of a batch's loss.
        items: the lines of it where samples are weighted.
        weight: the expression of what the loss is a mean over.
        ignores: whether a batch may have no target at all.
        constants: lines that the script begins with.
        imports: what is imported from where it lives.
    """

    plain: str
    items: list[str]
    weight: str
    ignores: bool = False
    constants: list[str] = field(default_factory=list)
    imports: list[tuple[str, str]] = field(default_factory=list)


def loss_text(loss: Loss, sources: Sequence[Source], *, bf16: bool, device: torch.device) -> LossText:
    """How a script computes a compiled loss.

    Raises:
        ValueError: the loss is one that a script cannot import or write.
    """
    if loss.adds_up:
        raise unknown("compile(loss=...)", 'one with reduction="sum"', "Take the mean.")
    if loss.built_in is None:
        return _own(loss, sources)
    function = f"F.{loss.built_in.function.__name__}"
    options, constants = _options(loss, device)
    target = _target(loss, sources[0].y, bf16=bf16)
    plain = f"{function}({', '.join(['output', target, *options])})"
    items = f"{function}({', '.join(['output', target, *options, 'reduction=' + chr(34) + 'none' + chr(34)])})"
    module: Any = loss.module
    ignored = getattr(module, "ignore_index", None)
    ignores = any(may_be_ignored(source, ignored) for source in sources)
    weight = _weight(loss, sources, ignored if ignores else None)
    one_a_sample = isinstance(module, CLASS_LOSSES) and sources[0].y.dim() == 1
    factor = "w" if one_a_sample else "w.view(-1, *[1] * (items.dim() - 1))"
    lines = [f"items = {items}", f"loss = (items * {factor}).sum() / {weight}"]
    return LossText(plain, lines, weight, ignores, constants)


def class_weight_text(weights: dict[int, float], source: Source, loss: Loss, device: torch.device) -> tuple[str, str]:
    """The constant of fit's class_weight, and the expression of a batch's sample weights by it."""
    y = source.y
    if not isinstance(loss.module, CLASS_LOSSES) or y.is_floating_point() or y.dim() != 1 or source.saved is None:
        raise unknown("class_weight", "over targets that are no saved class indices", "Pass sample weights.")
    classes = max(*weights, some_class(source)) + 1
    if classes > MOST_CLASSES:
        raise unknown("class_weight", f"over {classes} classes", "Pass sample weights.")
    table = [float(weights.get(index, 1.0)) for index in range(classes)]
    on = "" if device.type == "cpu" else f'.to("{device}")'
    index = "y.long()" if y.dtype != torch.int64 else "y"
    if bool((y < 0).any()):
        index = f"{index}.clamp(min=0)"
    return f"CLASS_WEIGHT = torch.tensor({table}){on}", f"CLASS_WEIGHT[{index}]"


def _own(loss: Loss, sources: Sequence[Source]) -> LossText:
    """A function or module of the user's, imported from where it lives.

    As in fit, several numbers mean their mean, which of one is itself; it is weighed by samples.
    """
    advice = "Move it into a file that can be imported."
    if any(source.weighted for source in sources):
        raise unknown("sample_weight", "with a loss of your own", "Use a loss by name, or write the loop by hand.")
    if loss.module is None:
        found = importable(loss.call)
        if found is None:
            raise unknown("compile(loss=...)", "a function that cannot be imported by its name", advice)
        return LossText(f"{found[1]}(output, y).mean()", [], "len(y)", imports=[found])
    text, found = module_expression(loss.module), importable(type(loss.module))
    if text is None or found is None or loss.module.state_dict():
        raise unknown("compile(loss=...)", f"a {type(loss.module).__name__} that a script cannot make anew", advice)
    if text.startswith("nn."):
        return LossText("loss_function(output, y).mean()", [], "len(y)", constants=[f"loss_function = {text}"])
    return LossText("loss_function(output, y).mean()", [], "len(y)", False, [f"loss_function = {text}"], [found])


def _options(loss: Loss, device: torch.device) -> tuple[list[str], list[str]]:
    """The keyword arguments of torch's function that differ from its defaults, and the constants that they name."""
    module, options, constants = loss.module, [], []
    for name, parameter in inspect.signature(loss.built_in.function).parameters.items():  # type: ignore[union-attr]
        value = getattr(module, name, parameter.default)
        if name in ("size_average", "reduce") or (name == "reduction" and value in ("mean", "none")):
            continue
        if name == "weight" and isinstance(value, torch.Tensor):
            if not isinstance(module, (nn.CrossEntropyLoss, nn.NLLLoss)) or len(value) > MOST_CLASSES:
                raise unknown("compile(loss=...)", "one with weights of its own", "Pass sample weights.")
            on = "" if device.type == "cpu" else f'.to("{device}")'
            dtype = "" if value.dtype == torch.float32 else f", dtype={value.dtype}"
            constants.append(f"LOSS_WEIGHT = torch.tensor({value.tolist()}{dtype}){on}")
            options.append("weight=LOSS_WEIGHT")
        elif isinstance(value, torch.Tensor):
            raise unknown("compile(loss=...)", f"one with a tensor {name}", "Write the loop by hand.")
        elif parameter.default is not parameter.empty and value != parameter.default:
            options.append(f"{name}={literal(value)}")
    return options, constants


def _target(loss: Loss, y: torch.Tensor, *, bf16: bool) -> str:
    """The targets in the shape and type that the loss needs beside the outputs."""
    if loss.built_in is not None and loss.built_in.function is F.multilabel_margin_loss:
        return "y"
    if isinstance(loss.module, CLASS_LOSSES):
        if y.is_floating_point():
            return "y" if y.dtype == torch.float32 else "y.float()" if bf16 else "y.to(output.dtype)"
        text = "y.squeeze(1)" if y.dim() == 2 and y.shape[1] == 1 else "y"
        return text if y.dtype == torch.int64 else f"{text}.long()"
    # (N,) against (N, 1) is never broadcast.
    text = "y.view_as(output)" if y.dim() == 1 or (y.dim() == 2 and y.shape[1] == 1) else "y"
    return text if y.is_floating_point() else f"{text}.float()" if bf16 else f"{text}.to(output.dtype)"


def _weight(loss: Loss, sources: Sequence[Source], ignored: int | None) -> str:
    averages = "samples" if loss.reduction == "batchmean" else loss.built_in.averages  # type: ignore[union-attr]
    y = sources[0].y
    if averages == "elements":
        return "output.numel()"
    if averages == "samples" or (y.is_floating_point() and y.dim() < 3):
        return "len(y)"
    if y.is_floating_point():
        return "y[:, 0].numel()"
    if getattr(loss.module, "weight", None) is not None:
        if ignored is not None:
            raise unknown("compile(loss=...)", "one with class weights and ignored targets", "Use one of the two.")
        return "float(LOSS_WEIGHT[y].sum(dtype=torch.float64))"
    if ignored is not None:
        return f"int((y != {ignored}).sum())"
    return "len(y)" if y.dim() == 1 else "y.numel()"
