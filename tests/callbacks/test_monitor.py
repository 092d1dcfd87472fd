"""What callbacks with a monitor share."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import fitkit
from fitkit.callbacks import Callback, EarlyStopping
from fitkit.callbacks.monitor import MonitorCallback


def test_the_direction_follows_mode_and_name() -> None:
    assert MonitorCallback("val_accuracy").direction == "max"
    assert MonitorCallback("val_accuracy", "min").direction == "min"


def test_an_improvement_is_strict_and_exceeds_min_delta() -> None:
    callback = MonitorCallback("loss", min_delta=0.5)
    assert not callback.is_improvement(0.5, 1.0)
    assert callback.is_improvement(0.25, 1.0)
    assert callback.is_improvement(9.0, None)
    assert not callback.is_improvement(math.nan, None)


@pytest.mark.parametrize("min_delta", [-0.1, math.nan, math.inf])
def test_a_min_delta_out_of_range_is_refused(min_delta: float) -> None:
    with pytest.raises(ValueError, match="of at least 0, received min_delta="):
        MonitorCallback("loss", min_delta=min_delta)


@pytest.mark.parametrize("min_delta", ["0.1", None, True])
def test_a_min_delta_that_is_no_number_is_refused(min_delta: object) -> None:
    with pytest.raises(TypeError, match="Expected a number, received min_delta="):
        MonitorCallback("loss", min_delta=min_delta)  # type: ignore[arg-type]


def test_a_monitor_must_be_a_key() -> None:
    with pytest.raises(TypeError, match=r"received monitor=\['loss'\]"):
        MonitorCallback(["loss"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='received monitor=""'):
        MonitorCallback("")


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="received mode='smaller'"):
        MonitorCallback("loss", "smaller")


def test_a_known_monitor_passes_the_check() -> None:
    MonitorCallback("val_loss").check_monitor({"loss", "val_loss"}, may_be_added=False)


def test_an_unknown_monitor_passes_when_something_may_add_it() -> None:
    MonitorCallback("val_custom").check_monitor({"loss"}, may_be_added=True)


def test_a_monitor_that_can_never_appear_names_the_nearest_key() -> None:
    with pytest.raises(
        ValueError, match=r"MonitorCallback\(monitor='val_los'\).*Did you mean 'val_loss'.*: loss, val_"
    ):
        MonitorCallback("val_los").check_monitor(["val_loss", "loss"], may_be_added=False)


def test_a_validation_monitor_without_validation_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="This run has no validation: give it some, or monitor 'loss'"):
        MonitorCallback("val_loss").check_monitor(["loss"], may_be_added=False)


def test_a_validation_monitor_is_measured_only_with_validation() -> None:
    callback = MonitorCallback("val_loss")
    assert callback.measured({"loss": 1.0}) is None
    assert callback.measured({"loss": 1.0, "val_loss": 2.0}) == 2.0


def test_none_counts_as_not_measured() -> None:
    assert MonitorCallback("loss").measured({"loss": None}) is None


def test_a_tensor_is_measured_as_a_number() -> None:
    assert MonitorCallback("loss").measured({"loss": torch.tensor(0.5)}) == 0.5


@pytest.mark.parametrize("monitor", ["losses", "val_losses"])
def test_a_monitor_that_is_missing_though_measurable_is_an_error(monitor: str) -> None:
    with pytest.raises(ValueError, match=r"no such key in the epoch's logs\. .*Available keys: loss, val_loss"):
        MonitorCallback(monitor).measured({"loss": 1.0, "val_loss": 2.0})


class Answering(Callback):
    """Adds a key to the logs, and says so."""

    adds_to_logs = ("answer",)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        logs["answer"] = float(epoch)


class Silent(Answering):
    """Adds the key and says nothing."""

    adds_to_logs = None


def fitted(*callbacks: Callback) -> fitkit.History:
    model = fitkit.Model(nn.Linear(1, 1), device="cpu")
    model.compile("sgd", "mse")
    return model.fit(torch.ones(4, 1), torch.ones(4, 1), epochs=9, callbacks=list(callbacks), verbose=0)


@pytest.mark.parametrize("adding", [Answering, Silent])
def test_a_key_that_an_earlier_callback_adds_can_be_watched(adding: type[Callback]) -> None:
    assert len(fitted(adding(), EarlyStopping("answer", patience=2))) == 3


def test_a_key_near_to_one_that_is_added_is_found_before_the_first_batch() -> None:
    with pytest.raises(ValueError, match="watches a key that this run never logs. Did you mean 'answer'"):
        fitted(Answering(), EarlyStopping("answr"))


def test_a_key_that_a_later_callback_adds_cannot_be_watched() -> None:
    with pytest.raises(ValueError, match="watches a key that this run never logs"):
        fitted(EarlyStopping("answer"), Answering())


def test_a_callback_that_says_nothing_may_add_anything() -> None:
    with pytest.raises(ValueError, match="found no such key in the epoch's logs. Did you mean 'answer'"):
        fitted(Silent(), EarlyStopping("answr"))


def test_one_string_is_no_list_of_keys() -> None:
    class Wrong(Answering):
        adds_to_logs: Any = "answer"

    with pytest.raises(TypeError, match=r"received Wrong.adds_to_logs='answer'. Write \('answer',\)"):
        fitted(Wrong())
