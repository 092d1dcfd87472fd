"""track_grad_norm: the norms of the gradients before clipping, by names, as means over the steps of an epoch."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fitkit
from fitkit.callbacks import LambdaCallback

# The gradient of the mean output of a Linear(2, 1) is the mean input, and 1 for the bias.
X = torch.tensor([[3.0, 4.0]])


def model_of(module: nn.Module, precision: str = "32-true") -> fitkit.Model:
    """A model that minimises its mean output, with steps of length 0."""
    model = fitkit.Model(module, device="cpu")
    model.compile("sgd", lambda output, target: output.mean(), learning_rate=0.0, precision=precision)
    return model


def norms(x: Tensor, order: Any, module: nn.Module | None = None, **options: Any) -> dict[str, list[float]]:
    """The norms in History, by their keys."""
    model = model_of(module or nn.Linear(2, 1))
    options = {"batch_size": 1, "epochs": 1, "shuffle": False, **options}
    history = model.fit(x, torch.zeros(len(x)), track_grad_norm=order, verbose=0, **options)
    return {key: column for key, column in history.history.items() if key != "loss"}  # type: ignore[misc]


@pytest.mark.parametrize(
    ("order", "label", "weight", "total"),
    [
        (1, "1", 7.0, 8.0),
        (2, "2", 5.0, math.sqrt(26)),
        (2.0, "2", 5.0, math.sqrt(26)),
        ("inf", "inf", 4.0, 4.0),
        (math.inf, "inf", 4.0, 4.0),
        (1.5, "1.5", (3**1.5 + 4**1.5) ** (2 / 3), (3**1.5 + 4**1.5 + 1) ** (2 / 3)),
        (0.5, "0.5", (3**0.5 + 2) ** 2, (3**0.5 + 3) ** 2),
    ],
)
def test_the_norms_are_those_by_hand(order: Any, label: str, weight: float, total: float) -> None:
    assert norms(X, order) == {
        f"grad_{label}_norm_total": [pytest.approx(total)],
        f"grad_{label}_norm_weight": [pytest.approx(weight)],
        f"grad_{label}_norm_bias": [pytest.approx(1.0)],
    }


def test_names_are_those_of_named_parameters() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"head": nn.Linear(1, 1)}), nn.Linear(2, 1, bias=False))
    del module[1]
    names = [f"grad_2_norm_{name}" for name, _ in module.named_parameters()]
    assert list(norms(X, 2, module)) == ["grad_2_norm_total", *names]


def test_minus_1_is_off() -> None:
    assert norms(X, -1) == norms(X, -1.0) == {}


def test_history_has_the_mean_over_the_epochs_steps() -> None:
    x = torch.cat([X, 2 * X, 6 * X])
    assert norms(x, 2, epochs=2)["grad_2_norm_weight"] == [pytest.approx(15.0)] * 2


def test_each_step_weighs_the_same_whatever_it_holds() -> None:
    x = torch.cat([X, X, X, 5 * X])
    assert norms(x, 2, batch_size=3)["grad_2_norm_weight"] == [pytest.approx(15.0)]


def test_the_norm_is_taken_before_clipping() -> None:
    assert norms(X, 2, gradient_clip_val=0.1)["grad_2_norm_weight"] == [pytest.approx(5.0)]
    assert norms(X, "inf", gradient_clip_val=0.1)["grad_inf_norm_total"] == [pytest.approx(4.0)]


def test_with_accumulation_it_is_that_of_the_whole_window() -> None:
    x = torch.cat([X, -X, 3 * X, 3 * X, 2 * X])
    tracked = norms(x, 2, accumulate_grad_batches=2)
    assert tracked["grad_2_norm_weight"] == [pytest.approx((0 + 15 + 10) / 3)]


def seen_at_batches(x: Tensor, key: str, **options: Any) -> list[float | None]:
    """What batch logs say at the end of each batch."""
    seen: list[float | None] = []
    looking = LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(logs.get(key)))
    norms(x, 2, callbacks=[looking], **options)
    return seen


def test_batch_logs_hold_the_last_steps() -> None:
    x = torch.cat([X, 2 * X, 6 * X])
    assert seen_at_batches(x, "grad_2_norm_weight") == pytest.approx([5.0, 10.0, 30.0])


def test_batch_logs_hold_the_last_step_until_the_next_one() -> None:
    seen = seen_at_batches(torch.cat([X, X, 2 * X, 2 * X]), "grad_2_norm_weight", accumulate_grad_batches=2, epochs=2)
    assert seen == [None, pytest.approx(5.0), pytest.approx(5.0), pytest.approx(10.0)] * 2


def test_a_frozen_parameter_has_no_norm() -> None:
    module = nn.Linear(2, 1)
    module.bias.requires_grad_(False)
    assert norms(X, 2, module) == {
        "grad_2_norm_total": [pytest.approx(5.0)],
        "grad_2_norm_weight": [pytest.approx(5.0)],
    }


def test_a_parameter_that_is_frozen_later_has_no_norm_from_then_on() -> None:
    module = nn.Linear(2, 1)
    freezing = LambdaCallback(on_epoch_begin=lambda epoch, logs: module.bias.requires_grad_(epoch == 0))
    tracked = norms(X, 2, module, epochs=2, callbacks=[freezing])
    assert tracked["grad_2_norm_bias"] == [1.0, None]
    assert tracked["grad_2_norm_total"] == pytest.approx([math.sqrt(26), 5.0])


class Unused(nn.Linear):
    """A Linear with a parameter that takes no part."""

    def __init__(self) -> None:
        super().__init__(2, 1)
        self.unused = nn.Parameter(torch.ones(3))


@pytest.mark.parametrize("order", [1, 2, "inf"])
def test_a_parameter_without_a_gradient_has_a_norm_of_0(order: Any) -> None:
    tracked = norms(X, order, Unused())
    assert tracked.pop(f"grad_{order}_norm_unused") == [0.0]
    assert tracked == norms(X, order)


def test_a_step_without_any_gradient_has_a_norm_of_0() -> None:
    elsewhere = nn.Parameter(torch.ones(2))
    model = fitkit.Model(nn.Linear(2, 1), device="cpu")
    model.compile("sgd", lambda output, target: (elsewhere * output.detach()).mean())
    history = model.fit(X, torch.zeros(1), epochs=1, track_grad_norm=2, verbose=0)
    assert history["grad_2_norm_total"] == [0.0]


def test_only_what_the_optimizer_trains_is_measured() -> None:
    module = nn.Linear(2, 1)
    model = fitkit.Model(module, device="cpu")
    model.compile(torch.optim.SGD([module.weight], lr=0.0), lambda output, target: output.mean())
    history = model.fit(X, torch.zeros(1), epochs=1, track_grad_norm=2, verbose=0)
    assert set(history) == {"loss", "grad_2_norm_total", "grad_2_norm_weight"}


def eighth(output: Tensor, target: Tensor) -> Tensor:
    """The mean output, small enough to be scaled by 65536 in float16."""
    return output.float().mean() / 8


def test_under_16_mixed_norms_are_unscaled() -> None:
    model = fitkit.Model(nn.Linear(2, 1), device="cpu")
    model.compile("sgd", eighth, learning_rate=0.0, precision="16-mixed")
    history = model.fit(X, torch.zeros(1), epochs=1, track_grad_norm=2, verbose=0)
    assert history["grad_2_norm_weight"] == [pytest.approx(5 / 8)]


@pytest.mark.parametrize("optimizer", ["sgd", lambda parameters: torch.optim.SGD(parameters, lr=0.0)])
def test_a_step_that_the_scaler_skipped_is_none(optimizer: Any) -> None:
    model = fitkit.Model(nn.Linear(2, 1), device="cpu")
    model.compile(optimizer, eighth, precision="16-mixed")
    x = torch.cat([3 * X, X, X / 2])  # the first gradient, scaled, is infinite in float16
    options = {"batch_size": 1, "shuffle": False, "epochs": 1, "verbose": 0}
    history = model.fit(x, torch.zeros(3), track_grad_norm=2, gradient_clip_val=0.01, **options)
    assert history["grad_2_norm_weight"] == [pytest.approx((5 / 8 + 5 / 16) / 2)]


def test_tracking_changes_no_weight() -> None:
    module, x, y = nn.Linear(2, 1), torch.randn(10, 2), torch.randn(10, 1)
    for each, order in ((module, 2), (other := copy.deepcopy(module), -1)):
        model = fitkit.Model(each, device="cpu")
        model.compile("adam", "mse", learning_rate=0.1)
        torch.manual_seed(0)
        model.fit(x, y, batch_size=3, epochs=3, track_grad_norm=order, verbose=0)
    torch.testing.assert_close(module.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_norms_are_of_training_alone() -> None:
    tracked = norms(X, 2, validation_data=(X, torch.zeros(1)))
    assert [key for key in tracked if "norm" in key and key.startswith("val_")] == []


@pytest.mark.parametrize("value", [0, -2, -0.5, math.nan, -math.inf, "2", "Inf", ""])
def test_what_is_no_order_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"received track_grad_norm="):
        norms(X, value)


@pytest.mark.parametrize("value", [True, None, [2]])
def test_what_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="Expected a number, received track_grad_norm="):
        norms(X, value)
