"""Accelerate: the user's own loop, prepared. It keeps no means of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from exact_cases import WINDOW, Case, RecordingSGD
from workloads import LARGEST_NORM, LEARNING_RATE, Task

Run = Callable[[], Any]


def gradients(case: Case) -> list[float]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=WINDOW)
    module, criterion = case.module(), case.criterion()
    recording = RecordingSGD(module.parameters())
    module, optimizer, loader = accelerator.prepare(module, recording, case.loader())
    for x, y in loader:
        with accelerator.accumulate(module):
            accelerator.backward(criterion(module(x), y))
            optimizer.step()
            optimizer.zero_grad()
    return recording.seen


def prepared(task: Task) -> tuple[Accelerator, Any, Any, Any]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=task.accumulate)
    module = task.module()
    optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)
    return accelerator, *accelerator.prepare(module, optimizer, task.loader())


def fit(task: Task) -> Run:
    accelerator, module, optimizer, loader = prepared(task)

    def run() -> None:
        module.train()
        for _ in range(task.epochs):
            loss_sum, right, samples = torch.zeros(()), torch.zeros((), dtype=torch.int64), 0
            for x, y in loader:
                optimizer.zero_grad()
                output = module(x)
                loss = F.cross_entropy(output, y)
                accelerator.backward(loss)
                optimizer.step()
                loss_sum += loss.detach() * len(x)
                right += (output.detach().argmax(1) == y).sum()
                samples += len(x)

    return run


def fit_200_layers(task: Task) -> Run:
    accelerator, module, optimizer, loader = prepared(task)
    parameters = list(module.parameters())

    def run() -> None:
        module.train()
        loss_sum, norm_sums = torch.zeros(()), torch.zeros(len(parameters))
        for x, y in loader:
            with accelerator.accumulate(module):
                loss = F.cross_entropy(module(x), y)
                accelerator.backward(loss)
                loss_sum += loss.detach()
                if accelerator.sync_gradients:
                    norm_sums.add_(torch.stack(torch._foreach_norm([parameter.grad for parameter in parameters])))
                    accelerator.clip_grad_norm_(parameters, LARGEST_NORM)
                optimizer.step()
                optimizer.zero_grad()

    return run


def scoring(task: Task, *, predicts: bool) -> Run:
    accelerator = Accelerator(cpu=True)
    module, loader = accelerator.prepare(task.module(), task.loader(shuffle=False))

    @torch.no_grad()
    def run() -> Any:
        module.eval()
        outputs, loss_sum, right = [], torch.zeros(()), torch.zeros((), dtype=torch.int64)
        for x, y in loader:
            output = module(x)
            if predicts:
                outputs.append(accelerator.gather_for_metrics(output))
                continue
            output, y = accelerator.gather_for_metrics((output, y))
            loss_sum += F.cross_entropy(output, y) * len(y)
            right += (output.argmax(1) == y).sum()
        return torch.cat(outputs) if predicts else (loss_sum, right)

    return run


TIMED = {
    "fit-loader": fit,
    "fit-200-layers": fit_200_layers,
    "evaluate-loader": lambda task: scoring(task, predicts=False),
    "predict-loader": lambda task: scoring(task, predicts=True),
}
