"""gradient_clip_val: torch's own clipping by the norm of all gradients, on the gradient of the optimizer's step."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fitkit

X, Y = torch.randn(24, 3, generator=torch.Generator().manual_seed(1)), 9 * torch.ones(24, 2)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))


def fitted(module: nn.Module, clip: float, precision: str = "32-true", **options: Any) -> fitkit.Model:
    model = fitkit.Model(module, device="cpu")
    model.compile(torch.optim.SGD(module.parameters(), lr=0.1), "mse", precision=precision)
    options = {"batch_size": 4, "epochs": 3, "shuffle": False, "verbose": 0, **options}
    model.fit(X, Y, gradient_clip_val=clip, **options)
    return model


def plain(module: nn.Module, clip: float, k: int = 1, epochs: int = 3) -> list[float]:
    """The plain loop with k micro-batches a step; returns the norms before clipping."""
    optimizer, norms = torch.optim.SGD(module.parameters(), lr=0.1), []
    for step, (x, y) in enumerate(list(zip(X.split(4), Y.split(4), strict=True)) * epochs, start=1):
        (F.mse_loss(module(x), y) / k).backward()
        if step % k == 0:
            norms.append(torch.nn.utils.clip_grad_norm_(module.parameters(), clip).item())
            optimizer.step()
            optimizer.zero_grad()
    return norms


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("clip", [0.1, 1, 3.5])
def test_it_is_clip_grad_norm_bit_for_bit(clip: float) -> None:
    module = network()
    other = copy.deepcopy(module)
    assert max(plain(other, clip)) > clip
    fitted(module, clip)
    assert_equal(module, other)


@pytest.mark.parametrize("order", [1, 2, 3.5, "inf"])
def test_it_is_the_same_with_norms_tracked_beside(order: Any) -> None:
    module = network()
    other = copy.deepcopy(module)
    plain(other, 0.5)
    fitted(module, 0.5, track_grad_norm=order)
    assert_equal(module, other)


@pytest.mark.parametrize("tracked", [-1, 2])
def test_with_accumulation_it_acts_on_the_gradient_of_the_whole_window(tracked: int) -> None:
    module = network()
    other = copy.deepcopy(module)
    plain(other, 0.5, k=3)
    fitted(module, 0.5, accumulate_grad_batches=3, track_grad_norm=tracked)
    assert_equal(module, other)


def test_no_step_has_a_longer_gradient() -> None:
    module, lengths = network(), []
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: lengths.append(length(module)))
    model = fitkit.Model(module, device="cpu")
    model.compile(optimizer, "mse")
    model.fit(X, Y, batch_size=5, epochs=2, accumulate_grad_batches=2, gradient_clip_val=0.25, verbose=0)
    assert lengths == [pytest.approx(0.25, rel=1e-4)] * 6


def length(module: nn.Module) -> float:
    """The norm of all gradients together."""
    return torch.cat([parameter.grad.flatten() for parameter in module.parameters()]).norm().item()  # type: ignore[union-attr]


def test_a_gradient_within_the_bound_stays_as_it_is() -> None:
    module = network()
    other = copy.deepcopy(module)
    fitted(module, 1e6)
    fitted(other, 0)
    assert_equal(module, other)


def test_0_is_off() -> None:
    module = network()
    other = copy.deepcopy(module)
    plain(other, math.inf)
    fitted(module, 0)
    assert_equal(module, other)


def test_the_norm_is_that_of_the_short_last_window_too() -> None:
    module, x, y = nn.Linear(3, 2), X[:5], Y[:5]
    other = copy.deepcopy(module)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    for inputs, targets in ((x[:4], y[:4]), (x[4:], y[4:])):
        optimizer.zero_grad()
        F.mse_loss(other(inputs), targets).backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        optimizer.step()
    model = fitkit.Model(module, device="cpu")
    model.compile(torch.optim.SGD(module.parameters(), lr=0.1), "mse")
    model.fit(x, y, batch_size=2, epochs=1, shuffle=False, accumulate_grad_batches=2, gradient_clip_val=0.5, verbose=0)
    torch.testing.assert_close(module.state_dict(), other.state_dict(), rtol=1e-5, atol=1e-6)


def test_under_16_mixed_it_acts_on_unscaled_gradients() -> None:
    module = network()
    other = copy.deepcopy(module)
    optimizer, scaler = torch.optim.SGD(other.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    for x, y in list(zip(X.split(4), Y.split(4), strict=True)) * 3:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = F.mse_loss(other(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
    fitted(module, 0.5, precision="16-mixed")
    assert_equal(module, other)


class Unused(nn.Module):
    """A module of which one part takes no part and another is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.frozen = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 3)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.used(self.frozen(x))
        return output


@pytest.mark.parametrize("tracked", [-1, 2, "inf"])
def test_parameters_without_a_gradient_add_nothing(tracked: Any) -> None:
    module = Unused()
    other = copy.deepcopy(module)
    plain(other, 0.5)
    fitted(module, 0.5, track_grad_norm=tracked)
    assert_equal(module, other)


def test_the_norm_is_over_all_parameter_groups_together() -> None:
    module = network()
    other = copy.deepcopy(module)
    plain(other, 0.5)
    groups = [{"params": [each], "lr": 0.1} for each in module.parameters()]
    model = fitkit.Model(module, device="cpu")
    model.compile(torch.optim.SGD(groups), "mse")
    model.fit(X, Y, batch_size=4, epochs=3, shuffle=False, gradient_clip_val=0.5, verbose=0)
    assert_equal(module, other)


@pytest.mark.parametrize("value", [-1, -0.1, math.nan, math.inf])
def test_what_is_no_length_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="Expected a number of at least 0.*, received gradient_clip_val="):
        fitted(network(), value)


@pytest.mark.parametrize("value", [True, None, "1"])
def test_what_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="Expected a number, received gradient_clip_val="):
        fitted(network(), value)


@pytest.mark.parametrize("track", [-1, 1, 2])
def test_only_what_the_optimizer_has_is_clipped(track: float) -> None:
    module = network()
    before = [parameter.detach().clone() for parameter in module[2].parameters()]
    model = fitkit.Model(module, device="cpu")
    model.compile(torch.optim.SGD(module[2].parameters(), lr=1.0), "mse")
    model.fit(X, Y, batch_size=24, epochs=1, gradient_clip_val=1.0, track_grad_norm=track, verbose=0)
    changes = [now.detach() - then for now, then in zip(module[2].parameters(), before, strict=True)]
    assert float(torch.cat([change.flatten() for change in changes]).norm()) == pytest.approx(1.0, rel=1e-4)
