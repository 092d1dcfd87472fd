"""SwapEMAWeights: the average is that of torch's swa_utils, counted by steps, and each moment has the right weights."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fitkit
from fitkit.callbacks import Callback, EarlyStopping, Every, LambdaCallback, ModelCheckpoint, SwapEMAWeights

X = torch.linspace(-1, 1, 40).reshape(20, 2)
Y = X.sum(1, keepdim=True) + 0.5


def compiled(module: nn.Module | None = None) -> fitkit.Model:
    torch.manual_seed(0)
    model = fitkit.Model(nn.Linear(2, 1) if module is None else module, device="cpu")
    model.compile("sgd", "mse", learning_rate=0.1)
    return model


def fitted(model: fitkit.Model, *callbacks: Callback, epochs: int = 2, **flags: Any) -> fitkit.History:
    flags = {"batch_size": 4, "shuffle": False, "verbose": 0, **flags}
    return model.fit(X, Y, epochs=epochs, callbacks=list(callbacks), **flags)


def by_hand(module: nn.Module, momentum: float, window: int = 1, epochs: int = 2) -> AveragedModel:
    """A plain loop over windows of so many batches, with torch's own average; the module is trained in place."""
    averaged = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(momentum))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(epochs):
        for x, y in zip(X.split(4 * window), Y.split(4 * window), strict=True):
            optimizer.zero_grad()
            nn.functional.mse_loss(module(x), y).backward()
            optimizer.step()
            averaged.update_parameters(module)
    return averaged


def test_a_run_ends_with_the_average_of_torch() -> None:
    model = compiled()
    averaged = by_hand(copy.deepcopy(model.module), 0.9)
    fitted(model, SwapEMAWeights(momentum=0.9))
    assert all(map(torch.equal, model.module.parameters(), averaged.module.parameters()))


def test_the_average_counts_windows_and_not_batches() -> None:
    model = compiled()
    averaged = by_hand(copy.deepcopy(model.module), 0.5, window=2)
    fitted(model, SwapEMAWeights(momentum=0.5), accumulate_grad_batches=2)
    for ours, torchs in zip(model.module.parameters(), averaged.module.parameters(), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-6, atol=1e-7)


def test_momentum_0_is_the_last_step() -> None:
    with_average, without = compiled(), compiled()
    fitted(with_average, SwapEMAWeights(momentum=0.0))
    fitted(without)
    assert all(map(torch.equal, with_average.module.parameters(), without.module.parameters()))


@pytest.mark.parametrize("swap_on_epoch", [False, True])
def test_training_goes_on_with_the_weights_that_are_trained(swap_on_epoch: bool) -> None:
    plain = fitted(compiled(), epochs=3)
    averaging = SwapEMAWeights(swap_on_epoch, momentum=0.9)
    averaged = fitted(compiled(), averaging, epochs=3, validation_data=(X, Y))
    assert averaged["loss"] == plain["loss"]


@pytest.mark.parametrize("swap_on_epoch", [False, True])
def test_validation_sees_the_average(swap_on_epoch: bool) -> None:
    model = compiled()
    module = copy.deepcopy(model.module)
    history = fitted(model, SwapEMAWeights(swap_on_epoch, momentum=0.9), epochs=1, validation_data=(X, Y))
    averaged = by_hand(module, 0.9, epochs=1)
    assert history["val_loss"] == [pytest.approx(nn.functional.mse_loss(averaged(X), Y).item(), rel=1e-6)]
    assert history["val_loss"] != [pytest.approx(nn.functional.mse_loss(module(X), Y).item(), rel=1e-3)]


@pytest.mark.parametrize("swap_on_epoch", [False, True])
def test_later_callbacks_see_the_average_at_an_epochs_end_when_asked(swap_on_epoch: bool) -> None:
    model, seen = compiled(), []
    module = copy.deepcopy(model.module)
    looking = LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(copy.deepcopy(model.module)))
    fitted(model, SwapEMAWeights(swap_on_epoch, momentum=0.9), looking, epochs=1)
    averaged = by_hand(module, 0.9, epochs=1)
    expected = averaged.module if swap_on_epoch else module
    assert all(map(torch.equal, seen[0].parameters(), expected.parameters()))


def test_early_stopping_brings_back_an_average_when_it_comes_later() -> None:
    model = compiled()
    stopping = EarlyStopping("val_loss", patience=2, restore_best_weights=True)
    averaging = SwapEMAWeights(swap_on_epoch=True, momentum=0.9)
    history = fitted(model, averaging, stopping, epochs=4, validation_data=(X, Y))
    assert model.evaluate(X, Y, verbose=0) == pytest.approx(min(history["val_loss"]), rel=1e-6)  # type: ignore[type-var]


RESTORING = EarlyStopping("val_loss", restore_best_weights=True)


@pytest.mark.parametrize(
    "chosen",
    [
        [SwapEMAWeights(), RESTORING],
        [RESTORING, SwapEMAWeights()],
        [RESTORING, SwapEMAWeights(swap_on_epoch=True)],
        [Every(2, SwapEMAWeights(swap_on_epoch=True)), RESTORING],
    ],
    ids=["without swap_on_epoch", "either way", "too late", "not in every epoch"],
)
def test_weights_that_were_never_validated_are_not_kept(chosen: list[Callback]) -> None:
    batches: list[int] = []
    noting = LambdaCallback(on_train_batch_begin=lambda batch, logs: batches.append(batch))
    with pytest.raises(ValueError, match=r"never validated.*callbacks=\[SwapEMAWeights\(swap_on_epoch=True\), Early"):
        fitted(compiled(), *chosen, noting, validation_data=(X, Y))
    assert not batches


@pytest.mark.parametrize("stopping", [EarlyStopping("val_loss"), EarlyStopping("loss", restore_best_weights=True)])
def test_early_stopping_that_keeps_no_weights_for_a_validation_needs_no_swap(stopping: EarlyStopping) -> None:
    assert len(fitted(compiled(), SwapEMAWeights(), stopping, validation_data=(X, Y))) == 2


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("best.pt", {"save_best_only": True}),
        ("best.pt", {"save_best_only": True, "save_weights_only": True}),
        ("best.pt", {"save_top_k": 1}),
        ("{epoch}-{val_loss:.2f}.pt", {}),
    ],
    ids=["save_best_only", "save_weights_only", "save_top_k", "by name"],
)
def test_files_by_a_validation_do_not_hold_weights_that_were_never_validated(
    tmp_path: Path, name: str, arguments: dict[str, Any]
) -> None:
    saving = ModelCheckpoint(tmp_path / name, **arguments)
    with pytest.raises(ValueError, match=r"goes by 'val_loss', would save weights that were never validated.*Model"):
        fitted(compiled(), SwapEMAWeights(), saving, validation_data=(X, Y))
    assert not list(tmp_path.iterdir())


def test_the_best_file_holds_the_average_that_was_the_best(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path / "best.pt", save_best_only=True)
    history = fitted(compiled(), SwapEMAWeights(swap_on_epoch=True), saving, validation_data=(X, Y))
    model = compiled()
    model.load(tmp_path / "best.pt")
    assert model.evaluate(X, Y, verbose=0) == pytest.approx(history.best("val_loss")["val_loss"], rel=1e-6)


def test_a_run_goes_on_from_a_file_of_the_average_as_if_undisturbed(tmp_path: Path) -> None:
    def run(epochs: int, **arguments: Any) -> fitkit.Model:
        averaging = SwapEMAWeights(swap_on_epoch=True, momentum=0.9)
        saving = ModelCheckpoint(tmp_path / "{epoch}-{val_loss:.2f}.pt")
        model = compiled()
        fitted(model, averaging, saving, epochs=epochs, validation_data=(X, Y), **arguments)
        return model

    whole = run(3)
    [second] = tmp_path.glob("2-*.pt")
    assert all(map(torch.equal, run(3, resume_from=second).module.parameters(), whole.module.parameters()))


@pytest.mark.parametrize("arguments", [{}, {"monitor": "loss", "save_best_only": True}, {"save_freq": 1}])
def test_files_that_no_validation_judges_need_no_swap(tmp_path: Path, arguments: dict[str, Any]) -> None:
    fitted(compiled(), SwapEMAWeights(), ModelCheckpoint(tmp_path / "a.pt", **arguments), validation_data=(X, Y))
    assert (tmp_path / "a.pt").exists()


def test_a_run_that_an_error_ends_has_the_average_too() -> None:
    def fail(batch: int, logs: Any) -> None:
        if batch == 3:
            raise RuntimeError("in mid-run")

    model = compiled()
    module = copy.deepcopy(model.module)
    with pytest.raises(RuntimeError, match="in mid-run"):
        fitted(model, SwapEMAWeights(momentum=0.9), LambdaCallback(on_train_batch_begin=fail))
    averaged = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for x, y in list(zip(X.split(4), Y.split(4), strict=True))[:3]:
        module.zero_grad()
        nn.functional.mse_loss(module(x), y).backward()
        torch.optim.SGD(module.parameters(), lr=0.1).step()
        averaged.update_parameters(module)
    assert all(map(torch.equal, model.module.parameters(), averaged.module.parameters()))


def test_buffers_stay_those_of_training() -> None:
    def module() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))

    averaging, plain = compiled(module()), compiled(module())
    fitted(averaging, SwapEMAWeights(momentum=0.9))
    fitted(plain)
    assert all(map(torch.equal, averaging.module.buffers(), plain.module.buffers()))
    assert not torch.equal(averaging.module[0].weight, plain.module[0].weight)  # type: ignore[index]


def test_parameters_of_several_dtypes_are_averaged() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1).double(), nn.Linear(1, 1))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    averaging = SwapEMAWeights(momentum=0.5)
    averaging.set_model(SimpleNamespace(optimizer=optimizer))  # type: ignore[arg-type]
    averaging.on_train_begin({})
    for value in (2.0, 4.0):
        for parameter in module.parameters():
            nn.init.constant_(parameter, value)
        optimizer.step()
    averaging.on_train_end({})
    assert all((parameter == 3.0).all() for parameter in module.parameters())


@pytest.mark.parametrize("swap_on_epoch", [False, True])
def test_a_state_goes_on_where_it_was(swap_on_epoch: bool, tmp_path: Any) -> None:
    class Saving(Callback):
        def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
            if epoch == 0:
                torch.save([averaging.state_dict(), self.model.module.state_dict()], tmp_path / "state.pt")

    class Loading(Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            state, weights = torch.load(tmp_path / "state.pt", weights_only=True)
            self.model.module.load_state_dict(weights)
            averaging.load_state_dict(state)

    averaging = SwapEMAWeights(swap_on_epoch, momentum=0.9)
    whole, resumed = compiled(), compiled()
    fitted(whole, averaging, Saving(), epochs=3)
    fitted(resumed, averaging, Loading(), epochs=3, initial_epoch=1)
    assert all(map(torch.equal, whole.module.parameters(), resumed.module.parameters()))


def test_a_state_of_other_parameters_is_refused() -> None:
    averaging = SwapEMAWeights()
    averaging.set_model(compiled())
    averaging.on_train_begin({})
    with pytest.raises(ValueError, match=r"received those of others: \[\[\(3,\)\]\] for parameters of"):
        averaging.load_state_dict({"kept": [[torch.zeros(3)]], "is_swapped": False})
    averaging.on_train_end({})


def test_a_run_without_a_step_changes_nothing() -> None:
    model = compiled()
    before = copy.deepcopy(model.module)
    stopping = LambdaCallback(on_train_begin=lambda logs: setattr(model, "stop_training", True))
    fitted(model, SwapEMAWeights(), stopping)
    assert all(map(torch.equal, model.module.parameters(), before.parameters()))


def test_evaluate_inside_a_fit_sees_the_average_when_given_the_callback() -> None:
    model, seen = compiled(), []
    averaging = SwapEMAWeights(momentum=0.9)

    def look(epoch: int, logs: Any) -> None:
        seen.extend(model.evaluate(X, Y, callbacks=given, verbose=0) for given in (None, averaging))

    fitted(model, averaging, LambdaCallback(on_epoch_end=look), epochs=1)
    assert seen[0] != seen[1]
    assert seen[1] == pytest.approx(model.evaluate(X, Y, verbose=0), rel=1e-6)


@pytest.mark.parametrize("momentum", [-0.1, 1.1])
def test_a_momentum_out_of_range_is_refused(momentum: float) -> None:
    with pytest.raises(ValueError, match="Expected a number from 0 to 1, received momentum="):
        SwapEMAWeights(momentum=momentum)


@pytest.mark.parametrize("swap_on_epoch", [False, True])
def test_a_run_goes_on_from_a_validation_in_which_the_module_has_the_average(
    swap_on_epoch: bool, tmp_path: Path
) -> None:
    def run(*callbacks: Callback, **arguments: Any) -> Tensor:
        model = compiled()
        averaging = SwapEMAWeights(swap_on_epoch, momentum=0.5)
        fitted(model, averaging, *callbacks, epochs=3, validation_data=(X, Y), **arguments)
        return next(model.module.parameters()).detach().clone()

    count = iter(range(100))
    saving = LambdaCallback(on_test_batch_end=lambda batch, logs: saving.model.save(tmp_path / str(next(count))))
    expected = run(saving)
    assert next(count) > 2
    assert all(torch.equal(run(resume_from=tmp_path / str(index)), expected) for index in range(next(count) - 1))
