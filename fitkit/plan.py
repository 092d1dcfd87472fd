"""What a fit would do, in numbers, before it does anything: `Model.plan` gathers it, this file counts and shows it.

Nothing here trains, draws or reads a batch. What a run is made of is decided in preparation.py and flags.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from fitkit.callbacks import Callback, EarlyStopping, TerminateOnNaN, Timer
from fitkit.callbacks.hooks import HOOKS, HookTable
from fitkit.callbacks.monitor import MonitorCallback
from fitkit.computation import Compiled
from fitkit.data import EpochPlan
from fitkit.loop import FitRun
from fitkit.rehearsal import Rates, may_do_anything, rehearse
from fitkit.steps import trained_parameters


@final
@dataclass(frozen=True)
class Windows:
    """How batches make optimizer steps from an epoch on.

    Attributes:
        first_epoch: 0-based.
        batches: that make one step.
        steps: in an epoch; None where the data does not tell its length.
        samples: in a step; None where the data does not tell.
        last_batches: that make the epoch's last step.
        last_samples: in the epoch's last step.
    """

    first_epoch: int
    batches: int
    steps: int | None = None
    samples: int | None = None
    last_batches: int | None = None
    last_samples: int | None = None

    def __str__(self) -> str:
        short = self.steps is not None and (self.last_batches, self.last_samples) != (self.batches, self.samples)
        if short and self.steps == 1:
            return _amount(self.last_batches, self.last_samples)
        last = f"; the last: {_amount(self.last_batches, self.last_samples)}" if short else ""
        return _amount(self.batches, self.samples) + last


@final
@dataclass(frozen=True)
class Plan:
    """What a fit would do if it ran to its last epoch. Printed, it is a table.

    A number is None where the data does not tell its length. Steps are those of a run in which every window has a
    target and, with a GradScaler, none is skipped; a ``training_step`` that trains by itself makes its own.

    Attributes:
        epochs: the 0-based epochs, in full or, in a run that goes on from a file, the rest of them.
        may_end_before: the callbacks that may end the run before its last epoch.
        resumed_from: the file that the run goes on from.
        batches_per_epoch: training batches in a whole epoch.
        batch_size: samples in a training batch.
        last_batch_size: samples in the last training batch of an epoch.
        micro_batch_size: the argument: samples that go through the module at a time.
        windows: how batches make steps, one entry for each number of accumulated batches.
        batches: training batches in the run.
        steps: optimizer steps in the run.
        validation_batches: batches in one validation; None also where there is no validation.
        validations: how many validations there are.
        device: where the module is.
        precision: that of compile.
        parameters: numbers in the module.
        trainable_parameters: those among them that the optimizer has and that are not frozen.
        learning_rates: at the first and at the last step.
        hooks: by hook, who answers it, in the order of the calls.

    Example:
        >>> import torch, fitkit
        >>> model = fitkit.Model(torch.nn.Linear(4, 1), device="cpu")
        >>> model.compile(optimizer="sgd", loss="mse", learning_rate=0.1)
        >>> plan = model.plan(torch.randn(100, 4), torch.randn(100, 1), epochs=2, accumulate_grad_batches=3, verbose=0)
        >>> plan.batches, plan.steps, plan.windows[0].last_samples
        (8, 4, 4)
    """

    epochs: range
    may_end_before: tuple[str, ...]
    resumed_from: str | None
    batches_per_epoch: int | None
    batch_size: int | None
    last_batch_size: int | None
    micro_batch_size: int | str | None
    windows: tuple[Windows, ...]
    batches: int | None
    steps: int | None
    validation_batches: int | None
    validations: int
    device: str
    precision: str
    parameters: int
    trainable_parameters: int
    learning_rates: Rates
    hooks: Mapping[str, tuple[str, ...]]

    def __str__(self) -> str:
        return f"{self._table('simple', self._rows())}\n\n{self._table('simple', self._hook_rows(), _HOOK_HEADERS)}"

    def _repr_html_(self) -> str:
        """The tables, for notebooks."""
        return self._table("html", self._rows()) + self._table("html", self._hook_rows(), _HOOK_HEADERS)

    def _table(self, style: str, rows: Sequence[Sequence[str]], headers: Sequence[str] = ()) -> str:
        # Here, since importing it takes longer than the rest of this file's work.
        from tabulate import tabulate

        return str(tabulate(rows, headers, tablefmt=style, disable_numparse=True))

    def _rows(self) -> list[tuple[str, str]]:
        rows = [
            ("Epochs", self._shown_epochs()),
            ("Batches in an epoch", self._shown_batches()),
            *(("Optimizer steps in an epoch" + self._since(each), _count(each.steps)) for each in self.windows),
            *(("A step" + self._since(each), str(each)) for each in self.windows),
            ("Batches and steps in all", f"{_count(self.batches)} and {_count(self.steps)}"),
            ("Validations", self._shown_validations()),
            ("Device and precision", f"{self.device}, {self.precision}"),
            ("Trainable parameters", f"{self.trainable_parameters:,} of {self.parameters:,}"),
            ("Learning rate", self._shown_rates()),
        ]
        if self.micro_batch_size is not None:
            rows.insert(2, ("Samples at a time", str(self.micro_batch_size)))
        if self.resumed_from is not None:
            rows.insert(1, ("Goes on from", self.resumed_from))
        return rows

    def _hook_rows(self) -> list[tuple[str, str]]:
        return [(hook, ", ".join(names)) for hook, names in self.hooks.items()]

    def _shown_epochs(self) -> str:
        if not self.epochs:
            return "none: there is nothing left to do"
        count = f"{self.epochs[0] + 1} to {self.epochs[-1] + 1}" if len(self.epochs) > 1 else str(self.epochs[0] + 1)
        ended = f"; {' or '.join(self.may_end_before)} may end it before" if self.may_end_before else ""
        return count + ended

    def _shown_batches(self) -> str:
        sizes = "" if self.batch_size is None else f" of {_samples(self.batch_size)}"
        if self.last_batch_size != self.batch_size and self.batches_per_epoch != 1:
            sizes += f"; the last: {self.last_batch_size}"
        return _count(self.batches_per_epoch) + sizes

    def _since(self, windows: Windows) -> str:
        return "" if len(self.windows) == 1 else f", from epoch {windows.first_epoch + 1}"

    def _shown_validations(self) -> str:
        if not self.validations:
            return "none"
        return f"{self.validations}, each of {_batches(self.validation_batches)}"

    def _shown_rates(self) -> str:
        rates = self.learning_rates
        if rates.first is None:
            return rates.remark
        if rates.last is None:
            return f"{rates.first:g} at the first step; then {rates.remark}"
        constant = f"{rates.first:g} at the first step, {rates.last:g} at the last"
        return f"{constant}, {rates.remark}" if rates.remark else constant


_HOOK_HEADERS = ("Hook", "Answered by")


def make_plan(run: FitRun, compiled: Compiled) -> Plan:
    """Counts what a run would do, from where it begins or goes on."""
    flags, batches, validation = run.flags, run.batches, run.validation
    state, path = run.progress.saved or (None, None)
    begun = {} if state is None else state["run"]
    epochs = range(begun.get("epoch", flags.initial_epoch), 0 if begun.get("stop") else flags.last_epoch)
    done = _Done.of(begun)
    starts = [epoch for epoch in epochs if epoch == epochs[0] or flags.window(epoch) != flags.window(epoch - 1)]
    sizes = batches.sizes or (None, None)

    def steps_in(epoch: int) -> int | None:
        window = flags.window(epoch)
        whole = None if batches.length is None else -(-batches.length // window)
        return whole if whole is None or epoch != epochs[0] else whole - done.steps(batches.length, window)

    steps = [steps_in(epoch) for epoch in epochs]
    left = None if batches.length is None else batches.length * len(epochs) - done.batches(batches.length)
    parameters = list(compiled.module.parameters())
    rates = Rates(None, None, "as the file has it")
    if state is None:
        optimizer = compiled.optimizer
        rates = Rates(None, None, "none") if optimizer is None else rehearse(optimizer, run.callbacks, epochs, steps_in)
    return Plan(
        epochs=epochs,
        may_end_before=tuple(_shown(each) for each in run.callbacks if _may_stop(each)),
        resumed_from=None if path is None else str(path),
        batches_per_epoch=batches.length,
        batch_size=sizes[0],
        last_batch_size=sizes[1],
        micro_batch_size=flags.micro_batch_size,
        windows=tuple(_windows(epoch, flags.window(epoch), batches) for epoch in starts),
        batches=left if epochs else 0,
        steps=None if None in steps else sum(count or 0 for count in steps),
        validation_batches=None if validation is None else validation.batches.length,
        validations=0 if validation is None else sum(map(flags.validates, epochs)) - done.validations(flags, epochs),
        device=str(compiled.device),
        precision=compiled.precision,
        parameters=sum(parameter.numel() for parameter in parameters),
        trainable_parameters=sum(parameter.numel() for parameter in trained_parameters(compiled)),
        learning_rates=rates,
        hooks=_answers(run.hooks),
    )


@final
@dataclass(frozen=True)
class _Done:
    """What of its first epoch a run that goes on has behind it."""

    stage: str = "begin"
    given: int = 0

    @classmethod
    def of(cls, begun: Mapping[str, Any]) -> _Done:
        return cls(begun["stage"], begun["data"]["given"]) if begun else cls()

    def batches(self, length: int) -> int:
        return {"begin": 0, "train": self.given}.get(self.stage, length)

    def steps(self, length: int | None, window: int) -> int:
        done = self.batches(length or 0)
        return -(-done // window) if done == length else done // window

    def validations(self, flags: Any, epochs: range) -> int:
        return int(self.stage == "end" and bool(epochs) and flags.validates(epochs[0]))


def _windows(first_epoch: int, window: int, batches: EpochPlan) -> Windows:
    size, last_size = batches.sizes or (None, None)
    samples = None if size is None else size * window
    if batches.length is None:
        return Windows(first_epoch, window, samples=samples)
    steps = -(-batches.length // window)
    last = batches.length - (steps - 1) * window
    last_samples = None if size is None or last_size is None else size * (last - 1) + last_size
    return Windows(first_epoch, window, steps, samples, last, last_samples)


def _answers(hooks: HookTable) -> dict[str, tuple[str, ...]]:
    answers = {name: tuple(type(owner).__name__ for owner in hooks.owners(name)) for name in HOOKS}
    return {name: owners for name, owners in answers.items() if owners and "predict" not in name}


def _may_stop(callback: Callback) -> bool:
    """Whether it may set stop_training: those of fitkit that do, and whatever is of the user's own."""
    return may_do_anything(callback) or isinstance(callback, (EarlyStopping, TerminateOnNaN, Timer))


def _shown(callback: Callback) -> str:
    return callback.state_key if isinstance(callback, MonitorCallback) else type(callback).__name__


def _amount(batches: int | None, samples: int | None) -> str:
    return _batches(batches) if samples is None else f"{_batches(batches)}, {_samples(samples)}"


def _batches(count: int | None) -> str:
    return f"{_count(count)} batch{'' if count == 1 else 'es'}"


def _samples(count: int) -> str:
    return f"{count} sample{'' if count == 1 else 's'}"


def _count(count: int | None) -> str:
    return "?" if count is None else str(count)
