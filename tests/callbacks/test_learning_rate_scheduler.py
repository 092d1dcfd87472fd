"""LearningRateScheduler: the rate as a function of the epoch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fitkit
from fitkit.callbacks import LearningRateScheduler, ReduceLROnPlateau


def fitted(*callbacks: Any, epochs: int = 4) -> fitkit.History:
    model = fitkit.Model(nn.Linear(1, 1), device="cpu")
    model.compile("sgd", "mse", learning_rate=0.1)
    return model.fit(torch.ones(4, 1), torch.ones(4, 1), epochs=epochs, callbacks=list(callbacks), verbose=0)


def test_an_epoch_uses_the_rate_that_the_schedule_gives_for_it() -> None:
    history = fitted(LearningRateScheduler(lambda epoch: 1.0 / (epoch + 1)))
    assert history["learning_rate"] == [1.0, 1 / 2, 1 / 3, 1 / 4]


def test_a_schedule_of_two_arguments_gets_the_present_rate() -> None:
    history = fitted(LearningRateScheduler(lambda epoch, rate: rate if epoch < 2 else rate / 2))
    assert history["learning_rate"] == [0.1, 0.1, 0.05, 0.025]


def test_each_group_is_asked_with_its_own_rate() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in (1.0, 0.5)]
    optimizer = torch.optim.SGD(groups)
    scheduler = LearningRateScheduler(lambda epoch, rate: rate / 2)
    scheduler.set_model(SimpleNamespace(optimizer=optimizer))  # type: ignore[arg-type]
    scheduler.on_epoch_begin(0)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]


def test_the_rate_is_logged_once_when_two_change_it() -> None:
    scheduler = LearningRateScheduler(lambda epoch: 1.0)
    history = fitted(scheduler, ReduceLROnPlateau("loss", patience=1, min_delta=1e6))
    assert history["learning_rate"] == [1.0] * 4


def test_a_tensor_is_a_rate() -> None:
    assert fitted(LearningRateScheduler(lambda epoch: torch.tensor(0.5)), epochs=1)["learning_rate"] == [0.5]


def test_a_rate_below_0_names_the_call() -> None:
    with pytest.raises(ValueError, match=r"received schedule\(1, 0.5\)=-1.0"):
        fitted(LearningRateScheduler(lambda epoch, rate: 0.5 if epoch == 0 else -1.0))


def test_what_is_no_number_names_the_call() -> None:
    with pytest.raises(TypeError, match=r"Expected a number, received schedule\(0\)=None"):
        fitted(LearningRateScheduler(lambda epoch: None))  # type: ignore[arg-type,return-value]


def test_a_schedule_that_takes_neither_is_refused() -> None:
    with pytest.raises(TypeError, match=r"received a schedule that takes \(\)"):
        LearningRateScheduler(lambda: 0.1)


def test_a_number_is_no_schedule() -> None:
    with pytest.raises(TypeError, match="Expected a function of epoch and rate, received schedule=0.1"):
        LearningRateScheduler(0.1)  # type: ignore[arg-type]


def test_verbose_says_the_rate_of_each_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    fitted(LearningRateScheduler(lambda epoch: 0.5, verbose=1), epochs=2)
    assert capsys.readouterr().out.splitlines() == [
        "Epoch 1 (index 0): the learning rate is 0.5.",
        "Epoch 2 (index 1): the learning rate is 0.5.",
    ]


def test_a_model_without_anything_to_train_is_refused() -> None:
    scheduler = LearningRateScheduler(lambda epoch: 0.1)
    scheduler.set_model(SimpleNamespace(optimizer=None))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="LearningRateScheduler needs an optimizer"):
        scheduler.on_train_begin({})


def test_a_schedule_that_tells_nothing_of_its_arguments_gets_the_epoch_and_the_rate() -> None:
    assert fitted(LearningRateScheduler(max))["learning_rate"] == [0.1, 1.0, 2.0, 3.0]
