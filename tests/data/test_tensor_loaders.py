"""A DataLoader over a TensorDataset gives the same batches and draws, whether iterated or gathered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from fitkit.data.tensor_loaders import TensorLoaderBatches, is_tensor_loader

DATA = TensorDataset(torch.randn(203, 3), torch.arange(203), torch.rand(203, 2, 2).double().transpose(1, 2))


def _samplers() -> dict[str, dict[str, Any]]:
    return {
        "shuffled": {"shuffle": True, "batch_size": 2},
        "in order": {"batch_size": 64},
        "in order, dropping the last": {"batch_size": 3, "drop_last": True},
        "the first ones": {"sampler": SequentialSampler(range(50)), "batch_size": 8},  # type: ignore[arg-type]
        "dropping the last": {"shuffle": True, "batch_size": 10, "drop_last": True},
        "a subset": {"sampler": SubsetRandomSampler(range(0, 203, 2)), "batch_size": 3},
        "weighted": {"sampler": WeightedRandomSampler([1.0, 2.0] * 101 + [1.0], 500), "batch_size": 7},
        "more than there are": {"sampler": RandomSampler(DATA, num_samples=500), "batch_size": 9},
        "with a generator": {"shuffle": False, "batch_size": 9, "generator": torch.Generator().manual_seed(4)},
        "a batch sampler": {"batch_sampler": BatchSampler(SequentialSampler(DATA), 11, True)},
    }


@pytest.mark.parametrize("name", _samplers())
def test_batches_and_draws_are_those_of_the_loader(name: str) -> None:
    plain, gathered = DataLoader(DATA, **_samplers()[name]), DataLoader(DATA, **_samplers()[name])
    assert is_tensor_loader(gathered)
    seen = []
    for batches in (plain, TensorLoaderBatches(gathered, torch.float32)):
        torch.manual_seed(5)
        seen.append(([list(batches) for _ in range(2)], torch.rand(3)))  # type: ignore[call-overload]
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=0)
    assert [each.stride() for batch in seen[0][0][0] for each in batch] == [
        each.stride() for batch in seen[1][0][0] for each in batch
    ]
    assert type(seen[0][0][0][0]) is type(seen[1][0][0][0])


@pytest.mark.parametrize("name", _samplers())
def test_a_pass_goes_on_after_some_batches(name: str) -> None:
    gathered = TensorLoaderBatches(DataLoader(DATA, **_samplers()[name]), torch.float32)
    torch.manual_seed(5)
    whole = list(gathered)[3:]
    torch.manual_seed(5)
    torch.testing.assert_close(list(gathered.after(3)), whole, rtol=0, atol=0)


def test_a_pass_that_is_given_up_has_drawn_what_the_loader_draws() -> None:
    drawn = []
    for batches in (DataLoader(DATA, shuffle=True), TensorLoaderBatches(DataLoader(DATA, shuffle=True), torch.float32)):
        torch.manual_seed(5)
        next(iter(batches))  # type: ignore[call-overload]
        drawn.append(torch.rand(3))
    assert torch.equal(*drawn)


class Doubling(TensorDataset):
    def __getitem__(self, index: Any) -> Any:
        return tuple(2 * tensor for tensor in super().__getitem__(index))


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Doubling(torch.ones(4, 1))),
        DataLoader(DATA, num_workers=1),
        DataLoader(DATA, collate_fn=lambda samples: samples),
        DataLoader(DATA, batch_size=None),
        DataLoader(DATA, sampler=RandomSampler(DATA, replacement=True)),
        DataLoader(DATA, shuffle=True, generator=torch.Generator()),
        DataLoader(DATA, batch_sampler=[[0, 1], [2]]),
        DataLoader(TensorDataset(torch.ones(3, 1, requires_grad=True))),
    ],
    ids=["subclass", "workers", "collation", "no batches", "replacement", "generator", "batch sampler", "gradient"],
)
def test_a_loader_that_does_more_is_iterated(loader: DataLoader[Any]) -> None:
    assert not is_tensor_loader(loader)


def test_rows_may_be_counted_from_the_end() -> None:
    loader = DataLoader(DATA, batch_size=2, sampler=SubsetRandomSampler([-1, -2, 3, 4]))
    torch.manual_seed(0)
    expected = list(loader)
    torch.manual_seed(0)
    found = list(TensorLoaderBatches(loader, torch.float32))
    assert all(torch.equal(a, b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True))
