"""Keras on its torch backend; a torch module goes into a Sequential by way of TorchModuleWrapper."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Any

# Read when keras is imported.
os.environ["KERAS_BACKEND"] = "torch"

import keras
from exact_cases import CLASS_WEIGHTS, IGNORED, WINDOW, Case, far_off_batch, interrupted_loader, mse_of_valid
from torch import nn, tensor
from workloads import CLASSES, FEATURES, LARGEST_NORM, LEARNING_RATE, Task

Run = Callable[[], Any]


class Recording(keras.optimizers.SGD):
    """Keeps the gradient that each step is given."""

    def __init__(self, accumulate: int | None = None) -> None:
        super().__init__(0.0, gradient_accumulation_steps=accumulate)
        self.seen: list[float] = []

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        self.seen.append(gradient.item())
        super().update_step(gradient, variable, learning_rate)


def loss(case: Case) -> Any:
    if case.loss == "mse":
        return keras.losses.MeanSquaredError()
    if case.loss == "mse_of_valid":
        return lambda target, output: mse_of_valid(output, target)
    if case.loss == "ignoring":
        return keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=IGNORED)
    # Keras has no weight per class in a loss, and a torch loss may be used.
    weighted = nn.CrossEntropyLoss(tensor(CLASS_WEIGHTS))
    return lambda target, output: weighted(output, target.long().flatten())


def compiled(case: Case, accumulate: int | None = None) -> keras.Model:
    layer = keras.layers.TorchModuleWrapper(case.module(), output_shape=(None, case.x.shape[1]))
    model = keras.Sequential([keras.Input((case.x.shape[1],)), layer])
    model.compile(optimizer=Recording(accumulate), loss=loss(case))
    return model


def gradients(case: Case) -> list[float]:
    model = compiled(case, WINDOW)
    model.fit(case.loader(), epochs=1, shuffle=False, verbose=0)
    return list(model.optimizer.seen)


def training_mean(case: Case) -> float:
    return compiled(case).fit(case.loader(), epochs=1, shuffle=False, verbose=0).history["loss"][0]


def evaluated_mean(case: Case) -> float:
    return compiled(case).evaluate(case.loader(), verbose=0)


def mean_after_one_batch(case: Case) -> float:
    model = compiled(case)
    model.test_on_batch(*far_off_batch())
    return model.evaluate(case.loader(), verbose=0)


def mean_after_interrupt(case: Case) -> float:
    model = compiled(case)
    with contextlib.suppress(KeyboardInterrupt):
        model.fit(interrupted_loader(), epochs=1, shuffle=False, verbose=0)
    return model.fit(case.loader(), epochs=1, shuffle=False, verbose=0).history["loss"][0]


class EachEpoch(keras.callbacks.Callback):
    """Keeps each epoch's numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.rows.append(dict(logs or {}))


class EachBatch(keras.callbacks.Callback):
    """Counts batches."""

    seen = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.seen += 1


def model(task: Task, metrics: Any = ("accuracy",), **optimizer_options: Any) -> keras.Model:
    layer = keras.layers.TorchModuleWrapper(task.module(), output_shape=(None, CLASSES))
    made = keras.Sequential([keras.Input((FEATURES,)), layer])
    made.compile(
        optimizer=keras.optimizers.SGD(LEARNING_RATE, **optimizer_options),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=list(metrics),
    )
    return made


def fit_arrays(task: Task, **options: Any) -> Run:
    made = model(task)
    x, y, size = task.x.numpy(), task.y.numpy(), task.batch_size
    return lambda: made.fit(x, y, batch_size=size, epochs=task.epochs, verbose=0, **options)


def fit_loader(task: Task, **optimizer_options: Any) -> Run:
    return fit(task, model(task, **optimizer_options), task.loader())


def fit(task: Task, made: keras.Model, loader: Any) -> Run:
    return lambda: made.fit(loader, epochs=task.epochs, shuffle=False, verbose=0)


def fit_with_callbacks(task: Task) -> Run:
    validation = tuple(part.numpy() for part in task.validation)
    callbacks = [keras.callbacks.EarlyStopping("val_loss", patience=1000), EachEpoch(), EachBatch()]
    return fit_arrays(task, validation_data=validation, callbacks=callbacks)


def five_metrics() -> list[Any]:
    """Five of Keras's for targets that are class indices."""
    kinds = keras.metrics
    accuracies = [kinds.SparseCategoricalAccuracy(name=name) for name in ("first", "second")]
    top = [kinds.SparseTopKCategoricalAccuracy(k, name=f"top_{k}") for k in (1, 2)]
    return [*accuracies, *top, kinds.SparseCategoricalCrossentropy(from_logits=True)]


def evaluating_arrays(task: Task) -> Run:
    made, x, y = model(task), task.x.numpy(), task.y.numpy()
    return lambda: made.evaluate(x, y, batch_size=task.batch_size, verbose=0)


def evaluating_loader(task: Task) -> Run:
    made, loader = model(task), task.loader(shuffle=False)
    return lambda: made.evaluate(loader, verbose=0)


def predicting_arrays(task: Task) -> Run:
    made, x = model(task), task.x.numpy()
    return lambda: made.predict(x, batch_size=task.batch_size, verbose=0)


def predicting_loader(task: Task) -> Run:
    made, loader = model(task), task.loader(shuffle=False)
    return lambda: made.predict(loader, verbose=0)


TIMED = {
    "fit-arrays": fit_arrays,
    "fit-loader": fit_loader,
    "fit-callbacks": fit_with_callbacks,
    # Keras has no norms to track.
    "fit-200-layers": lambda task: fit_loader(
        task, gradient_accumulation_steps=task.accumulate, global_clipnorm=LARGEST_NORM
    ),
    "evaluate-arrays": evaluating_arrays,
    "evaluate-loader": evaluating_loader,
    "predict-arrays": predicting_arrays,
    "predict-loader": predicting_loader,
    "callbacks-100": lambda task: fit_arrays(task, callbacks=[EachEpoch() for _ in range(100)]),
    "metrics-5": lambda task: fit(task, model(task, five_metrics()), task.ready_loader()),
}
