"""The losses and metrics of an evaluation, computed on many batches at once.

The module is called on each batch in its turn. What it gives waits, and loss and metrics see many batches as one: a
mean over the data is the same, however the data is sliced. A callback that reads a number gets it as if nothing had
waited; afterwards all goes on waiting, so that who looks, and when, moves no sum's last digit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, final

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


class Unjudged(NamedTuple):
    """A batch before loss and metrics: nothing that the module or a loader may still write into."""

    output: Tensor
    target: Tensor
    batch: int


@final
class JointLosses:
    """Takes batches to the module, and what it gives to loss and metrics, many at a time.

    Args:
        compiled: what `Model.compile` made; `serves` is true of it.
        numbers: of the run.

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
    def serves(compiled: Compiled, numbers: Numbers) -> bool:
        """Whether loss and metrics are functions of outputs and targets that give means over the data."""
        losses = compiled.losses
        if losses is None or losses.keys is not None or not numbers.metrics.are_by_name:
            return False
        loss = losses.losses[0]
        is_mean = loss is not None and loss.may_wait and loss.is_mean_over_data
        return is_mean and not torch.are_deterministic_algorithms_enabled()

    def begin_epoch(self) -> None:
        """Forgets what waits."""
        self.failed_at: int | None = None
        self._waiting: list[Unjudged] = []
        # How batches look that may wait, and how many of them.
        self._like: object = None
        self._most = 0

    def take(self, batch: Any, index: int) -> bool:
        """Takes a batch in; False where it is none of (x, y) with one tensor y, and nothing was done."""
        x, y, sample_weight = batches_of.unpack(batch.on_host if isinstance(batch, batches_of.Placed) else batch)
        if sample_weight is not None or not isinstance(y, Tensor) or y.dim() == 0:
            self.settle()
            return False
        if self._transfer.is_needed:
            x, y, _ = batches_of.unpack(self._transfer(batch).on_device)
        output = batches_of.forward(self._forward, x)
        if isinstance(output, Tensor) and (output.shape, y.shape, y.dtype) == self._like:
            if len(self._waiting) >= self._most:  # not before: the latest batch's own loss may be asked for
                self.settle()
            target = y if self._numbers.owns_targets else y.clone()
            self._waiting.append(Unjudged(output.clone(), target, index))
            return True
        self.settle()
        outcome = self._judge(output, y)
        self._numbers.add(outcome, index, batch)
        self._most = self._room(outcome, y, batch)
        self._like = (output.shape, y.shape, y.dtype) if self._most > 1 else None
        return True

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
        outputs, targets, indices = zip(*waiting, strict=True)
        outcome = self._as_one(outputs, targets)
        if outcome is not None:
            self._numbers.add(outcome, indices[0])
            return
        for output, target, index in waiting:
            self.failed_at = index
            self._numbers.add(self._judge(output, target), index)
        self.failed_at = None

    def _as_one(self, outputs: tuple[Tensor, ...], targets: tuple[Tensor, ...]) -> Outcome | None:
        """None where the loss refuses a batch, or on the CPU is not finite; an accelerator is not asked."""
        try:
            outcome = self._judge(torch.cat(outputs), torch.cat(targets))
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
                *others, (output, target, index) = waiting
                self._waiting = others
                self.settle()
                self._numbers.add(self._judge(output, target), index)
            yield
        finally:
            self._numbers.load_state_dict(before)
            self._waiting = waiting

    def _outcome(self, output: Any, y: Tensor) -> Outcome:
        loss = self._loss
        assert loss is not None  # it serves
        target = loss.fit_target(output, y)
        return Outcome([loss(output, target, len(y))], [output], [target], None, {}, len(y))
