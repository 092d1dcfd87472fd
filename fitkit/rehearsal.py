"""The learning rates of a run, found by letting the callbacks that set them run through it without a module.

Copies of the callbacks are given an optimizer that has the groups of the real one and steps over nothing. What cannot
be known before the run, because it follows from measured numbers or from code of the user's, is said in words.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, final

import torch
from torch import nn
from torch.optim import Optimizer

from fitkit.callbacks import Callback, Every, LambdaCallback, LearningRateScheduler, LRScheduler, ReduceLROnPlateau
from fitkit.optimization import learning_rates

# A step of a schedule takes some microseconds; more steps than this are not run through.
MOST_STEPS = 200_000


@final
@dataclass(frozen=True)
class Rates:
    """The learning rates of the first parameter group over a run.

    Attributes:
        first: at the first optimizer step.
        last: at the last one, if the run takes all of its epochs; None where it is not known.
        remark: why it is not known, or who else may change it; empty where nobody may.
    """

    first: float | None
    last: float | None
    remark: str = ""


@final
class Understudy(Optimizer):
    """An optimizer with the groups and settings of another one, over nothing: its steps change no weight.

    Args:
        optimizer: whose groups.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        groups = [
            {
                "params": [nn.Parameter(torch.zeros(()))],
                **{name: copy.deepcopy(value) for name, value in group.items() if name != "params"},
            }
            for group in optimizer.param_groups
        ]
        super().__init__(groups, dict(optimizer.defaults))

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Counts as a step for schedulers, and is none."""


def rehearse(
    optimizer: Optimizer,
    callbacks: Sequence[Callback],
    epochs: range,
    steps_in: Callable[[int], int | None],
) -> Rates:
    """The rates of a run over these epochs.

    Args:
        optimizer: the real one; it stays as it is.
        callbacks: of the run, in their order; they stay as they are.
        epochs: 0-based.
        steps_in: the optimizer steps in an epoch; None where the data does not tell.
    """
    now = learning_rates(optimizer)[0]
    measuring = [_shown(each) for each in callbacks if _follows_measurements(each)]
    unknown = [_shown(each) for each in callbacks if may_do_anything(each)]
    setting = [each for each in callbacks if _sets_rates(each)]
    remark = f"unless {' or '.join(unknown)} changes it" if unknown else ""
    counts = [steps_in(epoch) for epoch in epochs]
    by_step = any(isinstance(each, LRScheduler) and each.interval == "step" for each in setting)
    if not epochs:
        return Rates(None, None, "no step is made")
    why = ""
    if measuring:
        why = f"{' and '.join(measuring)} sets it by what it measures"
    elif by_step and None in counts:
        why = "the data does not tell how many steps there are"
    elif by_step and sum(count or 0 for count in counts) > MOST_STEPS:
        why = f"more than {MOST_STEPS} steps are not run through"
    if not setting:
        return Rates(now, None if why else now, why or remark)
    understudy = Understudy(optimizer)
    cast = [_copied(each, optimizer, understudy) for each in setting]
    with warnings.catch_warnings():
        # torch remarks that a scheduler does not know this optimizer's step; what it has to say of the real one, it
        # says in the run.
        warnings.simplefilter("ignore")
        first, last = _run(understudy, cast, epochs[:1] if why else epochs, [1] if why else counts)
    return Rates(first, None if why else last, why or remark)


def _run(
    understudy: Understudy, cast: Sequence[Any], epochs: range, counts: Sequence[int | None]
) -> tuple[float, float]:
    """The rates at the first and at the last step."""
    first: float | None = None
    last = 0.0
    for callback in cast:
        callback.on_train_begin({})
    for epoch, count in zip(epochs, counts, strict=True):
        for callback in cast:
            callback.on_epoch_begin(epoch, {})
        for _ in range(1 if count is None else count):
            last = learning_rates(understudy)[0]
            first = last if first is None else first
            understudy.step()
        for callback in cast:
            callback.on_epoch_end(epoch, {})
    for callback in cast:
        callback.on_train_end({})
    return last if first is None else first, last


def _copied(callback: Any, optimizer: Optimizer, understudy: Understudy) -> Any:
    """The callback as it would be at the beginning, over the understudy, and silent."""
    copied = copy.copy(callback)
    copied.model = SimpleNamespace(optimizer=understudy)
    copied.verbose = False
    if isinstance(callback, LRScheduler) and isinstance(callback.scheduler, torch.optim.lr_scheduler.LRScheduler):
        # What it has beside the optimizer is copied with all that it holds.
        copied.scheduler = copy.deepcopy(callback.scheduler, {id(optimizer): understudy})
    return copied


def _sets_rates(callback: Callback) -> bool:
    return isinstance(callback, LearningRateScheduler) or (
        isinstance(callback, LRScheduler) and not callback.has_monitor
    )


def _follows_measurements(callback: Callback) -> bool:
    return isinstance(callback, ReduceLROnPlateau) or (isinstance(callback, LRScheduler) and callback.has_monitor)


def may_do_anything(callback: Callback) -> bool:
    """Whether the code is somebody else's, which may set the rate, or stop the run, in any hook."""
    return isinstance(callback, (LambdaCallback, Every)) or not type(callback).__module__.startswith("fitkit.")


def _shown(callback: Callback) -> str:
    return type(callback).__name__
