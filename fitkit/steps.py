"""What happens to one batch: the training step, the test step and the prediction step.

A step is called by the one batch loop (loop.py) with a batch and its index. Steps keep their numbers on the device
and never read one; the loop and the callbacks ask for numbers through `logs`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from fitkit import batch as batches_of
from fitkit._types import OutputMeaning, Precision
from fitkit.device import autocast, copy_back, move, random_state, restore_random_state, sum_dtype
from fitkit.diagnosis import explain_nonfinite
from fitkit.errors import check_number
from fitkit.gradients import GradientNorms, clip_gradients
from fitkit.logs import BatchLogs, Tally, read
from fitkit.losses import OutputLosses, Part, check_weight, show_structure
from fitkit.metrics import CompiledMetrics, RunningMetrics
from fitkit.windows import Window, weighted_sum


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
    """

    module: nn.Module
    forward: Callable[..., Any]
    losses: OutputLosses | None
    metrics: CompiledMetrics
    precision: Precision
    device: torch.device
    optimizer: torch.optim.Optimizer | None = None
    scaler: torch.amp.GradScaler | None = None


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
        self._moves = compiled.device.type != "cpu" or compiled.precision == "64-true"
        self._dtype = torch.float64 if compiled.precision == "64-true" else None
        self._names = ["loss"] if compiled.losses is None else compiled.losses.names or ["loss"]

    def __call__(self, batch: Any, index: int) -> Outcome:
        on_host = batch
        if self._moves:
            batch = move(batch, self._compiled.device, self._dtype)
        if self._user_step is not None:
            return self._user_outcome(self._user_step(batch, index), batch)
        x, y, sample_weight = batches_of.unpack(batch)
        output = batches_of.call(self._compiled.forward, x)
        size = batches_of.count_samples(x, y)
        losses = self._compiled.losses
        if losses is None:
            return self._own_outcome(output, batch, size)
        if y is None:
            raise ValueError(
                "Expected batches of (x, y) since compile was given a loss; received batches of x alone. Pass y, or "
                "compile(loss=None) for a module that returns its loss, or override training_step."
            )
        if self._class_weight is not None:
            sample_weight = self._class_weight(output, y, sample_weight)
        if losses.keys is None:
            loss = losses.losses[0]
            assert loss is not None  # a single loss is never None
            target_on_host = batches_of.unpack(on_host)[1] if self._moves else y
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
        compared = labels is not None and logits is not None
        return Outcome(
            [Part(loss.reshape(()), counted, size)], [logits] * compared, [labels] * compared, None, {}, size
        )

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
        outputs, targets = (
            ([extra.pop("output")], [extra.pop("target")]) if {"output", "target"} <= set(extra) else ([], [])
        )
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


@dataclass
class Numbers:
    """The running numbers of one run: losses, metrics and what the user's step returned.

    Attributes:
        compiled: what `Model.compile` made.
        several: the losses where each output has its own; None for one loss, also that of a user's step.
        adds_up: whether the one loss is a sum over samples.
        tally: running means.
        metrics: running metrics.
        last: the latest batch's loss.
        norms: of the gradients, where they are tracked.
    """

    compiled: Compiled
    several: OutputLosses | None
    adds_up: bool
    tally: Tally
    metrics: RunningMetrics
    last: Tensor | None = None
    norms: GradientNorms | None = None

    @classmethod
    def start(cls, compiled: Compiled, user_step: UserStep | None) -> Numbers:
        """Empty numbers for a new run; they share nothing with those of any other run."""
        losses = compiled.losses
        meanings = [OutputMeaning()] if losses is None else losses.meanings
        several = None if losses is None or losses.names is None or user_step is not None else losses
        single = None if losses is None or user_step is not None else losses.losses[0]
        adds_up = single is not None and single.adds_up
        return cls(
            compiled, several, adds_up, Tally(compiled.device), compiled.metrics.start(meanings, compiled.device)
        )

    def reset(self) -> None:
        """Starts an epoch."""
        self.tally.reset()
        self.metrics.reset()
        self.last = None
        if self.norms is not None:
            self.norms.reset()

    def add(self, outcome: Outcome, index: int) -> None:
        """Takes one batch in, or a part of it; index is the batch's."""
        if self.several is None:
            part = outcome.parts[0]
            self.last = part.value.detach()
            self.tally.mean("loss", adds_up=self.adds_up).add(self.last, part.weight, index)
        else:
            self._add_several(self.several, outcome, index)
        if outcome.extra:
            for name, value in outcome.extra.items():
                number = value.detach().reshape(()) if isinstance(value, Tensor) else torch.tensor(float(value))
                self.tally.mean(name).add(number.to(self.compiled.device), outcome.weight, index)
        if self.compiled.metrics.names:
            self._add_to_metrics(outcome)

    def _add_several(self, losses: OutputLosses, outcome: Outcome, index: int) -> None:
        assert losses.names is not None  # they are named where there are several
        for position, part in zip(losses.active, outcome.parts, strict=True):
            loss = losses.losses[position]
            mean = self.tally.mean(f"{losses.names[position]}_loss", adds_up=loss is not None and loss.adds_up)
            mean.add(part.value.detach(), part.weight, index)
        total = weighted_sum(outcome.parts, [losses.weights[position] for position in losses.active])
        self.last = None if total is None else total.detach()

    def _add_to_metrics(self, outcome: Outcome) -> None:
        if not outcome.targets:
            raise ValueError(
                f"metrics={self.compiled.metrics.names} need outputs and targets, which a step of your own or a module "
                'that returns its loss does not show. Return {"loss": ..., "output": ..., "target": ...} from the '
                "step, or return the metric's value by its name, or compile without metrics."
            )
        self.metrics.update([_detached(output) for output in outcome.outputs], outcome.targets, outcome.sample_weights)

    def values(self) -> dict[str, Tensor]:
        """Every running number as a 0-d tensor on the device, "loss" first."""
        means = self.tally.values()
        values = {"loss": self.loss(means), **means}
        return {**values, **self.metrics.compute()}

    def loss(self, means: Mapping[str, Tensor]) -> Tensor:
        """The total loss: the mean, or the weighted sum of the outputs' means."""
        losses = self.several
        if losses is None or losses.names is None:
            return means["loss"]
        total = torch.zeros((), device=self.compiled.device)
        for position in losses.active:
            total = total + losses.weights[position] * means[f"{losses.names[position]}_loss"]
        return total

    def names(self) -> list[str]:
        """The keys that batch logs have now."""
        names = ["loss", *(name for name in self.tally.means if name != "loss"), *self.compiled.metrics.names]
        if self.last is not None:
            names.append("batch_loss")
        if self.norms is not None and self.norms.last is not None:
            names += self.norms.names
        return names

    def number(self, name: str) -> Tensor:
        """The running number of that name as a 0-d tensor on the device; KeyError for another name."""
        if name == "loss":
            return self.loss(self.tally.values())
        if name in self.tally.means:
            return self.tally.means[name].value()
        if name in self.compiled.metrics.names:
            return self.metrics.compute([name])[name]
        if name == "batch_loss" and self.last is not None:
            return self.last
        if self.norms is not None and self.norms.last is not None and name in self.norms.names:
            return self.norms.last[self.norms.names.index(name)]
        raise KeyError(name)

    def first_bad(self) -> Tensor:
        """The index of the first batch with a loss that is not finite; -1 when there is none."""
        judged = ["loss"]
        if self.several is not None and self.several.names is not None:
            judged = [f"{self.several.names[position]}_loss" for position in self.several.active]
        found = [self.tally.mean(name).first_bad() for name in judged]
        indices = torch.stack([index.to(torch.int64) for index in found])
        first = torch.where(indices < 0, torch.iinfo(torch.int64).max, indices).min()
        return torch.where((indices < 0).all(), -1, first)


def _detached(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, Mapping):
        return {key: _detached(value) for key, value in output.items()}
    if isinstance(output, (tuple, list)):
        return [_detached(value) for value in output]
    return output


@final
class TrainStep:
    """The training step: forward, loss, backward, and at the end of a window clipping and the optimizer's step.

    Args:
        compiled: what `Model.compile` made.
        user_step: an overridden training_step.
        class_weight: weight of each class.
        gradient_clip_val: norm to which the gradients are clipped; 0 is off.
        norm_order: p of the gradient norms to track; -1 is off.
    """

    def __init__(
        self,
        compiled: Compiled,
        user_step: UserStep | None = None,
        class_weight: ClassWeight | None = None,
        gradient_clip_val: float = 0.0,
        norm_order: float = -1,
    ) -> None:
        if compiled.optimizer is None and user_step is None:
            raise ValueError("Expected a module with trainable parameters, received one that has none to train.")
        self.numbers = Numbers.start(compiled, user_step)
        self.logs = BatchLogs(self.numbers)
        self.device = compiled.device
        self._compute = Computation(compiled, user_step, class_weight)
        self._autocast = autocast(compiled.precision, compiled.device)
        self._compiled = compiled
        self._window = Window(None if user_step is not None else compiled.losses)
        self._clip = gradient_clip_val
        self._norm_order = norm_order
        self._scaler = compiled.scaler
        self._may_train_by_hand = user_step is not None
        self._by_hand = False
        self._latest: Any = None
        self.begin_epoch(1, None)

    def begin_epoch(self, batches_per_step: int, length: int | None) -> None:
        """Empties the running numbers and sets how many batches make a step.

        Args:
            batches_per_step: K of the gradient accumulation.
            length: batches in the epoch; None when it is not known.
        """
        self._batches_per_step = batches_per_step
        self._length = length
        self._held = held_parameters(self._compiled)
        self._stepped = optimizer_parameters(self._compiled)
        if self._norm_order != -1:
            trained = trained_parameters(self._compiled)
            self.numbers.norms = GradientNorms(self._compiled.module, trained, self._norm_order)
        self._window.discard()
        self.numbers.reset()

    def __call__(self, batch: Any, index: int, parts: int = 1, is_last: bool = True) -> None:
        """Trains on a batch, or on one of the parts that it comes in.

        Args:
            batch: the batch or part.
            index: of the batch in the epoch.
            parts: how many the batch is expected to have.
            is_last: whether it is the last of them.
        """
        # A window starts without gradients; the last one of an epoch may be short.
        if self._window.is_complete:
            if not self._by_hand:
                self._clear_gradients()
            left = self._batches_per_step if self._length is None else self._length - index
            # Data that gives more batches than it said goes on in whole windows.
            self._window.open(min(self._batches_per_step, left) if left > 0 else self._batches_per_step, parts)

        # Forward and loss, in the user's precision.
        with self._autocast:
            outcome = self._compute(batch, index)

        # Backward and, where the window is complete, the optimizer's step.
        if self._has_gradient(outcome):
            loss, seed = self._window.take(outcome.parts)
            if self._window.is_separate:
                self._window.backward_each(outcome.parts, self._scaler, self._held)
            elif loss is not None:
                scaled = loss if self._scaler is None else self._scaler.scale(loss)
                scaled.backward(seed)
            if is_last:
                self.end_batch()

        # Numbers stay on the device.
        self.numbers.add(outcome, index)
        self._latest = batch

    def _has_gradient(self, outcome: Outcome) -> bool:
        """Whether there is something to go backward from; not after a step of the user's that trained by itself."""
        had_trained, self._by_hand = self._by_hand, False
        if any(part.value.requires_grad for part in outcome.parts):
            if had_trained:
                self._clear_gradients()
            return True
        if not self._may_train_by_hand:
            raise ValueError(
                "Expected a loss with a gradient, received one that depends on no trainable parameter. Is the output "
                "detached, computed under torch.no_grad(), or all of its way frozen?"
            )
        self._by_hand = True
        self._window.discard()
        return False

    def _clear_gradients(self) -> None:
        for parameter in self._held:
            parameter.grad = None

    def explain_nonfinite(self) -> str:
        """Where NaN or infinity shows first, by one more forward pass on the latest batch."""
        batch = self._latest

        def forward() -> None:
            with self._autocast:
                self._compute(batch, 0)

        if self._by_hand:
            return "The training_step trains by itself; look at what it returns."
        return explain_nonfinite(self._compiled.module, batch, forward, self.device)

    def end_batch(self) -> None:
        """Ends a batch: where it completes the window, the optimizer makes its step."""
        self._window.end_batch()
        if self._window.is_complete:
            self._update()

    def keep(self) -> Callable[[], None]:
        """Notes everything that a batch part may change before the optimizer's step; the result puts it back."""
        module, window = self._compiled.module, self._window.state()
        random_state_before = random_state(self._compiled.device)
        buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
        # At the start of a window gradients are about to be cleared anyway.
        held = [None if self._window.is_complete else parameter.grad for parameter in self._held]
        gradients = [None if gradient is None else gradient.clone() for gradient in held]

        def put_back() -> None:
            self._window.restore(window)
            restore_random_state(random_state_before, self._compiled.device)
            copy_back(buffers)
            for parameter, gradient in zip(self._held, gradients, strict=True):
                parameter.grad = gradient

        return put_back

    def finish(self) -> None:
        """Ends the epoch: a window that is still open makes its step."""
        if not self._window.is_complete:
            self._update()
        self._window.discard()

    def release(self) -> None:
        """Leaves no gradient and no batch behind."""
        self._window.discard()
        self._latest = None
        self._clear_gradients()

    def _update(self) -> None:
        """One optimizer step: unscale, norm, clip, step."""
        window, optimizer, scaler = self._window, self._compiled.optimizer, self._scaler
        if not window.holds_something:
            window.discard()
            return
        if optimizer is None:
            raise ValueError("Expected a module with something to train, received one without trainable parameters.")
        window.close(self._held)
        if scaler is not None:
            scaler.unscale_(optimizer)
        norms = None if self.numbers.norms is None else self.numbers.norms.measure()
        if self._clip:
            total = None if norms is None else self.numbers.norms.clip_total(norms)  # type: ignore[union-attr]
            clip_gradients(self._stepped, self._clip, total)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        if norms is not None:
            # A step that the scaler skipped, because a gradient was not finite, is none.
            self.numbers.norms.add(norms, only_finite=scaler is not None)  # type: ignore[union-attr]
        window.discard()

    def epoch_logs(self) -> tuple[dict[str, float], int | None]:
        """The epoch's numbers, read at once, and the first batch whose loss was not finite (None: all were)."""
        values = self.numbers.values()
        if self.numbers.norms is not None:
            values |= self.numbers.norms.means()
        numbers = read({**values, _FIRST_BAD: self.numbers.first_bad()})
        first_bad = numbers.pop(_FIRST_BAD)
        return numbers, None if first_bad < 0 else int(first_bad)


_FIRST_BAD = " first bad batch"


def held_parameters(compiled: Compiled) -> list[nn.Parameter]:
    """The parameters that the optimizer has, and those of the module that it has not."""
    held = [*optimizer_parameters(compiled), *compiled.module.parameters()]
    return list({id(parameter): parameter for parameter in held}.values())


def optimizer_parameters(compiled: Compiled) -> list[nn.Parameter]:
    """The parameters that the optimizer has."""
    groups = [] if compiled.optimizer is None else compiled.optimizer.param_groups
    return [parameter for group in groups for parameter in group["params"]]


def trained_parameters(compiled: Compiled) -> list[nn.Parameter]:
    """The parameters that the optimizer has and that are not frozen."""
    return [parameter for parameter in optimizer_parameters(compiled) if parameter.requires_grad]


@final
class TestStep:
    """The test step: forward, loss and metrics, without gradients.

    Args:
        compiled: what `Model.compile` made.
        user_step: an overridden validation_step.
    """

    __test__ = False  # not a test for pytest

    def __init__(self, compiled: Compiled, user_step: UserStep | None = None) -> None:
        self.numbers = Numbers.start(compiled, user_step)
        self.logs = BatchLogs(self.numbers)
        self._compute = Computation(compiled, user_step)
        self._autocast = autocast(compiled.precision, compiled.device)

    def begin_epoch(self) -> None:
        """Empties the running numbers."""
        self.numbers.reset()

    @torch.no_grad()
    def __call__(self, batch: Any, index: int) -> None:
        with self._autocast:
            outcome = self._compute(batch, index)
        self.numbers.add(outcome, index)

    def finish(self) -> None:
        """Nothing is open at the end of an epoch."""

    def epoch_logs(self) -> dict[str, float]:
        """The numbers of all batches, read at once."""
        return read(self.numbers.values())


@final
class PredictStep:
    """The prediction step: forward alone; keeps the outputs on the CPU.

    Args:
        compiled: what `Model.compile` made, or a stand-in where nothing was compiled.
        user_step: an overridden predict_step.
    """

    def __init__(self, compiled: Compiled, user_step: UserStep | None = None) -> None:
        self.outputs: list[Any] = []
        self.logs: Mapping[str, Any] = {}
        self._compiled = compiled
        self._user_step = user_step
        self._autocast = autocast(compiled.precision, compiled.device)
        self._moves = compiled.device.type != "cpu" or compiled.precision == "64-true"
        self._dtype = torch.float64 if compiled.precision == "64-true" else None

    @torch.no_grad()
    def __call__(self, batch: Any, index: int) -> None:
        if self._moves:
            batch = move(batch, self._compiled.device, self._dtype)
        with self._autocast:
            if self._user_step is not None:
                output = self._user_step(batch, index)
            else:
                output = batches_of.call(self._compiled.forward, batches_of.unpack(batch)[0])
        self.logs = {"outputs": output}
        self.outputs.append(batches_of.on_cpu(output))

    def finish(self) -> None:
        """Nothing is open at the end."""
