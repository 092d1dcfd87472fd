"""Timer: how a time can be written, and that a run ends when it is over."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import nn

import fitkit
from fitkit.callbacks import LambdaCallback, Timer


def fitted(*callbacks: Any, **flags: Any) -> fitkit.History:
    model = fitkit.Model(nn.Linear(1, 1), device="cpu")
    model.compile("sgd", "mse")
    flags = {"epochs": 5, "batch_size": 1, "verbose": 0, **flags}
    return model.fit(torch.ones(8, 1), torch.ones(8, 1), callbacks=list(callbacks), **flags)


def pausing(seconds: float, at: int = 2) -> LambdaCallback:
    """Takes its time in one batch of the first epoch."""
    return LambdaCallback(on_train_batch_begin=lambda batch, logs: time.sleep(seconds * (batch == at)))


@pytest.mark.parametrize(
    ("duration", "seconds"),
    [
        (90, 90.0),
        (0.5, 0.5),
        ("00:10:00", 600.0),
        ("1:02:03", 3723.0),
        ("00:00:01.5", 1.5),
        ("1:00:00:00", 86400.0),
        ("10min", 600.0),
        ("90 s", 90.0),
        ("2sec", 2.0),
        ("1.5h", 5400.0),
        ("1h 30min", 5400.0),
        ("1d", 86400.0),
        (timedelta(minutes=2), 120.0),
    ],
)
def test_a_time_can_be_written_in_many_ways(duration: Any, seconds: float) -> None:
    assert Timer(duration).duration == seconds


@pytest.mark.parametrize(
    "duration", ["10", "10:00", "", "ten minutes", "10minutes", "1:99:00", 0, -1, "0s", timedelta()]
)
def test_what_is_no_time_above_0_is_refused(duration: Any) -> None:
    with pytest.raises(ValueError, match="Expected a length of time such as .* received duration="):
        Timer(duration)


@pytest.mark.parametrize("duration", [None, True, [1]])
def test_what_is_no_number_is_refused(duration: Any) -> None:
    with pytest.raises(TypeError, match="Expected a number, received duration="):
        Timer(duration)


def test_it_stops_after_the_batch_in_which_time_is_over() -> None:
    timer, batches = Timer(0.5), []
    counting = LambdaCallback(on_train_batch_end=lambda batch, logs: batches.append(batch))
    history = fitted(timer, counting, pausing(0.6))
    assert batches == [0, 1, 2]
    assert (len(history), history.stop_reason, timer.has_stopped) == (1, "stop_training", True)


def test_time_in_a_validation_counts() -> None:
    pause = LambdaCallback(on_test_begin=lambda logs: time.sleep(0.6))
    history = fitted(Timer(0.5), pause, validation_data=(torch.ones(1, 1), torch.ones(1, 1)))
    assert len(history) == 1


def test_a_run_that_is_done_in_time_is_not_stopped() -> None:
    timer = Timer("1h")
    assert fitted(timer).stop_reason == "epochs"
    assert not timer.has_stopped
    assert 0 < timer.elapsed < 3600


def test_the_clock_stands_after_the_run() -> None:
    timer = Timer("1h")
    fitted(timer)
    assert timer.elapsed == timer.elapsed


def test_each_fit_starts_its_own_clock() -> None:
    timer = Timer(0.5)
    fitted(timer, pausing(0.6))
    assert len(fitted(timer)) == 5


def test_a_resumed_run_counts_the_time_before() -> None:
    timer = Timer(100)
    resuming = LambdaCallback(on_train_begin=lambda logs: timer.load_state_dict({"elapsed": 99.999}))
    history = fitted(timer, resuming, pausing(0.1))
    assert history.stop_reason == "stop_training"
    assert timer.state_dict()["elapsed"] > 100


def test_min_nb_epochs_does_not_hold_it_back() -> None:
    assert len(fitted(Timer(0.1), pausing(0.2), min_nb_epochs=3)) == 1


def test_verbose_says_that_it_stops(capsys: pytest.CaptureFixture[str]) -> None:
    fitted(Timer(0.1, verbose=True), pausing(0.2))
    assert capsys.readouterr().out.startswith("Training stops after 0.")
