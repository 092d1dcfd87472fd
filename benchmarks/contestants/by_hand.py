"""The fastest loops that we know how to write by hand, with nothing checked and nothing general."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from workloads import CLASSES, LARGEST_NORM, LEARNING_RATE, Task

Run = Callable[[], Any]
# So many batches share a gather, and a sum of losses and metrics.
TOGETHER = 64
SLICE = 4096


def shuffled(task: Task) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Chunks of batches, gathered from one permutation."""
    order = torch.randperm(task.samples)
    for index in order.split(TOGETHER * task.batch_size):
        yield cut(task.x, task.y, index, task.batch_size)


def loaded(loader: DataLoader[Any]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Chunks of batches of any loader."""
    batches = iter(loader)
    while chunk := list(itertools.islice(batches, TOGETHER)):
        yield chunk


def sampled(loader: DataLoader[Any]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Chunks of batches as the loader's own batch sampler draws them, where the dataset is known."""
    if not isinstance(loader.dataset, TensorDataset):
        yield from loaded(loader)
        return
    x, y = loader.dataset.tensors
    batches = iter(loader.batch_sampler)
    while chunk := list(itertools.islice(batches, TOGETHER)):
        index = torch.tensor(list(itertools.chain.from_iterable(chunk)))
        yield cut(x, y, index, loader.batch_size)


def in_order(task: Task, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(task.x.split(batch_size), task.y.split(batch_size), strict=True)


def cut(x: Tensor, y: Tensor, index: Tensor, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    xs, ys = x.index_select(0, index).split(batch_size), y.index_select(0, index).split(batch_size)
    return list(zip(xs, ys, strict=True))


def train(
    module: nn.Module, optimizer: torch.optim.Optimizer, chunks: Iterable[list[tuple[Tensor, Tensor]]]
) -> tuple[Tensor, Tensor]:
    """One epoch; gradients are dropped by hand, numbers are summed a chunk at a time."""
    module.train()
    parameters = list(module.parameters())
    loss_sum, right, samples = torch.zeros(()), torch.zeros((), dtype=torch.int64), 0
    for chunk in chunks:
        losses, outputs = [], []
        for x, y in chunk:
            for parameter in parameters:
                parameter.grad = None
            output = module(x)
            loss = F.cross_entropy(output, y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
            outputs.append(output.detach())
        sizes = torch.tensor([len(y) for _, y in chunk])
        loss_sum += (torch.stack(losses) * sizes).sum()
        right += (torch.cat(outputs).argmax(1) == torch.cat([y for _, y in chunk])).sum()
        samples += sum(len(y) for _, y in chunk)
    return loss_sum / samples, right / samples


@torch.inference_mode()
def evaluate(module: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    module.eval()
    losses, sizes, right = [], [], []
    for x, y in batches:
        output = module(x)
        losses.append(F.cross_entropy(output, y))
        right.append((output.argmax(1) == y).sum())
        sizes.append(len(y))
    weights = torch.tensor(sizes)
    return (torch.stack(losses) * weights).sum() / weights.sum(), torch.stack(right).sum() / weights.sum()


@torch.inference_mode()
def predict(module: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    module.eval()
    return torch.cat([module(x) for x, _ in batches])


def fit(task: Task, chunks: Callable[[], Iterable[Any]], kind: type[torch.optim.Optimizer] = torch.optim.SGD) -> Run:
    module = task.module()
    optimizer = kind(module.parameters(), lr=LEARNING_RATE, fused=True)
    return lambda: [train(module, optimizer, chunks()) for _ in range(task.epochs)]


def fit_loader(task: Task, loader: DataLoader[Any]) -> Run:
    return fit(task, lambda: sampled(loader))


def ready(task: Task) -> list[Any]:
    return [task.batches[start : start + TOGETHER] for start in range(0, len(task.batches), TOGETHER)]


def fit_with_callbacks(task: Task) -> Run:
    module = task.module()
    optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE, fused=True)
    x, y = task.validation

    def run() -> None:
        history, best, waited = [], float("inf"), 0
        for _ in range(task.epochs):
            numbers = [*train(module, optimizer, shuffled(task))]
            numbers += evaluate(module, zip(x.split(task.batch_size), y.split(task.batch_size), strict=True))
            history.append(torch.stack(numbers).tolist())
            val_loss = history[-1][2]
            best, waited = (val_loss, 0) if val_loss < best else (best, waited + 1)

    return run


def fit_200_layers(task: Task) -> Run:
    """The window's share of each loss goes in as the seed of its backward pass."""
    module = task.module()
    parameters = list(module.parameters())
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE, fused=True)
    loader = task.loader()
    seed = torch.tensor(1.0 / task.accumulate)

    def run() -> None:
        losses, outputs, targets, all_norms = [], [], [], []
        for batch, (x, y) in enumerate(itertools.chain.from_iterable(sampled(loader)), start=1):
            output = module(x)
            loss = F.cross_entropy(output, y)
            loss.backward(seed)
            losses.append(loss.detach())
            outputs.append(output.detach())
            targets.append(y)
            if batch % task.accumulate == 0:
                norms = torch.stack(torch._foreach_norm([parameter.grad for parameter in parameters]))
                total = torch.linalg.vector_norm(norms)
                all_norms.append(torch.cat([total.reshape(1), norms]))
                torch.nn.utils.clip_grads_with_norm_(parameters, LARGEST_NORM, total)
                optimizer.step()
                for parameter in parameters:
                    parameter.grad = None
        torch.stack(losses).mean()
        (torch.cat(outputs).argmax(1) == torch.cat(targets)).sum()
        torch.stack(all_norms).mean(0)

    return run


def fit_with_metrics(task: Task) -> Run:
    """All five metrics come from one confusion matrix, counted 64 batches at a time."""
    module = task.module()
    parameters = list(module.parameters())
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE, fused=True)
    chunks = ready(task)

    def run() -> Tensor:
        loss_sum, confusion = torch.zeros(()), torch.zeros(CLASSES * CLASSES, dtype=torch.int64)
        for chunk in chunks:
            losses, outputs = [], []
            for x, y in chunk:
                for parameter in parameters:
                    parameter.grad = None
                output = module(x)
                loss = F.cross_entropy(output, y)
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
                outputs.append(output.detach())
            loss_sum += torch.stack(losses).sum()
            classes, targets = torch.cat(outputs).argmax(1), torch.cat([y for _, y in chunk])
            confusion += torch.bincount(targets * CLASSES + classes, minlength=CLASSES * CLASSES)
        return five_metrics(confusion.reshape(CLASSES, CLASSES).double())

    return run


def five_metrics(confusion: Tensor) -> Tensor:
    """Accuracy, and precision, recall, F1 and specificity as means over the classes."""
    right = confusion.diag()
    predicted, actual, samples = confusion.sum(0), confusion.sum(1), confusion.sum()
    precision, recall = right / predicted, right / actual
    specificity = (samples - predicted - actual + right) / (samples - actual)
    by_class = torch.stack([precision, recall, 2 * right / (predicted + actual), specificity])
    return torch.cat([(right.sum() / samples).reshape(1), by_class.mean(1)])


def evaluating(task: Task, batch_size: int) -> Run:
    module = task.module()
    return lambda: evaluate(module, in_order(task, batch_size))


def predicting(task: Task, batch_size: int) -> Run:
    module = task.module()
    return lambda: predict(module, in_order(task, batch_size))


TIMED = {
    "fit-arrays": lambda task: fit(task, lambda: shuffled(task)),
    "fit-loader": lambda task: fit_loader(task, task.loader()),
    "fit-dataset": lambda task: fit_loader(task, task.python_loader()),
    "fit-batches": lambda task: fit(task, lambda: ready(task)),
    "fit-callbacks": fit_with_callbacks,
    "fit-200-layers": fit_200_layers,
    "adam": lambda task: fit(task, lambda: ready(task), torch.optim.Adam),
    "evaluate-arrays": lambda task: evaluating(task, task.batch_size),
    "evaluate-free": lambda task: evaluating(task, SLICE),
    "evaluate-loader": lambda task: evaluating(task, task.batch_size),
    "predict-arrays": lambda task: predicting(task, task.batch_size),
    "predict-free": lambda task: predicting(task, SLICE),
    "predict-loader": lambda task: predicting(task, task.batch_size),
    "metrics-5": fit_with_metrics,
}
