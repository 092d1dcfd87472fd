"""The mean of values by their weights, as torchmetrics' MeanMetric gives it, but without asking the device for NaN.

MeanMetric looks for NaN at each update, which waits for the device; with ``nan_strategy="disable"`` it leaves the
weights out as well. Imported when the first such metric is built, since torchmetrics takes seconds.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor
from torchmetrics import Metric


@final
class WeightedMean(Metric):
    """sum(weight x value) / sum(weight) over everything; NaN without any weight."""

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("weight", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, value: Tensor, weight: Tensor | float = 1.0) -> None:
        """Takes values in.

        Args:
            value: of any shape.
            weight: in a shape that broadcasts to it.
        """
        values = torch.as_tensor(value, device=self.device).to(self.dtype)
        weights = torch.as_tensor(weight, device=self.device).to(self.dtype).broadcast_to(values.shape)
        self.total += (values * weights).sum()
        self.weight += weights.sum()

    def compute(self) -> Tensor:
        """The mean so far, 0-d."""
        return self.total / self.weight
