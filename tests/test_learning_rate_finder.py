"""The learning rate range test: what it suggests, that it leaves nothing behind, and that it refuses early."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fitkit
from fitkit.learning_rate_finder import LearningRateCurve

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
Y = X @ torch.randn(6, 1, generator=torch.Generator().manual_seed(1))


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))


def compiled(optimizer: Any = "adam", module: nn.Module | None = None, **options: Any) -> fitkit.Model:
    model = fitkit.Model(module or network(), device="cpu")
    model.compile(optimizer, "mse", **options)
    return model


def curve(losses: list[float]) -> LearningRateCurve:
    return LearningRateCurve([10.0 ** (index - len(losses)) for index in range(len(losses))], losses)


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def state(model: fitkit.Model) -> Any:
    """All that a training changes, as plain values."""
    optimizer = model.optimizer
    assert optimizer is not None
    scaler = model._compiled.scaler  # type: ignore[union-attr]
    names = {parameter: name for name, parameter in model.module.named_parameters()}
    return copy.deepcopy(
        {
            "module": dict(model.module.state_dict()),
            "gradients": [parameter.grad for parameter in model.module.parameters()],
            "optimizer": {names[parameter]: values for parameter, values in optimizer.state.items()},
            "groups": [{key: group[key] for key in group if key != "params"} for group in optimizer.param_groups],
            "scaler": None if scaler is None else scaler.state_dict(),
            "modes": [module.training for module in model.module.modules()],
            "history": model.history.state_dict(),
            "stop_training": model.stop_training,
        }
    )


def assert_same(one: Any, other: Any) -> None:
    """Bit for bit, tensors in nests of dicts and lists among plain values."""
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list):
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            assert_same(first, second)
    else:
        assert one == other


def assert_undone(model: fitkit.Model, search: Callable[[], Any]) -> None:
    """Runs the search and compares bit for bit what was before with what is after."""
    before = state(model)
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    expected = draws()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    search()
    assert draws() == expected
    assert_same(state(model), before)


# ---------------------------------------------------------------------------------------------------------------------
# What is suggested.
# ---------------------------------------------------------------------------------------------------------------------


def test_the_suggestion_is_a_tenth_of_the_rate_with_the_lowest_loss() -> None:
    found = curve([5.0, 5.0, 4.5, 3.0, 1.0, 2.0, 40.0])
    assert found.suggestion == pytest.approx(found.rates[4] / 10)
    assert found.steepest == found.rates[3]


def test_an_explosion_at_the_end_moves_nothing() -> None:
    losses = [5.0, 5.0, 4.5, 3.0, 1.0, 2.0]
    for end in (40.0, 1e30, math.inf, math.nan):
        assert curve([*losses, end]).suggestion == curve([*losses, 6.0]).suggestion


def test_losses_below_zero_are_losses_too() -> None:
    found = curve([-1.0, -1.0, -1.5, -3.0, -5.0, 2.0])
    assert found.suggestion == pytest.approx(found.rates[4] / 10)


@pytest.mark.parametrize("losses", [[1.0, 2.0, 3.0, 4.0], [2.0] * 6, [math.nan] * 4], ids=["rising", "flat", "nan"])
def test_without_a_fall_there_is_no_suggestion(losses: list[float]) -> None:
    found = curve(losses)
    assert (found.suggestion, found.steepest) == (None, None)
    assert f"the loss did not fall clearly at any rate from {found.rates[0]:.3g} to 0.1" in str(found)
    assert len(found.plot().axes[0].get_legend().get_texts()) == 2


def test_noise_alone_gives_no_suggestion() -> None:
    noise = torch.randn(100, generator=torch.Generator().manual_seed(2))
    found = LearningRateCurve(np.geomspace(1e-7, 10, 100).tolist(), (2.0 + 0.3 * noise).tolist())
    assert found.suggestion is None


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_suggested_rate_learns_and_a_rate_beyond_the_curve_does_not(optimizer: str) -> None:
    found = compiled(optimizer, nn.Linear(6, 1)).find_learning_rate(X, Y, batch_size=16, verbose=0)
    assert found.suggestion is not None
    losses = []
    for rate in (found.suggestion, 1000 * found.suggestion):
        model = compiled(optimizer, nn.Linear(6, 1), learning_rate=rate)
        losses.append(model.fit(X, Y, epochs=10, batch_size=16, on_nonfinite="ignore", verbose=0)["loss"][-1])
    good, bad = losses
    start = compiled(optimizer, nn.Linear(6, 1)).evaluate(X, Y, verbose=0)
    assert good < 0.5 * start
    assert not bad < start


def test_rates_grow_by_one_factor_from_start_to_end() -> None:
    found = compiled().find_learning_rate(X, Y, start=1e-6, end=1e-3, steps=13, verbose=0)
    assert found.rates == pytest.approx(np.geomspace(1e-6, 1e-3, 13).tolist())
    assert len(found.losses) == 13


def test_the_losses_are_those_of_a_plain_loop_with_these_rates() -> None:
    module = nn.Linear(6, 1)
    plain = copy.deepcopy(module)
    found = compiled("sgd", module).find_learning_rate(
        DataLoader(TensorDataset(X, Y), 16), steps=12, end=0.1, verbose=0
    )
    optimizer = torch.optim.SGD(plain.parameters(), lr=1.0)
    for index, (rate, loss) in enumerate(zip(found.rates, found.losses, strict=True)):
        rows = slice(index % 4 * 16, index % 4 * 16 + 16)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        expected = nn.functional.mse_loss(plain(X[rows]), Y[rows])
        expected.backward()
        optimizer.step()
        assert loss == pytest.approx(expected.item(), rel=1e-6)


def test_the_test_ends_when_the_loss_explodes() -> None:
    found = compiled("sgd", nn.Linear(6, 1)).find_learning_rate(X, Y, end=1e6, verbose=0)
    assert len(found.rates) == len(found.losses) < 100
    assert found.losses[-1] > 10 * found.losses[0] or math.isnan(found.losses[-1])


def test_groups_keep_their_proportion() -> None:
    module = network()
    optimizer = torch.optim.SGD(
        [{"params": module[0].parameters(), "lr": 0.1}, {"params": module[3].parameters()}], 0.4
    )
    seen = []

    class Watching(fitkit.Model):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append([group["lr"] for group in optimizer.param_groups])
            return nn.functional.mse_loss(self.module(batch[0]), batch[1])

    model = Watching(module, device="cpu")
    model.compile(optimizer)
    found = model.find_learning_rate(X, Y, steps=10, verbose=0)
    assert [rates[1] for rates in seen] == found.rates
    assert all(first == pytest.approx(second / 4) for first, second in seen)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.4]


def test_a_plot_shows_the_curve_and_marks_the_suggestion() -> None:
    found = curve([5.0, 5.0, 4.5, 3.0, 1.0, 2.0, 40.0])
    axes = found.plot().axes[0]
    assert axes.get_xscale() == "log"
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["loss of each batch", "smoothed", "suggestion: 0.0001", "steepest: 0.0001"]
    assert axes.lines[2].get_xdata()[0] == found.suggestion
    assert axes.get_ylim()[1] < 40.0


# ---------------------------------------------------------------------------------------------------------------------
# Nothing is left behind.
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "adagrad", "rmsprop", "adafactor"])
def test_a_search_before_the_first_fit_leaves_everything_bit_for_bit(optimizer: str) -> None:
    model = compiled(optimizer)
    assert_undone(model, lambda: model.find_learning_rate(X, Y, verbose=0))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "64-true"])
def test_a_search_between_fits_changes_neither_the_state_nor_the_next_fit(precision: str) -> None:
    models = [compiled(precision=precision), compiled(precision=precision)]
    for model in models:
        torch.manual_seed(7)
        model.fit(X, Y, epochs=2, verbose=0)
    assert_undone(models[0], lambda: models[0].find_learning_rate(X, Y, verbose=0))
    for model in models:
        torch.manual_seed(8)
        model.fit(X, Y, epochs=2, verbose=0)
    assert_same(state(models[0]), state(models[1]))


def test_gradients_modes_and_objects_are_the_same_ones() -> None:
    model = compiled()
    model.module[1].eval()
    model.module[0].weight.grad = torch.ones(8, 6)
    gradient, group = model.module[0].weight.grad, model.optimizer.param_groups[0]  # type: ignore[union-attr]
    buffers = dict(model.module.named_buffers())
    assert_undone(model, lambda: model.find_learning_rate(X, Y, verbose=0))
    assert model.module[0].weight.grad is gradient
    assert model.optimizer.param_groups[0] is group  # type: ignore[union-attr]
    assert all(buffer is buffers[name] for name, buffer in model.module.named_buffers())


def test_a_rate_that_is_a_tensor_stays_that_tensor() -> None:
    module = network()
    rate = torch.tensor(0.01)
    model = compiled(torch.optim.Adam(module.parameters(), lr=rate, capturable=False, foreach=False), module)
    assert_undone(model, lambda: model.find_learning_rate(X, Y, verbose=0))
    assert model.optimizer.param_groups[0]["lr"] is rate  # type: ignore[union-attr]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_or_ctrl_c_in_the_middle_is_raised_and_undone(error: type[BaseException]) -> None:
    class Failing(nn.Sequential):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 20:
                raise error("in the middle")
            return super().forward(x)

    model = compiled(module=Failing(*network()))

    def search() -> None:
        with pytest.raises(error, match="in the middle"):
            model.find_learning_rate(X, Y, verbose=0)

    assert_undone(model, search)


def test_a_loaders_own_generator_is_put_back() -> None:
    generator = torch.Generator().manual_seed(4)
    loader = DataLoader(TensorDataset(X, Y), 16, shuffle=True, generator=generator)
    before = generator.get_state()
    compiled().find_learning_rate(loader, verbose=0)
    assert torch.equal(generator.get_state(), before)


def test_the_history_of_the_last_fit_stays() -> None:
    model = compiled()
    history = model.fit(X, Y, epochs=1, verbose=0)
    model.find_learning_rate(X, Y, verbose=0)
    assert model.history is history
    assert len(history) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of data, and what is refused.
# ---------------------------------------------------------------------------------------------------------------------


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(zip(X, Y, strict=True))


@pytest.mark.parametrize(
    "data",
    [(X, Y), TensorDataset(X, Y), DataLoader(Stream(), 16), [(X, Y)], ((X, Y) for _ in range(30))],
    ids=lambda data: type(data).__name__,
)
def test_any_data_of_fit_is_read_as_often_as_needed(data: Any) -> None:
    assert len(compiled().find_learning_rate(data, steps=30, end=1e-4, verbose=0).rates) == 30


def test_parts_weights_and_clipping_go_with_it() -> None:
    model = fitkit.Model(nn.Linear(6, 3), device="cpu")
    model.compile("sgd", "cross_entropy")
    labels = torch.arange(64) % 3
    options = {"class_weight": {0: 2.0}, "micro_batch_size": 7, "gradient_clip_val": 1.0, "batch_size": 20}
    found = model.find_learning_rate(X, labels, steps=10, end=1e-3, verbose=0, **options)  # type: ignore[arg-type]
    assert len(found.losses) == 10


def test_a_generator_that_ends_too_soon_is_an_error_and_undone() -> None:
    model = compiled()
    with pytest.raises(ValueError, match=r"at least steps=100 batches, received a generator that gave 5"):
        model.find_learning_rate(((X, Y) for _ in range(5)), verbose=0)
    assert model.optimizer.param_groups[0]["lr"] == 1e-3  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 0}, r"rise from above 0, received start=0, end=10"),
        ({"start": 1.0, "end": 0.1}, r"rise from above 0, received start=1\.0, end=0\.1"),
        ({"start": -1}, r"received start=-1"),
        ({"end": math.inf}, r"received end=inf"),
        ({"end": "large"}, r"received end='large'"),
        ({"steps": 9}, r"at least 10, received steps=9"),
        ({"steps": 10.0}, r"received steps=10\.0"),
        ({"batch_size": 0}, r"received batch_size=0"),
        ({"micro_batch_size": 0}, r"received micro_batch_size=0"),
        ({"gradient_clip_val": -1}, r"received gradient_clip_val=-1"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_before_the_first_batch(options: dict[str, Any], message: str) -> None:
    class Untouched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise AssertionError("a batch came through")

    with pytest.raises((TypeError, ValueError), match=message):
        compiled(module=Untouched(6, 1)).find_learning_rate(X, Y, verbose=0, **options)


def test_a_model_that_is_not_compiled_or_has_nothing_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="Call model.compile"):
        fitkit.Model(network(), device="cpu").find_learning_rate(X, Y)
    with pytest.raises(ValueError, match="trainable parameters"):
        compiled(module=network().requires_grad_(False)).find_learning_rate(X, Y, verbose=0)


def test_within_a_fit_it_is_refused() -> None:
    model = compiled()
    search = fitkit.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: model.find_learning_rate(X, Y))
    with pytest.raises(ValueError, match=r"find_learning_rate\(...\) was called from within a fit"):
        model.fit(X, Y, epochs=1, callbacks=[search], verbose=0)


def test_no_line_an_epoch_is_written_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    compiled().find_learning_rate(X, Y, steps=20, end=1e-3)
    assert capsys.readouterr().out == ""


class Noting(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        self.param_groups[0]["steps"] = self.param_groups[0].get("steps", 0) + 1
        return super().step(closure)


def test_an_option_that_the_optimizer_adds_does_not_stay() -> None:
    module = network()
    optimizer = Noting(module.parameters(), lr=0.1)
    compiled(optimizer, module).find_learning_rate(X, Y, steps=20)
    assert "steps" not in optimizer.param_groups[0]
