"""ReduceLROnPlateau: when it lowers the rate, and what the History says of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import fitkit
from fitkit.callbacks import EarlyStopping, ReduceLROnPlateau


def optimizer_with(*rates: float) -> torch.optim.SGD:
    return torch.optim.SGD([{"params": [nn.Parameter(torch.zeros(1))], "lr": rate} for rate in rates])


def driven(reducing: ReduceLROnPlateau, values: Sequence[float | None], *rates: float) -> list[float]:
    """The rates that the logs of the epochs have, and after them that of the next one."""
    optimizer = optimizer_with(*(rates or (1.0,)))
    model: Any = SimpleNamespace(optimizer=optimizer)
    reducing.set_model(model)
    reducing.on_train_begin({})
    seen = []
    for epoch, value in enumerate(values):
        logs = {"loss": 1.0} if value is None else {"loss": 1.0, "val_loss": value}
        reducing.on_epoch_end(epoch, logs)
        seen.append(logs["learning_rate"])
    return [*seen, optimizer.param_groups[0]["lr"]]


def test_it_lowers_the_rate_after_patience_epochs_without_improvement() -> None:
    reducing = ReduceLROnPlateau(factor=0.5, patience=2)
    assert driven(reducing, [3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]) == [1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25]


def test_patience_0_acts_as_1() -> None:
    assert driven(ReduceLROnPlateau(factor=0.5, patience=0), [1.0, 1.0, 0.5, 0.5])[-1] == 0.25


def test_a_change_of_min_delta_is_no_improvement() -> None:
    assert driven(ReduceLROnPlateau(factor=0.5, patience=1, min_delta=0.5), [2.0, 1.0, 0.5])[-1] == 0.5


def test_min_delta_defaults_to_that_of_keras() -> None:
    assert ReduceLROnPlateau().min_delta == 1e-4
    assert driven(ReduceLROnPlateau(factor=0.5, patience=1), [1.0, 0.99995])[-1] == 0.5


def test_the_cooldown_counts_as_that_of_keras() -> None:
    # Keras 3: lowered after epochs 1, 3 and 5. The epoch that ends a cooldown of 2 is counted again.
    reducing = ReduceLROnPlateau(factor=0.5, patience=1, cooldown=2)
    assert driven(reducing, [1.0] * 7) == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]


def test_no_rate_goes_below_min_lr() -> None:
    reducing = ReduceLROnPlateau(factor=0.1, patience=1, min_lr=0.05)
    assert driven(reducing, [1.0] * 5)[-1] == 0.05


def test_a_group_below_min_lr_stays_where_it_is() -> None:
    reducing = ReduceLROnPlateau(factor=0.5, patience=1, min_lr=0.4)
    driven(reducing, [1.0] * 6, 1.0, 0.1)
    assert [group["lr"] for group in reducing.model.optimizer.param_groups] == [0.4, 0.1]  # type: ignore[union-attr]


def test_only_measured_epochs_count() -> None:
    reducing = ReduceLROnPlateau(factor=0.5, patience=2)
    assert driven(reducing, [1.0, None, 1.0, None, None])[-1] == 1.0
    assert reducing.wait == 1


def test_nan_is_no_improvement() -> None:
    assert driven(ReduceLROnPlateau(factor=0.5, patience=2), [math.nan] * 2)[-1] == 0.5


def test_mode_max_wants_more() -> None:
    assert driven(ReduceLROnPlateau(factor=0.5, patience=1, mode="max"), [1.0, 2.0, 3.0])[-1] == 1.0


def test_a_rate_that_is_a_tensor_stays_that_tensor() -> None:
    rate = torch.tensor(1.0)
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=rate)
    reducing = ReduceLROnPlateau("loss", factor=0.5, patience=1)
    reducing.set_model(SimpleNamespace(optimizer=optimizer))  # type: ignore[arg-type]
    for epoch in range(2):
        reducing.on_epoch_end(epoch, {"loss": 1.0})
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == 0.5


def test_a_fit_starts_from_a_clean_state() -> None:
    reducing = ReduceLROnPlateau(factor=0.5, patience=2)
    driven(reducing, [1.0, 1.0])
    assert driven(reducing, [5.0, 5.0])[-1] == 1.0


def test_a_state_goes_on_where_it_was() -> None:
    reducing = ReduceLROnPlateau(factor=0.5, patience=3)
    driven(reducing, [1.0, 1.0, 1.0])
    resumed = ReduceLROnPlateau(factor=0.5, patience=3)
    driven(resumed, [])
    resumed.load_state_dict(reducing.state_dict())
    resumed.on_epoch_end(3, {"val_loss": 1.0})
    assert resumed.model.optimizer.param_groups[0]["lr"] == 0.5  # type: ignore[union-attr]


def test_history_has_the_rate_that_each_epoch_used() -> None:
    model = fitkit.Model(nn.Linear(1, 1), device="cpu")
    model.compile("sgd", "mse", learning_rate=0.1)
    reducing = ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=1e6)
    history = model.fit(torch.ones(4, 1), torch.ones(4, 1), epochs=4, callbacks=[reducing], verbose=0)
    assert history["learning_rate"] == [0.1, 0.1, 0.05, 0.025]


def test_a_later_callback_can_watch_the_rate() -> None:
    model = fitkit.Model(nn.Linear(1, 1), device="cpu")
    model.compile("sgd", "mse", learning_rate=0.1)
    callbacks = [ReduceLROnPlateau("loss"), EarlyStopping("learning_rate", patience=2)]
    history = model.fit(torch.ones(4, 1), torch.ones(4, 1), epochs=9, callbacks=callbacks, verbose=0)
    assert len(history) == 3


def test_an_earlier_callback_cannot_watch_the_rate() -> None:
    model = fitkit.Model(nn.Linear(1, 1), device="cpu")
    model.compile("sgd", "mse", learning_rate=0.1)
    callbacks = [EarlyStopping("learning_rate"), ReduceLROnPlateau("loss")]
    with pytest.raises(ValueError, match="monitor='learning_rate'.*never logs"):
        model.fit(torch.ones(4, 1), torch.ones(4, 1), epochs=9, callbacks=callbacks, verbose=0)


def test_verbose_says_when_it_lowers_the_rate(capsys: pytest.CaptureFixture[str]) -> None:
    driven(ReduceLROnPlateau(factor=0.5, patience=1, verbose=1), [1.0, 1.0])
    assert capsys.readouterr().out == "Epoch 2 (index 1): the learning rate goes from 1 to 0.5.\n"


@pytest.mark.parametrize("factor", [0.0, 1.0, 1.5, -0.1])
def test_a_factor_that_lowers_nothing_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match="received factor="):
        ReduceLROnPlateau(factor=factor)


@pytest.mark.parametrize("name", ["patience", "cooldown", "min_lr", "min_delta"])
def test_negative_numbers_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"received {name}=-1"):
        ReduceLROnPlateau(**{name: -1})  # type: ignore[arg-type]
