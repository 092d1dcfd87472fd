"""The losses of all outputs: one for each by position or by key, and the factor that it has in the total.

What a single loss is, its value and its weight, is in losses.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from fitkit._types import OutputMeaning
from fitkit.errors import check_number, show
from fitkit.losses import Loss, show_structure


@final
class OutputLosses:
    """The losses of all outputs, by position or by key, with the weight that each has in the total.

    Args:
        loss: one loss, or a list, tuple or dict of losses (None where an output has none).
        loss_weights: numbers in the same structure as loss; None is 1.0 for each.
    """

    def __init__(self, loss: Any, loss_weights: Any = None) -> None:
        self.keys: list[Any] | None = None
        entries = [loss]
        if isinstance(loss, Mapping):
            self.keys, entries = list(loss), list(loss.values())
        elif isinstance(loss, (list, tuple)):
            self.keys, entries = list(range(len(loss))), list(loss)
        if not entries or (all(entry is None for entry in entries) and self.keys is not None):
            raise ValueError(f"Expected at least one loss, received loss={show(loss)}.")
        self.names = _output_names(self.keys)
        arguments = ["loss"] if self.keys is None else [f"loss[{key!r}]" for key in self.keys]
        self.losses = [
            None if entry is None else Loss(entry, argument) for entry, argument in zip(entries, arguments, strict=True)
        ]
        self.weights = _loss_weights(loss_weights, self.keys)
        self.active = [index for index, entry in enumerate(self.losses) if entry is not None]

    def to(self, device: torch.device, dtype: torch.dtype | None = None, outputs: torch.dtype | None = None) -> None:
        """Moves what tensors the losses hold to the device, and to the dtype where one is given; see `Loss.to`."""
        for index in self.active:
            self.losses[index].to(device, dtype, outputs)  # type: ignore[union-attr]

    @property
    def are_means_over_data(self) -> bool:
        """Whether the losses cannot depend on how the data is cut into batches."""
        return all(loss is None or loss.is_mean_over_data for loss in self.losses)

    @property
    def are_torchs(self) -> bool:
        """Whether the losses are torch's own, and nobody listens to their calls."""
        return all(loss is None or loss.is_torchs for loss in self.losses)

    @property
    def kinds(self) -> list[str | None]:
        """What each loss is, in words that tell losses of different numbers apart; None where an output has none."""
        return [None if loss is None else loss.kind for loss in self.losses]

    @property
    def meanings(self) -> list[OutputMeaning]:
        """What each loss says of its output, in the order of the outputs."""
        return [OutputMeaning() if loss is None else loss.meaning for loss in self.losses]

    def select(self, structure: Any, argument: str) -> list[Any]:
        """The entry of each output in a structure of outputs, targets or weights.

        Raises:
            ValueError: the structure has not the outputs that the losses are for.
        """
        if self.keys is None:
            return [structure]
        needed = [self.keys[index] for index in self.active]
        if isinstance(structure, Mapping):
            missing = [key for key in needed if key not in structure]
            if not missing:
                return [structure.get(key) for key in self.keys]
            raise ValueError(
                f"Expected {argument} to have the keys of loss, {self.keys}, received the keys {list(structure)}; "
                f"missing: {missing}."
            )
        if isinstance(structure, (tuple, list)) and len(structure) == len(self.keys):
            return list(structure)
        if isinstance(structure, Tensor) and len(needed) == 1 and argument != "the module's output":
            return [structure if index in self.active else None for index in range(len(self.keys))]
        raise ValueError(
            f"Expected {argument} to have {len(self.keys)} parts since loss has {len(self.keys)}, received "
            f"{show_structure(structure)}."
        )


def _output_names(keys: Sequence[Any] | None) -> list[str] | None:
    if keys is None:
        return None
    return [f"output_{key + 1}" if isinstance(key, int) else str(key) for key in keys]


def _loss_weights(loss_weights: Any, keys: Sequence[Any] | None) -> list[float]:
    if loss_weights is None:
        return [1.0] * (1 if keys is None else len(keys))
    if keys is None:
        raise ValueError(
            f"loss_weights={show(loss_weights)} needs a loss for each output. Give loss as a list or a dict."
        )
    if isinstance(loss_weights, Mapping):
        unknown = [key for key in loss_weights if key not in keys]
        if unknown:
            raise ValueError(f"Expected loss_weights with keys of loss, {list(keys)}, received the keys {unknown}.")
        values = [loss_weights.get(key, 1.0) for key in keys]
    elif isinstance(loss_weights, (list, tuple)) and len(loss_weights) == len(keys):
        values = list(loss_weights)
    else:
        raise ValueError(f"Expected one of loss_weights for each of {len(keys)} losses, received {show(loss_weights)}.")
    return [check_number(f"loss_weights[{key!r}]", value) for key, value in zip(keys, values, strict=True)]
