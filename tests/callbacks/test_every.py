"""Every: which hooks of another callback it lets through."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fitkit
from fitkit.callbacks import Callback, EarlyStopping, Every, LambdaCallback, Timer
from fitkit.callbacks.hooks import implemented_hooks


def fitted(*callbacks: Any) -> fitkit.History:
    model = fitkit.Model(nn.Linear(1, 1), device="cpu")
    model.compile("sgd", "mse")
    return model.fit(torch.ones(6, 1), torch.ones(6, 1), batch_size=1, epochs=6, callbacks=list(callbacks), verbose=0)


class Noting(Callback):
    """Notes what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.epochs: list[int] = []
        self.batches: list[int] = []

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self.epochs.append(epoch)
        assert self.params["epochs"] == 6
        assert isinstance(self.model, fitkit.Model)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.batches.append(batch)


def test_every_third_epoch_is_let_through_and_every_batch() -> None:
    noting = Noting()
    fitted(Every(3, noting))
    assert noting.epochs == [2, 5]
    assert noting.batches == list(range(6)) * 6


def test_every_third_batch_is_let_through_and_every_epoch() -> None:
    noting = Noting()
    fitted(Every(3, noting, "batch"))
    assert noting.epochs == list(range(6))
    assert noting.batches == [2, 5] * 6


def test_only_the_hooks_of_the_callback_are_called() -> None:
    assert implemented_hooks(Every(2, Noting())) == ["on_epoch_end", "on_train_batch_end"]


def test_the_hook_gets_the_logs_that_all_share() -> None:
    adding = LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(added=float(epoch)))
    assert fitted(Every(2, adding))["added"] == [None, 1.0, None, 3.0, None, 5.0]


def test_state_is_that_of_the_callback() -> None:
    every: Any = Every(2, Timer("1h"))
    every.load_state_dict({"elapsed": 5.0})
    assert every.state_dict() == {"elapsed": 5.0}
    assert not hasattr(Every(2, Noting()), "state_dict")


def test_a_callback_with_a_monitor_is_refused() -> None:
    with pytest.raises(TypeError, match="Expected a callback without a monitor of its own, received callback="):
        Every(2, EarlyStopping())


def test_what_is_no_callback_is_refused() -> None:
    with pytest.raises(TypeError, match="received callback=<built-in function print>"):
        Every(2, print)  # type: ignore[arg-type]


def test_an_unknown_unit_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected one of 'epoch', 'batch', received unit='step'"):
        Every(2, Noting(), "step")
