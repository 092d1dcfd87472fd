"""How many epochs a fit trains: epochs, min_nb_epochs, max_nb_epochs, initial_epoch."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

import fitkit
from fitkit.callbacks import EarlyStopping, LambdaCallback
from fitkit.flags import TrainingFlags

X, Y = torch.ones(8, 1), torch.ones(8, 1)


def standing() -> fitkit.Model:
    """A model whose loss never changes: nothing improves, and every early stopping wants to stop."""
    module = nn.Linear(1, 1)
    model = fitkit.Model(module, device="cpu")
    model.compile("sgd", "mse", learning_rate=0.0)
    return model


def epochs_of(**options: Any) -> list[int]:
    return standing().fit(X, Y, verbose=0, **options).epoch


def test_epochs_are_trained_to_the_last_though_nothing_improves() -> None:
    assert epochs_of(epochs=12) == list(range(12))


def test_without_epochs_the_default_early_stopping_waits_for_3_epochs() -> None:
    assert epochs_of() == [0, 1, 2, 3]


def test_without_epochs_max_nb_epochs_is_the_limit() -> None:
    assert epochs_of(max_nb_epochs=2) == [0, 1]


def test_the_limit_without_epochs_is_1000() -> None:
    assert standing().fit(X, Y, verbose=0).params["epochs"] == 1000


def test_no_early_stop_before_min_nb_epochs() -> None:
    assert epochs_of(min_nb_epochs=7) == list(range(7))


def test_min_nb_epochs_below_the_patience_changes_nothing() -> None:
    assert epochs_of(min_nb_epochs=2) == [0, 1, 2, 3]


def test_min_nb_epochs_binds_with_epochs_too() -> None:
    stopping = EarlyStopping("loss", patience=1)
    assert epochs_of(epochs=9, min_nb_epochs=5, callbacks=[stopping]) == list(range(5))
    assert stopping.stopped_epoch == 4


def test_min_nb_epochs_may_be_the_maximum() -> None:
    assert epochs_of(min_nb_epochs=6, max_nb_epochs=6) == list(range(6))
    assert epochs_of(min_nb_epochs=6, epochs=6) == list(range(6))


@pytest.mark.parametrize("maximum", ["epochs", "max_nb_epochs"])
def test_min_nb_epochs_above_the_maximum_is_refused(maximum: str) -> None:
    with pytest.raises(ValueError, match=f"at most {maximum}=3, received min_nb_epochs=4"):
        epochs_of(min_nb_epochs=4, **{maximum: 3})


def test_epochs_excludes_max_nb_epochs() -> None:
    with pytest.raises(ValueError, match="epochs=3 and max_nb_epochs=9 exclude each other"):
        epochs_of(epochs=3, max_nb_epochs=9)


def test_stop_training_by_hand_does_not_wait_for_min_nb_epochs() -> None:
    model = standing()
    by_hand = LambdaCallback(on_epoch_end=lambda epoch, logs: setattr(model, "stop_training", epoch == 1))
    history = model.fit(X, Y, verbose=0, min_nb_epochs=5, callbacks=[by_hand])
    assert (history.epoch, history.stop_reason) == ([0, 1], "stop_training")


def test_no_epochs_train_nothing_and_give_an_empty_history() -> None:
    model, calls = standing(), []
    before = copy.deepcopy(model.module.state_dict())
    listening = LambdaCallback(
        on_train_begin=lambda logs: calls.append("begin"),
        on_epoch_begin=lambda epoch, logs: calls.append("epoch"),
        on_train_end=lambda logs: calls.append("end"),
    )
    history = model.fit(X, Y, epochs=0, verbose=0, callbacks=[listening])
    assert (history.epoch, history.history, history.stop_reason) == ([], {}, "epochs")
    assert calls == ["begin", "end"]
    torch.testing.assert_close(model.module.state_dict(), before, rtol=0, atol=0)


def test_epochs_is_the_final_index_with_initial_epoch() -> None:
    assert epochs_of(initial_epoch=2, epochs=5) == [2, 3, 4]


@pytest.mark.parametrize("initial_epoch", [3, 4, 100])
def test_nothing_left_to_do_gives_an_empty_history(initial_epoch: int) -> None:
    history = standing().fit(X, Y, epochs=3, initial_epoch=initial_epoch, verbose=0)
    assert (history.epoch, history.stop_reason) == ([], "epochs")


def test_max_nb_epochs_is_the_final_index_with_initial_epoch() -> None:
    assert epochs_of(initial_epoch=4, max_nb_epochs=6) == [4, 5]


def test_hooks_and_history_count_from_initial_epoch() -> None:
    begun: list[int] = []
    listening = LambdaCallback(on_epoch_begin=lambda epoch, logs: begun.append(epoch))
    assert epochs_of(initial_epoch=7, epochs=9, callbacks=[listening]) == begun == [7, 8]


def test_callbacks_are_told_how_many_epochs_there_are() -> None:
    params = standing().fit(X, Y, batch_size=3, initial_epoch=1, epochs=3, min_nb_epochs=2, verbose=0).params
    expected = {"epochs": 3, "initial_epoch": 1, "steps": 3, "min_nb_epochs": 2, "verbose": 0}
    assert expected.items() <= params.items()


def test_two_fits_train_what_one_long_fit_trains() -> None:
    x, y = torch.randn(10, 3), torch.randn(10, 1)
    module = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.Linear(4, 1))
    weights = []
    for runs in ([(0, 4)], [(0, 1), (1, 4)]):
        model = fitkit.Model(copy.deepcopy(module), device="cpu")
        model.compile("adam", "mse")
        torch.manual_seed(3)
        for first, last in runs:
            model.fit(x, y, batch_size=4, initial_epoch=first, epochs=last, verbose=0)
        weights.append(model.module.state_dict())
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_each_fit_has_a_history_of_its_own() -> None:
    model = standing()
    first = model.fit(X, Y, epochs=2, verbose=0)
    second = model.fit(X, Y, epochs=1, verbose=0)
    assert (len(first), len(second)) == (2, 1)
    assert model.history is second


@pytest.mark.parametrize("name", ["epochs", "initial_epoch", "min_nb_epochs", "max_nb_epochs"])
@pytest.mark.parametrize("value", [True, 2.0, math.nan, "3"])
def test_what_is_no_integer_is_refused(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"Expected an integer of at least [01], received {name}="):
        epochs_of(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("epochs", -1), ("initial_epoch", -1), ("min_nb_epochs", 0), ("max_nb_epochs", 0)]
)
def test_too_few_are_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"Expected an integer of at least [01], received {name}={value}"):
        epochs_of(**{name: value})


def test_a_limit_that_is_never_reached_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def validates(flags: TrainingFlags, epoch: int) -> bool:
        asked.append(epoch)
        assert len(asked) < 100
        return True

    monkeypatch.setattr(TrainingFlags, "validates", validates)
    stopping = EarlyStopping(patience=1)
    assert epochs_of(epochs=10**12, validation_data=(X, Y), callbacks=[stopping]) == [0, 1]


def test_numpy_integers_are_integers() -> None:
    numpy = pytest.importorskip("numpy")
    assert epochs_of(epochs=numpy.int64(2)) == [0, 1]
