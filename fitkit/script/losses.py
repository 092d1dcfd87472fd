"""The compiled loss as a script writes it: the value of a batch, and what the value weighs."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import nn

from fitkit.batch import count_samples, forward, unpack
from fitkit.computation import Compiled, transfer_of
from fitkit.data import Batches
from fitkit.device import autocasting, copy_back, kept_modes
from fitkit.loss_names import CLASS_LOSSES
from fitkit.losses import Loss
from fitkit.script.expressions import importable, literal, module_expression, own_name, unknown
from fitkit.script.sources import Source, first_batch, may_be_ignored, some_class

# Longer lists of class weights do not belong into a script that is to be read.
MOST_CLASSES = 100


@final
@dataclass
class LossText:
    """The loss in a script.

    Attributes:
        plain: the lines of a batch's loss.
        items: the lines of it where samples are weighted.
        weight: the expression of what the loss is a mean over.
        most: the expression of the most that a batch could weigh, where one may weigh nothing; else empty.
        constants: lines that the script begins with.
        imports: what is imported from where it lives.
    """

    plain: list[str]
    items: list[str]
    weight: str
    most: str = ""
    constants: list[str] = field(default_factory=list)
    imports: list[tuple[str, str]] = field(default_factory=list)


def loss_text(loss: Loss, sources: Sequence[Source], compiled: Compiled, data: Batches) -> LossText:
    """How a script computes a compiled loss.

    Args:
        loss: of the one output.
        sources: of the batches that it is computed on.
        compiled: whose loss it is.
        data: what is trained on; a loss of the user's is looked at on a first batch.

    Raises:
        ValueError: the loss is one that a script cannot import or write.
    """
    if loss.adds_up:
        raise unknown("compile(loss=...)", 'one with reduction="sum"', "Take the mean.")
    if loss.built_in is None:
        return _own(loss, sources, compiled, data)
    function = f"F.{loss.built_in.function.__name__}"
    options, constants = _options(loss, compiled.device)
    target = _target(loss, sources[0].y, bf16=compiled.precision == "bf16-mixed")
    plain = f"loss = {function}({', '.join(['output', target, *options])})"
    items = f"{function}({', '.join(['output', target, *options, 'reduction=' + chr(34) + 'none' + chr(34)])})"
    module: Any = loss.module
    ignored = getattr(module, "ignore_index", None)
    ignores = any(may_be_ignored(source, ignored) for source in sources)
    weight = _weight(loss, sources, ignored if ignores else None)
    one_a_sample = isinstance(module, CLASS_LOSSES) and sources[0].y.dim() == 1
    lines = [f"items = {items}", f"loss = (items * {_factor(sources, one_a_sample, compiled)}).sum() / {weight}"]
    return LossText([plain], lines, weight, "y.numel()" if ignores else "", constants)


def _factor(sources: Sequence[Source], one_a_sample: bool, compiled: Compiled) -> str:
    """The sample weights in a shape that multiplies the item losses and nothing else, and in their dtype."""
    given = [source.w for source in sources if source.w is not None]
    of_items = [w.dim() > 1 and w[0].numel() > 1 for w in given]
    if any(of_items) and not all(of_items):
        raise unknown("sample_weight", "one a sample here and one an element there", "Give both one shape.")
    cast = compiled.precision != "64-true" and any(w.dtype == torch.float64 for w in given)
    w = "w.to(items.dtype)" if cast else "w"
    if any(of_items):
        return w
    if one_a_sample:
        return f"{w}.view(-1)" if any(each.dim() > 1 for each in given) else w
    return f"{w}.view(-1, *[1] * (items.dim() - 1))"


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


def _own(loss: Loss, sources: Sequence[Source], compiled: Compiled, data: Batches) -> LossText:
    """A function or module of the user's, imported from where it lives."""
    advice = "Move it into a file that can be imported."
    if any(source.weighted for source in sources):
        raise unknown("sample_weight", "with a loss of your own", "Use a loss by name, or write the loop by hand.")
    if loss.module is None:
        found = importable(loss.call)
        if found is None:
            raise unknown("compile(loss=...)", "a function that cannot be imported by its name", advice)
        text = _own_text(f"{own_name(found[1])}(output, y)", *_looked_at(loss, compiled, data))
        text.imports.append(found)
        return text
    made, found = module_expression(loss.module), importable(type(loss.module))
    if made is None or found is None or loss.module.state_dict():
        raise unknown("compile(loss=...)", f"a {type(loss.module).__name__} that a script cannot make anew", advice)
    text = _own_text("loss_function(output, y)", *_looked_at(loss, compiled, data))
    text.constants.append(f"loss_function = {made}")
    if not made.startswith("nn."):
        text.imports.append(found)
    return text


def _own_text(call: str, returned: Any, size: int) -> LossText:
    """The text of what is computed by a call that returned this for a batch of that size.

    As in fit, a value comes with its weight or is weighed by samples, and several values are weighed by their number.
    """
    if isinstance(returned, tuple) and len(returned) == 2:
        weight = returned[1]
        if isinstance(weight, torch.Tensor) and not weight.is_cpu:
            what = f"one whose weight is on {weight.device}, where fit does not read it"
            raise unknown("compile(loss=...)", what, "Return the weight as a number.")
        number = "weight" if type(weight) in (int, float) else "float(weight)"
        return LossText([f"loss, weight = {call}"], [], number, "len(y)")
    if isinstance(returned, torch.Tensor) and returned.dim() > 1 and returned.shape[0] == size:
        return LossText([f"items = {call}", "loss = items.mean()"], [], "items.numel()")
    return LossText([f"loss = {call}.mean()"], [], "len(y)")


def _looked_at(loss: Loss, compiled: Compiled, data: Batches) -> tuple[Any, int]:
    """What a loss of the user's returns for a first batch, and the size of that; the module stays as it is."""
    x, y, _ = unpack(transfer_of(compiled)(first_batch(data)).on_device)
    module = compiled.module
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]

    def compute() -> Any:
        return loss.call(forward(module, x), y)

    with kept_modes(module):
        if not module.training:
            module.train()
        try:
            return autocasting(compute, compiled.precision, compiled.device)(), count_samples(x, y)
        finally:
            copy_back(buffers)


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
