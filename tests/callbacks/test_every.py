"""Every: which hooks of another callback it lets through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fitkit
from fitkit.callbacks import (
    BackupAndRestore,
    Callback,
    EarlyStopping,
    Every,
    LambdaCallback,
    LRScheduler,
    ModelCheckpoint,
    ReduceLROnPlateau,
    SwapEMAWeights,
    TensorBoard,
    Timer,
)
from fitkit.callbacks.hooks import implemented_hooks


def fitted(*callbacks: Any) -> fitkit.History:
    torch.manual_seed(0)
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


def scheduling() -> LRScheduler:
    return LRScheduler(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1))


@pytest.mark.parametrize("unit", ["epoch", "batch"])
@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (EarlyStopping, "see its patience"),
        (ReduceLROnPlateau, "see its patience"),
        (lambda: ModelCheckpoint("{epoch}.pt"), "see its save_freq"),
        (scheduling, r"give that a longer period, such as StepLR\(optimizer, 10\)"),
        (lambda: Every(2, Noting()), r"Write Every\(6, callback\)"),
    ],
)
def test_one_that_counts_by_itself_is_refused_with_what_to_use_there(make: Any, advice: str, unit: str) -> None:
    with pytest.raises(TypeError, match=rf"does not count by itself, received callback=.*unit='{unit}'.*{advice}"):
        Every(2, make(), unit)


def test_what_counts_batches_itself_is_refused_for_batches_only() -> None:
    backup = BackupAndRestore("backup", save_freq=3)
    with pytest.raises(TypeError, match="It counts batches itself: see its save_freq"):
        Every(2, backup, "batch")
    assert Every(2, backup).callback is backup


def test_tensorboard_counts_its_batches_itself(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    writing = TensorBoard(tmp_path, update_freq="batch")
    with pytest.raises(TypeError, match="It counts batches itself: see its update_freq"):
        Every(3, writing, "batch")
    assert Every(3, writing).callback is writing


def test_training_goes_on_with_its_own_weights_after_an_epoch_that_ended_with_the_average() -> None:
    plain = fitted()["loss"]
    assert fitted(Every(2, SwapEMAWeights(swap_on_epoch=True, momentum=0.9)))["loss"] == plain


def test_every_beginning_is_let_through() -> None:
    epochs: list[int] = []
    batches: list[int] = []
    begin = {
        "on_epoch_begin": lambda epoch, logs: epochs.append(epoch),
        "on_train_batch_begin": lambda batch, logs: batches.append(batch),
    }
    fitted(Every(4, LambdaCallback(**begin)), Every(4, LambdaCallback(**begin), "batch"))
    assert epochs == [epoch for epoch in range(6) for _ in "12"]
    assert len(batches) == 2 * 36


def test_what_is_no_callback_is_refused() -> None:
    with pytest.raises(TypeError, match="received callback=<built-in function print>"):
        Every(2, print)  # type: ignore[arg-type]


def test_an_unknown_unit_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected one of 'epoch', 'batch', received unit='step'"):
        Every(2, Noting(), "step")
