"""What takes one process's share of a batch to a step, and what brings the processes to one mind between steps.

How gradients come together is in synchronisation.py, what processes tell each other in distributed.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, final

from fitkit._types import ModelProtocol, Step
from fitkit.batch import Share
from fitkit.distributed import any_of, gather
from fitkit.steps import PredictStep, TrainStep


class Skipping(Protocol):
    """What is told of a batch of which this process has no sample."""

    def skip(self, index: int) -> None: ...

    def stand_in(self, batch: Any, index: int, /) -> None: ...


@final
class SharedStep:
    """Takes the share of a batch to a step.

    Args:
        step: what takes a batch, whole or in parts.
        skipping: what is told of batches without a sample: most often the same.
        train: the training step; None where nothing is trained.
    """

    def __init__(self, step: Step, skipping: Skipping, train: TrainStep | None = None) -> None:
        self._step = step
        self._skipping = skipping
        self._together = None if train is None else train.together
        # The batches of which this process has a part, by index.
        self.taken: list[int] = []

    @property
    def logs(self) -> Any:
        """Those of the step."""
        return self._step.logs

    def __call__(self, share: Share, index: int) -> None:
        if self._together is not None:
            self._together.begin_batch(share)
        if share.samples:
            self.taken.append(index)
            self._step(share.batch, index)
        elif share.batch is not None:
            self._skipping.stand_in(share.batch, index)
        else:
            self._skipping.skip(index)

    def finish(self) -> None:
        """Ends the epoch."""
        self._step.finish()


def taking_shares(step: Step, train: TrainStep) -> Step:
    """What takes a batch, or the share of one where processes share it, to the training step."""
    return step if train.processes is None else SharedStep(step, train, train)


@final
class Agreement:
    """Hooks after all others, by which a stop in any process stops all of them at the same batch.

    Args:
        model: whose ``stop_training`` it is.
        at_batches: whether anything may stop the run between two batches: if not, no batch waits for the others.
    """

    def __init__(self, model: ModelProtocol, *, at_batches: bool) -> None:
        self._model = model
        if at_batches:
            self.on_train_batch_end = self._agree

    def on_train_begin(self, logs: Mapping[str, float] | None = None) -> None:
        """Agrees whether there is anything to train."""
        self._agree()

    def on_epoch_end(self, epoch: int, logs: Mapping[str, float] | None = None) -> None:
        """Agrees whether the run goes on."""
        self._agree()

    def _agree(self, *_: object) -> None:
        self._model.stop_training = any_of(self._model.stop_training)


def joined_outputs(step: PredictStep, indices: list[int]) -> list[Any]:
    """The outputs of all processes, in the order of the samples, on each of them.

    Args:
        step: of this process.
        indices: of the batches that it had a part of.
    """
    everywhere = gather(list(zip(indices, step.outputs, strict=True)))
    found = [(index, rank, output) for rank, outputs in enumerate(everywhere) for index, output in outputs]
    return [output for _, _, output in sorted(found, key=lambda each: each[:2])]
