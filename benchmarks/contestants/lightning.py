"""Lightning: a LightningModule that logs its loss by self.log, and the Trainer."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from exact_cases import WINDOW, Case, RecordingSGD, interrupted_loader
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import grad_norm
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
    MulticlassSpecificity,
)
from workloads import CLASSES, LARGEST_NORM, LEARNING_RATE, Task

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
# Advice about workers and intervals of logging.
warnings.filterwarnings("ignore", module="lightning")
Run = Callable[[], Any]


class Module(L.LightningModule):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.module = case.module()
        self.criterion = case.criterion()
        self.made = RecordingSGD(self.parameters())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        loss = self.criterion(self.module(x), y)
        self.log("train_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", self.criterion(self.module(x), y))

    def configure_optimizers(self) -> Any:
        return self.made


def trainer(**options: Any) -> L.Trainer:
    """A Trainer with everything off that can be."""
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return L.Trainer(**{"accelerator": "cpu", "max_epochs": 1, **off, **options})


def gradients(case: Case) -> list[float]:
    module = Module(case)
    trainer(accumulate_grad_batches=WINDOW).fit(module, case.loader())
    return module.made.seen


def training_mean(case: Case) -> float:
    training = trainer()
    training.fit(Module(case), case.loader())
    return training.callback_metrics["train_loss"].item()


def evaluated_mean(case: Case) -> float:
    return trainer().validate(Module(case), case.loader(), verbose=False)[0]["val_loss"]


def mean_after_interrupt(case: Case) -> float:
    module = Module(case)
    # Lightning leaves the process after Ctrl-C.
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        trainer().fit(module, interrupted_loader())
    training = trainer()
    training.fit(module, case.loader())
    return training.callback_metrics["train_loss"].item()


class Classifier(L.LightningModule):
    """Loss and metrics by self.log, once an epoch."""

    def __init__(self, task: Task, metrics: dict[str, Any] | None = None, *, tracks_norms: bool = False) -> None:
        super().__init__()
        self.module = task.module()
        self.metrics = torch.nn.ModuleDict(metrics or {"accuracy": accuracy()})
        self.validation_accuracy = accuracy()
        self.tracks_norms = tracks_norms

    def forward(self, x: Any) -> Any:
        return self.module(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        output = self(x)
        loss = F.cross_entropy(output, y)
        self.log("loss", loss, on_step=False, on_epoch=True)
        for name, metric in self.metrics.items():
            metric.update(output, y)
            self.log(name, metric, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        output = self(x)
        self.log("val_loss", F.cross_entropy(output, y))
        self.validation_accuracy.update(output, y)
        self.log("val_accuracy", self.validation_accuracy)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0])

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.tracks_norms:
            self.log_dict(grad_norm(self, norm_type=2), on_step=False, on_epoch=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=LEARNING_RATE)


class EachEpoch(L.Callback):
    """Keeps each epoch's numbers."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.rows.append(dict(trainer.callback_metrics))


class EachBatch(L.Callback):
    """Counts batches."""

    seen = 0

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.seen += 1


def accuracy() -> MulticlassAccuracy:
    return MulticlassAccuracy(CLASSES, average="micro", validate_args=False)


def five_metrics() -> dict[str, Any]:
    kinds = (MulticlassPrecision, MulticlassRecall, MulticlassF1Score, MulticlassSpecificity)
    return {"accuracy": accuracy(), **{kind.__name__: kind(CLASSES, validate_args=False) for kind in kinds}}


def fit(task: Task, module: Classifier | None = None, loader: Any = None, **options: Any) -> Run:
    module, loader = module or Classifier(task), loader or task.loader()
    training = trainer(max_epochs=task.epochs, **options)
    return lambda: training.fit(module, loader)


def fit_with_callbacks(task: Task) -> Run:
    module, loaders = Classifier(task), (task.loader(), task.validation_loader())
    callbacks = [EarlyStopping("val_loss", patience=1000), EachEpoch(), EachBatch()]
    training = trainer(max_epochs=task.epochs, callbacks=callbacks, num_sanity_val_steps=0)
    return lambda: training.fit(module, *loaders)


def fit_by_defaults(task: Task) -> Run:
    """With the logger, checkpoints, progress bar and summary that a Trainer has by itself."""
    folder = tempfile.TemporaryDirectory()
    module, loader = Classifier(task), task.loader()
    training = L.Trainer(accelerator="cpu", max_epochs=task.epochs, default_root_dir=folder.name)

    def run() -> None:
        with folder:
            training.fit(module, loader)

    return run


def evaluating(task: Task) -> Run:
    module, loader, testing = Classifier(task), task.loader(shuffle=False), trainer()
    return lambda: testing.validate(module, loader, verbose=False)


def predicting(task: Task) -> Run:
    module, loader, predictor = Classifier(task), task.loader(shuffle=False), trainer()
    return lambda: torch.cat(predictor.predict(module, loader))


TIMED = {
    "fit-loader": fit,
    "fit-callbacks": fit_with_callbacks,
    "fit-200-layers": lambda task: fit(
        task,
        Classifier(task, tracks_norms=True),
        accumulate_grad_batches=task.accumulate,
        gradient_clip_val=LARGEST_NORM,
    ),
    "evaluate-loader": evaluating,
    "predict-loader": predicting,
    "callbacks-100": lambda task: fit(task, callbacks=[EachEpoch() for _ in range(100)]),
    "metrics-5": lambda task: fit(task, Classifier(task, five_metrics()), task.ready_loader()),
}
