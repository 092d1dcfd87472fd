"""transformers.Trainer with a module that returns its loss."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
import transformers
from exact_cases import WINDOW, Case, RecordingSGD
from torch import Tensor, nn


class WithLoss(nn.Module):
    """What the Trainer wants of a module: inputs and labels by name, the loss first."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.module, self.criterion = case.module(), case.criterion()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.module(x)
        return {"logits": logits} if labels is None else {"loss": self.criterion(logits, labels), "logits": logits}


def trainer(case: Case, folder: str, accumulate: int = 1, **options: Any) -> transformers.Trainer:
    module = WithLoss(case)
    recording = RecordingSGD(module.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(recording, lambda step: 1.0)
    samples = [{"x": x, "labels": y} for x, y in zip(case.x, case.y, strict=True)]
    arguments = transformers.TrainingArguments(
        output_dir=folder,
        num_train_epochs=1,
        per_device_train_batch_size=case.batch_size,
        per_device_eval_batch_size=case.batch_size,
        gradient_accumulation_steps=accumulate,
        train_sampling_strategy="sequential",
        max_grad_norm=0.0,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    return transformers.Trainer(
        module, arguments, train_dataset=samples, eval_dataset=samples, optimizers=(recording, schedule), **options
    )


def gradients(case: Case, **options: Any) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        training = trainer(case, folder, WINDOW, **options)
        recording = training.optimizer
        training.train()
    return recording.seen


def training_mean(case: Case) -> float:
    with tempfile.TemporaryDirectory() as folder:
        return trainer(case, folder).train().training_loss


def evaluated_mean(case: Case) -> float:
    with tempfile.TemporaryDirectory() as folder:
        return trainer(case, folder).evaluate()["eval_loss"]
