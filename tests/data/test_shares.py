"""Each process's share of every batch: together the shares are the batches, and nobody loads more than a share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fitkit.data import Batching, as_batches
from fitkit.distributed import Processes


class Points(Dataset[Tensor]):
    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.seen: list[int] = []

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Tensor:
        self.seen.append(int(index))
        return torch.tensor([float(index)])


def batching(size: int | None) -> Batching:
    return Batching(size, None, True, torch.float32, torch.device("cpu"))


def sources(samples: int, size: int) -> dict[str, Any]:
    x = torch.arange(float(samples)).reshape(-1, 1)
    return {
        "arrays": (x, size),
        "a dataset": (Points(samples), size),
        "a tensor loader": (DataLoader(TensorDataset(x), size, shuffle=True), None),
        "a loader": (DataLoader(Points(samples), size, shuffle=True), None),
        "ready batches": ([(part,) for part in x.split(size)], None),
    }


def values(batch: Any) -> list[float]:
    tensor = batch[0] if isinstance(batch, (tuple, list)) else batch
    return [] if batch is None else tensor.flatten().tolist()


KINDS = list(sources(1, 1))


@pytest.mark.parametrize("kind", KINDS)
@given(samples=st.integers(1, 40), size=st.integers(1, 12), world=st.integers(1, 5), done=st.integers(0, 3))
def test_shares_together_are_the_batches(kind: str, samples: int, size: int, world: int, done: int) -> None:
    data, batch_size = sources(samples, size)[kind]
    batches = as_batches(data, None, None, batching(batch_size))
    torch.manual_seed(0)
    whole = [values(batch) for batch in batches][done:]
    parts = []
    for rank in range(world):
        torch.manual_seed(0)
        again = as_batches(data, None, None, batching(batch_size))
        parts.append(list(again.shares(Processes(rank, world), done)))
    assert [[value for part in batch for value in values(part.batch)] for batch in zip(*parts, strict=True)] == whole
    assert [batch[0].of for batch in zip(*parts, strict=True)] == list(map(len, whole))


@pytest.mark.parametrize("kind", ["a dataset", "a loader"])
def test_a_process_loads_only_its_samples(kind: str) -> None:
    data, batch_size = sources(40, 8)[kind]
    list(as_batches(data, None, None, batching(batch_size)).shares(Processes(1, 4), 0))
    dataset = data.dataset if isinstance(data, DataLoader) else data
    assert len(dataset.seen) == 10


def test_the_first_process_always_has_a_sample() -> None:
    assert [Processes(rank, 3).part(1) for rank in range(3)] == [(0, 1), (1, 1), (1, 1)]


def test_objects_of_another_library_cannot_be_shared() -> None:
    batches = as_batches([object()], None, None, batching(None))
    with pytest.raises(TypeError, match="of which each process takes its part.*Pass a Dataset"):
        next(batches.shares(Processes(0, 2), 0))
