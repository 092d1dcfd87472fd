"""Poutyne's Model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import poutyne
import torch
from exact_cases import WINDOW, Case, RecordingSGD, far_off_batch, interrupted_loader
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassPrecision,
    MulticlassRecall,
    MulticlassSpecificity,
)
from workloads import CLASSES, LARGEST_NORM, LEARNING_RATE, Task

Run = Callable[[], Any]


def model(case: Case) -> poutyne.Model:
    module = case.module()
    return poutyne.Model(module, RecordingSGD(module.parameters()), case.criterion())


def gradients(case: Case) -> list[float]:
    training = model(case)
    training.fit_generator(case.loader(), epochs=1, batches_per_step=WINDOW, verbose=False)
    return training.optimizer.seen


def training_mean(case: Case) -> float:
    return model(case).fit_generator(case.loader(), epochs=1, verbose=False)[0]["loss"]


def evaluated_mean(case: Case) -> float:
    return model(case).evaluate_generator(case.loader(), verbose=False)


def mean_after_one_batch(case: Case) -> float:
    evaluating = model(case)
    evaluating.evaluate_on_batch(*far_off_batch())
    return evaluating.evaluate_generator(case.loader(), verbose=False)


def mean_after_interrupt(case: Case) -> float:
    training = model(case)
    with contextlib.suppress(KeyboardInterrupt):
        training.fit_generator(interrupted_loader(), epochs=1, verbose=False)
    return training.fit_generator(case.loader(), epochs=1, verbose=False)[0]["loss"]


class EachEpoch(poutyne.Callback):
    """Keeps each epoch's numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def on_epoch_end(self, epoch_number: int, logs: dict[str, float]) -> None:
        self.rows.append(dict(logs))


class EachBatch(poutyne.Callback):
    """Counts batches."""

    seen = 0

    def on_train_batch_end(self, batch_number: int, logs: dict[str, float]) -> None:
        self.seen += 1


def classifier(task: Task, **metrics: Any) -> poutyne.Model:
    module = task.module()
    optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)
    return poutyne.Model(module, optimizer, "cross_entropy", **(metrics or {"batch_metrics": ["accuracy"]}))


def five_metrics() -> list[Any]:
    """Poutyne takes torchmetrics as metrics of the epoch."""
    kinds = (MulticlassPrecision, MulticlassRecall, MulticlassF1Score, MulticlassSpecificity)
    by_class = [kind(CLASSES, validate_args=False) for kind in kinds]
    return [MulticlassAccuracy(CLASSES, average="micro", validate_args=False), *by_class]


def fit_arrays(task: Task, **options: Any) -> Run:
    made = classifier(task)
    settings = {"batch_size": task.batch_size, "epochs": task.epochs, "verbose": False, **options}
    return lambda: made.fit(task.x, task.y, **settings)


def fit_loader(task: Task, made: poutyne.Model, loader: Any) -> Run:
    return lambda: made.fit_generator(loader, epochs=task.epochs, verbose=False)


def fit_with_callbacks(task: Task) -> Run:
    callbacks = [poutyne.EarlyStopping(monitor="val_loss", patience=1000), EachEpoch(), EachBatch()]
    return fit_arrays(task, validation_data=task.validation, callbacks=callbacks)


def fit_200_layers(task: Task) -> Run:
    """Poutyne logs gradients to files only, so that the norms are left out."""
    made, loader = classifier(task), task.loader()
    callbacks = [poutyne.ClipNorm(made.network.parameters(), LARGEST_NORM)]
    return lambda: made.fit_generator(
        loader, epochs=task.epochs, batches_per_step=task.accumulate, callbacks=callbacks, verbose=False
    )


def evaluating_arrays(task: Task) -> Run:
    made = classifier(task)
    return lambda: made.evaluate(task.x, task.y, batch_size=task.batch_size, verbose=False)


def evaluating_loader(task: Task) -> Run:
    made, loader = classifier(task), task.loader(shuffle=False)
    return lambda: made.evaluate_generator(loader, verbose=False)


def predicting_arrays(task: Task) -> Run:
    made = classifier(task)
    return lambda: made.predict(task.x, batch_size=task.batch_size, verbose=False)


def predicting_loader(task: Task) -> Run:
    made, loader = classifier(task), task.loader(shuffle=False)
    return lambda: made.predict_generator(loader, has_ground_truth=True, verbose=False)


TIMED = {
    "fit-arrays": fit_arrays,
    "fit-loader": lambda task: fit_loader(task, classifier(task), task.loader()),
    "fit-callbacks": fit_with_callbacks,
    "fit-200-layers": fit_200_layers,
    "evaluate-arrays": evaluating_arrays,
    "evaluate-loader": evaluating_loader,
    "predict-arrays": predicting_arrays,
    "predict-loader": predicting_loader,
    "callbacks-100": lambda task: fit_arrays(task, callbacks=[EachEpoch() for _ in range(100)]),
    "metrics-5": lambda task: fit_loader(task, classifier(task, epoch_metrics=five_metrics()), task.ready_loader()),
}
