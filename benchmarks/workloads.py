"""The workloads of the speed table: what each contestant is given, and what one round of it is measured by.

The module is tiny (20-32-2), so that nothing but the cost of the loop around it is seen. What a contestant does with a
task stands in its own module, under the workload's name in its dict TIMED.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

FEATURES, WIDTH, CLASSES = 20, 32, 2
LEARNING_RATE = 0.01
LARGEST_NORM = 1.0


class PythonDataset(Dataset[tuple[Tensor, Tensor]]):
    """A dataset of the user's own, of which nothing is known but its samples."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


@dataclass
class Task:
    """What a contestant is given: data, and how to go through it.

    Attributes:
        samples: for training, evaluation or prediction.
        batch_size: samples in a batch.
        epochs: passes over the data in one round.
        layers: linear layers of the module.
        accumulate: batches that make one optimizer step.
        held_out: samples for validation.
    """

    samples: int
    batch_size: int = 32
    epochs: int = 1
    layers: int = 2
    accumulate: int = 1
    held_out: int = 0

    def module(self) -> nn.Module:
        """A fresh module with the same weights each time."""
        torch.manual_seed(0)
        inner = [layer for _ in range(self.layers - 2) for layer in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
        return nn.Sequential(nn.Linear(FEATURES, WIDTH), nn.ReLU(), *inner, nn.Linear(WIDTH, CLASSES))

    @functools.cached_property
    def _drawn(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.samples + self.held_out, FEATURES, generator=generator)
        return x, (x[:, 0] + x[:, 1] > 0).long()

    @functools.cached_property
    def x(self) -> Tensor:
        return self._drawn[0][: self.samples]

    @functools.cached_property
    def y(self) -> Tensor:
        return self._drawn[1][: self.samples]

    @functools.cached_property
    def validation(self) -> tuple[Tensor, Tensor]:
        x, y = self._drawn
        return x[self.samples :], y[self.samples :]

    @functools.cached_property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Ready batches."""
        return list(zip(self.x.split(self.batch_size), self.y.split(self.batch_size), strict=True))

    @property
    def batch_count(self) -> int:
        """Batches in an epoch."""
        return -(-self.samples // self.batch_size)

    def dataset(self) -> TensorDataset:
        return TensorDataset(self.x, self.y)

    def loader(self, *, shuffle: bool = True) -> DataLoader[Any]:
        return DataLoader(self.dataset(), self.batch_size, shuffle=shuffle)

    def ready_loader(self) -> DataLoader[Any]:
        """The ready batches, for those who take nothing but a DataLoader."""
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]

    def validation_loader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(*self.validation), self.batch_size)

    def python_loader(self) -> DataLoader[Any]:
        return DataLoader(PythonDataset(self.x, self.y), self.batch_size, shuffle=True)


@dataclass(frozen=True)
class Workload:
    """One row of the table.

    Attributes:
        name: how --only and the contestants' TIMED call it.
        title: how the table calls it.
        task: what the contestants are given.
        at_most: what fitkit should reach; None where nothing was set.
        measure: "time", "import", "peak memory", "memory growth" or "host reads".
        reference: contestant and entry of its TIMED that 1.00 is; None is the raw loop at this workload.
        does: the entry of TIMED that is run, where it is not called as the workload.
    """

    name: str
    title: str
    task: Task
    at_most: float | None = None
    measure: str = "time"
    reference: tuple[str, str] | None = None
    does: str | None = None

    @property
    def entry(self) -> str:
        return self.does or self.name


def workloads(*, short: bool) -> list[Workload]:
    """All rows; the short ones only show that everything runs."""

    def steps(number: int, brief: int = 20, batch_size: int = 32) -> int:
        return (brief if short else number) * batch_size

    training = Task(steps(500))
    scoring = Task(steps(400, 6, 256), batch_size=256)
    many_epochs = Task(steps(100, 10), epochs=2 if short else 5)
    large = Task(20_000 if short else 2_000_000, batch_size=1000)
    return [
        Workload("fit-arrays", "fit, arrays, accuracy", training, 0.55),
        Workload("fit-loader", "fit, DataLoader(TensorDataset)", training, 0.62),
        Workload("fit-dataset", "fit, DataLoader of a Python Dataset", training, 1.00),
        Workload("fit-batches", "fit, ready batches", training, 1.02),
        Workload(
            "fit-callbacks",
            "fit, arrays, metric, 3 callbacks, validation",
            Task(steps(250), epochs=2, held_out=steps(50, 5)),
            0.62,
        ),
        Workload(
            "fit-200-layers",
            "fit, 200 layers, K=4, clipping, norms",
            Task(steps(80, 8), layers=200, accumulate=4),
            1.00,
        ),
        Workload("adam", "fit, ready batches, Adam", training, 0.75),
        Workload("evaluate-arrays", "evaluate, arrays, batch 256", scoring, 0.06),
        Workload("evaluate-free", "evaluate, arrays, batch_size=None", scoring, 0.03),
        Workload("evaluate-loader", "evaluate, DataLoader", scoring),
        Workload("predict-arrays", "predict, arrays, batch 256", scoring, 0.035),
        Workload("predict-free", "predict, arrays, batch_size=None", scoring, 0.02),
        Workload("predict-loader", "predict, DataLoader", scoring),
        Workload("callbacks-100", "100 callbacks without batch hooks", many_epochs),
        Workload(
            "callbacks-100-of-none",
            "100 callbacks, against none",
            many_epochs,
            1.00,
            reference=("fitkit", "callbacks-0"),
            does="callbacks-100",
        ),
        Workload("metrics-5", "5 metrics, ready batches", training, 1.10),
        Workload(
            "progress-bar",
            "progress bar in a terminal, against off",
            Task(steps(5000, 50)),
            1.03,
            reference=("fitkit", "progress-bar-off"),
        ),
        Workload("import", "import, against torch", training, 1.05, measure="import"),
        Workload("memory-arrays", "peak memory, arrays", large, 0.90, measure="peak memory", does="fit-arrays"),
        Workload("memory-loader", "peak memory, DataLoader", large, 1.02, measure="peak memory", does="fit-loader"),
        Workload(
            "memory-growth",
            "bytes kept per step",
            Task(steps(100_000, 200)),
            0.0,
            measure="memory growth",
            does="fit-loader",
        ),
        Workload(
            "host-reads", "host reads per step", Task(steps(100, 10)), 0.0, measure="host reads", does="fit-loader"
        ),
    ]
