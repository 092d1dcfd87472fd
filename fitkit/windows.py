"""A window: the micro-batches that make one optimizer step, each counted by what it holds.

Each backward pass is seeded with the micro-batch's weight over the weight that the whole window is expected to
have. When the window turns out to hold something else (a short batch, ignored targets), the gradients are
multiplied once, at the step. Equal micro-batches therefore cost nothing beyond their backward passes, and no batch
is looked at before its turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from fitkit.device import move, sum_dtype
from fitkit.losses import Part, Weight
from fitkit.output_losses import OutputLosses

# What a window holds beside its size, and what it is at its start.
_KEPT = ("taken", "batches_left", "expected", "actual", "ratios", "gradients")


@final
class Window:
    """The open window of a run.

    Args:
        losses: of every output; None when the module or training_step gives the loss itself.
        processes: how many share each window, and are averaged over afterwards; None for a process that works alone.

    Attributes:
        shares: the factor of each output's loss in the total.
        adds_up: of each output, whether its loss is a sum.
    """

    def __init__(self, losses: OutputLosses | None, processes: int | None = None) -> None:
        self._processes = processes
        active = [] if losses is None else [losses.losses[index] for index in losses.active]
        self.shares = [1.0] if losses is None else [losses.weights[index] for index in losses.active]
        self.adds_up = [loss is not None and loss.adds_up for loss in active] or [False]
        # Outputs whose weights may change independently need gradients of their own until the window is complete.
        self._outputs_differ = len(active) > 1 and any(
            loss is not None and (loss.adds_up or loss.weight_depends_on_targets) for loss in active
        )
        self._seeds: dict[tuple[float, torch.dtype], Tensor] = {}
        # Whether one micro-batch of one process is all there is.
        self.is_whole = False
        self._forget()

    def discard(self) -> None:
        """Forgets the micro-batches so far."""
        if self.is_whole:  # the usual case, which keeps nothing
            self.is_complete, self.holds_something, self._batches_left = True, False, 0
        else:
            self._forget()

    def _forget(self) -> None:
        self.size = 0
        self.is_complete = True
        # Whether each output's loss goes backward by itself.
        self.is_separate = False
        # Whether any micro-batch had a target; taken for granted where only the device knows.
        self.holds_something = False
        self._taken = 0
        self._batches_left = 0
        self._expected: list[float] = []
        self._actual: list[Weight] = []
        self._ratios: list[Weight] = []
        self._gradients: list[list[Tensor | None]] = []

    def open(self, batches: int, parts: int = 1) -> None:
        """Begins a window; the one before was discarded.

        Args:
            batches: how many complete it.
            parts: micro-batches that each of them is expected to come in.
        """
        self.is_complete = False
        self._batches_left = batches
        if not (self.is_whole and batches == parts == 1):  # otherwise the usual case, one like the one before
            self._begin(batches * parts)

    def _begin(self, size: int) -> None:
        self.size = size
        self.is_whole = size == 1 and self._processes is None
        self.is_separate = self._outputs_differ and not self.is_whole

    # What several processes tell the window, and ask it

    @property
    def outputs(self) -> int:
        """How many losses there are."""
        return len(self.shares)

    @property
    def has_several(self) -> bool:
        """Whether there are several losses."""
        return len(self.shares) > 1

    @property
    def is_at_last_batch(self) -> bool:
        """Whether the batch in progress completes the window."""
        return self._batches_left == 1

    def expect(self, weight: float) -> None:
        """Says what one of its batches is expected to weigh, where that is known before the first one."""
        # Not by its parts, of which another process may have more or fewer.
        self._expected = [self._batches_left * weight]

    def weights(self) -> list[Weight]:
        """What the micro-batches so far weigh together, of each output; nothing before the first one."""
        return list(self._actual)

    def weigh(self, weights: Sequence[Weight]) -> None:
        """Says what the window weighs in all processes, over their number."""
        self._actual = list(weights)

    def state(self) -> dict[str, Any]:
        """What the window is now, to come back to with `restore`."""
        kept = {name: list(value) if isinstance(value, list) else value for name, value in vars(self).items()}
        kept["_gradients"] = [
            [None if gradient is None else gradient.clone() for gradient in gradients] for gradients in self._gradients
        ]
        return kept

    def restore(self, state: dict[str, Any]) -> None:
        """Comes back to a state."""
        vars(self).update(state)

    def state_dict(self) -> dict[str, Any]:
        """The window as plain values and tensors, for a file."""
        kept = {name: getattr(self, f"_{name}") for name in _KEPT}
        return {**kept, "size": self.size, "holds_something": self.holds_something}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Comes back to what `state_dict` returned, with its tensors on the device."""
        for name in _KEPT:
            setattr(self, f"_{name}", move(state[name], device))
        self._begin(state["size"])
        self.holds_something = state["holds_something"]
        self.is_complete = self._batches_left <= 0

    def end_batch(self) -> None:
        """Counts a batch, all of whose parts have been taken."""
        self._batches_left -= 1
        self.is_complete = self._batches_left <= 0

    def take(self, parts: Sequence[Part]) -> tuple[Tensor | None, Tensor | None]:
        """Adds a micro-batch to the window.

        Args:
            parts: the loss and weight of each output.

        Returns:
            What to call backward on, and the seed to call it with. No loss: there is nothing to do, because no
            output had a target, or because `backward_each` is to be called.

        Raises:
            ValueError: outputs whose weights change independently of each other without saying so.
        """
        if self.is_whole:
            loss = weighted_sum(parts, self.shares)
            self.holds_something = loss is not None
            return loss, None
        self._taken += 1
        self._ratios = [self._ratio(index, part.weight, part.most) for index, part in enumerate(parts)]
        if self.is_separate:
            return None, None
        if len({ratio for ratio in self._ratios if not isinstance(ratio, Tensor)}) > 1:
            raise ValueError(
                f"Expected outputs whose sizes grow alike from batch to batch, received batches that hold "
                f"{self._ratios} of their windows. With outputs of varying lengths, let the losses return "
                "(value, weight)."
            )
        total = weighted_sum(parts, self.shares)
        return total, None if total is None else self.seed(self._ratios[0], total)

    def _ratio(self, index: int, weight: Weight, most: float) -> Weight:
        """The micro-batch's weight over the window's expected one."""
        if isinstance(weight, Tensor):  # a count is an integer, whose quotient would be float32
            weight = weight.to(sum_dtype(weight.device))
        if self._taken == 1:
            known = not isinstance(weight, Tensor) and weight > 0
            if index == len(self._expected):
                self._expected.append(self.size * (float(weight) if known else max(most, 1.0)))
            self._actual.append(weight)
        else:
            self._actual[index] = self._actual[index] + weight
        self.holds_something = self.holds_something or isinstance(weight, Tensor) or weight > 0
        # What adds up is averaged over processes afterwards, as everything is.
        return float(self._processes or 1) if self.adds_up[index] else weight / self._expected[index]

    def seed(self, ratio: Weight, loss: Tensor) -> Tensor:
        """The ratio as a tensor to call backward with; those of the usual batches are kept."""
        if isinstance(ratio, Tensor):
            return ratio.to(loss.dtype)
        key = (ratio, loss.dtype)
        if key not in self._seeds:
            if len(self._seeds) > 100:  # batches of ever new weights
                self._seeds.clear()
            self._seeds[key] = torch.full((), ratio, dtype=loss.dtype, device=loss.device)
        return self._seeds[key]

    def backward_each(self, parts: Sequence[Part], scaler: Any, parameters: Sequence[nn.Parameter]) -> None:
        """Backward of each output's loss by itself, into gradients of its own, for the batch just taken."""
        if not self._gradients:
            self._gradients = [[None] * len(parameters) for _ in parts]
        last = len(parts) - 1
        for index, (part, ratio) in enumerate(zip(parts, self._ratios, strict=True)):
            if not isinstance(part.weight, Tensor) and part.weight == 0:
                continue
            for parameter, gradient in zip(parameters, self._gradients[index], strict=True):
                parameter.grad = gradient
            loss = part.value if self.shares[index] == 1.0 else part.value * self.shares[index]
            scaled = loss if scaler is None else scaler.scale(loss)
            scaled.backward(self.seed(ratio, loss), retain_graph=index < last)
            self._gradients[index] = [parameter.grad for parameter in parameters]

    def close(self, parameters: Sequence[nn.Parameter]) -> None:
        """Leaves in the parameters the gradient of the batch that the micro-batches make up."""
        if self.is_whole:
            return
        if self._outputs_differ:
            self._join(parameters)
        elif not self.adds_up[0]:
            factor = correction(self._expected[0], self._actual[0])
            if isinstance(factor, Tensor) or factor != 1.0:
                multiply([parameter.grad for parameter in parameters], factor)

    def _join(self, parameters: Sequence[nn.Parameter]) -> None:
        for index, gradients in enumerate(self._gradients):
            factor = 1.0 if self.adds_up[index] else correction(self._expected[index], self._actual[index])
            multiply(gradients, factor)
        for position, parameter in enumerate(parameters):
            found = [gradients[position] for gradients in self._gradients]
            present = [gradient for gradient in found if gradient is not None]
            parameter.grad = None if not present else sum(present[1:], start=present[0])


def correction(expected: float, actual: Weight) -> Weight:
    """What a window was expected to hold over what it holds; 0 where that is nothing."""
    if isinstance(actual, Tensor):
        return torch.where(actual > 0, expected / actual, torch.zeros_like(actual))
    return expected / actual if actual else 0.0


def multiply(gradients: Sequence[Tensor | None], factor: Weight) -> None:
    """One fused multiplication of all gradients; none when the factor is 1."""
    present = [gradient for gradient in gradients if gradient is not None]
    if not present or (not isinstance(factor, Tensor) and factor == 1.0):
        return
    if isinstance(factor, Tensor):
        factor = factor.to(present[0].dtype)
    torch._foreach_mul_(present, factor)


def weighted_sum(parts: Sequence[Part], shares: Sequence[float]) -> Tensor | None:
    """The total loss of a batch; None when no output had a target."""
    if len(parts) == 1 and shares[0] == 1.0:  # the usual case
        value, weight, _ = parts[0]
        return value if isinstance(weight, Tensor) or weight > 0 else None
    total: Tensor | None = None
    for part, share in zip(parts, shares, strict=True):
        if not isinstance(part.weight, Tensor) and part.weight == 0:
            continue
        value = part.value if share == 1.0 else part.value * share
        total = value if total is None else total + value
    return total
