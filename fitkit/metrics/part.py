"""A part of the running metrics: what is updated together, and what a checkpoint and other processes get of it.

The parts are in gathering.py (metrics by name) and objects.py (metrics that users bring).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fitkit._types import Structure


class Part(ABC):
    """Running values of one output under one or more log keys.

    Args:
        keys: the log keys, in order.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self.keys = tuple(keys)

    @abstractmethod
    def update(self, output: Structure, target: Structure, weight: Tensor | None) -> None:
        """Takes in one batch; one without samples changes nothing."""

    @abstractmethod
    def compute(self) -> dict[str, Tensor]:
        """The values over all since reset, 0-d, by key; empty before the first update."""

    @abstractmethod
    def reset(self) -> None:
        """Forgets everything."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """All that is kept: nested dicts and lists of tensors, numbers and strings."""

    @abstractmethod
    def add_state(self, state: dict[str, Any]) -> None:
        """Goes on as if what the state was made from had been taken in here too."""

    @abstractmethod
    def compute_across(self, states: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """The values over the data of all processes. Called on each of them at once, with the states of all."""


def map_tensors(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    """The state with the function applied to each tensor in its dicts and lists."""
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, dict):
        return {name: map_tensors(function, value) for name, value in state.items()}
    return [map_tensors(function, value) for value in state] if isinstance(state, list) else state
