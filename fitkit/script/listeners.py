"""The callbacks of a run as a script writes them: schedules of the learning rate, and early stopping.

Those that only watch are left out, and named; of those that change what is trained, the ones below can be written.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, final

import torch
from torch.optim import Optimizer

from fitkit.callbacks import (
    BackupAndRestore,
    Callback,
    CSVLogger,
    EarlyStopping,
    LearningRateScheduler,
    LRScheduler,
    MLflowLogger,
    ModelCheckpoint,
    ProgressBar,
    TensorBoard,
    WandbLogger,
)
from fitkit.optimization import learning_rates
from fitkit.rehearsal import Understudy
from fitkit.script.expressions import fold, importable, literal, own_name, scheduler_expression, unknown
from fitkit.script.template import STOPPING, render

# What these do leaves no trace on the weights.
WATCHING = (BackupAndRestore, CSVLogger, MLflowLogger, ModelCheckpoint, ProgressBar, TensorBoard, WandbLogger)
# A longer list of rates is none to be read.
MOST_RATES = 200


@final
@dataclass
class Listeners:
    """What of the callbacks stands in a script.

    Attributes:
        left_out: their names.
        schedulers: the lines that make schedulers.
        by_step: the lines after an optimizer step.
        by_epoch: the lines after an epoch.
        plateau: the lines after a validation.
        constants: lines that the script begins with.
        rate: the expression of an epoch's learning rate, where a function sets it.
        stopping: the early stopping, None where there is none.
        imports: what is imported from where it lives.
    """

    left_out: list[str] = field(default_factory=list)
    schedulers: list[str] = field(default_factory=list)
    by_step: list[str] = field(default_factory=list)
    by_epoch: list[str] = field(default_factory=list)
    plateau: list[str] = field(default_factory=list)
    constants: list[str] = field(default_factory=list)
    rate: str | None = None
    stopping: EarlyStopping | None = None
    imports: list[tuple[str, str]] = field(default_factory=list)


def listeners_of(callbacks: Sequence[Callback], optimizer: Optimizer, epochs: range) -> Listeners:
    """Sorts a run's callbacks into what a script does for them.

    Raises:
        ValueError: one that a script cannot say.
    """
    found = Listeners()
    for callback in callbacks:
        name = type(callback).__name__
        if isinstance(callback, WATCHING):
            found.left_out.append(name)
        elif isinstance(callback, LRScheduler):
            _add_scheduler(found, callback, optimizer)
        elif isinstance(callback, LearningRateScheduler) and found.rate is None:
            _add_rates(found, callback, optimizer, epochs)
        elif isinstance(callback, EarlyStopping) and found.stopping is None:
            if callback.monitor not in ("loss", "val_loss"):
                raise unknown("callbacks", f"{callback.state_key}", 'A script measures "loss" and "val_loss" alone.')
            found.stopping = callback
        elif isinstance(callback, (EarlyStopping, LearningRateScheduler)):
            raise unknown("callbacks", f"a second {name}", "Pass one of them.")
        else:
            raise unknown("callbacks", f"{name}, which may do anything", "Leave it out, and write it into the script.")
    if found.rate is not None and found.schedulers:
        raise unknown("callbacks", "LearningRateScheduler beside LRScheduler", "Pass one of the two.")
    return found


def _add_scheduler(found: Listeners, callback: LRScheduler, optimizer: Optimizer) -> None:
    given = callback.scheduler

    def make(understudy: Optimizer) -> Any:
        if isinstance(given, torch.optim.lr_scheduler.LRScheduler):
            return copy.deepcopy(given, {id(optimizer): understudy})
        return given(understudy)

    if isinstance(given, torch.optim.lr_scheduler.LRScheduler) and given.last_epoch > 0:
        raise unknown("callbacks", "LRScheduler with a scheduler that has stepped", "Pass a callable that makes it.")
    name = "scheduler" if not found.schedulers else f"scheduler_{len(found.schedulers) + 1}"
    function = importable(given)
    text = scheduler_expression(optimizer, make)
    if text is None and function is not None:
        found.imports.append(function)
        text = f"{own_name(function[1])}(optimizer)"
    if text is None:
        raise unknown(
            "callbacks",
            "LRScheduler with a scheduler that a script cannot make anew",
            "Write the function that makes it in a file that can be imported.",
        )
    found.schedulers.append(fold(f"{name} = {text}"))
    if callback.interval == "step":
        found.by_step.append(f"{name}.step()")
    elif not callback.has_monitor:
        found.by_epoch.append(f"{name}.step()")
    elif callback.monitor in ("loss", "val_loss"):
        where = found.by_epoch if callback.monitor == "loss" else found.plateau
        where.append(f"{name}.step({callback.monitor})")
    else:
        raise unknown("callbacks", f"{callback.state_key}", 'A script measures "loss" and "val_loss" alone.')


def _add_rates(found: Listeners, callback: LearningRateScheduler, optimizer: Optimizer, epochs: range) -> None:
    """The rates themselves: a function of the epoch can be asked in advance."""
    if len(epochs) > MOST_RATES or len(optimizer.param_groups) > 1:
        raise unknown("callbacks", "LearningRateScheduler over many epochs or groups", "Pass LRScheduler.")
    understudy, asked = Understudy(optimizer), copy.copy(callback)
    asked.model, asked.verbose = SimpleNamespace(optimizer=understudy), False
    rates = []
    for epoch in epochs:
        asked.on_epoch_begin(epoch)
        rates.append(learning_rates(understudy)[0])
    found.constants.append(fold(f"RATES = {literal(rates)}"))
    found.rate = "RATES[epoch]" if epochs[:1] == range(1) else f"RATES[epoch - {epochs.start}]"


def stopping_text(stopping: EarlyStopping, least_epochs: int) -> str:
    """The lines that judge an epoch."""
    monitor, less = stopping.monitor, stopping.direction == "min"
    sign, margin = ("<", "+") if less else (">", "-")
    value = f"{monitor} {margin} {stopping.min_delta!r}" if stopping.min_delta else monitor
    words = {
        "baseline": stopping.baseline is not None,
        "restores": stopping.restore_best_weights,
        "least": least_epochs > 1,
    }
    values = {
        "monitor": monitor,
        "improved": f"{value} {sign} best",
        "beats": f"{value} {sign} {stopping.baseline!r}",
        "patience": str(max(stopping.patience, 1)),
        "least_epochs": str(least_epochs),
    }
    lines = render(STOPPING, words, values)
    if stopping.start_from_epoch == 0:
        return lines
    return f"if epoch >= {stopping.start_from_epoch}:\n" + "".join(f"    {line}\n" for line in lines.splitlines())
