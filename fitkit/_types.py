"""The words that several floors share: types of data, and what a callback sees of a Model.

This is the lowest floor; it imports nothing of fitkit.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import nn

if TYPE_CHECKING:
    from fitkit.history import History

# A tensor, or nested tuples, lists and dicts of tensors.
Structure = Any
Precision = Literal["32-true", "bf16-mixed", "16-mixed", "64-true"]
# What the numbers in an output are, as far as the loss tells.
Scale = Literal["logits", "probabilities", "log_probabilities", "values", "unknown"]


@dataclass(frozen=True)
class OutputMeaning:
    """What the loss tells about one output; metrics go by it, never by the values.

    Attributes:
        scale: "logits" (cross entropy, ``*_with_logits``), "probabilities" (bce), "log_probabilities" (nll),
            "values" (mse and other regression losses), "unknown" (a callable of the user's).
        ignore_index: the target value that the loss leaves out; None when there is no such value.
        classes: whether integer targets of one dimension less than the output name a class along dimension 1.
    """

    scale: Scale = "unknown"
    ignore_index: int | None = None
    classes: bool = False


class ModelProtocol(Protocol):
    """What a callback sees of a Model."""

    history: History
    stop_training: bool

    @property
    def module(self) -> nn.Module: ...

    @property
    def optimizer(self) -> torch.optim.Optimizer | None: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def metrics_names(self) -> list[str]: ...

    def save(self, path: str | os.PathLike[str]) -> None: ...

    def save_weights(self, path: str | os.PathLike[str]) -> None: ...


class Step(Protocol):
    """What the batch loop calls with each batch."""

    @property
    def logs(self) -> Any: ...

    def __call__(self, batch: Any, index: int, /) -> None: ...

    def finish(self) -> None: ...
