"""Tensors, NumPy arrays, pandas objects and nests of them, batched by index.

No DataLoader and no sample-by-sample work: an epoch's permutation is gathered in chunks of many batches, and the
chunks are cut into batches. Only a chunk is ever copied, so a memory-mapped array may be larger than the memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, final

import torch
from torch import Tensor

from fitkit.data.batches import Batches
from fitkit.errors import show

# One gather serves this many batches, as long as a chunk stays under the bytes below.
BATCHES_PER_CHUNK = 64
BYTES_PER_CHUNK = 16 * 2**20


class Rows(Protocol):
    """An array of which rows can be taken."""

    row_bytes: int

    def __len__(self) -> int: ...

    def cut(self, start: int, stop: int) -> Tensor:
        """A copy of the rows from start to stop."""

    def take(self, index: Tensor) -> Tensor:
        """A copy of the rows that index names, in its order."""

    def part(self, start: int, stop: int) -> Rows:
        """The rows from start to stop, not copied."""


@final
class TensorRows:
    """The rows of a tensor, or of a NumPy array seen as one.

    Args:
        tensor: at least one-dimensional.
        dtype: what floating rows become when they are taken.
        device: where rows are taken to.
    """

    def __init__(self, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
        self._tensor = tensor
        self._dtype = dtype if tensor.is_floating_point() else tensor.dtype
        self._device = device
        self.row_bytes = tensor[:1].numel() * tensor.element_size()

    def __len__(self) -> int:
        return len(self._tensor)

    def cut(self, start: int, stop: int) -> Tensor:
        rows = self._tensor[start:stop]
        moved = rows.to(device=self._device, dtype=self._dtype, non_blocking=True)
        # A module may work in place on what it is given: the user's array must not change.
        return moved.clone() if moved is rows else moved

    def take(self, index: Tensor) -> Tensor:
        rows = self._tensor.index_select(0, index.to(self._tensor.device))
        return rows.to(device=self._device, dtype=self._dtype, non_blocking=True)

    def part(self, start: int, stop: int) -> TensorRows:
        return TensorRows(self._tensor[start:stop], self._dtype, self._device)


@final
class FrameRows:
    """The rows of a pandas DataFrame or Series, made into tensors a chunk at a time.

    Args:
        frame: with numeric or bool columns only.
        argument: how messages name it.
        dtype: what floating rows become when they are taken.
        device: where rows are taken to.
    """

    def __init__(self, frame: Any, argument: str, dtype: torch.dtype, device: torch.device) -> None:
        self._frame = frame
        self._argument = argument
        self._dtype = dtype
        self._device = device
        _check_columns(frame, argument)
        self.row_bytes = max(1, frame[:1].to_numpy().nbytes)

    def __len__(self) -> int:
        return len(self._frame)

    def cut(self, start: int, stop: int) -> Tensor:
        return self._tensor(self._frame.iloc[start:stop])

    def take(self, index: Tensor) -> Tensor:
        return self._tensor(self._frame.iloc[index.numpy()])

    def part(self, start: int, stop: int) -> FrameRows:
        return FrameRows(self._frame.iloc[start:stop], self._argument, self._dtype, self._device)

    def _tensor(self, frame: Any) -> Tensor:
        array = frame.to_numpy(copy=True)
        if array.dtype == object:  # nullable columns with missing values, or a mix of bool and numbers
            array = frame.to_numpy(dtype="float64", na_value=float("nan"))
        tensor = torch.from_numpy(array)
        return tensor.to(device=self._device, dtype=self._dtype if tensor.is_floating_point() else tensor.dtype)


def _check_columns(frame: Any, argument: str) -> None:
    dtypes = frame.dtypes.items() if hasattr(frame, "columns") else [(frame.name, frame.dtype)]
    for name, dtype in dtypes:
        if getattr(dtype, "kind", "O") not in "biuf":
            raise TypeError(
                f"Expected numbers, received {argument} with column {name!r} of dtype {dtype}. Encode it as numbers "
                "(for example with pandas.get_dummies or .cat.codes) or leave it out."
            )


def is_array(value: Any) -> bool:
    """Whether the value is a tensor, a NumPy array or a pandas object."""
    return isinstance(value, Tensor) or _is_numpy(value) or _is_pandas(value)


def _is_numpy(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "numpy" and hasattr(value, "ndim")


def _is_pandas(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "pandas" and hasattr(value, "iloc")


def _rows(value: Any, argument: str, dtype: torch.dtype, device: torch.device) -> Rows:
    if isinstance(value, Tensor) or _is_numpy(value):
        tensor = value.detach() if isinstance(value, Tensor) else _as_tensor(value, argument)
        if tensor.dim() == 0:
            raise ValueError(f"Expected samples along the first dimension, received {argument} of shape ().")
        return TensorRows(tensor, dtype, device)
    if _is_pandas(value):
        return FrameRows(value, argument, dtype, device)
    if isinstance(value, (list, tuple)) or type(value) in (int, float, bool, str):
        hint = "Lists and tuples hold several arrays; make numbers an array with torch.tensor(...) or numpy.array(...)."
    else:
        hint = "Pass tensors, NumPy arrays, pandas objects, or nested tuples, lists and dicts of them."
    raise TypeError(f"Expected an array, received {argument}={show(value)}. {hint}")


def _as_tensor(array: Any, argument: str) -> Tensor:
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if any(stride < 0 for stride in array.strides):
        array = array.copy()  # torch has no negative strides
    with warnings.catch_warnings():
        # A read-only array (a memory map) may be read; what is handed out are copies.
        warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)
        try:
            return torch.from_numpy(array)
        except TypeError as error:
            raise TypeError(
                f"Expected numbers, received {argument}, an array of dtype {array.dtype}. Convert it, for example with "
                '.astype("float32"), or encode its labels as integers.'
            ) from error


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

    Raises:
        ValueError: no samples, or arrays of different lengths.
        TypeError: what came is no array of numbers.
    """

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
    ) -> None:
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._draws = draws
        layouts = [Layout(part, name) for part, name in zip(parts, names, strict=False)]
        self._rows: list[Rows] = [
            _rows(value, argument, dtype, device) for layout in layouts for argument, value in layout.leaves
        ]
        self.samples = _common_length(self._rows, [argument for layout in layouts for argument, _ in layout.leaves])
        self._build = _builder(parts, layouts)
        self.length = -(-self.samples // batch_size)

    def __iter__(self) -> Iterator[Any]:
        order = self._order()
        step = self._batch_size * self._batches_in_chunk()
        for start in range(0, self.samples, step):
            stop = min(start + step, self.samples)
            chunks = [rows.cut(start, stop) if order is None else rows.take(order[start:stop]) for rows in self._rows]
            cuts = [torch.split(chunk, self._batch_size) for chunk in chunks]
            if self._build is None:
                yield from zip(*cuts, strict=True)
            else:
                for leaves in zip(*cuts, strict=True):
                    yield self._build(leaves)

    def _order(self) -> Tensor | None:
        """This pass's permutation, from the same draws as ``iter(DataLoader(...))`` and its RandomSampler."""
        if self._draws:
            torch.empty((), dtype=torch.int64).random_()
        if not self._shuffle:
            return None
        seed = int(torch.empty((), dtype=torch.int64).random_().numpy())
        return torch.randperm(self.samples, generator=torch.Generator().manual_seed(seed))

    def _batches_in_chunk(self) -> int:
        batch_bytes = self._batch_size * sum(rows.row_bytes for rows in self._rows)
        return max(1, min(BATCHES_PER_CHUNK, BYTES_PER_CHUNK // max(1, batch_bytes)))

    def in_order(self) -> ArrayBatches:
        return self._with(self._rows, shuffle=False)

    def split(self, first: int) -> tuple[ArrayBatches, ArrayBatches]:
        """The first samples as they are, and the rest unshuffled and without draws, as validation data."""
        training = self._with([rows.part(0, first) for rows in self._rows], shuffle=self._shuffle)
        held_out = self._with([rows.part(first, self.samples) for rows in self._rows], shuffle=False)
        held_out._draws = False
        return training, held_out

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


def _builder(parts: tuple[Any, ...], layouts: Sequence[Layout]) -> Callable[[Sequence[Any]], Any] | None:
    """From the leaves of a batch to the batch; None where the leaves are the batch already."""
    if all(is_array(part) for part in parts) and len(parts) > 1:
        return None
    counts = [len(layout.leaves) for layout in layouts]
    starts = [sum(counts[:index]) for index in range(len(counts))]

    def build(leaves: Sequence[Any]) -> Any:
        built = tuple(
            layout.build(leaves[start : start + count])
            for layout, start, count in zip(layouts, starts, counts, strict=True)
        )
        # x alone is the batch, unless it would be taken for (x, y).
        return built[0] if len(built) == 1 and not isinstance(built[0], (tuple, list)) else built

    return build


def _common_length(rows: Sequence[Rows], arguments: Sequence[str]) -> int:
    if not rows:
        raise ValueError("Expected at least one array, received an empty structure.")
    lengths = [len(each) for each in rows]
    if len(set(lengths)) > 1:
        listed = ", ".join(f"{argument} has {length}" for argument, length in zip(arguments, lengths, strict=True))
        raise ValueError(f"Expected arrays with the same number of samples, received different lengths: {listed}.")
    if lengths[0] == 0:
        raise ValueError(f"Expected at least one sample, received {arguments[0]} with 0 samples.")
    return lengths[0]
