"""The reference: a careful hand-written loop, as one writes it without looking for what is fastest.

A DataLoader, zero_grad, forward, loss, backward, step; loss and accuracy are summed on the device, and nothing reads
a number before the epoch is over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from workloads import CLASSES, LARGEST_NORM, LEARNING_RATE, Task

Run = Callable[[], Any]
Batches = Iterable[tuple[Tensor, Tensor]]


def train(module: nn.Module, optimizer: torch.optim.Optimizer, batches: Batches) -> tuple[Tensor, Tensor]:
    """One epoch; returns mean loss and accuracy."""
    module.train()
    loss_sum, right, samples = torch.zeros(()), torch.zeros((), dtype=torch.int64), 0
    for x, y in batches:
        optimizer.zero_grad()
        output = module(x)
        loss = F.cross_entropy(output, y)
        loss.backward()
        optimizer.step()
        loss_sum += loss.detach() * len(x)
        right += (output.detach().argmax(1) == y).sum()
        samples += len(x)
    return loss_sum / samples, right / samples


@torch.no_grad()
def evaluate(module: nn.Module, batches: Batches) -> tuple[Tensor, Tensor]:
    """Mean loss and accuracy."""
    module.eval()
    loss_sum, right, samples = torch.zeros(()), torch.zeros((), dtype=torch.int64), 0
    for x, y in batches:
        output = module(x)
        loss_sum += F.cross_entropy(output, y) * len(x)
        right += (output.argmax(1) == y).sum()
        samples += len(x)
    return loss_sum / samples, right / samples


@torch.no_grad()
def predict(module: nn.Module, batches: Batches) -> Tensor:
    """The outputs for all samples."""
    module.eval()
    return torch.cat([module(x) for x, _ in batches])


def fit(task: Task, batches: Batches, kind: type[torch.optim.Optimizer] = torch.optim.SGD) -> Run:
    module = task.module()
    optimizer = kind(module.parameters(), lr=LEARNING_RATE)
    return lambda: [train(module, optimizer, batches) for _ in range(task.epochs)]


def fit_with_callbacks(task: Task) -> Run:
    """What three callbacks do, in the loop itself: count batches, keep the numbers, look for the best epoch."""
    module = task.module()
    optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)
    training, validation = task.loader(), task.validation_loader()

    def counted(batches: Batches) -> Batches:
        for batch in batches:
            seen[0] += 1
            yield batch

    seen = [0]

    def run() -> None:
        history, best, waited = [], float("inf"), 0
        for _ in range(task.epochs):
            numbers = [*train(module, optimizer, counted(training)), *evaluate(module, validation)]
            history.append(torch.stack(numbers).tolist())
            val_loss = history[-1][2]
            best, waited = (val_loss, 0) if val_loss < best else (best, waited + 1)

    return run


def fit_200_layers(task: Task) -> Run:
    """Accumulation, norms of all gradients (means over the steps) and clipping."""
    module = task.module()
    parameters = list(module.parameters())
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE)
    loader = task.loader()

    def run() -> None:
        loss_sum, right = torch.zeros(()), torch.zeros((), dtype=torch.int64)
        norm_sums = torch.zeros(len(parameters) + 1)
        for batch, (x, y) in enumerate(loader, start=1):
            output = module(x)
            loss = F.cross_entropy(output, y)
            (loss / task.accumulate).backward()
            loss_sum += loss.detach() * len(x)
            right += (output.detach().argmax(1) == y).sum()
            if batch % task.accumulate == 0:
                norms = torch.stack(torch._foreach_norm([parameter.grad for parameter in parameters]))
                total = torch.linalg.vector_norm(norms)
                norm_sums += torch.cat([total.reshape(1), norms])
                torch.nn.utils.clip_grads_with_norm_(parameters, LARGEST_NORM, total)
                optimizer.step()
                optimizer.zero_grad()

    return run


def fit_with_metrics(task: Task) -> Run:
    """Five of torchmetrics' metrics, updated at each batch."""
    from torchmetrics.classification import (
        MulticlassAccuracy,
        MulticlassF1Score,
        MulticlassPrecision,
        MulticlassRecall,
        MulticlassSpecificity,
    )

    module = task.module()
    optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)
    kinds = (MulticlassPrecision, MulticlassRecall, MulticlassF1Score, MulticlassSpecificity)
    # Without the checks of each batch's values, which would read the device.
    metrics = [kind(CLASSES, validate_args=False) for kind in kinds]
    metrics.append(MulticlassAccuracy(CLASSES, average="micro", validate_args=False))

    def run() -> None:
        loss_sum = torch.zeros(())
        for x, y in task.batches:
            optimizer.zero_grad()
            output = module(x)
            loss = F.cross_entropy(output, y)
            loss.backward()
            optimizer.step()
            loss_sum += loss.detach() * len(x)
            for metric in metrics:
                metric.update(output.detach(), y)
        for metric in metrics:
            metric.compute()
            metric.reset()

    return run


def evaluating(task: Task) -> Run:
    module, loader = task.module(), task.loader(shuffle=False)
    return lambda: evaluate(module, loader)


def predicting(task: Task) -> Run:
    module, loader = task.module(), task.loader(shuffle=False)
    return lambda: predict(module, loader)


TIMED = {
    "fit-arrays": lambda task: fit(task, task.loader()),
    "fit-loader": lambda task: fit(task, task.loader()),
    "fit-dataset": lambda task: fit(task, task.python_loader()),
    "fit-batches": lambda task: fit(task, task.batches),
    "fit-callbacks": fit_with_callbacks,
    "fit-200-layers": fit_200_layers,
    "adam": lambda task: fit(task, task.batches, torch.optim.Adam),
    "evaluate-arrays": evaluating,
    "evaluate-free": evaluating,
    "evaluate-loader": evaluating,
    "predict-arrays": predicting,
    "predict-free": predicting,
    "predict-loader": predicting,
    "callbacks-100": lambda task: fit(task, task.loader()),
    "metrics-5": fit_with_metrics,
}
