"""The mean of values by their weights: what accuracy, mae, mse and rmse are, and what a callable's values become.

It keeps two sums and needs nothing of torchmetrics, whose import takes a second and 100 MB. MeanMetric there looks for
NaN at each update, which waits for the device; with ``nan_strategy="disable"`` it leaves the weights out as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from fitkit.device import sum_dtype


@final
class WeightedMean:
    """sum(weight x value) / sum(weight) over everything; NaN without any weight.

    Args:
        device: where the values are.
    """

    def __init__(self, device: torch.device) -> None:
        self._dtype = sum_dtype(device)
        self._total = torch.zeros((), dtype=self._dtype, device=device)
        self._weight = torch.zeros((), dtype=self._dtype, device=device)

    def update(self, value: Tensor, weight: Tensor | None = None) -> None:
        """Takes values in.

        Args:
            value: of any shape.
            weight: of the same shape; None when each weighs 1. Truth values count as 1 and 0, here and there.
        """
        values = value if value.dtype is torch.bool else value.to(self._dtype)
        if weight is None:
            self._total += values.sum()
            self._weight += values.numel()
        else:
            weights = weight if weight.dtype is torch.bool else weight.to(self._dtype)
            self._total += (values * weights).sum()
            self._weight += weights.sum()

    def compute(self) -> Tensor:
        """The mean so far, 0-d."""
        return self._total / self._weight

    @property
    def metric_state(self) -> dict[str, Tensor]:
        """What is kept, under the name that torchmetrics has for it."""
        return {"total": self._total, "weight": self._weight}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Goes on where the state was made."""
        self._total, self._weight = state["total"].clone(), state["weight"].clone()
