"""Rows: what is read of tensors, NumPy arrays and pandas objects, and what of a ready batch becomes a tensor."""

from __future__ import annotations

import collections
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from fitkit.data.rows import as_rows, is_array, with_tensors

CPU = torch.device("cpu")
NUMBERS = np.arange(12).reshape(6, 2)


def rows(value: Any) -> Any:
    return as_rows(value, "x", torch.float32, CPU)


def assert_reads(value: Any, expected: Tensor) -> None:
    """Cut, taken and partly taken rows are those expected, dtype included."""
    read, index = rows(value), torch.tensor([4, 0, 3])
    assert len(read) == len(expected)
    torch.testing.assert_close(read.cut(1, 4), expected[1:4], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(read.take(index), expected[index], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(read.part(2, 6).cut(1, 3), expected[3:5], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("order", ["=", ">"])
def test_floating_arrays_become_the_dtype_asked_for(dtype: str, order: str) -> None:
    assert_reads(NUMBERS.astype(np.dtype(dtype).newbyteorder(order)), torch.tensor(NUMBERS, dtype=torch.float32))


@pytest.mark.parametrize("dtype", ["int64", "int32", "int8", "uint8", "bool", "complex64"])
def test_other_numbers_stay_what_they_are(dtype: str) -> None:
    assert_reads(NUMBERS.astype(dtype), torch.from_numpy(NUMBERS.astype(dtype)))


@pytest.mark.parametrize(("dtype", "read_as"), [("uint16", "int32"), ("uint32", "int64"), ("uint64", "int64")])
def test_large_unsigned_integers_become_signed(dtype: str, read_as: str) -> None:
    assert_reads(NUMBERS.astype(dtype), torch.from_numpy(NUMBERS.astype(read_as)))


@pytest.mark.parametrize("view", [NUMBERS[::-1], NUMBERS[:, ::-1], NUMBERS[::-1].astype(">i8"), NUMBERS.T.copy().T])
def test_rows_of_any_strides_are_read(view: Any) -> None:
    assert_reads(view, torch.tensor(view.tolist()))


def test_an_array_of_a_subclass_is_an_array(tmp_path: Path) -> None:
    class Measured(np.ndarray[Any, Any]):
        """As other libraries have them."""

    mapped = np.memmap(tmp_path / "numbers", dtype="int64", mode="w+", shape=(6, 2))
    mapped[:] = NUMBERS
    for array in (NUMBERS.view(Measured), mapped):
        assert is_array(array)
        assert_reads(array, torch.from_numpy(NUMBERS))


def test_a_read_only_array_is_read_without_a_warning() -> None:
    array = NUMBERS.copy()
    array.flags.writeable = False
    assert_reads(array, torch.from_numpy(NUMBERS))


@pytest.mark.parametrize("array", [NUMBERS, NUMBERS.astype("float32"), NUMBERS[::-1], pd.DataFrame(NUMBERS)])
def test_rows_are_copies(array: Any) -> None:
    before = np.array(array)
    for taken in (rows(array).cut(0, 6), rows(array).take(torch.arange(6))):
        taken.zero_()
    assert (np.array(array) == before).all()


@pytest.mark.parametrize("array", [torch.ones(2, 6).T, NUMBERS.T.copy().T, NUMBERS[:, ::-1], pd.DataFrame(NUMBERS)])
def test_rows_lie_in_memory_one_after_the_other(array: Any) -> None:
    assert rows(array).cut(0, 6).is_contiguous()
    assert rows(array).take(torch.arange(6)).is_contiguous()


def test_a_tensor_that_requires_grad_gives_rows_that_do_not() -> None:
    tensor = torch.ones(6, 2, requires_grad=True)
    assert_reads(tensor, torch.ones(6, 2))
    assert not rows(tensor).cut(0, 2).requires_grad


@pytest.mark.parametrize(
    ("series", "expected"),
    [
        (pd.Series([1, 2, 3, 4, 5, 6]), torch.int64),
        (pd.Series([1, 2, 3, 4, 5, 6], dtype="Int32"), torch.int32),
        (pd.Series([1, 0, 1, 0, 0, 1], dtype="boolean"), torch.bool),
        (pd.Series([1, 0, 1, 0, 0, 1], index=[0.5, 1, 2, 3, 4, 5]), torch.int64),
        (pd.Series(pd.arrays.SparseArray([1, 0, 1, 0, 0, 1])), torch.int64),
        (pd.Series([1, 2, 3, 4, 5, 6], dtype="Float64"), torch.float32),
    ],
)
def test_a_series_keeps_its_kind_of_number(series: Any, expected: torch.dtype) -> None:
    assert_reads(series, torch.tensor(series.to_list(), dtype=expected))


@pytest.mark.parametrize("dtype", ["Int64", "boolean", "Float32"])
def test_missing_values_are_nan_and_every_part_is_floating(dtype: str) -> None:
    series = pd.Series([1, 0, 1, 0, 0, None], dtype=dtype)
    assert_reads(series, torch.tensor([1, 0, 1, 0, 0, torch.nan]))
    assert_reads(series.to_frame(), torch.tensor([[1], [0], [1], [0], [0], [torch.nan]]))


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame({"a": [1.5, 2, 3, 4, 5, 6], "b": [0, 1, 0, 1, 1, 0]}),
        pd.DataFrame({"a": [1, 2, 3, 4, 5, 6], "b": [False, True, False, True, True, False]}),
        pd.DataFrame({"a": pd.array([1, 2, 3, 4, 5, 6], dtype="Int64"), "b": [0.5, 1, 0, 1, 1, 0]}),
        pd.DataFrame({"a": pd.array([0, 1, 0, 1, 1, 0], dtype="boolean"), "b": [0.5, 1, 0, 1, 1, 0]}),
    ],
    ids=["floats and integers", "integers and bools", "nullable integers and floats", "nullable bools and floats"],
)
def test_columns_of_several_kinds_are_floating(frame: Any) -> None:
    assert_reads(frame, torch.tensor(frame.astype("float64").to_numpy(), dtype=torch.float32))


def test_columns_of_integers_stay_integers() -> None:
    frame = pd.DataFrame({"a": np.arange(6, dtype="int8"), "b": pd.array(range(6), dtype="UInt16")})
    assert_reads(frame, torch.tensor([[index, index] for index in range(6)], dtype=torch.int32))


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.tensor(1.0), ValueError, r"Expected samples along the first dimension, received x of shape \(\)"),
        (np.array(1.0), ValueError, r"Expected samples along the first dimension, received x of shape \(\)"),
        (torch.eye(3).to_sparse(), TypeError, r"Expected a dense tensor, received x, a sparse_coo one"),
        (np.array(["a", "b"]), TypeError, r"Expected numbers, received x, an array of dtype <U1\. Convert it"),
        (np.array([1, None]), TypeError, r"Expected numbers, received x, an array of dtype object"),
        (np.array(["2020-01-01"], "datetime64[D]"), TypeError, r"an array of dtype datetime64\[D\]"),
        (np.ones(3, "longdouble"), TypeError, r"Expected numbers, received x, an array of dtype"),
        (np.ma.masked_array([1, 2], [0, 1]), TypeError, r"Expected an array without a mask, received x"),
        (
            pd.DataFrame({"a": [1], "b": ["red"]}),
            TypeError,
            r"received x with column 'b' of dtype .*Encode it as numbe",
        ),
        (pd.Series(["red"], dtype="category", name="c"), TypeError, r"column 'c' of dtype category"),
        ([1.0, 2.0], TypeError, r"received x=\[1.0, 2.0\]\. Lists and tuples hold several arrays; make numbers"),
        (None, TypeError, r"Expected an array, received x=None\. Pass tensors"),
        ({1, 2}, TypeError, r"Expected an array, received x=\{1, 2\}\. Pass tensors"),
    ],
)
def test_what_is_no_array_of_numbers_is_refused(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rows(value)


Pair = collections.namedtuple("Pair", ["x", "y"])


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        (NUMBERS.astype("float64"), torch.tensor(NUMBERS, dtype=torch.float32)),
        ((NUMBERS, NUMBERS > 2), (torch.tensor(NUMBERS), torch.tensor(NUMBERS > 2))),
        ({"a": [NUMBERS, 3]}, {"a": [torch.tensor(NUMBERS), 3]}),
        (Pair(NUMBERS, pd.Series([1.0, 2.0])), Pair(torch.tensor(NUMBERS), torch.tensor([1.0, 2.0]))),
        (pd.DataFrame(NUMBERS), torch.tensor(NUMBERS)),
    ],
)
def test_arrays_in_a_ready_batch_become_tensors(batch: Any, expected: Any) -> None:
    converted = with_tensors(batch, torch.float32)
    assert type(converted) is type(expected)
    torch.testing.assert_close(converted, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "batch",
    [
        torch.ones(2, dtype=torch.float64),
        (torch.ones(2), [torch.ones(2)]),
        collections.UserDict(a=torch.ones(2)),
        {"name": np.array(["a", "b"])},
        np.float64(1.0),
        "text",
        object(),
    ],
)
def test_a_ready_batch_without_arrays_of_numbers_stays_the_same_object(batch: Any) -> None:
    assert with_tensors(batch, torch.float32) is batch


def test_floating_tensors_are_cast_only_when_asked() -> None:
    x, y = with_tensors([torch.ones(2, dtype=torch.float64), torch.ones(2).long()], torch.float32, cast=True)
    assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
