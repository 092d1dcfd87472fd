"""From what a user passes as data to batches: `as_batches` asks each kind in turn.

What the kinds are is said in one place, here; how each gives its batches is said in its own file.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from fitkit.data.arrays import ArrayBatches
from fitkit.data.batches import Batches, EpochPlan, known_length
from fitkit.data.inputs import check_same_rows
from fitkit.data.iterables import GeneratorBatches, IterableBatches
from fitkit.data.loaders import LoaderBatches, check_loader_options, load_dataset, own_generators, split_dataset
from fitkit.data.rows import is_array, is_pandas
from fitkit.data.tensor_loaders import TensorLoaderBatches, is_tensor_loader
from fitkit.errors import check_flag, check_integer, check_number, show

__all__ = ["Batches", "Batching", "EpochPlan", "as_batches", "as_split_batches", "kept_generators"]

DEFAULT_BATCH_SIZE = 32


@dataclass(frozen=True)
class Batching:
    """How data that is no batches yet becomes batches.

    Attributes:
        batch_size: samples in a batch; None is 32. Refused for data that comes in batches.
        shuffle: None shuffles training data that fitkit batches itself. Refused where somebody else orders the data.
        training: whether a pass is one of training: shuffled by default, with a DataLoader's draws.
        dtype: what floating arrays become.
        device: where arrays are taken to.
        argument: how messages name the data.
        batch_size_argument: how messages name the batch size.
        default_size: samples in a batch where batch_size is None.
        whole: whether arrays make one batch.
        loader_options: of the DataLoader that is made of a Dataset, beside the batch size and the order.
    """

    batch_size: int | None
    shuffle: bool | None
    training: bool
    dtype: torch.dtype
    device: torch.device
    argument: str = "data"
    batch_size_argument: str = "batch_size"
    default_size: int = DEFAULT_BATCH_SIZE
    whole: bool = False
    loader_options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.batch_size is not None:
            check_integer(self.batch_size_argument, self.batch_size, least=1)
        if self.shuffle is not None:
            check_flag("shuffle", self.shuffle)
        if self.loader_options is not None:
            check_loader_options(self.loader_options)

    @property
    def size(self) -> int:
        return self.default_size if self.batch_size is None else int(self.batch_size)

    @property
    def shuffles(self) -> bool:
        return self.training if self.shuffle is None else self.shuffle


def as_batches(data: Any, y: Any, sample_weight: Any, batching: Batching) -> Batches:
    """Any kind of data as batches.

    Args:
        data: arrays or nests of them, a Dataset, a DataLoader, ready batches, or a generator of batches. A tuple is
            ``(x,)``, ``(x, y)`` or ``(x, y, sample_weight)``.
        y: targets, when data is x alone.
        sample_weight: weights, when data is x alone.
        batching: how arrays and Datasets are batched.

    Raises:
        ValueError: arguments that do not go with this kind of data; no data; lengths that differ.
        TypeError: no kind of data.
    """
    arrays = _array_batches(data, y, sample_weight, batching)
    if arrays is not None:
        _refuse_loader_options(data, batching)
        return arrays
    if _is_dataset(data):
        _refuse_parts(data, y, sample_weight, batching)
        _refuse_batching(data, batching, size=False)
        options = dict(batching.loader_options or {})
        if not batching.training:
            options["drop_last"] = False  # what is judged or predicted is all of the data
        return load_dataset(data, batching.size, batching.shuffles, batching.argument, batching.dtype, options)
    if isinstance(data, (str, bytes)) or not (hasattr(type(data), "__iter__") or hasattr(type(data), "__next__")):
        hint = " It is a function: call it." if inspect.isroutine(data) else ""
        raise TypeError(
            "Expected arrays, a Dataset, a DataLoader, an iterable of batches or a generator, received "
            f"{batching.argument}={show(data)}.{hint}"
        )
    _refuse_parts(data, y, sample_weight, batching)
    _refuse_batching(data, batching, size=True)
    _refuse_loader_options(data, batching)
    if isinstance(data, DataLoader):
        if is_tensor_loader(data):
            return TensorLoaderBatches(data, batching.dtype)
        return LoaderBatches(data, batching.dtype)
    if isinstance(data, Iterator):
        return GeneratorBatches(data, batching.dtype)
    return IterableBatches(data, batching.dtype)


def as_split_batches(
    data: Any, y: Any, sample_weight: Any, batching: Batching, validation_split: float, validation_size: int | None
) -> tuple[Batches, Batches | None]:
    """Training batches, and validation batches of the last part of the data when validation_split is above 0.

    Args:
        data: as in `as_batches`.
        y: as in `as_batches`.
        sample_weight: as in `as_batches`.
        batching: as in `as_batches`.
        validation_split: from 0 up to, not including, 1; the training part is rounded down.
        validation_size: batch size of the validation part; None is that of training.

    Raises:
        ValueError: the data cannot be split, or a part would be empty.
    """
    check_number("validation_split", validation_split, least=0.0)
    if validation_split >= 1.0:
        raise ValueError(f"Expected a fraction from 0 up to, not including, 1, received {validation_split=}.")
    if validation_split == 0.0:
        return as_batches(data, y, sample_weight, batching), None
    whole = _array_batches(data, y, sample_weight, batching)
    if whole is not None:
        _refuse_loader_options(data, batching)
        first, rest = whole.split(_first_part(whole.samples, validation_split))
        return first, rest if validation_size is None else rest.resized(validation_size)
    samples = known_length(data)
    if not _is_dataset(data) or isinstance(data, IterableDataset) or samples is None:
        raise ValueError(
            f"{validation_split=} needs arrays or a map-style Dataset that tells its length, received "
            f"{batching.argument}={_kind(data)}. Split the data yourself and pass validation_data=..."
        )
    _refuse_parts(data, y, sample_weight, batching)
    training, held_out = split_dataset(data, _first_part(samples, validation_split), samples)
    validating = replace(batching, training=False, shuffle=None, batch_size=validation_size or batching.batch_size)
    return as_batches(training, None, None, batching), as_batches(held_out, None, None, validating)


@contextlib.contextmanager
def kept_generators(*data: Any) -> Iterator[None]:
    """Leaves the random generators that DataLoaders have of their own as they were."""
    own = [generator for each in data if isinstance(each, DataLoader) for generator in own_generators(each)]
    states = [(generator, generator.get_state()) for generator in own]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def _first_part(samples: int, validation_split: float) -> int:
    # 10 * (1 - 0.9) is 0.9999999999999998: rounding at the ninth digit keeps the floor honest.
    first = math.floor(round(samples * (1.0 - validation_split), 9))
    if first == 0 or first == samples:
        raise ValueError(
            f"Expected validation_split to leave samples for training and for validation, received {validation_split=} "
            f"for {samples} samples: {first} for training, {samples - first} for validation."
        )
    return first


def _array_batches(data: Any, y: Any, sample_weight: Any, batching: Batching) -> ArrayBatches | None:
    """The batches of data that is batched by index; None for the other kinds."""
    # What a TensorDataset gives by its own code is known; a subclass may give something else, and so may a loader's
    # collate function.
    if type(data) is TensorDataset and batching.loader_options is None:
        _refuse_parts(data, y, sample_weight, batching)
        names = [f"{batching.argument}.tensors[{index}]" for index in range(len(data.tensors))]
        return _arrays(data.tensors, names, batching, bare=False)
    if isinstance(data, DataLoader) or _is_dataset(data) or not _are_arrays(data, y):
        return None
    names = ["x", "y", "sample_weight"]
    if batching.argument != "data":
        names = [f"{batching.argument}[{index}]" for index in range(3)]
    return _arrays(_parts(data, y, sample_weight, batching), names, batching)


def _arrays(parts: tuple[Any, ...], names: Sequence[str], batching: Batching, *, bare: bool = True) -> ArrayBatches:
    if len(parts) > 1 and is_pandas(parts[0]) and is_pandas(parts[1]):
        check_same_rows(parts[0], parts[1])
    made = ArrayBatches(
        parts,
        batch_size=batching.size,
        shuffle=batching.shuffles,
        draws=batching.training,
        dtype=batching.dtype,
        device=batching.device,
        names=names,
        bare=bare,
    )
    return made.resized(made.samples) if batching.whole else made


def _parts(data: Any, y: Any, sample_weight: Any, batching: Batching) -> tuple[Any, ...]:
    """x, y and sample_weight as one tuple, however they came."""
    if isinstance(data, tuple):
        if y is not None or sample_weight is not None:
            also = "y" if y is not None else "sample_weight"
            raise ValueError(
                f"{batching.argument} is a tuple, which means (x, y) or (x, y, sample_weight), and {also}=... came as "
                "well. Pass it once; several inputs are a list: [a, b]."
            )
        if not 1 <= len(data) <= 3:
            raise ValueError(
                f"Expected {batching.argument} to be (x,), (x, y) or (x, y, sample_weight), received a tuple of "
                f"{len(data)}. Several inputs are a list, a dict, or a tuple inside: ((a, b), y)."
            )
        parts = data
    else:
        parts = (data, y, sample_weight)
    while len(parts) > 1 and parts[-1] is None:
        parts = parts[:-1]
    if len(parts) == 3 and parts[1] is None:
        raise ValueError(
            f"Expected targets beside the weights, received sample_weight={show(parts[2])} and y=None. Pass y as well."
        )
    return parts


def _are_arrays(data: Any, y: Any) -> bool:
    if is_array(data) or isinstance(data, (tuple, Mapping)):
        return True
    if not isinstance(data, list):
        return y is not None and not hasattr(type(data), "__next__")
    # A list of arrays is several inputs; a list of tuples, dicts or other objects is a list of ready batches.
    return y is not None or any(is_array(item) or isinstance(item, (bool, int, float, str)) for item in data[:1])


def _is_dataset(data: Any) -> bool:
    """Whether samples, not batches, come out: torch's Datasets, and map-style ones without its base class.

    Those of Hugging Face are such. What can be indexed gives samples, also when it can be iterated; a list, tuple or
    deque holds batches.
    """
    if is_array(data) or isinstance(data, (tuple, list, deque, Mapping, str, bytes)):
        return False
    return isinstance(data, Dataset) or (hasattr(type(data), "__getitem__") and hasattr(type(data), "__len__"))


def _refuse_parts(data: Any, y: Any, sample_weight: Any, batching: Batching) -> None:
    for name, value in (("y", y), ("sample_weight", sample_weight)):
        if value is not None:
            raise ValueError(
                f"{name}=... goes with arrays, received {batching.argument}={_kind(data)}, which brings its own. Let "
                "it give (x, y) or (x, y, sample_weight)."
            )


def _refuse_batching(data: Any, batching: Batching, *, size: bool) -> None:
    if size and batching.batch_size is not None:
        raise ValueError(
            f"{batching.batch_size_argument}={batching.batch_size} goes with arrays and Datasets, received "
            f"{batching.argument}={_kind(data)}, which comes in batches. Set the batch size where you make it."
        )
    if batching.shuffle is not None and (size or (isinstance(data, IterableDataset) and batching.shuffle)):
        raise ValueError(
            f"shuffle={batching.shuffle} goes with arrays and map-style Datasets, received {batching.argument}="
            f"{_kind(data)}, which has an order of its own. Leave shuffle out."
        )


def _refuse_loader_options(data: Any, batching: Batching) -> None:
    """Options of a DataLoader mean nothing for other data; validation data may be of another kind than data."""
    if batching.loader_options is not None and batching.argument == "data":
        raise ValueError(
            f"dataloader_options=... goes with a Dataset, received {batching.argument}={_kind(data)}. Leave it out, "
            "or set these options where you make the DataLoader."
        )


def _kind(data: Any) -> str:
    """What a message shows of data that may be long: its type, and its length when it tells one."""
    length = known_length(data)
    return type(data).__name__ if length is None else f"{type(data).__name__} of length {length}"
