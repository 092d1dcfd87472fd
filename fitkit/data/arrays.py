"""Arrays and nests of them, batched by index.

No DataLoader and no sample-by-sample work: an epoch's permutation is gathered in chunks of many batches, and the
chunks are cut into batches. Only a chunk is ever copied, so a memory-mapped array may be larger than the memory.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from fitkit.batch import Placed, Share, unpack
from fitkit.data.batches import Batches
from fitkit.data.inputs import Input
from fitkit.data.rows import Rows, TensorRows, as_rows, is_array, nonfinite_rows
from fitkit.distributed import Processes
from fitkit.errors import show

# One gather serves this many batches, as long as a chunk stays under the bytes below: what is larger leaves the cache,
# and the memory of the process, which gets it back page by page.
BATCHES_PER_CHUNK = 64
BYTES_PER_CHUNK = 2**18
# How large a batch of an evaluation or prediction may be when its size is left to us: small samples only.
MOST_LARGE_BATCH = 4096
BYTES_LARGE_BATCH = 2**17


@final
class Layout:
    """How leaves are nested: the flat list of a structure's arrays, and the way back.

    Args:
        structure: arrays, or nested tuples, lists and dicts of them.
        argument: how messages name it.
    """

    def __init__(self, structure: Any, argument: str) -> None:
        self.leaves: list[tuple[str, Any]] = []
        self.build: Callable[[Sequence[Any]], Any] = self._visit(structure, argument)

    def _visit(self, value: Any, argument: str) -> Callable[[Sequence[Any]], Any]:
        if isinstance(value, Mapping):
            if not value:
                raise ValueError(f"Expected at least one array, received {argument}={show(value)}. Leave it out.")
            children = {key: self._visit(item, f"{argument}[{key!r}]") for key, item in value.items()}
            return lambda leaves: {key: build(leaves) for key, build in children.items()}
        if isinstance(value, (list, tuple)) and value and not all(type(item) in (int, float, bool) for item in value):
            builds = [self._visit(item, f"{argument}[{index}]") for index, item in enumerate(value)]
            if hasattr(value, "_fields"):
                return lambda leaves: type(value)(*(build(leaves) for build in builds))
            return lambda leaves: type(value)(build(leaves) for build in builds)
        position = len(self.leaves)
        self.leaves.append((argument, value))
        return lambda leaves: leaves[position]


@final
class ArrayBatches(Batches):
    """In-memory or memory-mapped arrays as batches.

    Args:
        parts: ``(x,)``, ``(x, y)`` or ``(x, y, sample_weight)``; each may be a nest of arrays.
        batch_size: samples in a batch; the last batch may have fewer.
        shuffle: whether each pass has an order of its own.
        draws: whether a pass draws from torch's generator what a DataLoader's pass draws, so that a plain loop with
            the same seed sees the same batches.
        dtype: what floating arrays become. Integers stay integers.
        device: where batches are taken to.
        names: how messages name the parts.
        bare: whether a batch of x alone is x, not ``(x,)``.

    Raises:
        ValueError: no samples, or arrays of different lengths.
        TypeError: what came is no array of numbers.
    """

    owned = True
    self_contained = True

    def __init__(
        self,
        parts: tuple[Any, ...],
        *,
        batch_size: int,
        shuffle: bool,
        draws: bool,
        dtype: torch.dtype,
        device: torch.device,
        names: Sequence[str] = ("x", "y", "sample_weight"),
        bare: bool = True,
    ) -> None:
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._draws = draws
        layouts = [Layout(part, name) for part, name in zip(parts, names, strict=False)]
        self._rows: list[Rows] = [
            as_rows(value, argument, dtype, device) for layout in layouts for argument, value in layout.leaves
        ]
        self._arguments = [argument for layout in layouts for argument, _ in layout.leaves]
        self.samples = _common_length(self._rows, self._arguments)
        self._name = names[0]
        self._build = _builder(parts, layouts, bare)
        self.parts = len(parts)
        # Of the leaves, those of the targets; and the device that batches are to come from, beside the host.
        first = len(layouts[0].leaves)
        self._inputs = first
        self._targets = range(first, first + len(layouts[1].leaves)) if len(layouts) > 1 else range(0)
        self._home: torch.device | None = None
        self.length = -(-self.samples // batch_size)

    def __iter__(self) -> Iterator[Any]:
        return self._from(0, self._order())

    def after(self, done: int) -> Iterator[Any]:
        return self._from(done, self._order())

    def facts(self) -> dict[str, Any]:
        return {"the number of samples": self.samples, "batch_size": self._batch_size, "shuffle": self._shuffle}

    @property
    def nbytes(self) -> int:
        """Bytes that a copy of all the data takes."""
        return self.samples * sum(rows.row_bytes for rows in self._rows)

    @property
    def shuffles(self) -> bool:
        """Whether each pass has an order of its own."""
        return self._shuffle

    @property
    def inputs(self) -> list[Input]:
        found = zip(self._arguments[: self._inputs], self._rows, strict=False)
        return [
            Input(argument, argument.removeprefix(self._name), rows.shape, _words(rows.columns))
            for argument, rows in found
        ]

    @property
    def extent(self) -> tuple[int, int]:
        return self.samples, self._batch_size

    def _from(self, first: int, order: Tensor | None) -> Iterator[Any]:
        size = min(self._batch_size, self.samples)  # torch takes no integers beyond 64 bits
        step = size * self._batches_in_chunk(size)
        sources = self._rows if self._home is None else self._copies(self._home)
        for start in range(first * size, self.samples, step):
            stop = min(start + step, self.samples)
            index = None if order is None else order[start:stop]
            yield from self._cut_up(sources, start, stop, index, size)

    def _cut_up(self, sources: Sequence[Rows], start: int, stop: int, index: Tensor | None, size: int) -> Iterable[Any]:
        """The batches of a chunk."""
        pieces = zip(*(_cut(rows, start, stop, index, size) for rows in sources), strict=True)
        if self._home is not None:
            return self._placed(pieces, start, stop, index, size)
        return pieces if self._build is None else map(self._build, pieces)

    def shares(self, processes: Processes, done: int) -> Iterator[Share]:
        return self._shares(processes, done, self._order())

    def _shares(self, processes: Processes, done: int, order: Tensor | None) -> Iterator[Share]:
        size = min(self._batch_size, self.samples)
        first, last = processes.part(size)
        step = size * self._batches_in_chunk(max(1, last - first))
        sources = self._rows if self._home is None else self._copies(self._home)
        whole = self.samples - self.samples % size
        # Chunks of whole batches, and the last batch, which may be smaller, by itself.
        chunks = [(start, min(start + step, whole), size) for start in range(done * size, whole, step)]
        if whole < self.samples and done * size <= whole:
            chunks.append((whole, self.samples, self.samples - whole))
        for start, stop, size in chunks:
            first, last = processes.part(size)
            if first == last:
                yield from itertools.repeat(Share(None, 0, size), (stop - start) // size)
                continue
            index = torch.arange(start, stop, device="cpu").reshape(-1, size)[:, first:last].reshape(-1)
            index = index if order is None else order[index]
            for batch in self._cut_up(sources, 0, 0, index, last - first):
                yield Share(batch, processes.count(size), size)

    def _copies(self, device: torch.device) -> list[Rows]:
        return [rows.copied_to(device) if isinstance(rows, TensorRows) else rows for rows in self._rows]

    def _placed(
        self, pieces: Iterable[tuple[Tensor, ...]], start: int, stop: int, index: Tensor | None, size: int
    ) -> Iterator[Placed]:
        """The batches of a chunk on the device, each beside its targets on the host."""
        nothing = itertools.repeat(None)
        on_host = [
            _cut(rows, start, stop, index, size) if position in self._targets else nothing
            for position, rows in enumerate(self._rows)
        ]
        build = self._build or tuple
        for leaves, beside in zip(pieces, zip(*on_host, strict=False), strict=False):
            yield Placed(build(leaves), build(beside))

    def kept_on(self, device: torch.device, most_bytes: int) -> ArrayBatches:
        tensors = [rows for rows in self._rows if isinstance(rows, TensorRows)]
        if len(tensors) < len(self._rows) or sum(rows.nbytes for rows in tensors) > most_bytes:
            return self
        other = self._with(self._rows, shuffle=self._shuffle)
        other._home = device
        return other

    def nonfinite(self) -> str | None:
        searched = map(nonfinite_rows, self._rows, self._arguments)
        found = [sentence for sentence in searched if sentence is not None]
        return f"The data hold NaN or infinity: {'; '.join(found)}." if found else None

    def some_targets(self) -> Any:
        samples = min(self._batch_size, self.samples)
        leaves = next(zip(*(_cut(rows, 0, samples, None, samples) for rows in self._rows), strict=True))
        return unpack(leaves if self._build is None else self._build(leaves))[1]

    def _order(self) -> Tensor | None:
        """This pass's permutation, from the same draws as ``iter(DataLoader(...))`` and its RandomSampler."""
        if self._draws:
            _draw()
        if not self._shuffle:
            return None
        generator = torch.Generator().manual_seed(_draw())
        return torch.randperm(self.samples, generator=generator, device="cpu")

    def _batches_in_chunk(self, size: int) -> int:
        batch_bytes = size * sum(rows.row_bytes for rows in self._rows)
        return max(1, min(BATCHES_PER_CHUNK, BYTES_PER_CHUNK // max(1, batch_bytes)))

    def in_order(self) -> ArrayBatches:
        return self._with(self._rows, shuffle=False)

    def split(self, first: int) -> tuple[ArrayBatches, ArrayBatches]:
        """The first samples as they are, and the rest unshuffled and without draws, as validation data."""
        training = self._with([rows.part(0, first) for rows in self._rows], shuffle=self._shuffle)
        held_out = self._with([rows.part(first, self.samples) for rows in self._rows], shuffle=False)
        held_out._draws = False
        return training, held_out

    def in_large_batches(self) -> ArrayBatches:
        row_bytes = max(1, sum(rows.row_bytes for rows in self._rows))
        return self.resized(max(self._batch_size, min(MOST_LARGE_BATCH, BYTES_LARGE_BATCH // row_bytes)))

    def resized(self, batch_size: int) -> ArrayBatches:
        """The same data in batches of another size."""
        other = self._with(self._rows, shuffle=self._shuffle)
        other._batch_size = batch_size
        other.length = -(-other.samples // batch_size)
        return other

    def _with(self, rows: list[Rows], *, shuffle: bool) -> ArrayBatches:
        other = object.__new__(ArrayBatches)
        other.__dict__.update(self.__dict__)
        other._rows, other._shuffle, other.samples = rows, shuffle, len(rows[0])
        other.length = -(-other.samples // self._batch_size)
        return other


def _cut(rows: Rows, start: int, stop: int, index: Tensor | None, size: int) -> Sequence[Tensor]:
    """A chunk of rows, from start to stop or those of the index, in batches.

    Batches are pieces of a chunk, but no views to autograd: a module may work in place on its input.
    """
    chunk = rows.cut(start, stop) if index is None else rows.take(index)
    return (chunk,) if len(chunk) <= size else torch.unsafe_split(chunk, size)


def _draw() -> int:
    """One number of torch's generator; on the CPU, where a DataLoader draws, whatever torch's default device is."""
    return int(torch.empty((), dtype=torch.int64, device="cpu").random_().numpy())


def _builder(parts: tuple[Any, ...], layouts: Sequence[Layout], bare: bool) -> Callable[[Sequence[Any]], Any] | None:
    """From the leaves of a batch to the batch; None where the leaves are the batch already."""
    if all(is_array(part) for part in parts) and (len(parts) > 1 or not bare):
        return None
    if is_array(parts[0]) and len(parts) == 1:
        return operator.itemgetter(0)
    counts = [len(layout.leaves) for layout in layouts]
    starts = [sum(counts[:index]) for index in range(len(counts))]

    def build(leaves: Sequence[Any]) -> Any:
        built = tuple(
            layout.build(leaves[start : start + count])
            for layout, start, count in zip(layouts, starts, counts, strict=True)
        )
        # x alone is the batch, unless it would be taken for (x, y).
        return built[0] if bare and len(built) == 1 and not isinstance(built[0], (tuple, list)) else built

    return build


def _words(columns: Sequence[Any]) -> tuple[str, ...]:
    """The columns' names where all are words; numbers are what pandas gives to columns without a name."""
    return tuple(columns) if all(isinstance(name, str) for name in columns) else ()


def _common_length(rows: Sequence[Rows], arguments: Sequence[str]) -> int:
    lengths = [len(each) for each in rows]
    if len(set(lengths)) > 1:
        listed = ", ".join(f"{argument} has {length}" for argument, length in zip(arguments, lengths, strict=True))
        raise ValueError(
            f"Expected arrays with the same number of samples, received different lengths: {listed}. The first "
            "dimension of every array counts samples; a single sample gets one by x[None]."
        )
    if lengths[0] == 0:
        raise ValueError(f"Expected at least one sample, received {arguments[0]} with 0 samples. Check what made it.")
    return lengths[0]
