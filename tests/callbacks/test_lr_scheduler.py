"""LRScheduler: torch's schedulers advance as in a loop by hand, by epochs or by the steps that were really made."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import fitkit
from fitkit.callbacks import EarlyStopping, LambdaCallback, LRScheduler

X = torch.linspace(-1, 1, 40).reshape(20, 2)
Y = X.sum(1, keepdim=True) + 0.5


def compiled(optimizer: Any = "sgd", **options: Any) -> fitkit.Model:
    torch.manual_seed(0)
    model = fitkit.Model(nn.Linear(2, 1), device="cpu")
    if optimizer == "sgd":
        options.setdefault("learning_rate", 0.1)
    model.compile(optimizer, "mse", **options)
    return model


def fitted(model: fitkit.Model, *callbacks: Any, epochs: int = 3, **flags: Any) -> fitkit.History:
    flags = {"batch_size": 4, "shuffle": False, "verbose": 0, **flags}
    return model.fit(X, Y, epochs=epochs, callbacks=list(callbacks), **flags)


def halving(optimizer: Any) -> lr_scheduler.LRScheduler:
    return lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


SCHEDULERS: dict[str, Callable[[Any], lr_scheduler.LRScheduler]] = {
    "StepLR": halving,
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=16),
    "CosineAnnealingLR": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 15),
    "LambdaLR": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "SequentialLR": lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2), halving(optimizer)], milestones=[2]
    ),
    "ChainedScheduler": lambda optimizer: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(optimizer, 0.1, 3), halving(optimizer)], optimizer=optimizer
    ),
    "MultiStepLR": lambda optimizer: lr_scheduler.MultiStepLR(optimizer, [2, 4]),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, cycle_momentum=False),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")  # of torch's SequentialLR
@pytest.mark.parametrize("interval", ["epoch", "step"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_weights_and_rates_are_those_of_a_loop_by_hand(name: str, interval: str) -> None:
    model = compiled(lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9))
    module = copy.deepcopy(model.module)
    history = fitted(model, LRScheduler(SCHEDULERS[name], interval=interval))

    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    scheduler = SCHEDULERS[name](optimizer)
    rates = []
    for _ in range(3):
        for x, y in zip(X.split(4), Y.split(4), strict=True):
            rate = optimizer.param_groups[0]["lr"]
            optimizer.zero_grad()
            nn.functional.mse_loss(module(x), y).backward()
            optimizer.step()
            if interval == "step":
                scheduler.step()
        rates.append(rate)
        if interval == "epoch":
            scheduler.step()
    assert history["learning_rate"] == rates
    assert all(map(torch.equal, model.module.parameters(), module.parameters()))


def test_a_step_is_a_window_of_batches() -> None:
    model = compiled()
    history = fitted(model, LRScheduler(halving, interval="step"), epochs=2, accumulate_grad_batches=2)
    # 5 batches are windows of 2, 2 and 1: three steps an epoch. The last one of the second epoch is the sixth.
    assert history["learning_rate"] == [0.1 / 4, 0.1 / 32]
    assert model.optimizer.param_groups[0]["lr"] == 0.1 / 64  # type: ignore[union-attr]


def test_a_micro_batch_is_no_step() -> None:
    model = compiled()
    fitted(model, LRScheduler(halving, interval="step"), epochs=1, micro_batch_size=2)
    assert model.optimizer.param_groups[0]["lr"] == 0.1 / 32  # type: ignore[union-attr]


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_is_none(fused: bool) -> None:
    model = compiled(lambda parameters: torch.optim.SGD(parameters, lr=0.1, fused=fused), precision="16-mixed")
    x, steps = X.clone(), []
    x[4:8] = 1e30  # the second of five batches has infinite gradients, and so has what the first scale is too large for
    weight = next(model.module.parameters())
    watched = fitkit.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: steps.append(weight.detach().clone())
    )
    scheduler = LRScheduler(halving, interval="step")
    model.fit(
        x, Y, epochs=1, batch_size=4, shuffle=False, on_nonfinite="ignore", callbacks=[watched, scheduler], verbose=0
    )
    made = sum(not torch.equal(*pair) for pair in zip(steps, [*steps[1:], weight.detach()], strict=True))
    assert 0 < made < 5
    assert model.optimizer.param_groups[0]["lr"] == 0.1 / 2**made  # type: ignore[union-attr]


def test_reduce_on_plateau_gets_its_monitor() -> None:
    def plateau(optimizer: Any) -> lr_scheduler.LRScheduler:
        return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1e6, threshold_mode="abs")

    history = fitted(compiled(), LRScheduler(plateau, monitor="loss"), epochs=4)
    assert history["learning_rate"] == [0.1, 0.1, 0.05, 0.025]


def test_reduce_on_plateau_is_asked_in_measured_epochs_only() -> None:
    def plateau(optimizer: Any) -> lr_scheduler.LRScheduler:
        return lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1e6, threshold_mode="abs")

    scheduler = LRScheduler(plateau, monitor="val_loss")
    history = fitted(compiled(), scheduler, epochs=6, validation_data=(X, Y), validation_freq=2)
    assert history["learning_rate"] == [0.1, 0.1, 0.1, 0.1, 0.05, 0.05]


def test_reduce_on_plateau_without_a_monitor_is_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match='ReduceLROnPlateau judges a number: pass LRScheduler.*monitor="val_loss"'):
        fitted(compiled(), LRScheduler(lr_scheduler.ReduceLROnPlateau))


def test_reduce_on_plateau_by_steps_is_refused() -> None:
    with pytest.raises(ValueError, match='received interval="step"'):
        fitted(compiled(), LRScheduler(lr_scheduler.ReduceLROnPlateau, interval="step", monitor="loss"))


def test_another_scheduler_takes_no_monitor() -> None:
    with pytest.raises(ValueError, match="StepLR looks at no number; received monitor='loss'"):
        fitted(compiled(), LRScheduler(halving, monitor="loss"))


def test_a_monitor_that_never_appears_is_an_error_before_the_first_batch() -> None:
    with pytest.raises(ValueError, match="LRScheduler.monitor='val_loss'. watches a key that this run never logs"):
        fitted(compiled(), LRScheduler(lr_scheduler.ReduceLROnPlateau, monitor="val_loss"))


def test_a_scheduler_over_the_compiled_optimizer_goes_on_in_a_second_fit() -> None:
    module = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    model = fitkit.Model(module, device="cpu")
    model.compile(optimizer, "mse")
    scheduler = LRScheduler(lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / 2**epoch))
    assert fitted(model, scheduler, epochs=2)["learning_rate"] == [0.1, 0.05]
    assert fitted(model, scheduler, epochs=2)["learning_rate"] == [0.025, 0.0125]


def test_a_scheduler_over_another_optimizer_is_refused_before_the_first_batch() -> None:
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    model = compiled()
    weight = next(model.module.parameters()).detach().clone()
    with pytest.raises(ValueError, match="Expected a scheduler over the model's optimizer, received a StepLR"):
        fitted(model, LRScheduler(halving(other)))
    assert torch.equal(weight, next(model.module.parameters()))


def test_a_callable_starts_anew_from_the_present_rate_at_each_fit() -> None:
    model = compiled()
    scheduler = LRScheduler(lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 / 2**epoch))
    assert fitted(model, scheduler, epochs=2)["learning_rate"] == [0.1, 0.05]
    assert fitted(model, scheduler, epochs=2)["learning_rate"] == [0.025, 0.0125]
    assert "initial_lr" not in model.optimizer.param_groups[0]  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")  # of torch's SequentialLR
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_state_goes_on_where_it_was(name: str, tmp_path: Any) -> None:
    class Saving(fitkit.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
            if epoch == 0:
                torch.save(scheduler.state_dict(), tmp_path / "state.pt")

    class Loading(fitkit.callbacks.Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            scheduler.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))

    scheduler = LRScheduler(SCHEDULERS[name], interval="step")
    whole = fitted(compiled(), scheduler, Saving())
    resumed = fitted(compiled(), scheduler, Loading(), initial_epoch=1)
    assert resumed["learning_rate"] == whole["learning_rate"][1:]


def test_the_rate_of_an_epoch_is_known_where_a_resumed_run_has_no_step_left(tmp_path: Path) -> None:
    def save(batch: int, logs: Any) -> None:
        if batch == 4 and not saving.model.history.epoch:
            saving.model.save(tmp_path / "state")

    saving = LambdaCallback(on_train_batch_end=save)
    whole = fitted(compiled(), LRScheduler(halving, interval="step"), saving)
    resumed = fitted(compiled(), LRScheduler(halving, interval="step"), resume_from=tmp_path / "state")
    assert resumed["learning_rate"] == whole["learning_rate"]


def test_early_stopping_can_watch_the_rate() -> None:
    stopping = EarlyStopping("learning_rate", patience=1, mode="max")
    assert len(fitted(compiled(), LRScheduler(halving), stopping, epochs=9)) == 2


@pytest.mark.parametrize("scheduler", ["step", None, 3])
def test_what_makes_no_scheduler_is_refused(scheduler: Any) -> None:
    with pytest.raises(TypeError, match="Expected a scheduler of torch.optim.lr_scheduler or a callable"):
        LRScheduler(scheduler)


def test_a_callable_that_makes_no_scheduler_is_refused() -> None:
    with pytest.raises(TypeError, match="to return a torch scheduler, received None"):
        fitted(compiled(), LRScheduler(lambda optimizer: None))  # type: ignore[arg-type,return-value]


def test_an_unknown_interval_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected one of 'epoch', 'step', received interval='batch'"):
        LRScheduler(halving, interval="batch")


def saved_at_epoch_ends(folder: Path, *, first: bool) -> None:
    saving = LambdaCallback(on_epoch_end=lambda epoch, logs: saving.model.save(folder / str(epoch)))
    rates = LRScheduler(halving)
    fitted(compiled(), *((saving, rates) if first else (rates, saving)))


def test_a_resumed_run_leaves_no_rate_to_start_from_and_torch_warns_of_nothing(tmp_path: Path) -> None:
    saved_at_epoch_ends(tmp_path, first=True)
    model = compiled()
    fitted(model, LRScheduler(halving), resume_from=tmp_path / "0")
    assert fitted(model, LRScheduler(halving), epochs=2)["learning_rate"] == [0.0125, 0.00625]


def test_a_file_from_the_midst_of_a_run_brings_no_rate_to_start_from(tmp_path: Path) -> None:
    saved_at_epoch_ends(tmp_path, first=False)
    model = compiled()
    model.load(tmp_path / "1")
    assert fitted(model, LRScheduler(halving), epochs=2)["learning_rate"] == [0.025, 0.0125]


def test_a_scheduler_of_another_class_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    saved_at_epoch_ends(tmp_path, first=True)
    model = compiled()
    before = model.module.weight.detach().clone()
    other = LRScheduler(lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.5))
    with pytest.raises(ValueError, match=r"/0 cannot be used: Expected a StepLR.*ExponentialLR") as caught:
        fitted(model, other, resume_from=tmp_path / "0")
    assert torch.equal(model.module.weight, before)
    assert model.history.epoch == []
    assert not hasattr(caught.value, "__notes__")


def test_a_schedule_as_long_as_all_batches_is_not_advanced_by_epochs() -> None:
    cycle = LRScheduler(lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.2, epochs=3, steps_per_epoch=3))
    model = compiled()
    with pytest.raises(ValueError, match=r"total_steps=9\) has as many .*, 3 x 3, .*interval=\"step\""):
        model.fit(X[:12], Y[:12], batch_size=4, epochs=3, callbacks=[cycle], verbose=0)


def test_outside_of_a_fit_it_has_no_state() -> None:
    scheduling = LRScheduler(halving)
    assert scheduling.state_dict() == {}
    scheduling.load_state_dict({})
    assert scheduling.state_dict() == {}


def test_a_rate_that_is_a_tensor_stays_one_when_a_run_goes_on(tmp_path: Path) -> None:
    def run(epochs: int, **arguments: Any) -> tuple[fitkit.Model, list[float | None]]:
        model = compiled(lambda parameters: torch.optim.Adam(parameters, lr=torch.tensor(0.1), capturable=False))
        saving = LambdaCallback(on_epoch_end=lambda epoch, logs: model.save(tmp_path / "state") if epoch == 0 else None)
        history = fitted(model, LRScheduler(halving), saving, epochs=epochs, **arguments)
        assert isinstance(model.optimizer.param_groups[0]["lr"], torch.Tensor)  # type: ignore[union-attr]
        return model, history["learning_rate"]

    whole, rates = run(3)
    resumed, again = run(3, resume_from=tmp_path / "state")
    assert again == rates
    assert all(map(torch.equal, resumed.module.parameters(), whole.module.parameters()))
