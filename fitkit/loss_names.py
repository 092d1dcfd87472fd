"""What a user may write as a loss: torch's names with or without "_loss", short forms, modules, callables.

What fitkit knows of torch's own losses stands here; what becomes of one on a batch is in losses.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fitkit._types import OutputMeaning, Scale
from fitkit.errors import check_order, show, unknown_name

# What a loss averages over: its elements, its samples, or the targets that name a class.
Averages = Literal["elements", "samples", "targets"]


@dataclass(frozen=True)
class BuiltIn:
    """What fitkit knows of a loss of torch's: its function, what it averages over, what the outputs are."""

    function: Callable[..., Tensor]
    averages: Averages
    scale: Scale


BUILT_IN: dict[type[nn.Module], BuiltIn] = {
    nn.CrossEntropyLoss: BuiltIn(F.cross_entropy, "targets", "logits"),
    nn.NLLLoss: BuiltIn(F.nll_loss, "targets", "log_probabilities"),
    nn.BCELoss: BuiltIn(F.binary_cross_entropy, "elements", "probabilities"),
    nn.BCEWithLogitsLoss: BuiltIn(F.binary_cross_entropy_with_logits, "elements", "logits"),
    nn.MSELoss: BuiltIn(F.mse_loss, "elements", "values"),
    nn.L1Loss: BuiltIn(F.l1_loss, "elements", "values"),
    nn.SmoothL1Loss: BuiltIn(F.smooth_l1_loss, "elements", "values"),
    nn.HuberLoss: BuiltIn(F.huber_loss, "elements", "values"),
    nn.PoissonNLLLoss: BuiltIn(F.poisson_nll_loss, "elements", "values"),
    nn.KLDivLoss: BuiltIn(F.kl_div, "elements", "values"),
    nn.SoftMarginLoss: BuiltIn(F.soft_margin_loss, "elements", "values"),
    nn.HingeEmbeddingLoss: BuiltIn(F.hinge_embedding_loss, "elements", "values"),
    nn.MultiMarginLoss: BuiltIn(F.multi_margin_loss, "samples", "logits"),
    nn.MultiLabelMarginLoss: BuiltIn(F.multilabel_margin_loss, "samples", "values"),
    nn.MultiLabelSoftMarginLoss: BuiltIn(F.multilabel_soft_margin_loss, "samples", "logits"),
}
# The losses over class indices, whose outputs have one dimension more than their targets.
CLASS_LOSSES = (nn.CrossEntropyLoss, nn.NLLLoss, nn.MultiMarginLoss)
# The usual short forms, beside torch.nn.functional's own names with or without "_loss".
SHORT_NAMES: dict[str, type[nn.Module]] = {
    "mae": nn.L1Loss,
    "bce": nn.BCELoss,
    "bce_with_logits": nn.BCEWithLogitsLoss,
    "ce": nn.CrossEntropyLoss,
}
# What to write for the names that users of Keras try first.
KERAS_NAMES = {
    "binary_crossentropy": '"bce_with_logits" for logits, or "bce" for probabilities',
    "categorical_crossentropy": '"cross_entropy", on logits',
    "sparse_categorical_crossentropy": '"cross_entropy", on logits',
    "mean_squared_error": '"mse"',
    "mean_absolute_error": '"mae"',
}


def known_losses() -> dict[str, type[nn.Module]]:
    """The module class of every loss name."""
    names = dict(SHORT_NAMES)
    for kind, built_in in BUILT_IN.items():
        name = built_in.function.__name__
        names[name] = kind
        names[name.removesuffix("_loss")] = kind
    return names


def recognised(loss: Any, argument: str) -> tuple[nn.Module | None, BuiltIn | None]:
    """The loss module, and what fitkit knows of it; (None, None) for a callable of the user's."""
    if isinstance(loss, str):
        known = known_losses()
        name = loss.lower()
        if name in KERAS_NAMES:
            raise ValueError(f"Unknown name: {argument}={loss!r}, which is Keras's. Here it is {KERAS_NAMES[name]}.")
        if name not in known:
            raise unknown_name(argument, loss, known)
        return known[name](), BUILT_IN[known[name]]
    if inspect.isclass(loss) and issubclass(loss, nn.Module):
        raise TypeError(f"Expected a loss, received the class {argument}={loss.__name__}. Write {loss.__name__}().")
    if isinstance(loss, nn.Module):
        for kind, built_in in BUILT_IN.items():
            if isinstance(loss, kind) and type(loss).forward is kind.forward:
                return loss, built_in
        check_order(argument, loss.forward)
        return loss, None
    options: Mapping[str, Any] = {}
    if isinstance(loss, partial) and not loss.args:
        loss, options = loss.func, loss.keywords
    for kind, built_in in BUILT_IN.items():
        # torch's functions take some options that its modules do not, such as the weights of mse_loss.
        if loss is built_in.function and set(options) <= set(inspect.signature(kind).parameters):
            return kind(**options), built_in
    if not callable(loss):
        raise TypeError(
            f"Expected a name, a loss module or a callable loss(output, target), received {argument}={show(loss)}."
        )
    check_order(argument, loss)
    return None, None


def meaning_of(module: Any, built_in: BuiltIn | None) -> OutputMeaning:
    """What the loss, a module or a callable of the user's, tells about the output."""
    options = module.keywords if isinstance(module, partial) else {}
    ignored = options.get("ignore_index", getattr(module, "ignore_index", None))
    if built_in is not None:
        return OutputMeaning(built_in.scale, ignored, isinstance(module, CLASS_LOSSES))
    for kind, parent in BUILT_IN.items():  # a subclass with a forward of its own still says what its outputs are
        if isinstance(module, kind):
            return OutputMeaning(parent.scale, ignored, issubclass(kind, CLASS_LOSSES))
    return OutputMeaning("unknown", ignored if isinstance(ignored, int) else None)
