"""The losses and metrics of an evaluation, computed on many batches at once.

The module is called on each batch in its turn. What it gives waits, and loss and metrics see many batches as one: a
mean over the data is the same, however the data is sliced. A callback that reads a number gets it as if nothing had
waited; afterwards all goes on waiting, so that who looks, and when, moves no sum's last digit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor

from fitkit import batch as batches_of
from fitkit.computation import Compiled, Outcome, transfer_of
from fitkit.device import autocasting
from fitkit.numbers import Numbers

# How many batches wait at most, and how many elements their outputs and targets have together: they are to be found in
# the cache.
MOST_BATCHES = 64
MOST_ELEMENTS = 2**17
# How many bytes the batches have together that wait: see BATCH_BYTES in metrics/gathering.py.
MOST_BYTES = 2**23


@final
class JointLosses:
    """Takes batches to the module, and what it gives to loss and metrics, many at a time.

    Outputs and targets that wait are copied into one place each, of the same memory all along: the module may write its
    next output where it wrote this one, a loader its next target, and what is allocated between two passes of a module
    costs both their place in the cache.

    Args:
        compiled: what `Model.compile` made; `serves` is true of it.
        numbers: of the run; they keep nothing that they are given as it is.

    Attributes:
        failed_at: the index of the batch in which an error came up, where that is not the latest.
    """

    def __init__(self, compiled: Compiled, numbers: Numbers) -> None:
        assert compiled.losses is not None  # it serves
        self._numbers = numbers
        self._loss = compiled.losses.losses[0]
        self._transfer = transfer_of(compiled)
        self._forward = autocasting(compiled.forward, compiled.precision, compiled.device)
        self._judge = autocasting(self._outcome, compiled.precision, compiled.device)
        self.begin_epoch()

    @staticmethod
    def serves(compiled: Compiled) -> bool:
        """Whether loss and metrics are functions of outputs and targets that give means over the data."""
        losses = compiled.losses
        if losses is None or losses.keys is not None or not compiled.metrics.are_by_name:
            return False
        loss = losses.losses[0]
        is_mean = loss is not None and loss.may_wait and loss.is_mean_over_data
        return is_mean and not torch.are_deterministic_algorithms_enabled()

    def begin_epoch(self) -> None:
        """Forgets what waits."""
        self.failed_at: int | None = None
        # The indices of the batches that wait, and where output and target of each are.
        self._waiting: list[int] = []
        self._outputs = self._targets = torch.empty(0)
        self._places: list[tuple[Tensor, Tensor]] = []
        # How batches look that may wait.
        self._like: object = None

    def take(self, batch: Any, index: int) -> bool:
        """Takes a batch in; False where it is none of (x, y) with one tensor y, and nothing was done."""
        x, y, sample_weight = batches_of.unpack(batch.on_host if isinstance(batch, batches_of.Placed) else batch)
        if sample_weight is not None or not isinstance(y, Tensor) or y.dim() == 0:
            self.settle()
            return False
        if self._transfer.is_needed:
            x, y, _ = batches_of.unpack(self._transfer(batch).on_device)
        output = batches_of.forward(self._forward, x)
        if isinstance(output, Tensor) and output.requires_grad:  # a module may have switched gradients on
            output = output.detach()
        if isinstance(output, Tensor) and _look(output, y) == self._like:
            if len(self._waiting) >= len(self._places):  # not before: the latest batch's own loss may be asked for
                self.settle()
            place_of_output, place_of_target = self._places[len(self._waiting)]
            place_of_output.copy_(output)
            place_of_target.copy_(y)
            self._waiting.append(index)
            return True
        self.settle()
        outcome = self._judge(output, y)
        self._numbers.add(outcome, index, batch)
        self._make_room(output, y, self._room(outcome, y, batch))
        return True

    def _make_room(self, output: Any, y: Tensor, batches: int) -> None:
        """Sets how batches look that may wait, and how many of them, from the latest one."""
        self._like = None
        # A tensor of a class of its own may be more than its numbers.
        if batches > 1 and type(output) is type(y) is Tensor and output.numel() and y.numel():
            self._like = _look(output, y)
            with torch.inference_mode(False):  # later batches may come outside of one that this batch came in
                rooms = [part.new_empty((batches * len(part), *part.shape[1:])) for part in (output, y)]
            self._outputs, self._targets = rooms
            self._places = list(zip(self._outputs.split(len(output)), self._targets.split(len(y)), strict=True))

    @staticmethod
    def _room(outcome: Outcome, y: Tensor, batch: Any) -> int:
        """How many batches like this one may wait."""
        if outcome.parts[0].value.dtype not in (torch.float32, torch.float64):
            return 0  # in half precision the loss of many would be rounded as one, and a sum may overflow
        elements = outcome.outputs[0].numel() + y.numel()
        size: int = sum(tensor.nbytes for tensor in batches_of.tensors(batch))
        return min(MOST_BATCHES, MOST_ELEMENTS // max(1, int(elements)), MOST_BYTES // max(1, size))

    def settle(self) -> None:
        """Takes what waits to loss and metrics: as one, or one by one where one of them is at fault."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        outcome = self._as_one(len(waiting))
        if outcome is not None:
            self._numbers.add(outcome, waiting[0])
            return
        for (output, target), index in zip(self._places, waiting, strict=False):
            self.failed_at = index
            self._numbers.add(self._judge(output, target), index)
        self.failed_at = None

    def _as_one(self, batches: int) -> Outcome | None:
        """None where the loss refuses a batch, or on the CPU is not finite; an accelerator is not asked."""
        output, target = self._places[0]
        try:
            outcome = self._judge(self._outputs[: batches * len(output)], self._targets[: batches * len(target)])
        except Exception:
            return None
        loss = outcome.parts[0].value
        return outcome if not loss.is_cpu or math.isfinite(float(loss.numpy())) else None

    def names(self) -> list[str]:
        """The keys that batch logs have now."""
        return self._numbers.names()

    def number(self, name: str) -> Tensor:
        """The running number of that name as a 0-d tensor on the device; KeyError for another name."""
        with self._settled():
            return self._numbers.number(name)

    def first_bad(self) -> Tensor:
        """The index of the first batch whose loss is not finite; -1 when there is none."""
        with self._settled():
            return self._numbers.first_bad()

    @contextmanager
    def _settled(self) -> Iterator[None]:
        """With nothing waiting, until all waits again."""
        if not self._waiting:
            yield
            return
        waiting, before = list(self._waiting), self._numbers.state_dict()
        try:
            with torch.no_grad():
                self._waiting = waiting[:-1]
                self.settle()
                self._numbers.add(self._judge(*self._places[len(waiting) - 1]), waiting[-1])
            yield
        finally:
            self._numbers.load_state_dict(before)
            self._waiting = waiting

    def _outcome(self, output: Any, y: Tensor) -> Outcome:
        loss = self._loss
        assert loss is not None  # it serves
        target = loss.fit_target(output, y)
        return Outcome([loss(output, target, len(y))], [output], [target], None, {}, len(y))


def _look(output: Tensor, y: Tensor) -> object:
    """What is the same of batches that wait together."""
    return type(output), output.shape, output.dtype, type(y), y.shape, y.dtype
