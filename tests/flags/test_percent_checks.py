"""train_percent_check and val_percent_check: an epoch or a validation of a part of the batches."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fitkit
from fitkit.callbacks import EarlyStopping, LambdaCallback


class Remembering(nn.Linear):
    """y = 0 * x; remembers which x it was given, by its mode."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        self.trained: list[list[float]] = []
        self.tested: list[list[float]] = []

    def forward(self, x: Tensor) -> Tensor:
        (self.trained if self.training else self.tested).append(x.flatten().tolist())
        return super().forward(x)


def numbered(samples: int) -> Tensor:
    return torch.arange(samples, dtype=torch.float32)[:, None]


def fitted(samples: int, module: nn.Module | None = None, *, loaded: bool = False, **options: Any) -> Any:
    """Trains on x = y = 0, 1, 2, ... in batches of 2 without learning; returns the module."""
    module = module or Remembering()
    model = fitkit.Model(module, device="cpu")
    model.compile("sgd", "mse", learning_rate=0.0)
    x = numbered(samples)
    data = DataLoader(TensorDataset(x, x), batch_size=2, shuffle=True) if loaded else (x, x)
    size = {} if loaded else {"batch_size": 2}
    model.fit(data, verbose=0, **size, **{"epochs": 1, **options})
    return module


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize(
    ("batches", "fraction", "used"),
    [(10, 1.0, 10), (10, 0.5, 5), (10, 0.59, 5), (10, 0.01, 1), (3, 0.34, 1), (3, 0.67, 2), (1, 0.1, 1), (7, 0.99, 6)],
)
def test_an_epoch_has_that_part_of_the_batches_and_at_least_one(
    batches: int, fraction: float, used: int, loaded: bool
) -> None:
    assert len(fitted(2 * batches, train_percent_check=fraction, loaded=loaded).trained) == used


@pytest.mark.parametrize(("batches", "fraction", "used"), [(10, 1, 10), (10, 0.5, 5), (10, 0.01, 1), (3, 0.67, 2)])
def test_a_validation_has_that_part_of_its_batches_in_their_order(batches: int, fraction: float, used: int) -> None:
    x = numbered(2 * batches) + 100
    module = fitted(4, validation_data=(x, x), val_percent_check=fraction, epochs=2)
    assert module.tested == [[100.0 + 2 * batch, 101.0 + 2 * batch] for batch in range(used)] * 2
    assert len(module.trained) == 4


def test_a_smaller_last_batch_is_a_batch() -> None:
    assert len(fitted(7, train_percent_check=0.75).trained) == 3


@pytest.mark.parametrize("loaded", [False, True])
def test_each_epoch_is_shuffled_anew(loaded: bool) -> None:
    trained = fitted(20, train_percent_check=0.3, epochs=8, loaded=loaded).trained
    epochs = [list(itertools.chain(*trained[start : start + 3])) for start in range(0, 24, 3)]
    assert len({tuple(epoch) for epoch in epochs}) == 8
    assert all(len(set(epoch)) == 6 for epoch in epochs)
    assert len(set().union(*epochs)) > 12


def test_the_batches_are_the_first_of_a_plain_loader() -> None:
    x, module = numbered(20), Remembering()
    torch.manual_seed(5)
    loader = DataLoader(TensorDataset(x, x), batch_size=2, shuffle=True)
    expected = [batch.flatten().tolist() for _ in range(2) for batch, _ in [*loader][:3]]
    torch.manual_seed(5)
    assert fitted(20, module, train_percent_check=0.3, epochs=2).trained == expected


def test_without_shuffling_each_epoch_has_the_first_batches() -> None:
    trained = fitted(8, train_percent_check=0.5, epochs=2, shuffle=False).trained
    assert trained == [[0.0, 1.0], [2.0, 3.0]] * 2


def test_losses_are_means_over_the_batches_used() -> None:
    model = fitkit.Model(Remembering(), device="cpu")
    model.compile("sgd", "mse", learning_rate=0.0)
    x, options = numbered(8), {"batch_size": 2, "shuffle": False, "epochs": 1, "verbose": 0}
    history = model.fit(x, x, validation_data=(x, x), train_percent_check=0.5, val_percent_check=0.25, **options)
    assert history.history == {"loss": [(0 + 1 + 4 + 9) / 4], "val_loss": [(0 + 1) / 2]}


def test_callbacks_are_told_of_the_short_epoch() -> None:
    told: list[Any] = []
    telling = LambdaCallback()
    telling.on_train_begin = lambda logs=None: told.append(telling.params)  # type: ignore[method-assign]
    x = numbered(12)
    fitted(20, train_percent_check=0.3, validation_data=(x, x), val_percent_check=0.5, callbacks=[telling])
    assert (told[0]["steps"], told[0]["validation_steps"]) == (3, 3)


def test_with_early_stopping_val_loss_is_that_of_the_validation() -> None:
    model, x = fitkit.Model(nn.Linear(1, 1), device="cpu"), numbered(20) / 20
    model.compile("sgd", "mse", learning_rate=0.1)
    measured: list[Any] = []
    measuring = LambdaCallback(
        on_epoch_end=lambda epoch, logs: measured.append(model.evaluate(x, 1 - x, batch_size=2, verbose=0))
    )
    stopping, options = EarlyStopping(patience=2), {"batch_size": 2, "epochs": 6, "verbose": 0}
    data = {"validation_data": (x, 1 - x), "train_percent_check": 0.3}
    history = model.fit(x, x, callbacks=[measuring, stopping], **data, **options)
    assert history["val_loss"] == measured
    assert stopping.best == min(measured)


def test_with_early_stopping_the_run_stops_by_the_part_that_is_validated() -> None:
    module, x = Remembering(), numbered(4)
    falling = LambdaCallback(on_epoch_begin=lambda epoch, logs: nn.init.constant_(module.bias, -float(epoch)))
    stopping = EarlyStopping(patience=2)
    y = torch.tensor([0.0, 0.0, -99.0, -99.0])[:, None]
    fitted(8, module, validation_data=(x, y), val_percent_check=0.5, callbacks=[falling, stopping], epochs=9)
    assert (stopping.best, stopping.stopped_epoch) == (0.0, 2)


@pytest.mark.parametrize(("k", "steps"), [(1, 5), (2, 3), (3, 2), (5, 1), (9, 1), ({0: 1, 1: 2, 2: 5}, (5, 3, 1))])
def test_with_accumulation_the_last_window_of_a_short_epoch_makes_its_step(k: Any, steps: Any) -> None:
    model, x = fitkit.Model(nn.Linear(1, 1), device="cpu"), numbered(20)
    model.compile("sgd", "mse", learning_rate=0.0)
    count: list[int] = []
    model.optimizer.register_step_post_hook(lambda *_: count.append(1))
    options = {"batch_size": 2, "epochs": 3, "verbose": 0}
    model.fit(x, x, accumulate_grad_batches=k, train_percent_check=0.5, **options)
    assert len(count) == (sum(steps) if isinstance(steps, tuple) else 3 * steps)


def test_with_accumulation_a_short_window_is_weighed_by_what_it_holds() -> None:
    module, x, y = nn.Linear(2, 1), torch.randn(12, 2), torch.randn(12, 1)
    plain = copy.deepcopy(module)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for part in [slice(0, 4), slice(4, 6)] * 2:
        optimizer.zero_grad()
        F.mse_loss(plain(x[part]), y[part]).backward()
        optimizer.step()
    model = fitkit.Model(module, device="cpu")
    model.compile(torch.optim.SGD(module.parameters(), lr=0.1), "mse")
    options = {"batch_size": 2, "epochs": 2, "shuffle": False, "verbose": 0}
    model.fit(x, y, accumulate_grad_batches=2, train_percent_check=0.5, **options)
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-6)


def endless() -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield numbered(2), numbered(2)


@pytest.mark.parametrize(
    ("name", "steps"), [("train_percent_check", "steps_per_epoch"), ("val_percent_check", "validation_steps")]
)
def test_a_fraction_of_data_without_a_length_names_what_to_pass(name: str, steps: str) -> None:
    model = fitkit.Model(nn.Linear(1, 1), device="cpu")
    model.compile("sgd", "mse")
    data = {"data": endless()} if name[0] == "t" else {"data": (numbered(4),) * 2, "validation_data": endless()}
    with pytest.raises(ValueError, match=rf"{name}=0.5 is a fraction .* Pass {steps}="):
        model.fit(**data, epochs=1, verbose=0, **{name: 0.5})


def test_a_fraction_and_a_number_of_steps_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="steps_per_epoch=2 and train_percent_check=0.5 exclude each other"):
        fitted(8, train_percent_check=0.5, steps_per_epoch=2)


@pytest.mark.parametrize("name", ["train_percent_check", "val_percent_check"])
@pytest.mark.parametrize("value", [0, 0.0, -0.1, 1.01, 50, math.nan, math.inf])
def test_what_is_no_fraction_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"received {name}="):
        fitted(8, **{name: value})


@pytest.mark.parametrize("name", ["train_percent_check", "val_percent_check"])
@pytest.mark.parametrize("value", [True, None, "0.5"])
def test_what_is_no_number_is_refused(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"Expected a number, received {name}="):
        fitted(8, **{name: value})
