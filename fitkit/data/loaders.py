"""DataLoaders as they are, and Datasets by way of one.

The loader's own sampler, collation and workers do the work, so the batches and the random draws are the loader's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, final

from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler, Subset

from fitkit.data.batches import Batches


@final
class LoaderBatches(Batches):
    """The batches of a torch DataLoader.

    Args:
        loader: any DataLoader; what it yields is what the steps are given.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader
        try:
            self.length = len(loader)
        except TypeError:  # an IterableDataset without a length
            self.length = None

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)

    def in_order(self) -> Batches:
        """The loader's data in its dataset's order; for a sampler of the user's, the batches of its first pass."""
        loader = self._loader
        if isinstance(loader.dataset, IterableDataset):
            return self
        if loader.batch_sampler is None:
            return LoaderBatches(_with_batches(loader, [[index] for index in range(len(loader.dataset))], single=True))  # type: ignore[arg-type]
        if type(loader.batch_sampler) is BatchSampler:
            sampler = loader.batch_sampler
            order = SequentialSampler(loader.dataset)  # type: ignore[arg-type]
            return LoaderBatches(_with_batches(loader, BatchSampler(order, sampler.batch_size, sampler.drop_last)))
        return LoaderBatches(_with_batches(loader, list(itertools.islice(loader.batch_sampler, self.length))))


def _with_batches(loader: DataLoader[Any], batch_sampler: Any, *, single: bool = False) -> DataLoader[Any]:
    """A loader like the given one, with batches of other indices."""
    options: dict[str, Any] = {"batch_sampler": batch_sampler}
    if single:  # batch_size=None: the dataset gives whole batches by index
        options = {"batch_size": None, "sampler": [index for (index,) in batch_sampler]}
    if loader.num_workers:
        options |= {"prefetch_factor": loader.prefetch_factor, "persistent_workers": loader.persistent_workers}
    return DataLoader(
        loader.dataset,
        **options,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
    )


def load_dataset(dataset: Dataset[Any], batch_size: int, shuffle: bool) -> LoaderBatches:
    """A map-style or iterable Dataset in batches of that size, collated as torch does by default."""
    if isinstance(dataset, IterableDataset):
        return LoaderBatches(DataLoader(dataset, batch_size=batch_size))
    if len(dataset) == 0:  # type: ignore[arg-type]
        raise ValueError("Expected at least one sample, received data, a Dataset with 0 samples.")
    return LoaderBatches(DataLoader(dataset, batch_size=batch_size, shuffle=shuffle))


def split_dataset(dataset: Dataset[Any], first: int) -> tuple[Dataset[Any], Dataset[Any]]:
    """The first samples, and the rest."""
    length = len(dataset)  # type: ignore[arg-type]
    return Subset(dataset, range(first)), Subset(dataset, range(first, length))
