"""DataLoaders as they are, and Datasets by way of one.

The loader's own sampler, collation and workers do the work, so the batches and the random draws are the loader's.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, final

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)
from torch.utils.data.distributed import DistributedSampler

from fitkit.batch import Share
from fitkit.data.batches import Batches, keeps_its_place, known_length
from fitkit.data.rows import with_tensors
from fitkit.data.shares import Size, beside, own_parts
from fitkit.distributed import Processes
from fitkit.errors import show, unknown_name


@final
class LoaderBatches(Batches):
    """The batches of a torch DataLoader.

    Args:
        loader: any DataLoader; what it yields is what the steps are given.
        dtype: what floating NumPy arrays in a batch become.
        cast: whether floating tensors become of that dtype too: for loaders that fitkit made from a Dataset.
        chosen: the list of indices that the loader's sampler, which `in_order` made, reads.
    """

    def __init__(
        self, loader: DataLoader[Any], dtype: torch.dtype, *, cast: bool = False, chosen: list[Any] | None = None
    ) -> None:
        self._loader = loader
        self._chosen = chosen
        self._dtype = dtype
        self._cast = cast
        self.length = known_length(loader)
        self.parts = _known_parts(loader)
        # torch stacks samples into new memory; workers' memory is better given back.
        is_plain = type(loader) is DataLoader and loader.num_workers == 0
        self.owned = is_plain and loader.collate_fn is default_collate and loader.batch_sampler is not None
        self._parts: _Parts | None = None
        self._part_loader: LoaderBatches | None = None

    def __iter__(self) -> Iterator[Any]:
        if self._cast and self.keeps_workers:
            # A new iterator draws a seed for its workers; one whose workers stay does not. The order of a Dataset is
            # the same with any number of workers, and goes on after a crash, when the workers are new.
            torch.empty((), dtype=torch.int64).random_(generator=self._loader.generator)
        return (with_tensors(batch, self._dtype, cast=self._cast) for batch in self._loader)

    @property
    def keeps_workers(self) -> bool:
        loader = self._loader
        return type(loader) is DataLoader and loader.persistent_workers and loader._iterator is not None

    def start_workers(self) -> None:
        # One that fitkit made draws the seed with and without workers of an earlier pass.
        if type(self._loader) is DataLoader and self._loader.persistent_workers and not self._cast:
            iter(self._loader)

    @property
    def chosen(self) -> list[Any] | None:
        return self._chosen

    def choose(self, chosen: list[Any]) -> None:
        if self._chosen is not None:
            self._chosen[:] = chosen

    def after(self, done: int) -> Iterator[Any]:
        loader = self._loader
        index_sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        # Workers may draw random numbers for what they load, and a loader of another class may do anything.
        if type(loader) is not DataLoader or loader.num_workers or isinstance(loader.dataset, IterableDataset):
            return super().after(done)
        rest = _Rest(index_sampler)
        options = {"batch_size": None, "sampler": rest} if loader.batch_sampler is None else {"batch_sampler": rest}
        iterator = iter(self._with(loader, **options))
        rest.skip(done)
        return iterator

    def shares(self, processes: Processes, done: int) -> Iterator[Share]:
        loader = self._loader
        by_index = type(loader) is DataLoader and not isinstance(loader.dataset, IterableDataset)
        if isinstance(getattr(loader.batch_sampler, "sampler", loader.sampler), DistributedSampler):
            raise ValueError(
                "Expected a DataLoader of all samples, of which each process takes its part, received one with a "
                "DistributedSampler. Leave it out, and give the DataLoader the whole batch's size."
            )
        if not by_index or loader.batch_sampler is None:
            return super().shares(processes, done)
        if self._parts is None:
            self._parts = _Parts(loader.batch_sampler, processes)
            # One loader for all passes, so that its workers may stay.
            self._part_loader = self._with(loader, batch_sampler=self._parts)
        parts = self._parts
        parts.skipped = 0 if loader.num_workers else done
        iterator = iter(self._part_loader)  # type: ignore[arg-type]
        shares = parts.beside(iterator)
        return shares if parts.skipped == done else itertools.islice(shares, done, None)

    def facts(self) -> dict[str, Any]:
        loader = self._loader
        samples = known_length(loader.dataset)
        sampler = "" if loader.sampler is None else type(loader.sampler).__name__
        return {
            **super().facts(),
            **({} if samples is None else {"the number of samples": samples}),
            "batch_size": getattr(loader.batch_sampler, "batch_size", loader.batch_size),
            "the loader's sampler": sampler,
        }

    @property
    def loader(self) -> DataLoader[Any]:
        """The loader."""
        return self._loader

    @property
    def extent(self) -> tuple[int, int] | None:
        given: Any = self._loader.batch_sampler
        if type(given) is not BatchSampler or self.length is None:
            return None
        samples = known_length(given.sampler)
        if samples is None:
            return None
        return min(samples, self.length * given.batch_size) if given.drop_last else samples, given.batch_size

    @property
    def generators(self) -> list[torch.Generator]:
        return own_generators(self._loader)

    def some_targets(self) -> Any:
        dataset, sampler = self._loader.dataset, self._loader.sampler
        # What a sampler leaves out is nobody's target.
        takes_all = type(sampler) is SequentialSampler or (type(sampler) is RandomSampler and not sampler.replacement)
        if type(dataset) is not TensorDataset or (self.parts or 0) < 2 or self._loader.batch_size is None:
            return None
        if not takes_all or len(sampler) != len(dataset):  # type: ignore[arg-type]
            return None
        return dataset.tensors[1][: self._loader.batch_size]

    @property
    def source(self) -> Any:
        return self._loader if keeps_its_place(self._loader) else None

    def in_order(self) -> Batches:
        """The loader's data in its dataset's order; for a sampler of the user's, the batches of its first pass."""
        loader = self._loader
        if self.length is None or isinstance(loader.dataset, IterableDataset):
            return self
        if loader.batch_sampler is None:  # batch_size=None: the dataset gives whole batches by index
            order = _in_order(loader.sampler, loader.dataset)
            return self._with(loader, order, batch_size=None, sampler=order)
        given = loader.batch_sampler
        if type(given) is BatchSampler:
            order = _in_order(given.sampler, loader.dataset)
            return self._with(loader, order, batch_sampler=BatchSampler(order, given.batch_size, given.drop_last))
        order = list(itertools.islice(given, self.length))
        return self._with(loader, order, batch_sampler=order)

    def _with(self, loader: DataLoader[Any], order: Any = None, **options: Any) -> LoaderBatches:
        """The batches of a loader like the given one, of other indices."""
        if loader.num_workers:
            options |= {"prefetch_factor": loader.prefetch_factor, "persistent_workers": loader.persistent_workers}
        other = DataLoader(
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
        chosen = order if isinstance(order, list) else None
        return LoaderBatches(other, self._dtype, cast=self._cast, chosen=chosen)


# Samplers that draw all that they draw when they begin.
DRAW_AT_START = (SequentialSampler, RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


@final
class _Parts:
    """A batch sampler that gives of each batch the part of this process, and notes how large the whole is.

    Args:
        sampler: of lists of indices.
        processes: that share them.
    """

    def __init__(self, sampler: Any, processes: Processes) -> None:
        self._sampler = sampler
        self._processes = processes
        self._indices: Iterator[Any] | None = None
        self._sizes: list[Size] = []
        self.skipped = 0

    def __iter__(self) -> Iterator[list[int]]:
        self._indices, self._sizes = None, []
        return self._given()

    def _begin(self) -> None:
        """Takes from the sampler what it draws before the processes draw numbers of their own: all, if in doubt."""
        if self._indices is not None:
            return
        indices = iter(self._sampler)
        for _ in range(self.skipped):
            next(indices, None)
        length = known_length(self._sampler)
        draws_once = type(self._sampler) is BatchSampler and type(self._sampler.sampler) in DRAW_AT_START
        ahead = 1 if draws_once or length is None else max(0, length - self.skipped)
        self._indices = itertools.chain(list(itertools.islice(indices, ahead)), indices)

    def _given(self) -> Iterator[list[int]]:
        self._begin()
        assert self._indices is not None  # it has begun
        yield from own_parts(self._indices, self._processes, self._sizes)

    def beside(self, loaded: Iterator[Any]) -> Iterator[Share]:
        """The shares of the parts that are loaded; the loader has begun."""
        self._begin()
        return beside(loaded, self._sizes)

    def __len__(self) -> int:
        return len(self._sampler)


@final
class _Rest:
    """What a sampler gives after some that are taken from it first: when it is told, as samplers draw when they begin.

    Args:
        sampler: of indices, or of lists of them.
    """

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        self._indices: Iterator[Any] = iter(())

    def skip(self, count: int) -> None:
        """Begins, and leaves so many out."""
        self._indices = iter(self._sampler)
        for _ in range(count):
            next(self._indices, None)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self._indices)

    def __len__(self) -> int:
        return len(self._sampler)


def _known_parts(loader: DataLoader[Any]) -> int | None:
    """How many parts each batch has, where the loader stacks the rows of tensors; None where only a batch tells."""
    dataset: Any = loader.dataset
    while type(dataset) is Subset:
        dataset = dataset.dataset
    stacks = type(loader) is DataLoader and loader.collate_fn is default_collate and loader.batch_sampler is not None
    if not stacks or type(dataset) is not TensorDataset:
        return None
    return len(dataset.tensors) if len(dataset.tensors) <= 3 else None


def own_generators(loader: DataLoader[Any]) -> list[torch.Generator]:
    """The generators that the user gave to the loader and its samplers."""
    holders = (loader, loader.batch_sampler, loader.sampler, getattr(loader.batch_sampler, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())


def _in_order(sampler: Any, dataset: Any) -> Any:
    """The dataset's own order; where a sampler chooses among the samples, what it chose, once and for all."""
    samples = known_length(dataset)
    if samples is not None and type(sampler) in (SequentialSampler, RandomSampler) and len(sampler) == samples:
        return range(samples)
    return list(itertools.islice(sampler, len(sampler)))


# What says which samples come in which batch, and so is said by the arguments of fit.
SAID_ELSEWHERE = {"self", "dataset", "batch_size", "shuffle", "sampler", "batch_sampler"}


def check_loader_options(options: Any) -> None:
    """Refuses what is no dict of options of a DataLoader.

    Raises:
        TypeError: it is no dict.
        ValueError: an option that DataLoader does not have, or that fit has an argument for.
    """
    if not isinstance(options, Mapping):
        raise TypeError(
            f'Expected a dict of options of a DataLoader, such as {{"num_workers": 4}}, received dataloader_options='
            f"{show(options)}."
        )
    known = [name for name in inspect.signature(DataLoader.__init__).parameters if name not in SAID_ELSEWHERE]
    for name in options:
        if name in ("batch_size", "shuffle"):
            raise ValueError(f"Expected {name} as an argument of its own, received dataloader_options[{name!r}].")
        if name in SAID_ELSEWHERE:
            raise ValueError(
                f"dataloader_options[{name!r}] says which samples come in which batch. Make a DataLoader, and pass "
                "it in place of the Dataset."
            )
        if name not in known:
            raise unknown_name("dataloader_options' key", str(name), known)


def load_dataset(
    dataset: Dataset[Any],
    batch_size: int,
    shuffle: bool,
    argument: str,
    dtype: torch.dtype,
    options: Mapping[str, Any],
) -> Batches:
    """A map-style or iterable Dataset in batches of that size, collated as torch does by default.

    Args:
        dataset: what gives samples.
        batch_size: samples in a batch.
        shuffle: whether each pass has an order of its own, for a map-style Dataset.
        argument: how messages name the dataset.
        dtype: what floating tensors become: torch collates Python's floats to float64.
        options: of the DataLoader. Its workers stay from epoch to epoch unless it is told otherwise.

    Raises:
        ValueError: it has no samples.
        TypeError: it is map-style and does not tell its length.
    """
    if options.get("num_workers"):
        options = {"persistent_workers": True, **options}
    if isinstance(dataset, IterableDataset):
        return LoaderBatches(DataLoader(dataset, batch_size=batch_size, **options), dtype, cast=True)
    samples = known_length(dataset)
    if samples is None:
        raise TypeError(
            f"Expected a Dataset that tells its length, received {argument}={type(dataset).__name__}, which has no "
            "__len__. Give it one, or make it an IterableDataset."
        )
    if samples == 0:
        raise ValueError(
            f"Expected at least one sample, received {argument}, a Dataset with 0 samples. Check what made it."
        )
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, **options)
    return LoaderBatches(loader, dtype, cast=True)


def split_dataset(dataset: Dataset[Any], first: int, samples: int) -> tuple[Dataset[Any], Dataset[Any]]:
    """The first samples, and the rest."""
    return Subset(dataset, range(first)), Subset(dataset, range(first, samples))
