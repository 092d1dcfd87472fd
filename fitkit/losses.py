"""From what a user writes as a loss to what the steps call: a value, and the weight that the value has.

A loss that averages is weighted by the number of things it averaged over: elements, samples, targets that are not
ignored, class weights of the targets. With these weights the mean of an epoch is the mean over its data, and the
gradient of several micro-batches is that of the batch they make up. What a user may write is in loss_names.py; this
file does not know about batches, windows or outputs by name (see steps.py).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, final

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fitkit.errors import check_number, show
from fitkit.loss_names import Averages, meaning_of, recognised
from fitkit.targets import fit_classes, fit_elements

# A number where the host knows it, a 0-d tensor where only the device does.
Weight = float | Tensor


class Part(NamedTuple):
    """The loss of one output on one batch: a 0-d value, and what it weighs among other batches."""

    value: Tensor
    weight: Weight
    # The most that a batch of its size could weigh, for where only the device knows the weight.
    most: float = 1.0


# Up to so many targets are counted faster one by one than by NumPy.
SHORT = 128
# The losses whose targets are probabilities, and whose weight has the shape of a batch.
_BINARY_CROSS_ENTROPIES = (F.binary_cross_entropy, F.binary_cross_entropy_with_logits)
# Items of a list that a message shows.
SHOWN = 4


@final
class Loss:
    """One loss over one output: gives the value on a batch and the weight of that value.

    Args:
        loss: a name, a module or a callable ``loss(output, target)``. A callable may return a 0-d tensor (weighted
            by samples), a tensor of item losses (averaged over its elements) or ``(value, weight)``.
        argument: how messages name it.

    Raises:
        ValueError: an unknown name.
        TypeError: neither name, module nor callable.
    """

    def __init__(self, loss: Any, argument: str = "loss") -> None:
        self.argument = argument
        self.module, self.built_in = recognised(loss, argument)
        self.call: Callable[..., Any] = self.module if self.module is not None else loss
        if self.module is not None and self.module is not loss:
            # Nobody has hooks on a module that was made here; a name means torch's function as it is.
            self.call = self.built_in.function if isinstance(loss, str) else self.module.forward  # type: ignore[union-attr]
        if self.built_in is not None and self.module.reduction == "none":  # type: ignore[union-attr]
            self.call = self.module = _with_reduction(self.module, "mean")
        self.reduction = getattr(self.module, "reduction", "mean")
        self.meaning = meaning_of(loss if self.module is None else self.module, self.built_in)
        self._class_weights = _on_host(self.module)
        # A module of the user's may be given other class weights later.
        self._is_users = self.module is loss
        self._counted_weight = getattr(self.module, "weight", None)
        # "sum" has no denominator: windows add up, and only the report divides, by samples.
        self.adds_up = self.reduction == "sum"
        averages: Averages = "samples" if self.built_in is None else self.built_in.averages
        self._averages = "samples" if self.adds_up or self.reduction == "batchmean" else averages
        self._items: Callable[..., Tensor] | None = _item_losses(self.call if self.module is None else self.module)

    def to(self, device: torch.device, dtype: torch.dtype | None = None, outputs: torch.dtype | None = None) -> None:
        """Moves class weights and other tensors of the loss to the device, and to the dtype where one is given.

        Class weights come out of NumPy and scikit-learn as float64, which torch refuses beside other outputs: in
        torch's own losses float64 becomes the dtype of the outputs, where that is given.
        """
        if self.module is not None:
            if self.built_in is not None and any(tensor.dtype == torch.float64 for tensor in self.module.buffers()):
                dtype = dtype or outputs
            self.module.to(device=device, dtype=dtype)
            self._class_weights = _on_host(self.module)
            self._items = _item_losses(self.call if self.module is None else self.module)

    @property
    def kind(self) -> str:
        """The class or function by name; of torch's own also the settings that are numbers or words."""
        if self.built_in is None:
            named = self.call if self.module is None else type(self.module)
            return str(getattr(named, "__name__", type(named).__name__))
        settings = {name: value for name, value in vars(self.module).items() if isinstance(value, (int, float, str))}
        shown = [f"{name}={value!r}" for name, value in settings.items() if name[0] != "_" and name != "training"]
        return f"{type(self.module).__name__}({', '.join(shown)})"

    @property
    def is_torchs(self) -> bool:
        """Whether it is one of torch's, and nobody listens to its calls: each value is a new tensor, and torch's."""
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return self.built_in is not None and not any(getattr(self.module, name) for name in hooks)

    @property
    def may_wait(self) -> bool:
        """Whether it may be called later, on many batches at once: nobody hears of it, or may change it in between."""
        return self.is_torchs and not (self._is_users and any(True for _ in self.module.buffers()))  # type: ignore[union-attr]

    @property
    def is_mean_over_data(self) -> bool:
        """Whether it cannot depend on how the data is cut into batches: it is torch's own, and weighs no places."""
        if self.built_in is None:
            return False
        return self.built_in.function not in _BINARY_CROSS_ENTROPIES or getattr(self.module, "weight", None) is None

    @property
    def weight_depends_on_targets(self) -> bool:
        """Whether two batches of equal shape may have different weights."""
        return self.built_in is None or self.built_in.averages == "targets"

    def __call__(
        self, output: Any, target: Any, size: int, sample_weight: Tensor | None = None, host_target: Any = None
    ) -> Part:
        """The loss of one batch.

        Args:
            output: what the module gave, batch first.
            target: what it should have given, as `fit_target` returned it.
            size: samples in the batch.
            sample_weight: ``(N,)`` or the shape of the item losses; multiplies these and leaves the denominator.
            host_target: target before it went to the device, so that counting it asks the device nothing.
        """
        if self.built_in is None:
            return self._custom(output, target, size, sample_weight)
        try:
            weight = self._weight(output, target, size, host_target)
            if sample_weight is None:
                return Part(self.call(output, target), weight, target.numel())
            return Part(self._weighted(output, target, sample_weight, weight), weight, target.numel())
        except IndexError as error:  # torch's "Target 5 is out of bounds."
            ignoring = f"{type(self.module).__name__}(ignore_index=...)"
            raise ValueError(
                f"Expected class indices below {output.shape[1]}, the outputs for {self.argument}="
                f"{self.built_in.function.__name__!r}, received another one: {error} If it marks targets to ignore, "
                f"pass loss=nn.{ignoring}."
            ) from error
        except RuntimeError as error:
            if self.built_in.function is F.binary_cross_entropy and (output.min() < 0 or output.max() > 1):
                raise ValueError(
                    f"Expected probabilities from 0 to 1 for {self.argument}='binary_cross_entropy', received outputs "
                    f'from {float(output.min()):g} to {float(output.max()):g}. For logits use "bce_with_logits".'
                ) from error
            raise

    def _custom(self, output: Any, target: Any, size: int, sample_weight: Tensor | None) -> Part:
        if sample_weight is not None:
            items = self._item_values(output, target, size)
            weight = items.numel() if not self.adds_up else size
            return Part(self._reduced(items * _spread(sample_weight, items), weight), weight)
        value = self.call(output, target)
        if isinstance(value, tuple):
            return _valued_and_weighted(value, self.argument, size)
        if not isinstance(value, Tensor):
            raise TypeError(f"Expected {self.argument}(output, target) to return a tensor, received {show(value)}.")
        if value.numel() == 1:
            return Part(value.reshape(()), size, size)
        # One value or more per sample; a value per class, say, is a mean over samples already.
        return Part(value.mean(), value.numel() if value.shape[0] == size else size)

    def _item_values(self, output: Any, target: Any, size: int) -> Tensor:
        items = None if self._items is None else self._items(output, target)
        if not isinstance(items, Tensor) or items.dim() == 0 or items.shape[0] != size:
            raise ValueError(
                f"Expected a loss that can give one value per sample, since there are sample weights or class weights; "
                f"received {self.argument}={show(self.call)}, which gives a single number. Use a loss by name, or let "
                'the callable return item losses, or take reduction="none".'
            )
        return items

    def _weighted(self, output: Tensor, target: Tensor, sample_weight: Tensor, weight: Weight) -> Tensor:
        assert self._items is not None  # every built-in loss has item losses
        items = self._items(output, target)
        return self._reduced(items * _spread(sample_weight, items), weight)

    def _reduced(self, items: Tensor, weight: Weight) -> Tensor:
        if self.adds_up:
            return items.sum()
        if isinstance(weight, Tensor):
            return items.sum() / weight.to(items.dtype).clamp(min=torch.finfo(items.dtype).tiny)
        return items.sum() / (weight or 1.0)

    def fit_target(self, output: Any, target: Any) -> Any:
        """The target as the loss needs it beside that output; a callable of the user's is given it as it is.

        Raises:
            ValueError: shapes or dtypes that do not fit; shapes that torch would broadcast are among them.
            TypeError: no tensors, where the loss is one of torch's.
        """
        if self.built_in is None:
            return target
        if not isinstance(output, Tensor) or not isinstance(target, Tensor):
            advice = (
                "With several outputs give a loss for each, as a list or dict; without targets override training_step."
            )
            if isinstance(target, (list, tuple)) and any(isinstance(each, str) for each in target):
                advice = (
                    "Encode labels that are text as integers, for example by numpy.unique(labels, return_inverse=True)."
                )
            raise TypeError(
                "Expected one output tensor and one target tensor for "
                f"{self.argument}={self.built_in.function.__name__!r}, received output={show_structure(output)} and "
                f"target={show_structure(target)}. {advice}"
            )
        if self.meaning.classes:
            if target.dtype is torch.int64 and output.dim() == 2 and target.shape == output.shape[:1]:
                return target  # the usual case
            return fit_classes(output, target, self.built_in.function.__name__)
        if self.built_in.function is F.multilabel_margin_loss:
            if output.dim() != 2 or output.shape != target.shape:  # torch takes one dimension for a single sample
                raise ValueError(
                    "Expected output and target of shape (N, C) for multilabel_margin_loss, received output of shape "
                    f"{tuple(output.shape)} and target of shape {tuple(target.shape)}."
                )
            return target
        return fit_elements(output, target, self.built_in.function.__name__)

    @property
    def takes_probabilities(self) -> bool:
        """Whether targets are probabilities, to be looked at with `check_targets`."""
        return self.built_in is not None and self.built_in.function in _BINARY_CROSS_ENTROPIES

    def check_targets(self, target: Any) -> None:
        """Refuses targets that are no probabilities.

        Raises:
            ValueError: there is one below 0 or above 1. ``bce_with_logits`` itself would train on them.
        """
        if not isinstance(target, Tensor) or not target.numel():
            return
        least, most = float(target.min()), float(target.max())
        if least < 0 or most > 1:
            name = self.built_in.function.__name__  # type: ignore[union-attr]  # it takes probabilities
            raise ValueError(
                f"Expected targets from 0 to 1 for {self.argument}={name!r}, received targets from {least:g} to "
                f'{most:g}. For class indices use "cross_entropy"; labels of -1 and 1 become '
                "(y + 1) / 2."
            )

    def _weight(self, output: Tensor, target: Tensor, size: int, host_target: Any) -> Weight:
        if self._averages == "targets":
            if not target.is_floating_point():
                return self._count(target if host_target is None or not host_target.is_cpu else host_target)
            return target.numel() // target.shape[1] if target.dim() > 1 else 1
        return size if self._averages == "samples" else output.numel()

    def _count(self, target: Tensor) -> Weight:
        """The number of targets that are not ignored, or the sum of their class weights."""
        module: Any = self.module  # of the losses that average over targets
        ignored: int = module.ignore_index
        if self._is_users and module.weight is not self._counted_weight:
            self._class_weights = _on_host(module)
            self._counted_weight = module.weight
        if not target.is_cpu:
            kept = target != ignored
            if self._class_weights is None:
                return kept.sum()
            return (module.weight[target.clamp(min=0)] * kept).sum()  # type: ignore[no-any-return]
        # What is on the host is counted without asking torch for a number: a short list as it is, the rest by NumPy.
        if self._class_weights is None and target.dim() == 1 and target.shape[0] <= SHORT:
            return target.shape[0] - target.tolist().count(ignored)
        classes = target.numpy()
        if self._class_weights is None:
            return classes.size - int(numpy.count_nonzero(classes == ignored))
        return float(self._class_weights[classes[classes != ignored].astype("int64")].sum(dtype="float64"))


def _item_losses(call: Callable[..., Any]) -> Callable[..., Tensor] | None:
    """The loss without its reduction, for losses that can give one value per item."""
    if isinstance(call, nn.Module):
        if not isinstance(getattr(call, "reduction", None), str):
            return call
        unreduced: Callable[..., Tensor] = _with_reduction(call, "none")
        return unreduced
    try:
        parameters = inspect.signature(call).parameters
    except (TypeError, ValueError):
        return call
    if "reduction" in parameters:
        return lambda output, target: call(output, target, reduction="none")
    return call


def _on_host(module: nn.Module | None) -> Any:
    """The class weights of a loss as a NumPy array, for counting; None where it has none."""
    weight = getattr(module, "weight", None) if isinstance(module, (nn.CrossEntropyLoss, nn.NLLLoss)) else None
    return None if weight is None else weight.detach().cpu().numpy()


def _with_reduction(module: Any, reduction: str) -> Any:
    """A copy of the loss module that shares its tensors and reduces in another way."""
    other = copy.copy(module)
    other.reduction = reduction
    return other


def _spread(sample_weight: Tensor, items: Tensor) -> Tensor:
    """sample_weight in a shape that multiplies the item losses and nothing else."""
    weight = sample_weight.to(items.dtype)
    if weight.shape == items.shape:
        return weight
    if weight.dim() == 2 and weight.shape[1] == 1:
        weight = weight.squeeze(1)
    if weight.dim() == 1 and weight.shape[0] == items.shape[0]:
        return weight.reshape(-1, *(1 for _ in items.shape[1:]))
    raise ValueError(
        f"Expected sample_weight of shape ({items.shape[0]},) or of the item losses' shape {tuple(items.shape)}, "
        f"received sample_weight of shape {tuple(sample_weight.shape)}."
    )


def _valued_and_weighted(returned: tuple[Any, ...], argument: str, size: int) -> Part:
    if len(returned) != 2 or not isinstance(returned[0], Tensor) or returned[0].dim() != 0:
        raise TypeError(
            f"Expected {argument}(output, target) to return a 0-d tensor, item losses or (value, weight), received "
            f"a tuple of {len(returned)}: {', '.join(show(item) for item in returned)}."
        )
    value, weight = returned
    return Part(value, check_weight(f"weight returned by {argument}", weight), size)


def check_weight(argument: str, weight: Any) -> Weight:
    """A weight of the user's as a number, or as a 0-d tensor where only the device knows it."""
    if not isinstance(weight, Tensor):
        return check_number(argument, weight, least=0.0)
    if weight.numel() != 1:
        raise ValueError(f"Expected one number, received {argument} of shape {tuple(weight.shape)}.")
    weight = weight.detach().reshape(())
    # On the CPU, NumPy reads it without asking torch for a number.
    if weight.device.type == "cpu":
        return check_number(argument, float(weight.numpy()), least=0.0)
    waiting: Tensor = weight.clone()  # the user may write into it
    return waiting


def show_structure(value: Any) -> str:
    """A structure of tensors as messages show it."""
    if isinstance(value, Tensor):
        return f"tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {show_structure(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        first, more = value[:SHOWN], ", ..." if len(value) > SHOWN else ""
        return f"{type(value).__name__} of {len(value)}: " + ", ".join(map(show_structure, first)) + more
    return show(value)
