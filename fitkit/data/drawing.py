"""What data draw from torch's generator, where several processes read them whole: the same in each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, final

import torch


@final
class DrawingAlike:
    """Batches that every process reads whole draw the same numbers in all of them, whatever else these draw in between.

    As long as nothing else does, the global generator is left as in one process.

    Args:
        whole: makes its batches when it is asked for them; what it draws comes from where the generator is now.
    """

    def __init__(self, whole: Iterator[Any]) -> None:
        self._whole = whole
        self._generator = torch.Generator()
        self._generator.set_state(torch.get_rng_state())

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        own, other = self._generator.get_state(), torch.get_rng_state()
        if not self._is_apart() and not torch.equal(own, other):
            # What else is drawn must not be what is drawn here.
            torch.default_generator.manual_seed(int(torch.randint(2**62, (), device="cpu")))
            other = torch.get_rng_state()
        is_apart = self._is_apart()
        torch.set_rng_state(own)
        try:
            return next(self._whole)
        finally:
            self._generator.set_state(torch.get_rng_state())
            if is_apart:
                torch.set_rng_state(other)

    def _is_apart(self) -> bool:
        """Whether the global generator goes its own way: its state says so, and that is saved and resumed."""
        return torch.initial_seed() != self._generator.initial_seed()
