"""Whatever yields ready batches: lists of batches, objects with ``__iter__``, and generators."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, final

from fitkit.data.batches import Batches


@final
class IterableBatches(Batches):
    """Anything that iterates batches and can be iterated again.

    Args:
        iterable: gives a new iterator at each pass; its ``len``, when it has one, is the number of batches.
    """

    def __init__(self, iterable: Iterable[Any]) -> None:
        self._iterable = iterable
        try:
            self.length = len(iterable)  # type: ignore[arg-type]
        except TypeError:
            self.length = None

    def __iter__(self) -> Iterator[Any]:
        return iter(self._iterable)


@final
class GeneratorBatches(Batches):
    """A generator or other iterator, which gives its batches once.

    Args:
        iterator: what ``next`` is called on; batches that are not consumed stay in it.
    """

    again = False

    def __init__(self, iterator: Iterator[Any]) -> None:
        self._iterator = iterator

    def __iter__(self) -> Iterator[Any]:
        return _unclosed(self._iterator)


def _unclosed(iterator: Iterator[Any]) -> Iterator[Any]:
    """The rest of an iterator; giving this one up does not close the user's generator, as ``yield from`` would."""
    for batch in iterator:  # noqa: UP028
        yield batch
