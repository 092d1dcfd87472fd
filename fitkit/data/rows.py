"""Arrays whose rows can be taken: tensors, NumPy arrays and pandas objects, read a part at a time.

How arrays are nested and how rows become batches is in arrays.py.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, final

import numpy as np
import torch
from torch import Tensor

from fitkit.errors import show

# torch computes little with unsigned integers of more than 8 bits, so that these are read as signed ones.
READ_AS = {"uint16": "int32", "uint32": "int64", "uint64": "int64"}


SEARCHED_BYTES = 1 << 24
COLUMNS_SHOWN = 10


class Rows(Protocol):
    """An array of which rows can be taken."""

    row_bytes: int
    shape: tuple[int, ...]
    # Of a frame, the names of its columns.
    columns: Sequence[Any]

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
        is_array: whether NumPy may write into it, so that its version does not tell whether it has changed.
    """

    def __init__(self, tensor: Tensor, dtype: torch.dtype, device: torch.device, *, is_array: bool = False) -> None:
        self._tensor = tensor
        self._is_array = is_array
        self._copy: TensorRows | None = None
        self._copied_version = -1
        self._dtype = dtype if tensor.is_floating_point() else tensor.dtype
        self._device = device
        self.columns: Sequence[Any] = ()
        self.shape = tuple(tensor.shape)
        self.row_bytes = tensor[:1].numel() * tensor.element_size()

    def __len__(self) -> int:
        return len(self._tensor)

    def cut(self, start: int, stop: int) -> Tensor:
        rows = self._tensor[start:stop]
        moved = rows.to(device=self._device, dtype=self._dtype, non_blocking=True).contiguous()
        # A module may work in place on what it is given: the user's array must not change.
        return moved.clone() if moved.data_ptr() == rows.data_ptr() else moved

    def take(self, index: Tensor) -> Tensor:
        rows = self._tensor.index_select(0, index.to(self._tensor.device))
        return rows.to(device=self._device, dtype=self._dtype, non_blocking=True)

    def part(self, start: int, stop: int) -> TensorRows:
        return TensorRows(self._tensor[start:stop], self._dtype, self._device, is_array=self._is_array)

    @property
    def nbytes(self) -> int:
        """Bytes that a copy of all rows takes."""
        return len(self) * self.row_bytes

    def copied_to(self, device: torch.device) -> TensorRows:
        """The rows on a device: the copy made before, or a new one where the tensor has, or may have, changed since."""
        if self._copy is None or self._is_array or self._tensor._version != self._copied_version:
            self._copied_version = self._tensor._version
            copy = self._tensor.to(device=device, dtype=self._dtype, copy=True)
            self._copy = TensorRows(copy, self._dtype, device)
        return self._copy


@final
class ForeignRows:
    """The rows of what torch cannot see as a tensor, converted a part at a time.

    Args:
        array: a pandas object, or a NumPy array of another byte order, of negative strides or of large unsigned
            integers.
        convert: from a part of it to a NumPy array of its own that torch can see.
        dtype: what floating rows become when they are taken.
        device: where rows are taken to.
    """

    def __init__(
        self, array: Any, convert: Callable[[Any], np.ndarray[Any, Any]], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._array = array
        self._convert = convert
        self._dtype = dtype
        self._device = device
        self.columns: Sequence[Any] = list(getattr(array, "columns", ()))
        self.shape: tuple[int, ...] = tuple(array.shape)
        self.row_bytes = convert(self._positions[:1]).nbytes

    def __len__(self) -> int:
        return len(self._array)

    def cut(self, start: int, stop: int) -> Tensor:
        return self._select(slice(start, stop))

    def take(self, index: Tensor) -> Tensor:
        return self._select(index.numpy())

    def part(self, start: int, stop: int) -> ForeignRows:
        return ForeignRows(self._positions[start:stop], self._convert, self._dtype, self._device)

    @property
    def _positions(self) -> Any:
        """What rows are taken from by position; a pandas object alone takes them by label."""
        return self._array.iloc if is_pandas(self._array) else self._array

    def _select(self, which: Any) -> Tensor:
        tensor = torch.from_numpy(self._convert(self._positions[which]))
        return tensor.to(device=self._device, dtype=self._dtype if tensor.is_floating_point() else tensor.dtype)


def nonfinite_rows(rows: Rows, argument: str) -> str | None:
    """How many rows hold NaN or infinity, and of a frame in which columns; None where all is finite."""
    count, bad_columns = 0, torch.zeros((), dtype=torch.bool)
    step = max(1, SEARCHED_BYTES // max(1, rows.row_bytes))
    for start in range(0, len(rows), step):
        part = rows.cut(start, min(start + step, len(rows)))
        bad = part.isfinite().logical_not_().reshape(len(part), -1).cpu()
        count += int(bad.any(1).sum())
        bad_columns = bad_columns | bad.any(0)
    if not count:
        return None
    names = [repr(name) for index, name in enumerate(rows.columns) if bad_columns[index]]
    more = f" and {len(names) - COLUMNS_SHOWN} more" if len(names) > COLUMNS_SHOWN else ""
    within = f" (columns {', '.join(names[:COLUMNS_SHOWN])}{more})" if names else ""
    return f"{argument} in {count} of {len(rows)} rows{within}"


def is_array(value: Any) -> bool:
    """Whether the value is a tensor, a NumPy array or a pandas object."""
    return isinstance(value, (Tensor, np.ndarray)) or is_pandas(value)


def is_pandas(value: Any) -> bool:
    """Whether the value is a pandas DataFrame or Series; asked without importing pandas."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(value, (pandas.DataFrame, pandas.Series))


def as_rows(value: Any, argument: str, dtype: torch.dtype, device: torch.device) -> Rows:
    """The rows of a tensor, NumPy array or pandas object.

    Args:
        value: the array, samples first. It is neither copied nor changed.
        argument: how messages name it.
        dtype: what floating rows become. Integers stay integers.
        device: where rows are taken to.

    Raises:
        ValueError: it has no first dimension.
        TypeError: what came is no dense array of numbers.
    """
    if isinstance(value, Tensor):
        _check_tensor(value, argument)
        return TensorRows(value.detach(), dtype, device if value.device.type == "cpu" else value.device)
    if isinstance(value, np.ndarray):
        return _numpy_rows(value, argument, dtype, device)
    if is_pandas(value):
        return ForeignRows(value, _frame_converter(value, argument), dtype, device)
    if isinstance(value, (list, tuple)) or type(value) in (int, float, bool, str):
        hint = "Lists and tuples hold several arrays; make numbers an array with torch.tensor(...) or numpy.array(...)."
    else:
        hint = "Pass tensors, NumPy arrays, pandas objects, or nested tuples, lists and dicts of them."
    raise TypeError(f"Expected an array, received {argument}={show(value)}. {hint}")


def _check_tensor(tensor: Tensor, argument: str) -> None:
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise TypeError(
            f"Expected a dense tensor, received {argument}, a {kind} one. Convert it with .to_dense() or "
            ".to_padded_tensor(...), or pass batches of it."
        )
    if tensor.dim() == 0:
        raise ValueError(_no_samples(argument))


def _no_samples(argument: str) -> str:
    return (
        f"Expected samples along the first dimension, received {argument} of shape (). Give it one, for example "
        "with .reshape(1)."
    )


def _numpy_rows(array: np.ndarray[Any, Any], argument: str, dtype: torch.dtype, device: torch.device) -> Rows:
    if array.ndim == 0:
        raise ValueError(_no_samples(argument))
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(
            f"Expected an array without a mask, received {argument}, a masked one. Say what stands for what is masked: "
            ".filled(0.0)."
        )
    if array.dtype.kind not in "biufc" or array.dtype.char in "gG":  # g and G are long double and its complex
        raise TypeError(
            f"Expected numbers, received {argument}, an array of dtype {array.dtype}. Convert it, for example with "
            '.astype("float32"), or encode its labels as integers.'
        )
    native = array.dtype.newbyteorder("=")
    read_as = np.dtype(READ_AS.get(native.name, native))
    if read_as != array.dtype or any(stride < 0 for stride in array.strides):
        return ForeignRows(array, lambda part: np.array(part, dtype=read_as, order="C"), dtype, device)
    with warnings.catch_warnings():
        # A read-only array (a memory map) may be read; what is handed out are copies.
        warnings.filterwarnings("ignore", message=".*not writable", category=UserWarning)
        return TensorRows(torch.from_numpy(array), dtype, device, is_array=True)


def _frame_converter(frame: Any, argument: str) -> Callable[[Any], np.ndarray[Any, Any]]:
    """From a part of a pandas object to a NumPy array, of one dtype for all parts whatever values they hold."""
    columns = [frame.iloc[:, index] for index in range(frame.shape[1])] if frame.ndim == 2 else [frame]
    dtypes = []
    for column in columns:
        kind = getattr(column.dtype, "kind", "O")
        if kind not in "biuf":
            raise TypeError(
                f"Expected numbers, received {argument} with column {column.name!r} of dtype {column.dtype}. Encode it "
                "as numbers (for example with pandas.get_dummies or .cat.codes) or leave it out."
            )
        # Nullable and Arrow dtypes name the NumPy dtype below them, sparse ones their subtype.
        below = getattr(column.dtype, "numpy_dtype", getattr(column.dtype, "subtype", column.dtype))
        missing = kind != "f" and column.dtype is not below and column.hasnans
        dtypes.append(np.dtype("float64") if missing else np.dtype(below))
    # Columns of several kinds are features, and features are floating.
    mixed = len({"i" if dtype.kind == "u" else dtype.kind for dtype in dtypes}) > 1
    common = np.result_type(*dtypes, np.float32) if mixed else np.result_type(*dtypes or [np.float64])
    read_as = np.dtype(READ_AS.get(common.name, common))
    options = {"na_value": float("nan")} if read_as.kind == "f" else {}
    # Row by row in memory, as all other batches are: the layout decides in which order a matrix product adds.
    return lambda part: np.ascontiguousarray(part.to_numpy(dtype=read_as, copy=True, **options))


def with_tensors(batch: Any, dtype: torch.dtype, *, cast: bool = False) -> Any:
    """A ready batch with tensors in place of NumPy arrays and pandas objects; itself where it has none.

    Arrays of strings and objects stay what they are: a step of the user's may want them.

    Args:
        batch: anything; tuples, lists and mappings are looked into.
        dtype: what floating arrays become.
        cast: whether floating tensors become of that dtype too.
    """
    if isinstance(batch, Tensor):
        return batch.to(dtype) if cast and batch.is_floating_point() else batch
    if type(batch) in (tuple, list) and not cast and set(map(type, batch)) == {Tensor}:
        return batch  # the usual case
    if isinstance(batch, np.ndarray):
        if batch.ndim == 0 or batch.dtype.kind not in "biufc":
            return batch
        return _numpy_rows(batch, "a batch", dtype, _HOST).cut(0, len(batch))
    if isinstance(batch, (tuple, list)):
        items = [with_tensors(item, dtype, cast=cast) for item in batch]
        if all(map(_is, items, batch)):
            return batch
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    if isinstance(batch, Mapping):
        values = {key: with_tensors(item, dtype, cast=cast) for key, item in batch.items()}
        return batch if all(map(_is, values.values(), batch.values())) else values
    if is_pandas(batch):
        return as_rows(batch, "a batch", dtype, _HOST).cut(0, len(batch))
    return batch


_HOST = torch.device("cpu")


def _is(one: object, other: object) -> bool:
    return one is other
