"""Whatever yields ready batches: lists of batches, objects with ``__iter__``, and generators."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, final

import torch

from fitkit.batch import unpack
from fitkit.data.batches import Batches, keeps_its_place, known_length
from fitkit.data.rows import with_tensors


@final
class IterableBatches(Batches):
    """Anything that iterates batches and can be iterated again.

    Args:
        iterable: gives a new iterator at each pass; its ``len``, when it has one, is the number of batches.
        dtype: what floating NumPy arrays and pandas objects in a batch become. Tensors are left as they are.
    """

    def __init__(self, iterable: Iterable[Any], dtype: torch.dtype) -> None:
        self._iterable = iterable
        self._dtype = dtype
        self.length = known_length(iterable)
        self._first = iterable[0] if isinstance(iterable, (list, tuple)) and iterable else None
        self.parts = len(self._first) if type(self._first) is tuple and len(self._first) <= 3 else None

    def __iter__(self) -> Iterator[Any]:
        return (with_tensors(batch, self._dtype) for batch in self._iterable)

    def some_targets(self) -> Any:
        return None if self.parts is None else unpack(with_tensors(self._first, self._dtype))[1]

    @property
    def source(self) -> Any:
        return self._iterable if keeps_its_place(self._iterable) else None


@final
class GeneratorBatches(Batches):
    """A generator or other iterator, which gives its batches once.

    Args:
        iterator: what ``next`` is called on; batches that are not consumed stay in it.
        dtype: as in `IterableBatches`.
    """

    again = False

    def __init__(self, iterator: Iterator[Any], dtype: torch.dtype) -> None:
        self._iterator = iterator
        self._dtype = dtype

    def __iter__(self) -> Iterator[Any]:
        # Giving this one up closes it alone: the user's generator stays open, with the batches that are left.
        return (with_tensors(batch, self._dtype) for batch in self._iterator)

    @property
    def source(self) -> Any:
        return self._iterator if keeps_its_place(self._iterator) else None
