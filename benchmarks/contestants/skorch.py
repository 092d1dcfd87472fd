"""skorch's NeuralNet, batching by itself; it accumulates as its FAQ shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import skorch
import torch
from exact_cases import WINDOW, Case, RecordingSGD, far_off_batch
from skorch.callbacks import EarlyStopping, EpochScoring
from skorch.helper import predefined_split
from torch import nn
from torch.utils.data import TensorDataset
from workloads import LEARNING_RATE, Task

Run = Callable[[], Any]


class Accumulating(skorch.NeuralNet):
    """The FAQ's net: the loss over the window's length, a step at every so many batches."""

    def get_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().get_loss(*args, **kwargs) / WINDOW

    def train_step(self, batch: Any, **fit_params: Any) -> Any:
        batches = len(self.history[-1, "batches"])
        step = self.train_step_single(batch, **fit_params)
        if batches % WINDOW == 0:
            self.optimizer_.step()
            self.optimizer_.zero_grad()
        return step


class Criterion(nn.Module):
    """skorch makes the criterion itself, from a class."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, output: Any, target: Any) -> Any:
        return self.function(output, target)


def net(case: Case, kind: type[skorch.NeuralNet] = skorch.NeuralNet, **options: Any) -> skorch.NeuralNet:
    options = {"train_split": None, **options}
    return kind(
        case.module(),
        criterion=Criterion,
        criterion__function=case.criterion(),
        optimizer=RecordingSGD,
        lr=0.0,
        max_epochs=1,
        batch_size=case.batch_size,
        verbose=0,
        **options,
    )


def gradients(case: Case) -> list[float]:
    return net(case, Accumulating).fit(case.x, case.y).optimizer_.seen


def training_mean(case: Case) -> float:
    return net(case).fit(case.x, case.y).history[-1]["train_loss"]


def evaluated_mean(case: Case) -> float:
    fitted = net(case, train_split=predefined_split(case.dataset())).fit(case.x, case.y)
    return fitted.history[-1]["valid_loss"]


class PressedOnce(skorch.callbacks.Callback):
    """Ctrl-C after the first batch, once."""

    def __init__(self) -> None:
        self.is_pressed = False

    def on_batch_end(self, net: Any, **kwargs: Any) -> None:
        if not self.is_pressed:
            self.is_pressed = True
            raise KeyboardInterrupt


def mean_after_interrupt(case: Case) -> float:
    # skorch swallows Ctrl-C.
    training = net(case, callbacks=[PressedOnce()]).fit(*far_off_batch())
    return training.partial_fit(case.x, case.y).history[-1]["train_loss"]


class EachEpoch(skorch.callbacks.Callback):
    """Keeps each epoch's numbers."""

    def on_train_begin(self, net: Any, **kwargs: Any) -> None:
        self.rows_: list[Any] = []

    def on_epoch_end(self, net: Any, **kwargs: Any) -> None:
        self.rows_.append(net.history[-1, "train_loss"])


class EachBatch(skorch.callbacks.Callback):
    """Counts batches."""

    def on_train_begin(self, net: Any, **kwargs: Any) -> None:
        self.seen_ = 0

    def on_batch_end(self, net: Any, **kwargs: Any) -> None:
        self.seen_ += 1


def training_accuracy() -> EpochScoring:
    return EpochScoring("accuracy", lower_is_better=False, on_train=True, name="accuracy")


def classifier(task: Task, callbacks: Any = (), **options: Any) -> skorch.NeuralNetClassifier:
    settings = {"max_epochs": task.epochs, "train_split": None, "iterator_train__shuffle": True, **options}
    return skorch.NeuralNetClassifier(
        task.module(),
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.SGD,
        lr=LEARNING_RATE,
        batch_size=task.batch_size,
        callbacks=[training_accuracy(), *callbacks],
        callbacks__print_log=None,
        verbose=0,
        **settings,
    ).initialize()


def fit_arrays(task: Task, callbacks: Any = (), **options: Any) -> Run:
    made = classifier(task, callbacks, **options)
    return lambda: made.partial_fit(task.x, task.y)


def fit_loader(task: Task, loader: Any, callbacks: Any = ()) -> Run:
    """The loader is made by skorch from a dataset; skorch can be told how."""
    made = classifier(task, callbacks, iterator_train=lambda dataset, **options: loader)
    return lambda: made.partial_fit(task.dataset(), task.y)


def fit_with_callbacks(task: Task) -> Run:
    callbacks = [EarlyStopping("valid_loss", patience=1000), EachEpoch(), EachBatch()]
    return fit_arrays(task, callbacks, train_split=predefined_split(TensorDataset(*task.validation)))


def evaluating(task: Task, data: Any, y: Any = None) -> Run:
    """The validation that fit makes; it has the loss alone."""
    made = classifier(task)

    def run() -> None:
        batches = made.get_iterator(made.get_dataset(data, y), training=False)
        made.history.new_epoch()
        made.run_single_epoch(batches, training=False, prefix="valid", step_fn=made.validation_step)

    return run


def predicting(task: Task, data: Any) -> Run:
    made = classifier(task)
    return lambda: made.forward(data)


def five_scores() -> list[EpochScoring]:
    """Four of scikit-learn's beside accuracy."""
    names = ("precision", "recall", "f1", "balanced_accuracy")
    return [EpochScoring(name, lower_is_better=False, on_train=True, name=name) for name in names]


TIMED = {
    "fit-arrays": fit_arrays,
    "fit-loader": lambda task: fit_loader(task, task.loader()),
    "fit-callbacks": fit_with_callbacks,
    "evaluate-arrays": lambda task: evaluating(task, task.x, task.y),
    "evaluate-loader": lambda task: evaluating(task, task.dataset()),
    "predict-arrays": lambda task: predicting(task, task.x),
    "predict-loader": lambda task: predicting(task, task.dataset()),
    "callbacks-100": lambda task: fit_arrays(task, [EachEpoch() for _ in range(100)]),
    "metrics-5": lambda task: fit_loader(task, task.ready_loader(), five_scores()),
}
