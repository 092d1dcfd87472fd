"""Each process's share of every batch: data that several processes read together.

A batch is the batch that the optimizer sees, on any number of processes. How a kind of data loads only its part is said
in its own file, by `Batches.shares`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, final

import torch

from fitkit.batch import Share
from fitkit.data.batches import Batches
from fitkit.data.inputs import Input
from fitkit.distributed import Processes, gather, of_first, part_ways, share_random_state

# Of a part: whether it has samples to be loaded, how many of it count, and those of the whole batch.
Size = tuple[bool, int, int]


@final
class SharedBatches(Batches):
    """The batches of any kind of data, of which each process is given its `Share`.

    Every pass begins with the random state of rank 0, so that all see the same batches; what is drawn afterwards in a
    training differs, as each process draws for samples of its own.

    Args:
        whole: the data.
        processes: that share it.
        device: whose random state a pass may draw from.
        training: whether the processes draw numbers of their own after the order.
    """

    def __init__(self, whole: Batches, processes: Processes, device: torch.device, *, training: bool) -> None:
        self._whole = whole
        self._processes = processes
        self._device = device
        self._training = training
        self.length, self.again = whole.length, whole.again
        self.owned, self.parts = whole.owned, whole.parts
        self._is_checked = False

    def __iter__(self) -> Iterator[Any]:
        self._check_alike()
        share_random_state(self._device)
        self._share_generators()
        shares = self._whole.shares(self._processes, 0)
        if self._training:
            part_ways()
        return shares

    def after(self, done: int) -> Iterator[Any]:
        self._share_generators()
        return self._whole.shares(self._processes, done)

    def _check_alike(self) -> None:
        """Refuses data that are not as long in all processes: those with more would wait for the others."""
        if self._is_checked:
            return
        self._is_checked = True
        own, *others = gather(self._whole.facts())
        for rank, other in enumerate(others, start=1):
            if other != own:
                error = ValueError(
                    f"Expected the same data in every process, received {_listed(own)} in process 0 and "
                    f"{_listed(other)} in process {rank}. Give each all of it: of every batch it takes its part."
                )
                error.is_of_all = True  # type: ignore[attr-defined]  # no other process waits for this one
                raise error

    def _share_generators(self) -> None:
        """Gives the data's own generators the state that they have in rank 0."""
        if own := self.generators:
            for generator, state in zip(own, of_first([each.get_state() for each in own]), strict=True):
                generator.set_state(state)

    def facts(self) -> dict[str, Any]:
        return self._whole.facts()

    def nonfinite(self) -> str | None:
        return self._whole.nonfinite()

    def some_targets(self) -> Any:
        return self._whole.some_targets()

    @property
    def inputs(self) -> Sequence[Input]:
        return self._whole.inputs

    @property
    def generators(self) -> list[torch.Generator]:
        return self._whole.generators

    @property
    def source(self) -> Any:
        return self._whole.source


def _listed(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in facts.items()) or "data that does not tell its length"


def counted(
    indices: Iterator[list[int]], processes: Processes, read: Callable[[Iterator[list[int]]], Iterator[Any]]
) -> Iterator[Share]:
    """Shares of batches that are given by their indices.

    Args:
        indices: of the samples of each whole batch.
        processes: that share them.
        read: gives the batches of parts that are not empty.
    """
    sizes: list[Size] = []
    return beside(read(own_parts(indices, processes, sizes)), sizes)


def own_parts(indices: Iterator[list[int]], processes: Processes, sizes: list[Size]) -> Iterator[list[int]]:
    """Of the indices of each whole batch those of this process's part, where it is not empty; notes its sizes."""
    for whole in indices:
        first, last = processes.part(len(whole))
        sizes.append((last > first, processes.count(len(whole)), len(whole)))
        if last > first:
            yield whole[first:last]


def beside(loaded: Iterator[Any], sizes: list[Size]) -> Iterator[Share]:
    """Each part beside its sizes, those that are empty included.

    Args:
        loaded: the parts that are not empty.
        sizes: of each part; one is taken out as it is used.
    """
    for part in loaded:
        while True:
            is_loaded, samples, of = sizes.pop(0)
            yield Share(part if is_loaded else None, samples, of)
            if is_loaded:
                break
    for _, samples, of in sizes:  # those after the last part that is not empty
        yield Share(None, samples, of)
