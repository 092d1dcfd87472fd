"""What runs inside, between and after runs changes nothing of theirs: numbers, weights, gradients, draws, modes."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fitkit
from fitkit.callbacks import Callback, LambdaCallback

X, Y = torch.randn(2, 12, 3, generator=torch.Generator().manual_seed(1)).split(1)
X, Y = X[0], Y[0, :, :1]
BAD_Y = 1000 * torch.ones(12, 1)


class Drawing(nn.Module):
    """A network that draws random numbers in both modes, and keeps batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layers(x + 0.1 * torch.randn_like(x) + 0.1 * random.random() + 0.1 * np.random.rand())
        return output


def network() -> Drawing:
    """The same network each time."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return Drawing()


def compiled(module: nn.Module | None = None, **options: Any) -> fitkit.Model:
    model = fitkit.Model(module or network(), device="cpu")
    model.compile("adam", "mse", ["mae"], learning_rate=0.1, **options)
    return model


def loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), batch_size=4, **options)


Summary = tuple[dict[str, Tensor], dict[str, list[Any]], tuple[float, float, float]]


def trained(*callbacks: Callback, model: fitkit.Model | None = None, **options: Any) -> Summary:
    """What a fit from the same start leaves: weights, History, and what the generators draw next."""
    model = model or compiled()
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    options = {"batch_size": 4, "epochs": 3, "accumulate_grad_batches": 2, "verbose": 0, **options}
    history = model.fit(X, Y, callbacks=list(callbacks), **options).history
    return model.module.state_dict(), history, (torch.rand(()).item(), random.random(), np.random.rand())


def assert_equal(one: Summary, other: Summary) -> None:
    torch.testing.assert_close(one[0], other[0], rtol=0, atol=0)
    assert one[1:] == other[1:]


# What a callback may do with its model in the middle of a fit.
INTRUSIONS: dict[str, Callable[[fitkit.Model], Any]] = {
    "evaluate": lambda model: model.evaluate(X, BAD_Y, verbose=0),
    "evaluate a shuffled loader": lambda model: model.evaluate(loader(shuffle=True), verbose=0),
    "predict": lambda model: model.predict(X, batch_size=5, verbose=0),
    "predict a shuffled loader": lambda model: model.predict(loader(shuffle=True), verbose=0),
    "test_on_batch": lambda model: model.test_on_batch(X, BAD_Y),
    "predict_on_batch": lambda model: model.predict_on_batch(X),
}
HOOKS = ["on_train_begin", "on_epoch_begin", "on_train_batch_begin", "on_train_batch_end", "on_epoch_end"]


def intruding(model: fitkit.Model, hook: str, act: Callable[[fitkit.Model], Any]) -> Callback:
    callback = LambdaCallback()
    setattr(callback, hook, lambda *_: act(model))
    return callback


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("name", INTRUSIONS)
def test_what_a_callback_measures_changes_nothing_of_the_fit(name: str, hook: str) -> None:
    model = compiled()
    assert_equal(trained(intruding(model, hook, INTRUSIONS[name]), model=model), trained())


@pytest.mark.parametrize("hook", ["on_test_begin", "on_test_batch_begin", "on_test_batch_end", "on_test_end"])
@pytest.mark.parametrize("name", INTRUSIONS)
def test_what_a_callback_measures_within_a_validation_changes_nothing_of_it(name: str, hook: str) -> None:
    model, module = compiled(nn.Linear(3, 1)), nn.Linear(3, 1)
    module.load_state_dict(model.module.state_dict())
    intruder = intruding(model, hook, INTRUSIONS[name])
    one = trained(intruder, model=model, validation_data=(X, Y), validation_batch_size=5)
    assert_equal(one, trained(model=compiled(module), validation_data=(X, Y), validation_batch_size=5))


@pytest.mark.parametrize("name", INTRUSIONS)
def test_what_is_measured_between_two_fits_is_not_in_the_second_ones_numbers(name: str) -> None:
    summaries = []
    for act in (INTRUSIONS[name], lambda model: None):
        model = compiled()
        trained(model=model)
        act(model)
        summaries.append(trained(model=model))
    assert_equal(*summaries)


@pytest.mark.parametrize("name", [name for name in INTRUSIONS if "loader" not in name])
def test_measuring_draws_nothing_by_itself(name: str) -> None:
    model = compiled(nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.5)))
    before = torch.get_rng_state()
    INTRUSIONS[name](model)
    assert torch.equal(torch.get_rng_state(), before)


def train_on_batch(model: fitkit.Model) -> Any:
    return model.train_on_batch(X, Y)


@pytest.mark.parametrize("act", [*INTRUSIONS.values(), train_on_batch], ids=[*INTRUSIONS, "train_on_batch"])
def test_no_gradient_is_left_or_lost(act: Callable[[fitkit.Model], Any]) -> None:
    model = compiled()
    act(model)
    assert all(parameter.grad is None for parameter in model.module.parameters())
    for parameter in model.module.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    act(model)
    assert all(torch.equal(each.grad, torch.full_like(each, 2.0)) for each in model.module.parameters())  # type: ignore[arg-type]


def test_train_on_batch_in_a_callback_makes_its_own_step_and_leaves_the_open_window() -> None:
    module = nn.Linear(3, 1)
    plain = copy.deepcopy(module)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for first in (0, 6):
        window = [torch.zeros_like(parameter) for parameter in plain.parameters()]
        for part in (slice(first, first + 3), slice(first + 3, first + 6)):
            gradients = torch.autograd.grad(F.mse_loss(plain(X[part]), Y[part]) / 2, list(plain.parameters()))
            window = [sum(pair) for pair in zip(window, gradients, strict=True)]  # type: ignore[misc]
            if part.stop % 6:
                plain_step(plain, optimizer, torch.autograd.grad(plain(X).mean(), list(plain.parameters())))
        plain_step(plain, optimizer, window)
    fit_with_extra_steps(module)
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=1e-6, atol=1e-6)


def plain_step(module: nn.Module, optimizer: torch.optim.Optimizer, gradients: Any) -> None:
    for parameter, gradient in zip(module.parameters(), gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()


def fit_with_extra_steps(module: nn.Module) -> None:
    """Windows of two batches, and a step on the mean output in the middle of each."""
    model, other = fitkit.Model(module, device="cpu"), fitkit.Model(module, device="cpu")
    model.compile(torch.optim.SGD(module.parameters(), lr=0.1), "mse")
    other.compile(model.optimizer, lambda output, target: output.mean())
    extra = LambdaCallback(
        on_train_batch_end=lambda batch, logs: other.train_on_batch(X, Y) if batch % 2 == 0 else None
    )
    options = {"batch_size": 3, "shuffle": False, "epochs": 1, "accumulate_grad_batches": 2, "verbose": 0}
    model.fit(X, Y, callbacks=[extra], **options)


def test_train_on_batch_in_a_callback_is_not_in_the_fits_numbers() -> None:
    model = fitkit.Model(nn.Linear(3, 1), device="cpu")
    model.compile("sgd", "mse", ["mae"], learning_rate=0.0)
    alone = model.fit(X, Y, batch_size=4, epochs=2, shuffle=False, verbose=0).history
    callback = intruding(model, "on_train_batch_end", lambda model: model.train_on_batch(X, BAD_Y))
    assert model.fit(X, Y, batch_size=4, epochs=2, shuffle=False, verbose=0, callbacks=[callback]).history == alone


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that runs must not hand on to each other: 32 squared errors of 1 and one of 100 have the mean 4.
# ---------------------------------------------------------------------------------------------------------------------

ONES, TARGETS = torch.ones(33, 1), torch.tensor([1.0] * 32 + [10.0])[:, None]


def silent() -> fitkit.Model:
    """A model whose output is 0 and stays so."""
    module = nn.Linear(1, 1)
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    model = fitkit.Model(module, device="cpu")
    model.compile("sgd", "mse", learning_rate=0.0)
    return model


@pytest.mark.parametrize("name", ["test_on_batch", "train_on_batch"])
def test_a_batch_by_itself_is_not_in_the_next_evaluation(name: str) -> None:
    model = silent()
    assert getattr(model, name)(ONES, 99 * ONES) == pytest.approx(9801.0)
    assert model.evaluate(ONES, TARGETS, verbose=0) == pytest.approx(4.0)
    assert getattr(model, name)(ONES, TARGETS) == pytest.approx(4.0)


@pytest.mark.parametrize("error", [KeyboardInterrupt("stop"), RuntimeError("stop")])
def test_an_epoch_that_broke_off_is_not_in_the_next_ones_mean(error: BaseException) -> None:
    def fail(batch: int, logs: Any) -> None:
        raise error

    model = silent()
    with pytest.raises(type(error), match="stop"):
        model.fit(ONES, 99 * ONES, epochs=1, verbose=0, callbacks=[LambdaCallback(on_train_batch_end=fail)])
    history = model.fit(ONES, TARGETS, epochs=1, validation_data=(ONES, TARGETS), verbose=0)
    assert history.history == {"loss": [pytest.approx(4.0)], "val_loss": [pytest.approx(4.0)]}


@pytest.mark.parametrize("hook", ["on_test_batch_end", "on_test_begin"])
def test_an_evaluation_that_broke_off_is_not_in_the_next_one(hook: str) -> None:
    model = silent()
    breaking = Callback()
    setattr(breaking, hook, lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError, match="division"):
        model.evaluate(ONES, 99 * ONES, batch_size=8, verbose=0, callbacks=[breaking])
    assert model.evaluate(ONES, TARGETS, verbose=0) == pytest.approx(4.0)


def test_after_an_error_the_module_is_in_the_modes_it_had_and_without_gradients() -> None:
    model = compiled()
    model.module.get_submodule("layers.1").eval()
    modes = [child.training for child in model.module.modules()]
    for hook in (*HOOKS, "on_test_batch_end"):
        breaking = intruding(model, hook, lambda model: 1 / 0)
        with pytest.raises(ZeroDivisionError, match="division"):
            trained(breaking, model=model, validation_data=(X, Y), accumulate_grad_batches=9)
        assert [child.training for child in model.module.modules()] == modes
        assert all(parameter.grad is None for parameter in model.module.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# Validation.
# ---------------------------------------------------------------------------------------------------------------------

VALIDATIONS: dict[str, dict[str, Any]] = {
    "arrays": {"validation_data": (X, BAD_Y)},
    "arrays now and then": {"validation_data": (X, BAD_Y), "validation_freq": 2, "validation_batch_size": 5},
    "shuffled loader": {"validation_data": loader(shuffle=True)},
    "part of a loader": {"validation_data": loader(shuffle=True), "val_percent_check": 0.4},
    "loader with workers": {"validation_data": loader(shuffle=True, num_workers=2)},
}


@pytest.mark.parametrize("name", VALIDATIONS)
def test_validation_changes_nothing_of_the_training(name: str) -> None:
    validated, alone = trained(**VALIDATIONS[name]), trained()
    torch.testing.assert_close(validated[0], alone[0], rtol=0, atol=0)
    assert validated[1]["loss"] == alone[1]["loss"]
    assert validated[2] == alone[2]


def test_validation_changes_nothing_of_a_shuffled_loaders_training() -> None:
    weights = []
    for options in ({}, {"validation_data": loader(shuffle=True)}):
        model = compiled()
        torch.manual_seed(3)
        np.random.seed(3)
        random.seed(3)
        model.fit(loader(shuffle=True), epochs=3, verbose=0, **options)
        weights.append(model.module.state_dict())
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_the_validation_of_an_epoch_is_an_evaluation_after_it() -> None:
    model, measured = compiled(nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.5))), []
    measuring = intruding(model, "on_epoch_end", lambda model: measured.append(model.evaluate(X, Y, verbose=0)))
    history = model.fit(X, Y, validation_data=(X, Y), epochs=3, verbose=0, callbacks=[measuring])
    assert [list(row) for row in zip(history["val_loss"], history["val_mae"], strict=True)] == measured


# ---------------------------------------------------------------------------------------------------------------------
# Two Models that share what they work on.
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INTRUSIONS)
def test_another_model_of_the_same_module_changes_nothing_of_the_fit(name: str) -> None:
    model = compiled()
    other = compiled(model.module)
    other.compile("sgd", "l1", ["mse"])
    callback = intruding(other, "on_train_batch_end", INTRUSIONS[name])
    assert_equal(trained(callback, model=model), trained())


def test_two_models_of_one_module_may_train_it_in_turns() -> None:
    module = nn.Linear(3, 1)
    plain = copy.deepcopy(module)
    for loss in (F.mse_loss, F.l1_loss, F.mse_loss):
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
        loss(plain(X), Y).backward()
        optimizer.step()
        optimizer.zero_grad()
    models = {name: fitkit.Model(module, device="cpu") for name in ("mse", "mae")}
    for name, model in models.items():
        model.compile(torch.optim.SGD(module.parameters(), lr=0.1), name)
    for name in ("mse", "mae", "mse"):
        models[name].fit(X, Y, batch_size=12, epochs=1, shuffle=False, verbose=0)
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=1e-6, atol=1e-7)


def test_two_modules_may_share_an_optimizer() -> None:
    one, other = nn.Linear(3, 1), nn.Linear(3, 1)
    plain = copy.deepcopy(one)
    optimizer = torch.optim.SGD([*one.parameters(), *other.parameters()], lr=0.1)
    models = [fitkit.Model(module, device="cpu") for module in (one, other)]
    for model in models:
        model.compile(optimizer, "mse")
    callback = intruding(models[1], "on_train_batch_end", lambda model: model.train_on_batch(X, BAD_Y))
    options = {"batch_size": 3, "shuffle": False, "epochs": 2, "accumulate_grad_batches": 2, "verbose": 0}
    models[0].fit(X, Y, callbacks=[callback], **options)
    alone = fitkit.Model(plain, device="cpu")
    alone.compile(torch.optim.SGD(plain.parameters(), lr=0.1), "mse")
    alone.fit(X, Y, **options)
    torch.testing.assert_close(one.state_dict(), plain.state_dict(), rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Modes.
# ---------------------------------------------------------------------------------------------------------------------


def seen_modes(model: fitkit.Model, name: str) -> list[tuple[bool, bool]]:
    """A list that fills itself, at each call of the module, with the modes of the module and of a part of it."""
    seen: list[tuple[bool, bool]] = []
    part = model.module.get_submodule(name)
    model.module.register_forward_pre_hook(lambda module, inputs: seen.append((module.training, part.training)))
    return seen


def test_a_frozen_batch_norm_stays_in_eval_mode() -> None:
    model = compiled()
    norm = model.module.get_submodule("layers.1").eval()
    mean = norm.get_buffer("running_mean").clone()
    seen = seen_modes(model, "layers.1")
    model.fit(X, Y, batch_size=6, epochs=1, validation_data=(X, Y), verbose=0)
    model.evaluate(X, Y, verbose=0)
    model.predict(X, verbose=0)
    model.train_on_batch(X, Y)
    assert seen == [(True, False)] * 2 + [(False, False)] * 4 + [(True, False)]
    assert (model.module.training, norm.training) == (True, False)
    assert torch.equal(norm.get_buffer("running_mean"), mean)


@pytest.mark.parametrize("run", ["fit", "train_on_batch"])
def test_a_root_module_in_eval_mode_is_trained_and_put_back(run: str) -> None:
    model = compiled(network().eval())
    seen = seen_modes(model, "layers.2")
    getattr(model, run)(X, Y, **({"epochs": 1, "batch_size": 12, "verbose": 0} if run == "fit" else {}))
    assert seen == [(True, True)]
    assert not any(child.training for child in model.module.modules())


@pytest.mark.parametrize("name", INTRUSIONS)
def test_measuring_happens_in_eval_mode_and_puts_every_mode_back(name: str) -> None:
    model = compiled()
    model.module.get_submodule("layers.2").eval()
    modes = [child.training for child in model.module.modules()]
    seen = seen_modes(model, "layers.1")
    INTRUSIONS[name](model)
    assert set(seen) == {(False, False)}
    assert [child.training for child in model.module.modules()] == modes


@pytest.mark.parametrize("hook", ["on_epoch_begin", "on_train_batch_begin", "on_train_batch_end"])
def test_a_users_change_of_mode_survives_a_validation(hook: str) -> None:
    model = compiled()
    seen = seen_modes(model, "layers.1")
    freezing = intruding(model, hook, lambda model: model.module.get_submodule("layers.1").eval())
    model.fit(X, Y, batch_size=12, epochs=2, validation_data=(X, Y), verbose=0, callbacks=[freezing])
    assert seen[1:] == [(False, False), (True, False), (False, False)]
    assert all(child.training for child in model.module.modules())


def test_a_mode_that_a_callback_changes_at_the_end_of_an_epoch_holds_in_the_next() -> None:
    model = compiled()
    seen = seen_modes(model, "layers.1")
    freezing = intruding(model, "on_epoch_end", lambda model: model.module.get_submodule("layers.1").eval())
    model.fit(X, Y, batch_size=12, epochs=2, validation_data=(X, Y), verbose=0, callbacks=[freezing])
    assert seen == [(True, True), (False, False), (True, False), (False, False)]


class Noisy(nn.Module):
    """A loss of the user's with a part that has modes."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(self.dropout(output), target)


@pytest.mark.parametrize("training", [True, False])
def test_a_loss_that_is_a_module_is_called_in_the_mode_that_the_user_gave_it(training: bool) -> None:
    loss, modes = Noisy().train(training), []
    loss.register_forward_pre_hook(lambda module, inputs: modes.append(module.training))
    model = fitkit.Model(nn.Linear(3, 1), device="cpu")
    model.compile("sgd", loss)
    model.fit(X, Y, batch_size=6, epochs=2, verbose=0)
    assert modes == [training] * 4
    assert loss.training is training


def test_a_hook_that_leaves_the_module_in_eval_mode_does_not_stop_training() -> None:
    model, modes = compiled(), []
    model.module.get_submodule("layers.2").eval()

    def look(epoch: int, logs: Any) -> None:
        modes.append([child.training for child in model.module.modules()])

    sampling = LambdaCallback(on_epoch_begin=look, on_epoch_end=lambda *_: model.module.eval())
    model.fit(X, Y, epochs=3, callbacks=[sampling], verbose=0)
    assert modes == 3 * [[True, True, True, True, False, True]]
