"""The only epoch loop and the only batch loop, shared by fit, evaluate and predict.

What a run does, in order (indices are 0-based; a hook that no callback implements is never called)::

    fit:
        on_train_begin()
        for each epoch, until the last or until model.stop_training:
            on_epoch_begin(epoch)
            for each batch, until the last or until model.stop_training:
                on_train_batch_begin(batch)
                training step
                on_train_batch_end(batch, logs)
            if this epoch has a validation:
                evaluate
            on_epoch_end(epoch, logs)
        on_train_end(logs), or on_exception(error) when anything above raised

    evaluate:
        on_test_begin()
        for each batch:
            on_test_batch_begin(batch)
            test step
            on_test_batch_end(batch, logs)
        on_test_end(logs)

    predict:
        on_predict_begin()
        for each batch:
            on_predict_batch_begin(batch)
            prediction step
            on_predict_batch_end(batch, logs)
        on_predict_end()

The loop knows the order of things and when to stop. What happens to a batch is in steps.py, where batches come from
in data/, what callbacks do in callbacks/. A fit that goes on from a file (progress.py) enters its first epoch at
the stage at which the file was saved.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fitkit._types import ModelProtocol, Step
from fitkit.callbacks import EarlyStopping
from fitkit.callbacks.hooks import HookTable, finish
from fitkit.data import EpochPlan
from fitkit.device import kept_modes, kept_random_state
from fitkit.errors import NonFiniteLossError, add_note
from fitkit.flags import TrainingFlags
from fitkit.history import History
from fitkit.progress import Progress
from fitkit.steps import PredictStep, TestStep, TrainStep

Hook = Callable[..., Any]

# How many fits are going on here, one inside a callback of another counted as well.
_fits: ContextVar[int] = ContextVar("fits", default=0)


def is_fitting() -> bool:
    """Whether this is called from within a fit, of whichever Model: from a callback or a step."""
    return _fits.get() > 0


@dataclass(frozen=True)
class TestRun:
    """One evaluation: the step, its batches, who listens, and what takes a batch to the step."""

    __test__ = False  # not a test for pytest

    model: ModelProtocol
    step: TestStep
    batches: EpochPlan
    hooks: HookTable
    take_batch: Step


@dataclass(frozen=True)
class PredictRun:
    """One prediction: the step, its batches, who listens, and what takes a batch to the step."""

    model: ModelProtocol
    step: PredictStep
    batches: EpochPlan
    hooks: HookTable
    take_batch: Step


@dataclass(frozen=True)
class FitRun:
    """One fit: the training step, what takes a batch to it, the validation if there is one, who listens, what records.

    Where it is, and how it goes on from a file, is its progress.
    """

    model: ModelProtocol
    step: TrainStep
    batches: EpochPlan
    hooks: HookTable
    flags: TrainingFlags
    take_batch: Step
    validation: TestRun | None
    callbacks: Sequence[Any]
    progress: Progress
    history: History


def fit(run: FitRun) -> None:
    """Trains; the numbers go to the callbacks, of which the model's History is one."""
    model, hooks, flags, step, progress = run.model, run.hooks, run.flags, run.step, run.progress
    with kept_modes(model.module):
        with _counted(), _reported_errors(hooks, model), _located_errors(run), _released(step):
            # A root module in eval mode is one that nobody prepared; a submodule in eval mode is a frozen one.
            if not model.module.training:
                model.module.train()
            for hook in hooks.on_train_begin:
                hook({})
            # A run that goes on from a file may begin at any stage of an epoch.
            progress.restore()
            modes = [(child, child.training) for child in model.module.modules()]
            for epoch in range(progress.epoch, flags.last_epoch):
                if progress.stage == "begin":
                    if model.stop_training:
                        break
                    modes = _training_modes(model.module, modes)
                    for hook in progress.begin_hooks(hooks.on_epoch_begin):
                        hook(epoch, {})
                    step.begin_epoch(flags.window(epoch), run.batches.length)
                    progress.move_on("train")
                if progress.stage == "train":
                    before, after = hooks.on_train_batch_begin, hooks.on_train_batch_end
                    with contextlib.closing(run.batches.epoch()) as batches:
                        run_batches(batches, run.take_batch, before, after, model, run.batches.given)
                    # The only read of the training's numbers; each is a plain float from here on.
                    logs, first_bad = step.epoch_logs()
                    _judge_losses(logs["loss"], first_bad, epoch, run)
                    progress.move_on("validate", logs)
                if progress.stage == "validate" and run.validation is not None and flags.validates(epoch):
                    progress.begin_validation()
                    with kept_random_state(model.device):
                        validated = evaluate(run.validation)
                    progress.logs.update({f"val_{name}": value for name, value in validated.items()})
                progress.move_on("end")
                for hook in progress.end_hooks(hooks.on_epoch_end):
                    hook(epoch, progress.logs)
                progress.move_on("begin")
            model.history.stop_reason = model.history.stop_reason or _stop_reason(run)
        finish(hooks.on_train_end, progress.logs)


def evaluate(run: TestRun) -> dict[str, float]:
    """Tests; returns the means over all the data by name."""
    model, hooks, step = run.model, run.hooks, run.step
    with kept_modes(model.module):
        model.module.eval()
        for hook in hooks.on_test_begin:
            hook({})
        before, after = hooks.on_test_batch_begin, hooks.on_test_batch_end
        step.begin_epoch()
        with _without_gradients(run, before, after), contextlib.closing(run.batches.epoch()) as batches:
            run_batches(batches, run.take_batch, before, after)
        logs = step.epoch_logs()
        finish(hooks.on_test_end, logs)
    return logs


def predict(run: PredictRun) -> list[Any]:
    """Predicts; returns the outputs of each batch on the CPU."""
    model, hooks, step = run.model, run.hooks, run.step
    with kept_modes(model.module):
        model.module.eval()
        for hook in hooks.on_predict_begin:
            hook({})
        before, after = hooks.on_predict_batch_begin, hooks.on_predict_batch_end
        with _without_gradients(run, before, after), contextlib.closing(run.batches.epoch()) as batches:
            run_batches(batches, run.take_batch, before, after)
        finish(hooks.on_predict_end, {})
    return step.outputs


def run_batches(
    batches: Iterator[Any],
    step: Step,
    before: list[Hook],
    after: list[Hook],
    stoppable: ModelProtocol | None = None,
    first: int = 0,
) -> None:
    """The batch loop: hooks, step, hooks; ends early when a training is told to stop. It counts from first."""
    for index, batch in enumerate(batches, first):
        for hook in before:
            hook(index, {})
        step(batch, index)
        for hook in after:
            hook(index, step.logs)
        if stoppable is not None and stoppable.stop_training:
            break
    step.finish()


def _without_gradients(
    run: TestRun | PredictRun, before: list[Hook], after: list[Hook]
) -> contextlib.AbstractContextManager[None]:
    """No gradients, once for all batches: where the user's code may run between them, a step does it for each."""
    is_alone = not before and not after and run.batches.data.self_contained
    return torch.no_grad() if is_alone else contextlib.nullcontext()


@contextlib.contextmanager
def reported_errors(hooks: HookTable) -> Iterator[None]:
    """Tells callbacks of an error, Ctrl-C included, in place of the end of the run; then it goes on its way."""
    try:
        yield
    except BaseException as error:
        finish(hooks.on_exception, error, cause=error)
        raise


@contextlib.contextmanager
def _reported_errors(hooks: HookTable, model: ModelProtocol) -> Iterator[None]:
    try:
        with reported_errors(hooks):
            yield
    except BaseException as error:
        model.history.stop_reason = "interrupted" if isinstance(error, KeyboardInterrupt) else "error"
        raise


@contextlib.contextmanager
def _located_errors(run: FitRun) -> Iterator[None]:
    """Adds to an error where in the run it came up."""
    try:
        yield
    except NonFiniteLossError:
        raise  # it says so by itself
    except Exception as error:
        if run.progress.saved is not None:
            raise  # the run has not come to the place that it goes on from
        epoch, plan = run.progress.epoch, run.batches
        place, failed_at = f"epoch {epoch + 1} (index {epoch})", None
        if run.progress.stage == "validate" and run.validation is not None:
            place, plan, failed_at = f"the validation of {place}", run.validation.batches, run.validation.step.failed_at
        if run.progress.stage in ("train", "validate"):
            batch = plan.given if plan.failed else max(plan.given - 1, 0)
            batch = batch if failed_at is None else failed_at
            place += f", batch {batch + 1} (index {batch})"
        add_note(error, f"This came up in {place}.")
        raise


def _training_modes(module: nn.Module, before: list[tuple[nn.Module, bool]]) -> list[tuple[nn.Module, bool]]:
    """The modes that the next epoch trains in; those of before where a hook has left the whole module in eval mode."""
    if not module.training:
        for child, training in before:
            child.training = training
    return [(child, child.training) for child in module.modules()]


@contextlib.contextmanager
def _counted() -> Iterator[None]:
    token = _fits.set(_fits.get() + 1)
    try:
        yield
    finally:
        _fits.reset(token)


@contextlib.contextmanager
def _released(step: TrainStep) -> Iterator[None]:
    """Leaves no gradient behind, however the run ends."""
    try:
        yield
    finally:
        step.release()


def _judge_losses(loss: float, first_bad: int | None, epoch: int, run: FitRun) -> None:
    """What on_nonfinite says about an epoch whose training loss is NaN or infinite."""
    stops = any(callback.stops_on_nonfinite for callback in run.callbacks)
    action = "stop" if stops else run.flags.on_nonfinite
    if (first_bad is None and math.isfinite(loss)) or action == "ignore":
        return
    if action == "stop":
        run.model.stop_training = True
        run.model.history.stop_reason = "nonfinite"
        return
    if first_bad is None:
        raise NonFiniteLossError(
            f"Expected targets in epoch {epoch + 1} (index {epoch}), received batches of which none had any: all are "
            'ignored, or weigh nothing. Check the targets; on_nonfinite="ignore" records NaN instead.',
            epoch=epoch,
        )
    causes = (run.step.explain_nonfinite(), run.batches.data.nonfinite())
    raise NonFiniteLossError(
        f"Expected finite training losses, received NaN or infinity in epoch {epoch + 1} (index {epoch}), for the "
        f"first time in batch {first_bad + 1} (index {first_bad}). {' '.join(filter(None, causes))} Lower the learning "
        'rate, clip the gradients with gradient_clip_val=1.0, or check the data; on_nonfinite="stop" or "ignore" goes '
        "on without this error.",
        epoch=epoch,
        batch=first_bad,
    )


def _stop_reason(run: FitRun) -> str:
    if not run.model.stop_training:
        return "epochs"
    stopped = any(isinstance(each, EarlyStopping) and each.stopped_epoch is not None for each in run.callbacks)
    return "early_stopping" if stopped else "stop_training"
