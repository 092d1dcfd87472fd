"""Model.plan: what it counts is what fit then does, and it changes nothing."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SubsetRandomSampler, TensorDataset

import fitkit
from fitkit.callbacks import (
    Callback,
    EarlyStopping,
    Every,
    LambdaCallback,
    LearningRateScheduler,
    LRScheduler,
    ReduceLROnPlateau,
)
from fitkit.plan import Plan

X = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
Y = X[:, :1] - X[:, 1:2]


class Pairs(Dataset[Any]):
    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return X[index], Y[index]


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(zip(X, Y, strict=True))


class Counting(Callback):
    """What a run really did."""

    adds_to_logs = ()

    def __init__(self) -> None:
        super().__init__()
        self.batches = self.steps = self.validations = self.validation_batches = 0
        self.samples: list[int] = []
        self.rates: list[float] = []
        self._open = 0

    def on_train_begin(self, logs: Any = None) -> None:
        self.model.module.register_forward_pre_hook(self._count)
        self.model.optimizer.register_step_pre_hook(self._step)

    def _count(self, module: nn.Module, arguments: Any) -> None:
        if module.training:
            self._open += len(arguments[0])

    def _step(self, optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
        self.steps += 1
        self.samples.append(self._open)
        self._open = 0
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.batches += 1

    def on_test_begin(self, logs: Any = None) -> None:
        self.validations += 1
        self.validation_batches = 0

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        self.validation_batches += 1


def make_model() -> fitkit.Model:
    torch.manual_seed(1)
    model = fitkit.Model(nn.Linear(3, 1), device="cpu")
    model.compile("sgd", "mse", learning_rate=0.01)
    return model


DATA: dict[str, Callable[[], Any]] = {
    "arrays": lambda: (X, Y),
    "numpy": lambda: (X.numpy(), Y.numpy()),
    "tensor dataset": lambda: TensorDataset(X, Y),
    "dataset": Pairs,
    "stream": Stream,
    "loader": lambda: DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=True),
    "loader that drops": lambda: DataLoader(Pairs(), batch_size=8, drop_last=True),
    "loader of a part": lambda: DataLoader(Pairs(), batch_size=8, sampler=SubsetRandomSampler(range(20))),
    "loader with replacement": lambda: DataLoader(
        TensorDataset(X, Y), batch_size=8, sampler=RandomSampler(X, replacement=True, num_samples=21)
    ),
    "ready batches": lambda: [(X[:20], Y[:20]), (X[20:], Y[20:]), (X[:1], Y[:1])],
    "generator": lambda: ((X[index : index + 5], Y[index : index + 5]) for index in range(0, 50, 5)),
}
SIZED = [name for name in DATA if name not in ("stream", "generator")]
ARGUMENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 3},
    "accumulation by epoch": {"accumulate_grad_batches": {1: 2, 2: 5}},
    "a large window": {"accumulate_grad_batches": 100},
    "train percent": {"train_percent_check": 0.5, "accumulate_grad_batches": 2},
    "val percent": {"val_percent_check": 0.4, "validation_data": (X, Y), "validation_batch_size": 9},
    "overfit": {"overfit_pct": 0.3, "validation_data": (X, Y)},
    "steps": {"steps_per_epoch": 2},
    "validation": {"validation_data": (X, Y), "validation_freq": 2},
    "validation in a list": {"validation_data": DataLoader(Pairs(), batch_size=7), "validation_freq": [1, 3]},
    "validation steps": {"validation_data": Stream(), "validation_steps": 2},
    "micro-batches": {"micro_batch_size": 3, "accumulate_grad_batches": 2},
    "a later beginning": {"initial_epoch": 2},
    "nothing left": {"initial_epoch": 3},
    "at most": {"epochs": None, "max_nb_epochs": 2, "enable_early_stop": False},
    "clipping and norms": {"gradient_clip_val": 0.1, "track_grad_norm": 2},
}


def compare(make_data: Callable[[], Any], **arguments: Any) -> tuple[Plan, Counting]:
    """Plans a run, runs it, and compares all that a plan counts; what the data does not tell has to be None."""
    arguments = {"epochs": 3, "verbose": 0, **arguments}
    model, counting = make_model(), Counting()
    plan = model.plan(make_data(), **arguments, callbacks=[counting])
    model.fit(make_data(), **arguments, callbacks=[counting])
    assert list(plan.epochs) == model.history.epoch
    assert plan.batches in (None, counting.batches)
    assert plan.steps in (None, counting.steps)
    assert plan.validations == counting.validations
    assert plan.validation_batches in (None, counting.validation_batches) or not counting.validations
    return plan, counting


@pytest.mark.parametrize("arguments", ARGUMENTS)
@pytest.mark.parametrize("kind", SIZED)
def test_the_plan_of_sized_data_is_what_fit_does(kind: str, arguments: str) -> None:
    plan, counting = compare(DATA[kind], **ARGUMENTS[arguments])
    assert (plan.batches, plan.steps) == (counting.batches, counting.steps)
    if plan.batch_size is not None and counting.steps and kind != "ready batches":
        assert counting.samples[-1] == plan.windows[-1].last_samples
        largest = max(each.samples if each.steps > 1 else each.last_samples for each in plan.windows)  # type: ignore
        assert max(counting.samples) == largest


@pytest.mark.parametrize("arguments", ["plain", "accumulation", "validation", "validation steps"])
def test_what_unsized_data_does_not_tell_is_none(arguments: str) -> None:
    plan, counting = compare(DATA["stream"], batch_size=8, **ARGUMENTS[arguments])
    assert (plan.batches, plan.steps) == (None, None)
    assert counting.batches == 21


@pytest.mark.parametrize("kind", ["stream", "generator"])
def test_steps_per_epoch_make_unsized_data_countable(kind: str) -> None:
    plan, _ = compare(DATA[kind], steps_per_epoch=2, accumulate_grad_batches=3)
    assert (plan.batches, plan.steps) == (6, 3)


@pytest.mark.parametrize("kind", ["arrays", "tensor dataset", "dataset"])
@pytest.mark.parametrize("split", [0.1, 0.25, 0.7])
def test_a_split_is_counted(kind: str, split: float) -> None:
    plan, counting = compare(DATA[kind], validation_split=split, batch_size=7, accumulate_grad_batches=2)
    assert (plan.batches, plan.validation_batches) == (counting.batches, counting.validation_batches)


# ---------------------------------------------------------------------------------------------------------------------
# Learning rates.
# ---------------------------------------------------------------------------------------------------------------------

SCHEDULES: dict[str, Callable[[], list[Callback]]] = {
    "constant": list,
    "steps of epochs": lambda: [LRScheduler(lambda optimizer: lr_scheduler.StepLR(optimizer, 1, 0.5))],
    "one cycle": lambda: [
        LRScheduler(
            lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=50, cycle_momentum=False),
            interval="step",
        )
    ],
    "warmup and decay": lambda: [
        LRScheduler(
            lambda optimizer: lr_scheduler.ChainedScheduler(
                [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4), lr_scheduler.ExponentialLR(optimizer, 0.9)]
            ),
            interval="step",
        )
    ],
    "a function": lambda: [LearningRateScheduler(lambda epoch, rate: rate / (epoch + 1))],
    "two of them": lambda: [
        LearningRateScheduler(lambda epoch: 0.1 / (epoch + 1), verbose=1),
        LRScheduler(lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step), interval="step"),
    ],
}


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_first_and_last_learning_rates_are_those_of_the_fit(schedule: str, window: int) -> None:
    callbacks, counting = SCHEDULES[schedule](), Counting()
    model = make_model()
    arguments = {"epochs": 4, "batch_size": 8, "accumulate_grad_batches": window, "verbose": 0}
    plan = model.plan(X, Y, callbacks=[*callbacks, counting], **arguments)
    model.fit(X, Y, callbacks=[*callbacks, counting], **arguments)
    assert (plan.learning_rates.first, plan.learning_rates.last) == (counting.rates[0], counting.rates[-1])


# What torch 2.6 says of the way in which it calls its own schedulers.
@pytest.mark.filterwarnings("ignore:The epoch parameter in .scheduler.step:UserWarning")
def test_a_scheduler_that_goes_on_is_run_through_on_a_copy() -> None:
    model = make_model()
    assert model.optimizer is not None
    scheduler = lr_scheduler.SequentialLR(
        model.optimizer,
        [lr_scheduler.ConstantLR(model.optimizer, 0.5, 2), lr_scheduler.ExponentialLR(model.optimizer, 0.5)],
        milestones=[2],
    )
    counting = Counting()
    arguments = {"epochs": 4, "verbose": 0, "callbacks": [LRScheduler(scheduler), counting]}
    before = copy.deepcopy(scheduler.state_dict())
    plan = model.plan(X, Y, **arguments)
    assert str(scheduler.state_dict()) == str(before)
    model.fit(X, Y, **arguments)
    assert (plan.learning_rates.first, plan.learning_rates.last) == (counting.rates[0], counting.rates[-1])


@pytest.mark.parametrize(
    "callback",
    [
        ReduceLROnPlateau("loss"),
        LRScheduler(lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer), monitor="loss"),
    ],
    ids=["fitkit", "torch"],
)
def test_a_rate_that_follows_the_loss_is_said_to_be_unknown(callback: Callback) -> None:
    rates = make_model().plan(X, Y, epochs=3, callbacks=[callback]).learning_rates
    assert (rates.first, rates.last) == (0.01, None)
    assert "by what it measures" in rates.remark


@pytest.mark.parametrize("callback", [LambdaCallback(), Every(2, Counting()), Counting()])
def test_a_callback_of_the_users_may_change_the_rate(callback: Callback) -> None:
    rates = make_model().plan(X, Y, epochs=3, callbacks=[callback]).learning_rates
    assert rates.last == 0.01
    assert rates.remark == f"unless {type(callback).__name__} changes it"


def test_a_schedule_by_steps_of_unsized_data_is_said_to_be_unknown() -> None:
    schedule = LRScheduler(lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9), interval="step")
    rates = make_model().plan(Stream(), epochs=3, callbacks=[schedule]).learning_rates
    assert (rates.first, rates.last) == (0.01, None)
    assert "does not tell how many steps" in rates.remark


# ---------------------------------------------------------------------------------------------------------------------
# Nothing changes, and bad arguments are those of fit.
# ---------------------------------------------------------------------------------------------------------------------


def test_a_plan_changes_nothing() -> None:
    model, stopping = make_model(), EarlyStopping("loss")
    module, optimizer, history = model.module, model.optimizer, model.history
    assert optimizer is not None
    module.eval()
    generator = torch.Generator().manual_seed(3)
    sampler = RandomSampler(X, generator=generator)
    loader = DataLoader(TensorDataset(X, Y), batch_size=4, sampler=sampler, generator=generator)
    schedule = LRScheduler(lambda optimizer: lr_scheduler.StepLR(optimizer, 1), interval="step")
    noted = (copy.deepcopy(module.state_dict()), copy.deepcopy(optimizer.state_dict()), torch.get_rng_state())
    callbacks_before = [dict(vars(each)) for each in (stopping, schedule)]
    own = generator.get_state()
    model.plan(loader, validation_data=loader, overfit_pct=0.5, callbacks=[stopping, schedule])
    assert str(module.state_dict()) == str(noted[0])
    assert str(optimizer.state_dict()) == str(noted[1])
    assert torch.equal(torch.get_rng_state(), noted[2])
    assert torch.equal(generator.get_state(), own)
    assert [dict(vars(each)) for each in (stopping, schedule)] == callbacks_before
    assert (model.history, model.stop_training, module.training) == (history, False, False)


def test_a_plan_reads_no_batch_of_a_generator() -> None:
    generator = DATA["generator"]()
    make_model().plan(generator, steps_per_epoch=5, epochs=2)
    assert len(list(generator)) == 10


BAD: dict[str, dict[str, Any]] = {
    "epochs": {"epochs": 0.5},
    "both": {"epochs": 3, "max_nb_epochs": 3},
    "percent": {"train_percent_check": 0.0},
    "monitor": {"callbacks": [EarlyStopping("val_loss")]},
    "too many steps": {"steps_per_epoch": 99},
    "split": {"validation_split": 1.0},
    "class weight": {"class_weight": {0: 1.0}},
    "file": {"resume_from": "nowhere.fitkit"},
    "shuffle": {"shuffle": 1},
    "verbose": {"verbose": 7},
}


@pytest.mark.parametrize("arguments", BAD)
def test_what_fit_refuses_is_refused_with_the_same_words(arguments: str) -> None:
    with pytest.raises((ValueError, TypeError, OSError), match=r"\w") as refused:
        make_model().fit(X, Y, **BAD[arguments])
    with pytest.raises(type(refused.value), match=r"\w") as planned:
        make_model().plan(X, Y, **BAD[arguments])
    assert str(planned.value) == str(refused.value)


def test_an_unknown_argument_is_refused_with_the_nearest() -> None:
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'epoch'. Did you mean 'epochs'"):
        make_model().plan(X, Y, epoch=3)


def test_a_plan_needs_a_compiled_model() -> None:
    with pytest.raises(ValueError, match="Call model.compile"):
        fitkit.Model(nn.Linear(3, 1)).plan(X, Y)


# ---------------------------------------------------------------------------------------------------------------------
# Runs that go on from a file, and what is shown.
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["batch", "window", "validation", "epoch"])
def test_the_plan_of_a_resumed_run_is_what_is_left_of_it(tmp_path: Path, moment: str) -> None:
    path = tmp_path / "state"
    model = make_model()

    def save(hook: str) -> Callback:
        def at(index: int, logs: Any) -> None:
            if index == {"batch": 3, "window": 2, "validation": 1, "epoch": 1}[moment]:
                model.save(path)

        return LambdaCallback(**{hook: at})

    hook = {"batch": "on_train_batch_end", "window": "on_train_batch_end", "validation": "on_test_batch_end"}
    arguments: dict[str, Any] = {"validation_data": (X, Y), "accumulate_grad_batches": 3, "batch_size": 8}
    arguments |= {"epochs": 3, "verbose": 0}
    model.fit(X, Y, callbacks=[save(hook.get(moment, "on_epoch_end"))], **arguments)
    resumed, counting = make_model(), Counting()
    plan = resumed.plan(X, Y, resume_from=path, callbacks=[counting], **arguments)
    resumed.fit(X, Y, resume_from=path, callbacks=[counting], **arguments)
    assert (plan.batches, plan.steps, plan.validations) == (counting.batches, counting.steps, counting.validations)
    assert plan.resumed_from == str(path)
    assert "Goes on from" in str(plan)


def test_a_plan_prints_as_a_table() -> None:
    model = make_model()
    plan = model.plan(X, Y, validation_split=0.2, batch_size=16, max_nb_epochs=9, accumulate_grad_batches=2, verbose=0)
    shown = str(plan)
    assert "1 to 9; EarlyStopping(val_loss) may end it before" in shown
    assert "3 of 16 samples; the last: 8" in shown
    assert "2 batches, 32 samples; the last: 1 batch, 8 samples" in shown
    assert "27 and 18" in shown
    assert "9, each of 1 batch" in shown
    assert "4 of 4" in shown
    assert plan.hooks["on_epoch_end"] == ("EarlyStopping", "History")
    assert "<table>" in plan._repr_html_()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"batch_size": 20, "accumulate_grad_batches": 8}, r"A step +3 batches, 50 samples\n"),
        ({"micro_batch_size": 4}, r"Samples at a time +4\n"),
        ({"micro_batch_size": "auto"}, r"Samples at a time +auto\n"),
        ({"initial_epoch": 2}, r"Epochs +none: there is nothing left to do\n"),
        ({}, r"Validations +none\n"),
        (
            {"callbacks": ReduceLROnPlateau("loss")},
            r"Learning rate +0.01 at the first step; then ReduceLROn",
        ),
        ({"initial_epoch": 2, "callbacks": LearningRateScheduler(lambda epoch: 0.1)}, "Learning rate +no step is made"),
    ],
    ids=["one short step", "parts", "parts that fit", "nothing left", "no validation", "measured rate", "no rate"],
)
def test_a_plans_table_says_what_there_is_and_is_not(arguments: dict[str, Any], line: str) -> None:
    shown = str(make_model().plan(X, Y, **{"epochs": 2, "verbose": 0, **arguments}))
    assert re.search(line, shown), shown


def test_frozen_parameters_are_not_trainable() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    module[0].requires_grad_(False)
    model = fitkit.Model(module, device="cpu")
    model.compile("sgd", "mse")
    plan = model.plan(X, Y, epochs=1)
    assert (plan.parameters, plan.trainable_parameters) == (21, 5)


def test_a_plan_can_be_made_from_within_a_fit() -> None:
    model, plans = make_model(), []
    planning = LambdaCallback(on_epoch_end=lambda epoch, logs: plans.append(model.plan(X, Y, epochs=2)))
    model.fit(X, Y, epochs=2, verbose=0, callbacks=[planning])
    assert [plan.steps for plan in plans] == [4, 4]


def test_the_rates_of_very_many_steps_are_not_run_through() -> None:
    callback = LRScheduler(lambda optimizer: lr_scheduler.StepLR(optimizer, 1), interval="step")
    model = fitkit.Model(nn.Linear(3, 1), device="cpu")
    model.compile("sgd", "mse")
    plan = model.plan(X, Y, batch_size=1, epochs=4001, callbacks=callback)
    assert "more than 200000 steps are not run through" in str(plan)
