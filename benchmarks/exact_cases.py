"""The cases of the exactness table: small data whose right numbers can be worked out on paper.

Every module is linear without bias. For squared errors its one weight is 0, so the output is 0 and a sample's error is
its target squared; for cross entropy its weights are the identity, so that the inputs are the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

# Targets that do not count; torch's own default for cross entropy.
IGNORED = -100
CLASS_WEIGHTS = (1.0, 4.0)
# Batches that make one optimizer step in the cases of accumulation.
WINDOW = 2


@dataclass(frozen=True)
class Case:
    """What a contestant is given, and what it should say.

    Attributes:
        title: the column's heading.
        asks: the name of the contestant's function that answers.
        x: inputs in the order of the batches; nothing is shuffled.
        y: targets.
        batch_size: samples in a batch.
        loss: "mse", "mse_of_valid" (targets of -100 do not count), "weighted" or "ignoring" cross entropy.
        correct: the numbers that the large batch, or the whole data at once, gives.
    """

    title: str
    asks: str
    x: Tensor
    y: Tensor
    batch_size: int
    loss: str
    correct: tuple[float, ...]

    def module(self) -> nn.Module:
        """A fresh module."""
        module = nn.Linear(self.x.shape[1], self.x.shape[1], bias=False)
        with torch.no_grad():
            module.weight.copy_(torch.eye(2) if self.is_classification else torch.zeros(1, 1))
        return module

    def criterion(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The loss as plain torch has it."""
        if self.loss == "mse":
            return nn.MSELoss()
        if self.loss == "mse_of_valid":
            return mse_of_valid
        return nn.CrossEntropyLoss(torch.tensor(CLASS_WEIGHTS) if self.loss == "weighted" else None)

    @property
    def is_classification(self) -> bool:
        return not self.loss.startswith("mse")

    def dataset(self) -> TensorDataset:
        return TensorDataset(self.x, self.y)

    def loader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset(), self.batch_size)


def mse_of_valid(output: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of the targets that count."""
    kept = target != IGNORED
    return (output[kept] - target[kept]).square().mean()


class RecordingSGD(torch.optim.SGD):
    """Keeps the gradient of the first weight at each step, and changes nothing."""

    def __init__(self, parameters: Any, lr: float = 0.0) -> None:
        super().__init__(parameters, lr=lr)
        self.seen: list[float] = []

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.seen.append(self.param_groups[0]["params"][0].grad.flatten()[0].item())
        return loss


class Interrupted(IterableDataset[Any]):
    """One ready batch of 32 samples whose squared error is 10,000 each; then the user presses Ctrl-C."""

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield torch.ones(32, 1), torch.full((32, 1), 100.0)
        raise KeyboardInterrupt


def interrupted_loader() -> DataLoader[Any]:
    return DataLoader(Interrupted(), batch_size=None)


def far_off_batch() -> tuple[Tensor, Tensor]:
    """A batch of 1,000 samples whose squared error is 10,000 each."""
    return torch.ones(1000, 1), torch.full((1000, 1), 100.0)


def _regression(title: str, asks: str, y: list[float], correct: list[float], *, valid: bool = False) -> Case:
    """With inputs of 1 the gradient of a batch is -2 times the mean of its targets."""
    target = torch.tensor(y).unsqueeze(1)
    batch_size = 4 if asks == "gradients" else 32
    loss = "mse_of_valid" if valid else "mse"
    return Case(title, asks, torch.ones_like(target), target, batch_size, loss, tuple(correct))


def _classification(title: str, losses: list[float], y: list[int], loss: str, correct: float) -> Case:
    """Samples of two classes, with the cross entropy that each is to have."""
    margins = torch.tensor([-math.log(math.expm1(value)) for value in losses])
    target = torch.tensor(y)
    x = torch.stack([torch.where(target == 1, 0.0, margins), torch.where(target == 1, margins, 0.0)], dim=1)
    return Case(title, "evaluated_mean", x, target, 4, loss, (correct,))


ACCUMULATION = [
    _regression("A: 4 + 2 samples", "gradients", [1.0] * 4 + [4.0] * 2, [-4.0]),
    _regression("B: 3 batches, K=2", "gradients", [1.0] * 12, [-2.0, -2.0]),
    _regression("C: 4 + 1 valid", "gradients", [1.0] * 4 + [4.0] + [IGNORED] * 3, [-3.2], valid=True),
]
# 32 samples with a squared error of 1 and one of 100, in batches of 32 and 1.
_THIRTY_THREE = [1.0] * 32 + [10.0]
MEANS = [
    _regression("33 samples, training", "training_mean", _THIRTY_THREE, [4.0]),
    _regression("33 samples, evaluate", "evaluated_mean", _THIRTY_THREE, [4.0]),
    _classification("class weights", [0.951] * 4 + [0.804] * 2, [0] * 4 + [1] * 2, "weighted", 0.853),
    _classification("ignore_index", [0.9397] * 4 + [1.2562] * 4, [0] * 5 + [IGNORED] * 3, "ignoring", 1.003),
    _regression("after a test_on_batch", "mean_after_one_batch", _THIRTY_THREE, [4.0]),
    _regression("after Ctrl-C", "mean_after_interrupt", _THIRTY_THREE, [4.0]),
]
