"""fitkit, as its README shows it."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections.abc import Callable
from typing import Any, TextIO

from exact_cases import IGNORED, WINDOW, Case, RecordingSGD, far_off_batch, interrupted_loader
from torch import Tensor
from workloads import LARGEST_NORM, LEARNING_RATE, Task

import fitkit
from fitkit.callbacks import Callback, EarlyStopping, ProgressBar

Run = Callable[[], Any]
FIVE_METRICS = ["accuracy", "precision", "recall", "f1", "specificity"]


def mse_with_its_weight(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """A loss of the user's says what it averaged over."""
    kept = target != IGNORED
    return (output[kept] - target[kept]).square().mean(), kept.sum()


def compiled(case: Case) -> fitkit.Model:
    model = fitkit.Model(case.module())
    loss: Any = mse_with_its_weight if case.loss == "mse_of_valid" else case.criterion()
    model.compile(optimizer=lambda parameters: RecordingSGD(parameters), loss=loss)
    return model


def gradients(case: Case) -> list[float]:
    model = compiled(case)
    model.fit(case.loader(), epochs=1, accumulate_grad_batches=WINDOW, verbose=0)
    return model.optimizer.seen


def training_mean(case: Case) -> float:
    history = compiled(case).fit(case.loader(), epochs=1, verbose=0)
    return history["loss"][0]


def evaluated_mean(case: Case) -> float:
    return compiled(case).evaluate(case.loader(), verbose=0)


def mean_after_one_batch(case: Case) -> float:
    model = compiled(case)
    model.test_on_batch(*far_off_batch())
    return model.evaluate(case.loader(), verbose=0)


def mean_after_interrupt(case: Case) -> float:
    model = compiled(case)
    with contextlib.suppress(KeyboardInterrupt):
        model.fit(interrupted_loader(), epochs=1, verbose=0)
    return model.fit(case.loader(), epochs=1, verbose=0)["loss"][0]


class Recorder(Callback):
    """Keeps each epoch's numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self.rows.append(dict(logs or {}))


class Counter(Callback):
    """Counts batches."""

    seen = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.seen += 1


def model(task: Task, metrics: Any = ("accuracy",), optimizer: str = "sgd") -> fitkit.Model:
    made = fitkit.Model(task.module(), device="cpu")
    made.compile(optimizer, "cross_entropy", metrics, learning_rate=LEARNING_RATE)
    return made


def fit(task: Task, data: Any, metrics: Any = ("accuracy",), optimizer: str = "sgd", **options: Any) -> Run:
    made = model(task, metrics, optimizer)
    return lambda: made.fit(data, epochs=task.epochs, verbose=0, **options)


def fit_with_callbacks(task: Task) -> Run:
    made = model(task)

    def run() -> None:
        callbacks = [EarlyStopping("val_loss", patience=1000), Recorder(), Counter()]
        made.fit(
            task.x,
            task.y,
            epochs=task.epochs,
            validation_data=task.validation,
            callbacks=callbacks,
            batch_size=task.batch_size,
            verbose=0,
        )

    return run


def fit_200_layers(task: Task) -> Run:
    options = {"accumulate_grad_batches": task.accumulate, "gradient_clip_val": LARGEST_NORM, "track_grad_norm": 2}
    return fit(task, task.loader(), **options)


def evaluating(task: Task, data: Any, **options: Any) -> Run:
    made = model(task)
    return lambda: made.evaluate(data, verbose=0, **options)


def predicting(task: Task, data: Any, **options: Any) -> Run:
    made = model(task)
    return lambda: made.predict(data, verbose=0, **options)


@functools.cache
def terminal() -> TextIO:
    """A pseudo terminal, read by somebody until the process ends."""
    ours, theirs = os.openpty()

    def read_on() -> None:
        while os.read(ours, 4096):
            pass

    threading.Thread(target=read_on, daemon=True).start()
    return open(theirs, "w", encoding="utf-8")


def fit_in_terminal(task: Task) -> Run:
    made, bar = model(task), ProgressBar(stream=terminal())
    return lambda: made.fit((task.x, task.y), epochs=task.epochs, verbose=1, callbacks=[bar])


TIMED = {
    "fit-arrays": lambda task: fit(task, (task.x, task.y), batch_size=task.batch_size),
    "fit-loader": lambda task: fit(task, task.loader()),
    "fit-dataset": lambda task: fit(task, task.python_loader()),
    "fit-batches": lambda task: fit(task, task.batches),
    "fit-callbacks": fit_with_callbacks,
    "fit-200-layers": fit_200_layers,
    "adam": lambda task: fit(task, task.batches, optimizer="adam"),
    "evaluate-arrays": lambda task: evaluating(task, (task.x, task.y), batch_size=task.batch_size),
    "evaluate-free": lambda task: evaluating(task, (task.x, task.y)),
    "evaluate-loader": lambda task: evaluating(task, task.loader(shuffle=False)),
    "predict-arrays": lambda task: predicting(task, task.x, batch_size=task.batch_size),
    "predict-free": lambda task: predicting(task, task.x),
    "predict-loader": lambda task: predicting(task, task.loader(shuffle=False)),
    "callbacks-0": lambda task: fit(task, (task.x, task.y)),
    "callbacks-100": lambda task: fit(task, (task.x, task.y), callbacks=[Recorder() for _ in range(100)]),
    "metrics-5": lambda task: fit(task, task.batches, metrics=FIVE_METRICS),
    "progress-bar": fit_in_terminal,
    "progress-bar-off": lambda task: fit(task, (task.x, task.y)),
}
