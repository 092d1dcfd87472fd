"""DataLoaders over a TensorDataset, served in whole batches from the loader's own sampler.

The batches, their order and the random draws are those of iterating the loader; only the way there is shorter: rows
of many batches are gathered at once, where the loader takes sample by sample and stacks them again.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, final

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from fitkit.batch import Share
from fitkit.data.arrays import BATCHES_PER_CHUNK, BYTES_PER_CHUNK
from fitkit.data.batches import Batches
from fitkit.data.loaders import LoaderBatches
from fitkit.data.shares import counted
from fitkit.distributed import Processes


def is_tensor_loader(loader: DataLoader[Any]) -> bool:
    """Whether the loader does nothing that gathering rows would leave out."""
    return (
        type(loader) is DataLoader
        and type(loader.dataset) is TensorDataset
        and loader.num_workers == 0
        and loader.collate_fn is default_collate
        and not loader.pin_memory
        and type(loader.batch_sampler) is BatchSampler
        and _draws_at_its_start(loader.batch_sampler.sampler)
        and all(_is_plain(tensor) for tensor in loader.dataset.tensors)
    )


def _draws_at_its_start(sampler: Any) -> bool:
    """Whether reading some batches ahead draws nothing that would have been drawn later, or never."""
    if type(sampler) is RandomSampler:
        return not sampler.replacement and sampler.generator is None
    return type(sampler) in (SequentialSampler, SubsetRandomSampler, WeightedRandomSampler)


def _is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) is torch.Tensor and tensor.device.type == "cpu" and not tensor.requires_grad


@final
class TensorLoaderBatches(Batches):
    """The batches of a DataLoader over a TensorDataset.

    Args:
        loader: one of which `is_tensor_loader` is true.
        dtype: as in `LoaderBatches`, for data in order.
    """

    owned = True
    self_contained = True

    def __init__(self, loader: DataLoader[Any], dtype: torch.dtype) -> None:
        self._loader = loader
        # The same batches the long way, for all that does not depend on the way.
        self._plain = LoaderBatches(loader, dtype)
        self.length, self.parts = self._plain.length, self._plain.parts

    def __iter__(self) -> Iterator[Any]:
        return self.after(0)

    def after(self, done: int) -> Iterator[Any]:
        sampler: Any = self._loader.batch_sampler
        if type(sampler.sampler) is SequentialSampler and len(sampler.sampler) <= len(self._tensors[0]):
            self._draw()
            return self._one_after_the_other(done)
        indices = self._indices()
        for _ in range(done):
            next(indices, None)
        return self._from(indices)

    def shares(self, processes: Processes, done: int) -> Iterator[Share]:
        indices = self._indices()
        for _ in range(done):
            next(indices, None)
        # The sampler draws when its first batch is taken: before the processes draw numbers of their own.
        begun = itertools.chain(list(itertools.islice(indices, 1)), indices)
        return counted(begun, processes, self._from)

    def facts(self) -> dict[str, Any]:
        return self._plain.facts()

    @property
    def loader(self) -> DataLoader[Any]:
        """The loader."""
        return self._loader

    @property
    def extent(self) -> tuple[int, int] | None:
        return self._plain.extent

    @property
    def generators(self) -> list[torch.Generator]:
        return self._plain.generators

    def some_targets(self) -> Any:
        return self._plain.some_targets()

    def _indices(self) -> Iterator[list[int]]:
        self._draw()
        sampler: Any = self._loader.batch_sampler
        return iter(sampler)

    def _draw(self) -> None:
        """Draws what a DataLoader draws whenever it is iterated, for workers that it may not have."""
        torch.empty((), dtype=torch.int64, device="cpu").random_(generator=self._loader.generator)

    @property
    def _tensors(self) -> Sequence[torch.Tensor]:
        return self._loader.dataset.tensors  # type: ignore[attr-defined, no-any-return]

    @property
    def _batches_at_once(self) -> int:
        sampler: Any = self._loader.batch_sampler
        row_bytes = sum(tensor[:1].numel() * tensor.element_size() for tensor in self._tensors)
        return max(1, min(BATCHES_PER_CHUNK, BYTES_PER_CHUNK // max(1, row_bytes * int(sampler.batch_size))))

    def _one_after_the_other(self, done: int) -> Iterator[Any]:
        """The batches of a loader that goes through its data in order, from one on: nothing needs to be gathered."""
        sampler: Any = self._loader.batch_sampler
        size = sampler.batch_size
        samples = len(sampler.sampler)
        if sampler.drop_last:
            samples -= samples % size
        step = size * self._batches_at_once
        for start in range(done * size, samples, step):
            rows = slice(start, min(start + step, samples))
            copies = [tensor[rows].clone(memory_format=torch.contiguous_format) for tensor in self._tensors]
            columns = [torch.unsafe_split(copy, size) for copy in copies]
            yield from map(list, zip(*columns, strict=True))

    def _from(self, indices: Iterator[list[int]]) -> Iterator[Any]:
        tensors, at_once = self._tensors, self._batches_at_once
        while chunk := list(itertools.islice(indices, at_once)):
            rows = torch.tensor(list(itertools.chain.from_iterable(chunk)), dtype=torch.int64, device="cpu")
            # index_select takes no rows counted from the end, as a sampler may give them.
            rows = torch.where(rows < 0, rows + len(tensors[0]), rows)
            sizes = [len(batch) for batch in chunk]
            columns = [torch.unsafe_split_with_sizes(tensor.index_select(0, rows), sizes) for tensor in tensors]
            yield from map(list, zip(*columns, strict=True))

    def in_order(self) -> Batches:
        return self._plain.in_order()
