"""From one batch to its outputs and losses: the forward pass, by the compiled loss or by the user's own step.

What is done with a loss afterwards (backward, means, metrics) is in steps.py and numbers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from fitkit import batch as batches_of
from fitkit._types import Precision
from fitkit.device import sum_dtype
from fitkit.errors import check_number
from fitkit.losses import Part, check_weight, show_structure
from fitkit.metrics import CompiledMetrics
from fitkit.output_losses import OutputLosses
from fitkit.transfer import Transfer
from fitkit.windows import weighted_sum


@dataclass(frozen=True)
class Compiled:
    """What `Model.compile` made: everything a step needs that is the same in every run.

    Attributes:
        module: the user's module.
        forward: what is called: the module, or its compiled form.
        losses: of every output; None when the module or the user's step gives the loss.
        metrics: by name, torchmetrics or callables.
        precision: that of forward and loss.
        device: where it happens.
        optimizer: None when nothing can be trained.
        scaler: for "16-mixed".
        channels_last: whether images are given to the module in that memory format.
        left_out: names of the trainable parameters that the user gave to no optimizer.
    """

    module: nn.Module
    forward: Callable[..., Any]
    losses: OutputLosses | None
    metrics: CompiledMetrics
    precision: Precision
    device: torch.device
    optimizer: torch.optim.Optimizer | None = None
    scaler: torch.amp.GradScaler | None = None
    channels_last: bool = False
    left_out: frozenset[str] = frozenset()


class Outcome(NamedTuple):
    """What forward and loss made of one batch.

    Attributes:
        parts: loss and weight of each output.
        outputs: of the module, one for each loss.
        targets: one for each loss; empty when there are none to compare with.
        sample_weights: one for each loss, or None.
        extra: what a step of the user's returned beside the loss.
        weight: that of the extras.
    """

    parts: list[Part]
    outputs: list[Any]
    targets: list[Any]
    sample_weights: list[Tensor | None] | None
    extra: Mapping[str, Any]
    weight: float | Tensor


UserStep = Callable[[Any, int], Any]


@final
class Computation:
    """Forward and loss of one batch, by the compiled loss or by the user's own step.

    Args:
        compiled: what `Model.compile` made.
        user_step: an overridden training_step or validation_step; None for the compiled loss.
        class_weight: weight of each class, for training.
    """

    def __init__(self, compiled: Compiled, user_step: UserStep | None, class_weight: ClassWeight | None = None) -> None:
        self._compiled = compiled
        self._user_step = user_step
        self._class_weight = class_weight
        self._transfer = transfer_of(compiled)
        # The one loss of a module with one output, and what is called: looked up once.
        self._loss = None if compiled.losses is None or compiled.losses.keys is not None else compiled.losses.losses[0]
        self._forward = compiled.forward

    def __call__(self, batch: Any, index: int) -> Outcome:
        on_host = batch
        if self._transfer.is_needed:
            placed = self._transfer(batch)
            batch, on_host = placed.on_device, placed.on_host
        if self._user_step is not None:
            return self._user_outcome(self._user_step(batch, index), batch)
        x, y, sample_weight = batches_of.unpack(batch)
        losses = self._compiled.losses
        if y is None and losses is not None:
            alone, advice = "x alone", "Pass y"
            if isinstance(x, Mapping):
                alone = f"a dict of {', '.join(map(str, x))}, all of it inputs"
                advice = "Let the data give (inputs, target)"
            raise ValueError(
                f"Expected batches of (x, y) since compile was given a loss; received batches of {alone}. {advice}, or "
                "compile(loss=None) for a module that returns its loss, or override training_step."
            )
        try:
            output = self._forward(x) if isinstance(x, Tensor) else batches_of.call(self._forward, x)
        except Exception as error:
            batches_of.note_input(error, x)
            raise
        size = batches_of.count_samples(x, y)
        if losses is None:
            return self._own_outcome(output, batch, size)
        if self._class_weight is not None:
            sample_weight = self._class_weight(output, y, sample_weight)
        loss = self._loss
        if loss is not None:
            target_on_host = y if on_host is batch else batches_of.unpack(on_host)[1]
            target = loss.fit_target(output, y)
            part = loss(output, target, size, sample_weight, target_on_host)
            return Outcome([part], [output], [target], None if sample_weight is None else [sample_weight], {}, size)
        return self._several(losses, output, y, sample_weight, size, on_host)

    def _several(
        self, losses: OutputLosses, output: Any, y: Any, sample_weight: Any, size: int, on_host: Any
    ) -> Outcome:
        outputs, targets = losses.select(output, "the module's output"), losses.select(y, "y")
        on_host_targets = losses.select(batches_of.unpack(on_host)[1], "y")
        if sample_weight is None or isinstance(sample_weight, Tensor):
            weights = [sample_weight] * len(outputs)
        else:
            weights = losses.select(sample_weight, "sample_weight")
        parts = []
        for position in losses.active:
            loss = losses.losses[position]
            assert loss is not None  # active ones are not
            count = batches_of.count_samples(outputs[position], targets[position])
            targets[position] = loss.fit_target(outputs[position], targets[position])
            parts.append(
                loss(outputs[position], targets[position], count, weights[position], on_host_targets[position])
            )
        return Outcome(parts, outputs, targets, None if sample_weight is None else weights, {}, size)

    def _own_outcome(self, output: Any, batch: Any, size: int) -> Outcome:
        """The loss is the module's own; ``logits`` beside it and ``labels`` in the batch are what metrics compare."""
        loss, weight = batches_of.own_loss(output)
        counted = size if weight is None else check_weight("weight of the module's output", weight)
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
        part = Part(loss.reshape(()), counted, size)
        if labels is None or logits is None:
            return Outcome([part], [], [], None, {}, size)
        if isinstance(logits, Tensor) and isinstance(labels, Tensor):
            if "CausalLM" in type(output).__name__:
                # Each token is compared with the one after it, as the module's own loss does.
                logits, labels = logits[:, :-1], labels[:, 1:]
            logits = _classes_second(logits, labels)
        return Outcome([part], [logits], [labels], None, {}, size)

    def _user_outcome(self, returned: Any, batch: Any) -> Outcome:
        extra: dict[str, Any] = {}
        loss = returned
        if isinstance(returned, Mapping):
            extra = dict(returned)
            if "loss" not in extra:
                raise ValueError(
                    f'Expected the step to return a loss tensor or a dict with "loss", received the keys {list(extra)}.'
                )
            loss = extra.pop("loss")
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise TypeError(
                f"Expected the step to return a loss of one number as a tensor, received {show_structure(loss)}."
            )
        weight = extra.pop("weight", None)
        if weight is None:
            weight = batches_of.count_samples(*batches_of.unpack(batch)[:2] if _is_batch(batch) else (batch, None))
        weight = check_weight("weight returned by the step", weight)
        outputs, targets = [], []
        if {"output", "target"} <= set(extra):
            outputs, targets = [extra.pop("output")], [extra.pop("target")]
            if self._compiled.losses is not None and self._compiled.metrics.names:
                outputs = self._compiled.losses.select(outputs[0], "the step's 'output'")
                targets = self._compiled.losses.select(targets[0], "the step's 'target'")
        for name, value in extra.items():
            if name == "batch_loss" or name.startswith(("val_", "grad_")):
                raise ValueError(f"Expected another name for the step's {name!r}, which fitkit uses itself.")
            if not isinstance(value, Tensor):
                check_number(f"the step's {name!r}", value, finite=False)
            elif value.numel() != 1:
                raise ValueError(
                    f"Expected the step's {name!r} to be one number, received {show_structure(value)}. Reduce it."
                )
        return Outcome([Part(loss.reshape(()), weight)], outputs, targets, None, extra, weight)


def _classes_second(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits with their classes along dimension 1, as torch has them; a classifier of tokens has them last."""
    are_tokens = logits.dim() == 3 and logits.shape[:-1] == labels.shape
    # A segmentation's are where torch has them already.
    last = are_tokens or (logits.dim() > 3 and logits.shape[:-1] == labels.shape != logits[:, 0].shape)
    return logits.movedim(-1, 1) if last else logits


def transfer_of(compiled: Compiled) -> Transfer:
    """The way of batches to where the module is, in its precision."""
    dtype = torch.float64 if compiled.precision == "64-true" else None
    return Transfer(compiled.device, dtype, channels_last=compiled.channels_last)


def total_loss(compiled: Compiled, batch: Any, index: int) -> Tensor:
    """The compiled loss of a batch: one number, with its gradient; the outputs' losses by their loss_weights."""
    outcome = Computation(compiled, None)(batch, index)
    losses = compiled.losses
    shares = [1.0] if losses is None else [losses.weights[position] for position in losses.active]
    total = weighted_sum(outcome.parts, shares)
    return outcome.parts[0].value * 0.0 if total is None else total


def _is_batch(batch: Any) -> bool:
    return not isinstance(batch, (tuple, list)) or 1 <= len(batch) <= 3


@final
class ClassWeight:
    """Sample weights from targets: the weight of the class that each target names, 1 for a class without one.

    Args:
        weights: {class: weight}.
        device: where the targets are.
        one_of_many: whether a target of the output's shape has its classes along dimension 1, as for cross entropy;
            otherwise each of its entries is a class of its own, as for bce.
    """

    def __init__(self, weights: Mapping[int, float], device: torch.device, *, one_of_many: bool) -> None:
        self._one_of_many = one_of_many
        self._last = max(weights) + 1
        table = torch.ones(self._last + 1, dtype=sum_dtype(device))
        for index, weight in weights.items():
            table[index] = weight
        self._table = table.to(device)

    def __call__(self, output: Any, target: Any, sample_weight: Any) -> Tensor:
        """Weights of shape ``(N,)``, or of the targets' shape for a class per pixel, token or label.

        Raises:
            ValueError: there are sample weights as well, or targets that name no class.
        """
        if sample_weight is not None:
            raise ValueError("class_weight=... came with data that has sample weights. Use one of the two.")
        if not isinstance(target, Tensor):
            raise ValueError(f"class_weight=... needs one tensor of targets, received {show_structure(target)}.")
        classes = target
        if target.dim() == 2 and target.shape[1] == 1:
            classes = target.squeeze(1)
        elif self._one_of_many and target.dim() > 1 and target.shape == output.shape:
            classes = target.to(torch.uint8 if target.dtype == torch.bool else target.dtype).argmax(1)
        index = classes.long()
        return self._table[torch.where(index < 0, self._last, index.clamp(max=self._last))]
