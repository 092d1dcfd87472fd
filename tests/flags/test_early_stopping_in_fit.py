"""Early stopping as fit runs it: which one is there, when it stops, what weights and reason the run ends with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

import fitkit
from fitkit.callbacks import Callback, EarlyStopping, LambdaCallback

X, Y = torch.ones(4, 1), torch.zeros(4, 1)
IMPROVES = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]


class Scripted(Callback):
    """Writes each epoch's loss, on the training and the validation data, into the module: its only weight."""

    def __init__(self, values: Sequence[float]) -> None:
        super().__init__()
        self.values = values

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        nn.init.constant_(self.model.module.get_parameter("weight"), self.values[min(epoch, len(self.values) - 1)])


def still() -> fitkit.Model:
    """A model whose loss is the absolute value of its weight, and which does not learn."""
    model = fitkit.Model(nn.Linear(1, 1, bias=False), device="cpu")
    model.compile("sgd", "mae", learning_rate=0.0)
    return model


def fitted(
    values: Sequence[float],
    *callbacks: Callback,
    validated: bool = True,
    model: fitkit.Model | None = None,
    **options: Any,
) -> fitkit.History:
    """Trains through the scripted losses."""
    data = {"validation_data": (X, Y)} if validated else {}
    return (model or still()).fit(X, Y, verbose=0, callbacks=[Scripted(values), *callbacks], **data, **options)


def test_the_default_stops_after_3_epochs_without_improvement() -> None:
    history = fitted([5.0, 4.0, 3.0, 3.5, 3.0, 4.0, 1.0])
    assert history["val_loss"] == [5.0, 4.0, 3.0, 3.5, 3.0, 4.0]
    assert history.stop_reason == "early_stopping"


def test_the_default_goes_by_the_loss_without_validation_data() -> None:
    assert len(fitted([5.0, 4.0, 3.0, 3.5, 3.0, 4.0, 1.0], validated=False)) == 6


def test_the_default_goes_by_val_loss_with_validation_data() -> None:
    history = still().fit(X, Y, verbose=0, validation_data=(X, Y + 1), callbacks=[Scripted(IMPROVES[::-1])])
    assert history["loss"] == [1.0, 2.0, 3.0, 4.0]
    assert len(still().fit(X, Y, verbose=0, validation_data=(X, Y + 99), callbacks=[Scripted(IMPROVES[::-1])])) > 9


def test_an_improvement_of_any_size_goes_on() -> None:
    history = fitted(IMPROVES, max_nb_epochs=9)
    assert (len(history), history.stop_reason) == (9, "epochs")


def test_early_stop_callback_takes_the_defaults_place() -> None:
    patient = EarlyStopping(patience=6)
    assert len(fitted([1.0], early_stop_callback=patient)) == 7
    assert patient.stopped_epoch == 6


def test_early_stop_callback_works_with_epochs() -> None:
    history = fitted([1.0], epochs=20, early_stop_callback=EarlyStopping(patience=2))
    assert (len(history), history.stop_reason) == (3, "early_stopping")


@pytest.mark.parametrize("value", [EarlyStopping, True, "val_loss", LambdaCallback()])
def test_early_stop_callback_is_an_early_stopping(value: Any) -> None:
    with pytest.raises(TypeError, match="Expected an EarlyStopping, received early_stop_callback="):
        fitted([1.0], early_stop_callback=value)


@pytest.mark.parametrize("option", [{}, {"early_stop_callback": EarlyStopping(patience=1)}])
def test_enable_early_stop_false_switches_off_every_one(option: dict[str, Any]) -> None:
    history = fitted([1.0], EarlyStopping(patience=1), enable_early_stop=False, max_nb_epochs=8, **option)
    assert (len(history), history.stop_reason) == (8, "epochs")


def test_enable_early_stop_false_binds_with_epochs_too() -> None:
    assert len(fitted([1.0], EarlyStopping(patience=1), enable_early_stop=False, epochs=6)) == 6


@pytest.mark.parametrize("value", [0, None, "no"])
def test_enable_early_stop_is_true_or_false(value: Any) -> None:
    with pytest.raises(TypeError, match="Expected True or False, received enable_early_stop="):
        fitted([1.0], enable_early_stop=value)


def test_of_several_stoppers_the_first_to_fire_stops_the_run() -> None:
    patient, hasty = EarlyStopping(patience=5), EarlyStopping("loss", patience=2)
    history = fitted([1.0], patient, hasty, epochs=20)
    assert (len(history), patient.stopped_epoch, hasty.stopped_epoch) == (3, None, 2)
    assert patient.wait == 2


def test_a_passed_stopper_stands_beside_the_default() -> None:
    patient = EarlyStopping(patience=50)
    assert len(fitted([1.0], patient)) == 4


def test_a_stopper_that_is_passed_twice_counts_each_epoch_once() -> None:
    stopping = EarlyStopping(patience=4)
    assert len(fitted([1.0], stopping, early_stop_callback=stopping)) == 5


def test_a_run_stopped_by_hand_was_not_stopped_early() -> None:
    model = still()
    by_hand = LambdaCallback(on_epoch_end=lambda epoch, logs: setattr(model, "stop_training", epoch == 1))
    history = fitted([1.0], by_hand, model=model)
    assert (history.epoch, history.stop_reason) == ([0, 1], "stop_training")


def test_each_fit_starts_from_a_clean_state() -> None:
    stopping, model = EarlyStopping(patience=2), still()
    assert len(fitted([1.0], stopping, model=model, epochs=9)) == 3
    assert len(fitted([7.0, 6.0, 5.0, 5.0, 5.0], stopping, model=model, epochs=9)) == 5
    assert (stopping.best, stopping.best_epoch, stopping.stopped_epoch) == (5.0, 2, 4)


def test_min_nb_epochs_is_exact() -> None:
    for count in (1, 4, 5, 8):
        assert len(fitted([1.0], min_nb_epochs=count)) == max(count, 4)


def test_a_monitor_that_has_recovered_at_min_nb_epochs_goes_on() -> None:
    values = [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 0.5, 0.6, 0.7, 0.8]
    stopping = EarlyStopping(patience=2)
    assert len(fitted(values, early_stop_callback=stopping, min_nb_epochs=7)) == 9
    assert (stopping.best, stopping.stopped_epoch) == (0.5, 8)


def test_patience_counts_epochs_with_a_validation() -> None:
    stopping = EarlyStopping(patience=2)
    history = fitted([1.0], early_stop_callback=stopping, validation_freq=3)
    assert history["val_loss"] == [None, None, 1.0, None, None, 1.0, None, None, 1.0]
    assert (stopping.best_epoch, stopping.stopped_epoch) == (2, 8)


def test_validation_in_a_list_of_epochs_is_judged_in_these() -> None:
    history = fitted([1.0], early_stop_callback=EarlyStopping(patience=2), validation_freq=[1, 2, 7, 9])
    assert history["val_loss"] == [1.0, 1.0, None, None, None, None, 1.0]


def test_a_loss_is_judged_in_every_epoch_whatever_validation_freq() -> None:
    assert len(fitted([1.0], early_stop_callback=EarlyStopping("loss", patience=2), validation_freq=5)) == 3


def test_nan_is_measured_and_never_the_best() -> None:
    stopping = EarlyStopping("loss", patience=3)
    values = [math.nan, 5.0, math.nan, math.nan, math.nan, 1.0]
    history = fitted(values, early_stop_callback=stopping, on_nonfinite="ignore", validated=False)
    assert (len(history), stopping.best, stopping.best_epoch) == (5, 5.0, 1)


def weight_after(values: Sequence[float], *callbacks: Callback, **options: Any) -> float:
    """The weight that the run ends with: the scripted loss of the epoch whose weights these are."""
    model = still()
    restoring = EarlyStopping(patience=3, restore_best_weights=True)
    try:
        fitted(values, restoring, *callbacks, model=model, epochs=6, **options)
    except (RuntimeError, KeyboardInterrupt):
        assert model.history.stop_reason in ("error", "interrupted")
    return model.module.get_parameter("weight").item()


@pytest.mark.parametrize("values", [[3.0, 1.0, 2.0, 2.0, 2.0, 2.0], [3.0, 2.0, 2.0, 1.0, 2.0, 2.0]])
def test_best_weights_come_back_whether_it_stopped_the_run_or_not(values: list[float]) -> None:
    assert weight_after(values) == 1.0


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_epoch_begin", "on_test_batch_end", "on_epoch_end"])
def test_best_weights_come_back_after_an_error_and_ctrl_c(hook: str, error: BaseException) -> None:
    begun: list[int] = []

    def fail(*_: Any) -> None:
        if begun[-1] == 3:
            raise error

    counting = LambdaCallback(on_epoch_begin=lambda epoch, logs: begun.append(epoch))
    assert weight_after([3.0, 1.0, 2.0, 2.5], counting, LambdaCallback(**{hook: fail})) == 1.0


def test_best_weights_come_back_when_training_is_stopped_by_hand() -> None:
    by_hand = LambdaCallback()
    by_hand.on_epoch_end = lambda epoch, logs: setattr(by_hand.model, "stop_training", epoch == 2)  # type: ignore[method-assign, assignment]
    assert weight_after([3.0, 1.0, 2.0], by_hand) == 1.0


def test_nothing_is_restored_unasked() -> None:
    model = still()
    fitted([3.0, 1.0, 2.0], model=model)
    assert model.module.get_parameter("weight").item() == 2.0


def test_the_best_weights_are_those_that_were_validated() -> None:
    model, x, y = fitkit.Model(nn.Linear(2, 1), device="cpu"), torch.randn(16, 2), torch.randn(16, 1)
    model.compile("sgd", "mse", learning_rate=0.9)
    restoring = EarlyStopping(patience=2, restore_best_weights=True)
    history = model.fit(x, y, validation_split=0.5, batch_size=2, epochs=8, verbose=0, callbacks=[restoring])
    assert model.evaluate(x[8:], y[8:], batch_size=2, verbose=0) == min(history["val_loss"]) == restoring.best


def test_later_callbacks_see_that_the_run_was_stopped() -> None:
    model, seen = still(), []
    looking = LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(model.stop_training))
    fitted([1.0], EarlyStopping(patience=2), looking, model=model, epochs=9)
    assert seen == [False, False, True]


@pytest.mark.parametrize(
    ("stopping", "message"),
    [
        (EarlyStopping("val_los"), "Did you mean 'val_loss'"),
        (EarlyStopping("val_accuracy"), "watches a key that this run never logs.*Known keys: loss, val_loss"),
        (EarlyStopping("grad_2_norm_total"), "watches a key that this run never logs"),
    ],
)
def test_a_monitor_that_cannot_appear_is_refused_before_the_first_batch(stopping: EarlyStopping, message: str) -> None:
    model = still()
    model.module.register_forward_hook(lambda *_: pytest.fail("a batch was trained"))
    with pytest.raises(ValueError, match=message):
        model.fit(X, Y, verbose=0, validation_data=(X, Y), callbacks=[stopping], epochs=3)


def test_val_loss_without_validation_data_is_refused_and_advised() -> None:
    with pytest.raises(ValueError, match="This run has no validation: give it some, or monitor 'loss'"):
        still().fit(X, Y, verbose=0, early_stop_callback=EarlyStopping())


def test_a_monitor_that_another_callback_adds_is_judged() -> None:
    adding = LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(score=float(min(epoch, 2))))
    stopping = EarlyStopping("score", patience=2)
    history = fitted([1.0], adding, stopping, epochs=9)
    assert (history["score"], stopping.direction) == ([0.0, 1.0, 2.0, 2.0, 2.0], "max")


def test_a_monitor_that_nobody_added_after_all_is_an_error_after_the_first_epoch() -> None:
    adding = LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(score=1.0))
    model = still()
    with pytest.raises(ValueError, match="'scoer'.*found no such key.*Did you mean 'score'"):
        fitted([1.0], adding, EarlyStopping("scoer"), model=model, epochs=9)
    assert model.history.epoch == []


def test_a_val_monitor_that_nobody_added_is_an_error_after_the_first_validation() -> None:
    adding, model = LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(score=1.0)), still()
    with pytest.raises(ValueError, match="val_score"):
        fitted([1.0], adding, EarlyStopping("val_score"), model=model, epochs=9, validation_freq=3)
    assert model.history.epoch == [0, 1]


def test_a_gradient_norm_may_be_monitored() -> None:
    stopping = EarlyStopping("grad_2_norm_total", patience=2)
    assert len(fitted([1.0], early_stop_callback=stopping, track_grad_norm=2)) == 3
    assert stopping.best == 1.0


def test_an_accuracy_is_better_when_it_is_more() -> None:
    model = fitkit.Model(nn.Linear(1, 2), device="cpu")
    model.compile("sgd", "cross_entropy", ["accuracy"], learning_rate=0.0)
    stopping = EarlyStopping("val_accuracy", patience=1)
    flipping = LambdaCallback(on_epoch_begin=lambda epoch, logs: flip(model.module, epoch))
    targets = torch.tensor([0, 0, 0, 1])
    history = model.fit(X, targets, validation_data=(X, targets), epochs=9, verbose=0, callbacks=[flipping, stopping])
    assert history["val_accuracy"] == [0.25, 0.75, 0.75]


def flip(module: nn.Module, epoch: int) -> None:
    """Names class 1 in the first epoch and class 0 from then on."""
    nn.init.zeros_(module.get_parameter("weight"))
    with torch.no_grad():
        module.get_parameter("bias").copy_(torch.tensor([0.0, 1.0] if epoch == 0 else [1.0, 0.0]))


def test_the_best_weights_come_back_at_the_end_of_their_own_run_only() -> None:
    module, x, y = nn.Linear(3, 1), torch.randn(8, 3), torch.randn(8, 1)
    model = fitkit.Model(module, device="cpu")
    model.compile("sgd", "mse")
    stopping = EarlyStopping("loss", restore_best_weights=True)
    model.fit(x, y, epochs=2, callbacks=[stopping], verbose=0)
    nn.init.constant_(module.weight, 7.0)
    with pytest.raises(RuntimeError, match="shapes"):
        model.predict(torch.randn(2, 5), callbacks=[stopping], verbose=0)
    assert module.weight.eq(7.0).all()


def test_an_evaluation_with_the_same_callback_leaves_it_the_least_number_of_epochs() -> None:
    x, y = torch.randn(8, 3), torch.randn(8, 1)
    model = fitkit.Model(nn.Linear(3, 1), device="cpu")
    model.compile("sgd", "mse", learning_rate=0.0)
    stopping = EarlyStopping("loss", patience=1)
    evaluating = LambdaCallback(on_epoch_begin=lambda *_: model.evaluate(x, y, callbacks=[stopping], verbose=0))
    history = model.fit(x, y, epochs=9, min_nb_epochs=4, callbacks=[evaluating, stopping], verbose=0)
    assert len(history) == 4
