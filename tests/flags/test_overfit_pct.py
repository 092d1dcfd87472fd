"""overfit_pct: the first part of the data, always the same batches in the same order."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

import fitkit
from fitkit.callbacks import EarlyStopping


class Remembering(nn.Linear):
    """Remembers which x it was given, by its mode."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.trained: list[list[float]] = []
        self.tested: list[list[float]] = []

    def forward(self, x: Tensor) -> Tensor:
        (self.trained if self.training else self.tested).append(x.flatten().tolist())
        return super().forward(x)


def numbered(samples: int) -> Tensor:
    return torch.arange(samples, dtype=torch.float32)[:, None]


def pairs(samples: int) -> TensorDataset:
    return TensorDataset(numbered(samples), numbered(samples))


def fitted(data: Any, **options: Any) -> Remembering:
    module = Remembering()
    model = fitkit.Model(module, device="cpu")
    model.compile("sgd", "mse", learning_rate=0.0)
    model.fit(data, verbose=0, **{"epochs": 3, **options})
    return module


FIRST = [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]


@pytest.mark.parametrize("shuffle", [None, True, False])
@pytest.mark.parametrize("data", [(numbered(20), numbered(20)), pairs(20)], ids=["arrays", "dataset"])
def test_every_epoch_has_the_first_batches_in_their_order(data: Any, shuffle: bool | None) -> None:
    assert fitted(data, batch_size=2, overfit_pct=0.3, shuffle=shuffle).trained == FIRST * 3


@pytest.mark.parametrize("options", [{"shuffle": True}, {"shuffle": False}, {"sampler": RandomSampler(range(20))}])
def test_a_loader_is_not_shuffled_either(options: dict[str, Any]) -> None:
    assert fitted(DataLoader(pairs(20), batch_size=2, **options), overfit_pct=0.3).trained == FIRST * 3


@pytest.mark.long
def test_a_loader_with_workers_is_not_shuffled_either() -> None:
    loader = DataLoader(pairs(20), batch_size=2, shuffle=True, num_workers=2)
    assert fitted(loader, overfit_pct=0.3).trained == FIRST * 3


def test_a_loader_keeps_dropping_its_last_batch() -> None:
    loader = DataLoader(pairs(7), batch_size=2, shuffle=True, drop_last=True)
    assert fitted(loader, overfit_pct=1.0, epochs=1).trained == FIRST


class Uneven(BatchSampler):
    """A batch sampler of the user's: batches of 1, 2, 3, ... random samples."""

    def __init__(self) -> None:
        super().__init__(range(10), 1, drop_last=False)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(10).tolist()
        return iter([order[:1], order[1:3], order[3:6], order[6:]])

    def __len__(self) -> int:
        return 4


def test_of_a_sampler_of_the_users_the_first_batches_are_kept() -> None:
    trained = fitted(DataLoader(pairs(10), batch_sampler=Uneven()), overfit_pct=0.5).trained
    assert trained == trained[:2] * 3
    assert [len(batch) for batch in trained[:2]] == [1, 2]


def test_validation_takes_the_same_part_of_its_own_data() -> None:
    held_out = (numbered(8) + 100, numbered(8))
    module = fitted((numbered(20), numbered(20)), batch_size=2, overfit_pct=0.5, validation_data=held_out)
    assert module.tested == [[100.0, 101.0], [102.0, 103.0]] * 3
    assert len(module.trained) == 15


def test_a_shuffled_validation_loader_is_not_shuffled_either() -> None:
    held_out = DataLoader(pairs(20), batch_size=2, shuffle=True)
    module = fitted((numbered(4), numbered(4)), batch_size=2, overfit_pct=0.3, validation_data=held_out)
    assert module.tested == FIRST * 3


def test_with_a_split_both_parts_are_cut() -> None:
    module = fitted((numbered(20), numbered(20)), batch_size=2, overfit_pct=0.4, validation_split=0.5, epochs=2)
    assert module.trained == FIRST[:2] * 2
    assert module.tested == [[10.0, 11.0], [12.0, 13.0]] * 2


def test_it_overrides_both_percent_checks() -> None:
    held_out = (numbered(20), numbered(20))
    options = {"train_percent_check": 0.1, "val_percent_check": 0.9, "batch_size": 2, "epochs": 1}
    module = fitted(held_out, overfit_pct=0.3, validation_data=held_out, **options)
    assert module.trained == module.tested == FIRST


@pytest.mark.parametrize(("fraction", "batches"), [(0.01, 1), (0.19, 1), (0.99, 9), (1.0, 10), (1, 10)])
def test_it_is_that_part_of_the_batches_and_at_least_one(fraction: float, batches: int) -> None:
    module = fitted((numbered(20), numbered(20)), batch_size=2, overfit_pct=fraction, epochs=1)
    assert [batch[0] for batch in module.trained] == [2.0 * index for index in range(batches)]


def test_0_is_off() -> None:
    trained = fitted((numbered(20), numbered(20)), batch_size=2, overfit_pct=0.0, epochs=1).trained
    assert len(trained) == 10
    assert trained[:3] != FIRST


def test_it_draws_what_the_full_run_draws_each_epoch() -> None:
    drawn = []
    for loaded in (DataLoader(pairs(20), batch_size=2), (numbered(20), numbered(20))):
        torch.manual_seed(0)
        size = {"batch_size": 2} if isinstance(loaded, tuple) else {}
        fitted(loaded, overfit_pct=0.3, **size)
        drawn.append(torch.rand(1))
    assert drawn[0] == drawn[1]


def test_a_module_can_learn_a_part_by_heart() -> None:
    model = fitkit.Model(nn.Linear(8, 1), device="cpu")
    model.compile("adam", "mse", learning_rate=0.1)
    x, y = torch.randn(40, 8), torch.randn(40, 1)
    history = model.fit(x, y, batch_size=4, overfit_pct=0.1, epochs=200, verbose=0)
    assert history["loss"][-1] < 1e-3


def test_with_early_stopping_and_accumulation_it_runs_its_short_epochs() -> None:
    model, counted = fitkit.Model(Remembering(), device="cpu"), []
    model.compile("sgd", "mse", learning_rate=0.0)
    model.optimizer.register_step_post_hook(lambda *_: counted.append(1))
    stopping, options = EarlyStopping("loss", patience=2), {"batch_size": 2, "accumulate_grad_batches": 2, "verbose": 0}
    history = model.fit(numbered(20), numbered(20), overfit_pct=0.3, early_stop_callback=stopping, **options)
    assert (len(history), len(counted)) == (3, 6)


def endless() -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield numbered(2), numbered(2)


def test_a_part_of_data_without_a_length_is_refused() -> None:
    with pytest.raises(ValueError, match="overfit_pct=0.5 is a fraction .* Pass steps_per_epoch="):
        fitted(endless(), overfit_pct=0.5, epochs=1)


def test_a_part_and_a_number_of_steps_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="steps_per_epoch=2 and overfit_pct=0.5 exclude each other"):
        fitted((numbered(20), numbered(20)), overfit_pct=0.5, steps_per_epoch=2)


@pytest.mark.parametrize("value", [-0.1, 1.01, 2, math.nan, math.inf])
def test_what_is_no_fraction_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="Expected a number from 0 to 1, received overfit_pct="):
        fitted((numbered(4), numbered(4)), overfit_pct=value)


@pytest.mark.parametrize("value", [True, None, "0.5"])
def test_what_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="Expected a number, received overfit_pct="):
        fitted((numbered(4), numbered(4)), overfit_pct=value)
