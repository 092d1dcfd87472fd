"""TerminateOnNaN: when it stops a run, and that it reads the device no more often than it says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fitkit
from fitkit.callbacks import LambdaCallback, TerminateOnNaN
from fitkit.callbacks.terminate_on_nan import INTERVAL


def fitted(*callbacks: Any, bad: int | None = None, value: float = math.nan, **flags: Any) -> fitkit.History:
    """Ten batches an epoch; one of them has a bad target."""
    model = fitkit.Model(nn.Linear(1, 1), device="cpu")
    model.compile("sgd", "mse", learning_rate=0.0)
    y = torch.ones(10, 1)
    if bad is not None:
        y[bad] = value
    flags = {"epochs": 3, "batch_size": 1, "shuffle": False, "verbose": 0, **flags}
    return model.fit(torch.ones(10, 1), y, callbacks=list(callbacks), **flags)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("on_nonfinite", ["raise", "stop", "ignore"])
def test_it_stops_after_the_first_bad_batch_whatever_on_nonfinite_says(on_nonfinite: str, value: float) -> None:
    terminating, batches = TerminateOnNaN(), []
    counting = LambdaCallback(on_train_batch_end=lambda batch, logs: batches.append(batch))
    history = fitted(terminating, counting, bad=3, value=value, on_nonfinite=on_nonfinite)
    assert batches == [0, 1, 2, 3]
    assert (terminating.stopped_epoch, terminating.stopped_batch) == (0, 3)
    assert history.stop_reason == "nonfinite"
    assert len(history) == 1


def test_a_good_run_goes_on_to_its_end() -> None:
    terminating = TerminateOnNaN()
    assert fitted(terminating).stop_reason == "epochs"
    assert (terminating.stopped_epoch, terminating.stopped_batch) == (None, None)


def test_it_finds_the_batch_between_two_looks() -> None:
    terminating, batches = TerminateOnNaN(every=4), []
    counting = LambdaCallback(on_train_batch_end=lambda batch, logs: batches.append(batch))
    assert fitted(terminating, counting, bad=5).stop_reason == "nonfinite"
    assert (batches[-1], terminating.stopped_batch) == (7, 5)


def test_the_end_of_the_epoch_shows_what_no_look_has() -> None:
    terminating = TerminateOnNaN(every=50)
    history = fitted(terminating, bad=5, on_nonfinite="raise")
    assert (history.stop_reason, len(history)) == ("nonfinite", 1)
    assert (terminating.stopped_epoch, terminating.stopped_batch) == (0, None)


def test_a_batch_without_targets_is_not_bad() -> None:
    model = fitkit.Model(nn.Linear(1, 3), device="cpu")
    model.compile("sgd", "cross_entropy")
    y = torch.zeros(10, dtype=torch.long)
    y[0] = -100
    history = model.fit(
        torch.ones(10, 1), y, batch_size=1, epochs=2, shuffle=False, callbacks=[TerminateOnNaN()], verbose=0
    )
    assert history.stop_reason == "epochs"


def test_a_bad_validation_is_not_judged() -> None:
    history = fitted(TerminateOnNaN(), validation_data=(torch.ones(1, 1), torch.full((1, 1), math.nan)))
    assert history.stop_reason == "epochs"


def test_a_bad_part_of_a_batch_is_found_in_its_epoch() -> None:
    terminating = TerminateOnNaN()
    history = fitted(terminating, bad=0, batch_size=10, micro_batch_size=1)
    assert (history.stop_reason, terminating.stopped_epoch) == ("nonfinite", 0)


class Reads(TorchDispatchMode):
    """Counts how often a number is read from the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "_local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("every", "reads"), [(50, 0), (5, 2), (None, 10)])
def test_each_look_is_one_read(every: int | None, reads: int) -> None:
    with Reads() as plain:
        fitted(epochs=1)
    with Reads() as watched:
        fitted(TerminateOnNaN(every), epochs=1)
    assert watched.count - plain.count == reads


def test_an_accelerator_is_not_asked_at_each_batch() -> None:
    model: Any = fitkit.Model(nn.Linear(1, 1), device="meta")
    terminating = TerminateOnNaN()
    terminating.set_model(model)
    terminating.on_train_begin({})

    class Unread(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            raise AssertionError("read")

    for batch in range(INTERVAL - 1):
        terminating.on_train_batch_end(batch, Unread())
    with pytest.raises(AssertionError, match="read"):
        terminating.on_train_batch_end(INTERVAL - 1, Unread())


def test_it_says_why_unless_the_run_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    fitted(TerminateOnNaN(), bad=3, verbose=2)
    assert (
        "Epoch 1 (index 0): training stops, as the loss of batch 4 (index 3) is not finite." in capsys.readouterr().out
    )


@pytest.mark.parametrize("every", [0, -1])
def test_every_is_at_least_1(every: int) -> None:
    with pytest.raises(ValueError, match="received every="):
        TerminateOnNaN(every)
