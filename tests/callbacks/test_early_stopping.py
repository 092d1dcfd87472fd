"""EarlyStopping: when it stops a run, and which weights the run ends with."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fitkit.callbacks import EarlyStopping


def driven(stopping: EarlyStopping, values: list[float | None], min_nb_epochs: int = 1) -> int:
    """Trains, with the epoch's index as weight, until the callback stops it; returns the number of epochs."""
    module = nn.Linear(1, 1)
    model: Any = SimpleNamespace(module=module, stop_training=False)
    stopping.set_model(model)
    stopping.set_params({"min_nb_epochs": min_nb_epochs})
    stopping.on_train_begin({})
    for epoch, value in enumerate(values):
        nn.init.constant_(module.weight, epoch)
        stopping.on_epoch_end(epoch, {"loss": 1.0} if value is None else {"loss": 1.0, "val_loss": value})
        if model.stop_training:
            return epoch + 1
    return len(values)


def weight(stopping: EarlyStopping) -> float:
    """The epoch whose weights the module has."""
    return stopping.model.module.get_parameter("weight").item()


def test_it_stops_after_patience_epochs_without_improvement() -> None:
    stopping = EarlyStopping(patience=2)
    assert driven(stopping, [10.0, 9.0, 8.0, 9.0, 8.5, 7.0]) == 5
    assert (stopping.stopped_epoch, stopping.best, stopping.best_epoch, stopping.wait) == (4, 8.0, 2, 2)


def test_a_run_that_improves_to_its_end_is_not_stopped() -> None:
    stopping = EarlyStopping(patience=1)
    assert driven(stopping, [3.0, 2.0, 1.0]) == 3
    assert stopping.stopped_epoch is None


def test_equal_is_no_improvement() -> None:
    assert driven(EarlyStopping(patience=2), [1.0, 1.0, 1.0, 0.0]) == 3


def test_a_change_of_min_delta_is_no_improvement() -> None:
    assert driven(EarlyStopping(patience=1, min_delta=0.5), [2.0, 1.0, 0.5, 0.0]) == 3


def test_patience_0_acts_as_1() -> None:
    assert driven(EarlyStopping(patience=0), [2.0, 1.0, 1.5]) == 3
    assert driven(EarlyStopping(patience=1), [2.0, 1.0, 1.5]) == 3


def test_mode_max_wants_more() -> None:
    assert driven(EarlyStopping(patience=1, mode="max"), [1.0, 2.0, 1.5, 3.0]) == 3


def test_patience_counts_measured_epochs_only() -> None:
    stopping = EarlyStopping(patience=2)
    assert driven(stopping, [None, 1.0, None, 1.0, None, 1.0, None]) == 6
    assert stopping.best_epoch == 1


def test_nan_never_becomes_the_best() -> None:
    stopping = EarlyStopping(patience=3)
    assert driven(stopping, [math.nan, 5.0, 4.0, math.nan]) == 4
    assert (stopping.best, stopping.best_epoch, stopping.wait) == (4.0, 2, 1)


def test_nan_uses_up_the_patience() -> None:
    stopping = EarlyStopping(patience=2, restore_best_weights=True)
    assert driven(stopping, [math.nan] * 9) == 2
    assert (stopping.best, stopping.best_epoch) == (None, None)


def test_min_nb_epochs_holds_the_stop_back() -> None:
    assert driven(EarlyStopping(patience=1), [1.0, 2.0, 2.0, 2.0, 2.0], min_nb_epochs=4) == 4


def test_a_verdict_is_not_latched_until_min_nb_epochs() -> None:
    assert driven(EarlyStopping(patience=1), [1.0, 2.0, 2.0, 0.5, 0.75], min_nb_epochs=4) == 5


@given(st.lists(st.floats(0, 4, width=16), min_size=1, max_size=12), st.integers(1, 12), st.integers(1, 4))
def test_a_run_is_never_shorter_than_min_nb_epochs(values: list[float], least: int, patience: int) -> None:
    epochs = driven(EarlyStopping(patience=patience), list(values), min_nb_epochs=least)
    assert epochs >= min(least, len(values))
    assert epochs >= min(patience + 1, len(values))


def test_each_fit_starts_from_a_clean_state() -> None:
    stopping = EarlyStopping(patience=2)
    assert driven(stopping, [1.0, 2.0, 2.0]) == 3
    assert driven(stopping, [9.0, 8.0, 7.0]) == 3
    assert (stopping.stopped_epoch, stopping.best, stopping.wait) == (None, 7.0, 0)


def test_an_unmet_baseline_stops_after_patience() -> None:
    assert driven(EarlyStopping(patience=2, baseline=0.5), [0.9, 0.9, 0.9, 0.9]) == 2
    assert driven(EarlyStopping(patience=3, baseline=0.5), [0.9, 0.8, 0.7, 0.6]) == 3


def test_a_met_baseline_restarts_the_patience() -> None:
    stopping = EarlyStopping(patience=2, baseline=0.5)
    assert driven(stopping, [0.9, 0.4, 0.45, 0.3, 0.35, 0.3]) == 6
    assert stopping.best == 0.3


def test_keras_own_baseline_example_ends_alike() -> None:
    stopping = EarlyStopping(patience=5, baseline=0.5, restore_best_weights=True)
    assert driven(stopping, [0.9, 0.8, 0.7, 0.71, 0.72, 0.73]) == 5
    stopping.on_train_end({})
    assert weight(stopping) == 2


def test_epochs_before_start_from_epoch_are_not_looked_at() -> None:
    stopping = EarlyStopping(patience=1, start_from_epoch=2)
    assert driven(stopping, [0.1, 0.2, 5.0, 4.0, 4.5]) == 5
    assert (stopping.best, stopping.best_epoch) == (4.0, 3)


def test_the_best_weights_come_back_when_it_stopped_the_run() -> None:
    stopping = EarlyStopping(patience=2, restore_best_weights=True)
    driven(stopping, [3.0, 1.0, 2.0, 2.0])
    stopping.on_train_end({})
    assert weight(stopping) == 1


def test_the_best_weights_come_back_when_it_did_not_stop_the_run() -> None:
    stopping = EarlyStopping(patience=9, restore_best_weights=True)
    driven(stopping, [3.0, 1.0, 2.0])
    stopping.on_train_end({})
    assert weight(stopping) == 1


def test_the_best_weights_come_back_after_an_error() -> None:
    stopping = EarlyStopping(patience=9, restore_best_weights=True)
    driven(stopping, [3.0, 1.0, 2.0])
    stopping.on_exception(KeyboardInterrupt())
    assert weight(stopping) == 1


def test_without_restoring_the_last_weights_stay() -> None:
    stopping = EarlyStopping(patience=9)
    driven(stopping, [3.0, 1.0, 2.0])
    stopping.on_train_end({})
    assert weight(stopping) == 2


def test_a_nan_only_run_restores_nothing() -> None:
    stopping = EarlyStopping(patience=9, restore_best_weights=True)
    driven(stopping, [math.nan, math.nan, math.nan])
    stopping.on_train_end({})
    assert weight(stopping) == 2


class Counting(nn.BatchNorm1d):
    """A module with extra state, a list that it changes in place."""

    def __init__(self) -> None:
        super().__init__(1)
        self.counted = [0]

    def get_extra_state(self) -> list[int]:
        return self.counted

    def set_extra_state(self, state: list[int]) -> None:
        self.counted = state


def test_buffers_and_extra_state_come_back_with_the_weights() -> None:
    module: Any = Counting()
    stopping = EarlyStopping("loss", restore_best_weights=True)
    stopping.set_model(SimpleNamespace(module=module, stop_training=False))
    stopping.on_epoch_end(0, {"loss": 1.0})
    module(torch.ones(2, 1))
    module.counted[0] = 7
    stopping.on_train_end({})
    assert module.counted == [0]
    assert module.state_dict()["num_batches_tracked"] == 0


def test_it_stops_with_one_line_that_counts_epochs_from_one(capsys: pytest.CaptureFixture[str]) -> None:
    driven(EarlyStopping(patience=1, verbose=True), [0.5, 0.75])
    expected = "Epoch 2 (index 1): early stopping, as val_loss did not improve on 0.5 in 1 measured epoch.\n"
    assert capsys.readouterr().out == expected


def test_weights_that_come_back_are_announced(capsys: pytest.CaptureFixture[str]) -> None:
    stopping = EarlyStopping(verbose=True, restore_best_weights=True)
    driven(stopping, [0.5, 0.75])
    stopping.on_train_end({})
    assert capsys.readouterr().out == "Weights are those of epoch 1 (index 0), the best one.\n"


def test_it_is_silent_unless_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    driven(EarlyStopping(patience=1), [0.5, 0.75])
    assert capsys.readouterr().out == ""


def test_a_state_goes_on_where_it_was_with_the_new_patience() -> None:
    first = EarlyStopping(patience=9, restore_best_weights=True)
    driven(first, [3.0, 1.0, 2.0])
    second = EarlyStopping(patience=3, restore_best_weights=True)
    second.set_model(first.model)
    second.on_train_begin({})
    second.load_state_dict(first.state_dict())
    second.on_epoch_end(3, {"val_loss": 2.0})
    assert second.wait == 2
    second.on_epoch_end(4, {"val_loss": 2.0})
    second.on_train_end({})
    assert (second.stopped_epoch, second.best_epoch, weight(second)) == (4, 1, 1)


def test_a_state_can_be_saved_without_pickled_code(tmp_path: Any) -> None:
    stopping = EarlyStopping(restore_best_weights=True)
    driven(stopping, [3.0, 1.0])
    torch.save(stopping.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert (state["best"], state["best_epoch"], state["wait"]) == (1.0, 1, 0)
    assert torch.equal(state["best_weights"]["weight"], torch.ones(1, 1))


def test_a_missing_monitor_is_an_error_in_the_first_epoch_that_could_have_it() -> None:
    with pytest.raises(ValueError, match=r"EarlyStopping\(monitor='accuracy'\).*Available keys: loss, val_loss"):
        driven(EarlyStopping("accuracy", start_from_epoch=5), [1.0])


@pytest.mark.parametrize("patience", [2.0, 1.5, True, "3", None, math.nan])
def test_a_patience_that_is_no_integer_is_refused(patience: Any) -> None:
    with pytest.raises(TypeError, match="Expected an integer of at least 0, received patience="):
        EarlyStopping(patience=patience)


@pytest.mark.parametrize("name", ["patience", "start_from_epoch", "min_delta"])
def test_negative_numbers_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"of at least 0, received {name}=-1"):
        EarlyStopping(**{name: -1})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["baseline", "min_delta"])
def test_what_is_no_number_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=f"Expected a number, received {name}='0.1'"):
        EarlyStopping(**{name: "0.1"})  # type: ignore[arg-type]


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="received mode='minimum'"):
        EarlyStopping(mode="minimum")


@pytest.mark.parametrize("verbose", [2, "yes", None])
def test_an_unclear_verbose_is_refused(verbose: Any) -> None:
    with pytest.raises(TypeError, match="Expected True or False, received verbose="):
        EarlyStopping(verbose=verbose)


def test_keras_verbose_1_is_true() -> None:
    keras: Any = 1
    assert EarlyStopping(verbose=keras).verbose is True
