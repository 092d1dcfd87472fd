"""Batches that do not fit into memory at once: split into parts that make one step together.

A part is to the training step what a batch is to a window of accumulated gradients; so the step is that of the
whole batch, apart from what a module computes over a batch itself (BatchNorm's statistics, dropout's masks).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch

from fitkit import batch as batches_of
from fitkit.callbacks.display import print_line
from fitkit.flags import TrainingFlags
from fitkit.logs import BatchLogs
from fitkit.sharding import Sharding
from fitkit.steps import TrainStep
from fitkit.synchronisation import Synchronisation


def split_by(flags: TrainingFlags, step: TrainStep) -> TrainStep | FixedParts | FittingParts:
    """What takes a batch to the training step, as micro_batch_size says."""
    if flags.micro_batch_size is None:
        return step
    return FittingParts(step) if isinstance(flags.micro_batch_size, str) else FixedParts(step, flags.micro_batch_size)


def report_size(flags: TrainingFlags, fitting: FittingParts | None, params: dict[str, Any]) -> None:
    """Notes what a run's micro_batch_size was, in History's params, and says in a line what "auto" found.

    Args:
        flags: the checked arguments.
        fitting: what found the size, with "auto"; otherwise None.
        params: facts about the run; "micro_batch_size" becomes the samples in a part, None where no batch was split.
    """
    params["micro_batch_size"] = flags.micro_batch_size if fitting is None else fitting.size
    if fitting is not None and params["verbose"]:
        found = "batches fit whole" if fitting.size is None else f"parts of at most {fitting.size} samples fit"
        print_line(f'micro_batch_size="auto": {found} into the memory')


@final
class FixedParts:
    """Splits batches into parts of at most so many samples.

    Args:
        step: what each part goes through.
        size: samples in a part.
    """

    def __init__(self, step: TrainStep, size: int) -> None:
        self.logs: BatchLogs = step.logs
        self.size = size
        self._step = step

    def __call__(self, batch: Any, index: int) -> None:
        parts = batches_of.split(batch, self.size)
        together = self._step.together
        # The processes that share a sharded module pass through it equally often.
        passes = together.parts(self.size) if isinstance(together, Sharding) else len(parts)
        for position, part in enumerate(parts, start=1):
            self._step(part, index, parts=passes, is_last=position == passes)
        if len(parts) < passes:
            self._step.stand_in(parts[-1], index)

    def finish(self) -> None:
        """Ends the epoch."""
        self._step.finish()


@final
class FittingParts:
    """Splits batches into halves, quarters and so on, as far as memory asks for it.

    When a part does not fit, everything it changed is put back (random generators, buffers, gradients) and it is
    taken again in halves. The size that fits is kept for later batches.

    Args:
        step: what each part goes through.
    """

    def __init__(self, step: TrainStep) -> None:
        self.logs: BatchLogs = step.logs
        self.size: int | None = None
        self._step = step
        if isinstance(step.together, Synchronisation):
            step.together.in_one_pass = False

    def __call__(self, batch: Any, index: int) -> None:
        waiting = self._split(batch)
        while waiting:
            if self._fits(waiting[0], index, len(waiting)):
                waiting.pop(0)
            else:
                waiting = [part for larger in waiting for part in self._split(larger)]
        self._step.end_batch()

    def state_dict(self) -> dict[str, Any]:
        """The size that fits, as far as it is known."""
        return {"size": self.size}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begins with a size that was found before."""
        self.size = state["size"]

    def _split(self, batch: Any) -> list[Any]:
        return [batch] if self.size is None else batches_of.split(batch, self.size)

    def _fits(self, part: Any, index: int, parts: int) -> bool:
        """Takes the part to the step; where memory runs out, puts everything back and halves the size."""
        put_back = self._step.keep()
        try:
            # A module may work in place on what it is given, so it is given a copy.
            self._step(batches_of.copied(part), index, parts=parts, is_last=False)
            return True
        except torch.OutOfMemoryError as error:
            samples = batches_of.samples_of(part)
            if samples == 1:
                raise torch.OutOfMemoryError(
                    'Memory ran out on a single sample, so micro_batch_size="auto" cannot split further. Use a smaller '
                    'module or input, or precision="bf16-mixed".'
                ) from error
            self.size = -(-samples // 2)
        # Only here, when the failed pass is gone, is its memory free.
        put_back()
        if self._step.device.type != "cpu":
            torch.get_device_module(self._step.device).empty_cache()
        return False

    def finish(self) -> None:
        """Ends the epoch."""
        self._step.finish()
