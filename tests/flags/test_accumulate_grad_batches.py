"""accumulate_grad_batches: K micro-batches make the step that their one large batch would have made."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import IterableDataset

import fitkit
from fitkit.callbacks import Callback, LambdaCallback


def compiled(module: nn.Module, loss: Any = "mse", rate: float = 0.1, **options: Any) -> fitkit.Model:
    """A model that steps by plain SGD."""
    model = fitkit.Model(module, device="cpu")
    model.compile(torch.optim.SGD(module.parameters(), lr=rate), loss, **options)
    return model


def gradients_at_steps(model: fitkit.Model) -> list[float]:
    """A list that fills itself with the first gradient seen by each optimizer step."""
    seen: list[float] = []
    first = next(model.module.parameters())
    model.optimizer.register_step_pre_hook(lambda *_: seen.append(first.grad.sum().item()))  # type: ignore[union-attr]
    return seen


def plain_windows(module: nn.Module, x: Tensor, y: Tensor, window: int, epochs: int, loss: Any = F.mse_loss) -> None:
    """The plain loop over the large batches."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for _ in range(epochs):
        for inputs, targets in zip(x.split(window), y.split(window), strict=True):
            optimizer.zero_grad()
            loss(module(inputs), targets).backward()
            optimizer.step()


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=1e-5, atol=1e-6)


class Slope(nn.Linear):
    """w * x, from w = 0."""

    def __init__(self) -> None:
        super().__init__(1, 1, bias=False)
        nn.init.zeros_(self.weight)


# Squared errors around zero: the gradient of a batch is -2 times its mean target.
ONES = torch.ones(12, 1)


def test_a_smaller_micro_batch_counts_less() -> None:
    model = compiled(Slope())
    seen = gradients_at_steps(model)
    y = torch.tensor([1.0, 1, 1, 1, 4, 4])[:, None]
    model.fit(ONES[:6], y, batch_size=4, epochs=1, shuffle=False, accumulate_grad_batches=2, verbose=0)
    assert seen == [pytest.approx(-4.0, rel=1e-6)]


def test_a_short_window_is_not_divided_by_k() -> None:
    model = compiled(Slope(), rate=0.0)
    seen = gradients_at_steps(model)
    model.fit(ONES, ONES, batch_size=4, epochs=1, accumulate_grad_batches=2, verbose=0)
    assert seen == [-2.0, -2.0]


def test_a_loss_that_says_its_weight_is_weighted_by_it() -> None:
    def of_valid(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        valid = ~target.isnan()
        return ((output - target)[valid] ** 2).mean(), valid.sum()

    model = compiled(Slope(), of_valid)
    seen = gradients_at_steps(model)
    y = torch.tensor([1.0, 1, 1, 1, 4, math.nan, math.nan, math.nan])[:, None]
    model.fit(ONES[:8], y, batch_size=4, epochs=1, shuffle=False, accumulate_grad_batches=2, verbose=0)
    assert seen == [pytest.approx(-3.2, rel=1e-6)]


def test_equal_micro_batches_are_a_plain_loop_bit_for_bit() -> None:
    module, x, y = nn.Linear(3, 1), torch.randn(16, 3), torch.randn(16, 1)
    plain = copy.deepcopy(module)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step, (inputs, targets) in enumerate(zip(x.split(2), y.split(2), strict=True)):
        (F.mse_loss(plain(inputs), targets) / 4).backward()
        if step % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
    compiled(module).fit(x, y, batch_size=2, epochs=1, shuffle=False, accumulate_grad_batches=4, verbose=0)
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=0, atol=0)


@given(samples=st.integers(1, 20), size=st.integers(1, 6), k=st.integers(1, 6), epochs=st.integers(1, 3))
def test_any_slicing_reaches_the_weights_of_the_large_batches(samples: int, size: int, k: int, epochs: int) -> None:
    torch.manual_seed(0)
    module, x, y = nn.Linear(3, 2), torch.randn(samples, 3), torch.randn(samples, 2)
    plain = copy.deepcopy(module)
    plain_windows(plain, x, y, size * k, epochs)
    model = compiled(module)
    model.fit(x, y, batch_size=size, epochs=epochs, shuffle=False, accumulate_grad_batches=k, verbose=0)
    assert_same_weights(module, plain)


@given(samples=st.integers(1, 20), size=st.integers(1, 6), k=st.integers(1, 6), weighted=st.booleans())
def test_ignored_targets_and_class_weights_count_as_in_the_large_batch(
    samples: int, size: int, k: int, weighted: bool
) -> None:
    torch.manual_seed(samples)
    module, x, y = nn.Linear(3, 4), torch.randn(samples, 3), torch.randint(0, 4, (samples,))
    y[torch.rand(samples) < 0.4] = -100
    y[:: size * k] = 1  # every window has a target: without one the plain loop divides by zero
    plain = copy.deepcopy(module)
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5, 4.0]) if weighted else None)
    plain_windows(plain, x, y, size * k, 1, loss)
    compiled(module, loss).fit(x, y, batch_size=size, epochs=1, shuffle=False, accumulate_grad_batches=k, verbose=0)
    assert_same_weights(module, plain)


def test_a_window_without_any_target_makes_no_step() -> None:
    module = nn.Linear(2, 3)
    model = compiled(module, "cross_entropy")
    seen = gradients_at_steps(model)
    y = torch.tensor([-100, -100, -100, -100, 1, 2])
    model.fit(torch.randn(6, 2), y, batch_size=2, epochs=1, shuffle=False, accumulate_grad_batches=2, verbose=0)
    assert len(seen) == 1
    assert module.weight.isfinite().all()


def test_sums_add_up() -> None:
    module, x, y = nn.Linear(2, 1), torch.randn(7, 2), torch.randn(7, 1)
    plain = copy.deepcopy(module)
    plain_windows(plain, x, y, 4, 1, nn.MSELoss(reduction="sum"))
    model = compiled(module, nn.MSELoss(reduction="sum"))
    model.fit(x, y, batch_size=2, epochs=1, shuffle=False, accumulate_grad_batches=2, verbose=0)
    assert_same_weights(module, plain)


def test_sample_weights_leave_the_denominator_of_the_large_batch() -> None:
    module, x, y, weight = nn.Linear(2, 1), torch.randn(7, 2), torch.randn(7, 1), torch.rand(7)
    plain = copy.deepcopy(module)
    both = torch.cat([y, weight[:, None]], 1)
    plain_windows(plain, x, both, 4, 2, lambda output, y: (y[:, 1:] * (output - y[:, :1]) ** 2).mean())
    data = (x, y, weight)
    compiled(module).fit(data, batch_size=2, epochs=2, shuffle=False, accumulate_grad_batches=2, verbose=0)
    assert_same_weights(module, plain)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared, self.one, self.two = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.shared(x)
        return self.one(hidden), self.two(hidden)


def test_outputs_that_ignore_different_targets_each_have_their_own_denominator() -> None:
    module, x = Two(), torch.randn(9, 3)
    y = torch.randint(0, 3, (9, 2))
    y[1:4, 0] = y[5:8, 1] = -100
    plain = copy.deepcopy(module)
    plain_windows(plain, x, y, 6, 2, lambda output, y: sum(map(F.cross_entropy, output, y.unbind(1))))
    model = compiled(module, ["cross_entropy", "cross_entropy"])
    data = (x, (y[:, 0].clone(), y[:, 1].clone()))
    model.fit(data, batch_size=2, epochs=2, shuffle=False, accumulate_grad_batches=3, verbose=0)
    assert_same_weights(module, plain)


class Stream(IterableDataset[Any]):
    """Samples that do not tell how many they are."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.pairs = list(zip(x, y, strict=True))

    def __iter__(self) -> Iterator[Any]:
        return iter(self.pairs)


def test_the_last_window_of_data_without_a_length_makes_its_step_too() -> None:
    module, x, y = nn.Linear(2, 1), torch.randn(11, 2), torch.randn(11, 1)
    plain = copy.deepcopy(module)
    plain_windows(plain, x, y, 6, 2)
    compiled(module).fit(Stream(x, y), batch_size=2, epochs=2, accumulate_grad_batches=3, verbose=0)
    assert_same_weights(module, plain)


def test_a_user_step_is_weighted_by_its_samples() -> None:
    class Own(fitkit.Model):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.mse_loss(self.module(batch[0]), batch[1])

    module, x, y = nn.Linear(2, 1), torch.randn(7, 2), torch.randn(7, 1)
    plain = copy.deepcopy(module)
    plain_windows(plain, x, y, 6, 2)
    model = Own(module, device="cpu")
    model.compile(torch.optim.SGD(module.parameters(), lr=0.1))
    model.fit(x, y, batch_size=2, epochs=2, shuffle=False, accumulate_grad_batches=3, verbose=0)
    assert_same_weights(module, plain)


def test_more_batches_than_there_are_make_one_step() -> None:
    model = compiled(Slope(), rate=0.0)
    seen = gradients_at_steps(model)
    model.fit(ONES, ONES, batch_size=4, epochs=2, accumulate_grad_batches=100, verbose=0)
    assert seen == [-2.0, -2.0]


@pytest.mark.parametrize(
    ("schedule", "steps"),
    [
        ({0: 1, 2: 4}, [8, 8, 2, 2]),
        ({2: 4}, [8, 8, 2, 2]),  # one batch a step before the first entry
        ({3: 8, 1: 3}, [8, 3, 3, 1]),  # in any order
        (3, [3, 3, 3, 3]),
    ],
)
def test_a_schedule_counts_epochs_from_0(schedule: Any, steps: list[int]) -> None:
    model = compiled(Slope(), rate=0.0)
    seen, counts = gradients_at_steps(model), []
    counting = LambdaCallback(on_epoch_end=lambda epoch, logs: counts.append(len(seen)))
    model.fit(
        ONES[:8], ONES[:8], batch_size=1, epochs=4, accumulate_grad_batches=schedule, callbacks=[counting], verbose=0
    )
    assert counts == [sum(steps[: epoch + 1]) for epoch in range(4)]
    assert seen == [-2.0] * sum(steps)


def test_a_schedule_goes_by_the_epochs_index_when_training_goes_on() -> None:
    model = compiled(Slope(), rate=0.0)
    seen = gradients_at_steps(model)
    model.fit(
        ONES, ONES, batch_size=1, initial_epoch=5, epochs=6, accumulate_grad_batches={0: 1, 5: 4, 6: 12}, verbose=0
    )
    assert len(seen) == 3


def test_nothing_leaks_into_the_next_fit() -> None:
    model = compiled(Slope(), rate=0.0)
    seen = gradients_at_steps(model)
    stopping = LambdaCallback(on_train_batch_begin=failing_at(1))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="at batch 1"):
            model.fit(ONES, 7 * ONES, batch_size=4, epochs=1, accumulate_grad_batches=2, callbacks=stopping, verbose=0)
    model.fit(ONES, ONES, batch_size=4, epochs=1, accumulate_grad_batches=3, verbose=0)
    assert seen == [pytest.approx(-2.0, rel=1e-6)]


def failing_at(index: int) -> Callable[..., None]:
    def fail(batch: int, logs: Any) -> None:
        if batch == index:
            raise RuntimeError(f"at batch {batch}")

    return fail


def test_gradients_that_somebody_left_are_not_stepped_with() -> None:
    module = Slope()
    module.weight.grad = torch.full((1, 1), 1e6)
    model = compiled(module, rate=0.0)
    seen = gradients_at_steps(model)
    model.fit(ONES, ONES, batch_size=4, epochs=1, accumulate_grad_batches=3, verbose=0)
    assert seen == [pytest.approx(-2.0, rel=1e-6)]
    assert module.weight.grad is None


def test_a_frozen_parameter_is_not_stepped_with_a_gradient_of_before() -> None:
    module = nn.Linear(2, 1)
    model = compiled(module)
    module(torch.randn(4, 2)).sum().backward()
    module.bias.requires_grad_(False)
    bias = module.bias.clone()
    model.fit(torch.randn(8, 2), torch.randn(8, 1), batch_size=2, epochs=1, accumulate_grad_batches=2, verbose=0)
    assert torch.equal(module.bias, bias)


def test_a_parameter_thawed_in_mid_epoch_steps_with_the_gradient_of_its_window() -> None:
    module, x, y = nn.Linear(2, 1), torch.randn(8, 2), torch.randn(8, 1)
    module.bias.requires_grad_(False)
    plain = copy.deepcopy(module)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for inputs, targets in zip(x.split(2), y.split(2), strict=True):
        optimizer.zero_grad()
        F.mse_loss(plain(inputs), targets).backward()
        optimizer.step()
        plain.requires_grad_(True)
    thawing = LambdaCallback(on_train_batch_end=lambda batch, logs: module.requires_grad_(True))
    compiled(module).fit(x, y, batch_size=2, epochs=1, shuffle=False, callbacks=[thawing], verbose=0)
    assert_same_weights(module, plain)


class Stepped(Callback):
    """A torch scheduler, stepped by hand after each step of the optimizer."""

    def on_train_begin(self, logs: Any = None) -> None:
        optimizer = self.model.optimizer
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
        self.stepping = optimizer.register_step_post_hook(lambda *_: self.scheduler.step())

    def on_train_end(self, logs: Any = None) -> None:
        self.stepping.remove()


def test_a_scheduler_that_counts_optimizer_steps_counts_windows() -> None:
    module, x, y = nn.Linear(2, 1), torch.randn(10, 2), torch.randn(10, 1)
    plain = copy.deepcopy(module)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.5)
    for inputs, targets in zip(x.split(4), y.split(4), strict=True):
        optimizer.zero_grad()
        F.mse_loss(plain(inputs), targets).backward()
        optimizer.step()
        scheduler.step()
    compiled(module).fit(
        x, y, batch_size=2, epochs=1, shuffle=False, accumulate_grad_batches=2, callbacks=[Stepped()], verbose=0
    )
    assert_same_weights(module, plain)


def test_adam_sees_the_gradients_of_the_large_batches() -> None:
    module, x, y = nn.Linear(2, 1), torch.randn(10, 2), torch.randn(10, 1)
    plain = copy.deepcopy(module)
    for each, options in ((plain, {"batch_size": 6}), (module, {"batch_size": 2, "accumulate_grad_batches": 3})):
        model = fitkit.Model(each, device="cpu")
        model.compile("adam", "mse", learning_rate=0.1)
        model.fit(x, y, epochs=3, shuffle=False, verbose=0, **options)
    assert_same_weights(module, plain)


@pytest.mark.parametrize("value", [0, -1, {0: 0}, {-1: 2}])
def test_less_than_one_batch_a_step_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="integer of at least .*accumulate_grad_batches"):
        compiled(Slope()).fit(ONES, ONES, epochs=1, accumulate_grad_batches=value, verbose=0)


@pytest.mark.parametrize("value", [1.5, 2.0, True, math.nan, "2", None, {0: 2.0}, {"0": 2}, {0: True}, [1, 2]])
def test_what_is_no_integer_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="integer of at least .*accumulate_grad_batches"):
        compiled(Slope()).fit(ONES, ONES, epochs=1, accumulate_grad_batches=value, verbose=0)


def test_an_empty_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="accumulate_grad_batches={}"):
        compiled(Slope()).fit(ONES, ONES, epochs=1, accumulate_grad_batches={}, verbose=0)
