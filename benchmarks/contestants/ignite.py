"""Ignite: supervised trainer and evaluator by its factories, means by its metrics."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from exact_cases import WINDOW, Case, RecordingSGD, interrupted_loader
from ignite.engine import Engine, Events, create_supervised_evaluator, create_supervised_trainer
from ignite.handlers import EarlyStopping, EpochOutputStore
from ignite.metrics import Accuracy, Average, Loss, Precision, Recall, TopKCategoricalAccuracy
from torch import nn
from workloads import LARGEST_NORM, LEARNING_RATE, Task

Run = Callable[[], Any]
CRITERION = nn.CrossEntropyLoss()


def gradients(case: Case) -> list[float]:
    module = case.module()
    optimizer = RecordingSGD(module.parameters())
    trainer = create_supervised_trainer(module, optimizer, case.criterion(), gradient_accumulation_steps=WINDOW)
    trainer.run(case.loader(), max_epochs=1)
    return optimizer.seen


def training_mean(case: Case) -> float:
    module = case.module()
    trainer = create_supervised_trainer(module, RecordingSGD(module.parameters()), case.criterion())
    Average().attach(trainer, "loss")
    return trainer.run(case.loader(), max_epochs=1).metrics["loss"]


def evaluated_mean(case: Case) -> float:
    evaluator = create_supervised_evaluator(case.module(), metrics={"loss": Loss(case.criterion())})
    return evaluator.run(case.loader()).metrics["loss"]


def mean_after_interrupt(case: Case) -> float:
    module = case.module()
    trainer = create_supervised_trainer(module, RecordingSGD(module.parameters()), case.criterion())
    Average().attach(trainer, "loss")
    with contextlib.suppress(KeyboardInterrupt):
        trainer.run(interrupted_loader(), max_epochs=1)
    # As its documentation says for starting anew; without it the next run does nothing and returns None.
    trainer.state.max_epochs = None
    return trainer.run(case.loader(), max_epochs=1).metrics["loss"]


def compared(output: Any) -> Any:
    """Of what the trainer gives, the output and the target."""
    return output[0], output[1]


def trainer(module: nn.Module, metrics: dict[str, Any] | None = None) -> Engine:
    """A supervised trainer that measures while it trains."""
    optimizer = torch.optim.SGD(module.parameters(), lr=LEARNING_RATE)
    training = create_supervised_trainer(
        module, optimizer, CRITERION, output_transform=lambda x, y, output, loss: (output, y, loss.detach())
    )
    measure(training, metrics)
    return training


def measure(training: Engine, metrics: dict[str, Any] | None = None) -> None:
    Average(lambda output: output[2]).attach(training, "loss")
    for name, metric in (metrics or {"accuracy": Accuracy(compared)}).items():
        metric.attach(training, name)


def fit(task: Task, loader: Any, metrics: dict[str, Any] | None = None) -> Run:
    training = trainer(task.module(), metrics)
    return lambda: training.run(loader, max_epochs=task.epochs)


def fit_with_callbacks(task: Task) -> Run:
    module = task.module()
    training, loader = trainer(module), task.loader()
    evaluator, held_out = evaluator_of(module), task.validation_loader()
    rows, seen = [], [0]
    stopping = EarlyStopping(1000, lambda engine: -engine.state.metrics["loss"], training)
    evaluator.add_event_handler(Events.COMPLETED, stopping)

    @training.on(Events.EPOCH_COMPLETED)
    def validate(engine: Engine) -> None:
        rows.append({**engine.state.metrics, **evaluator.run(held_out).metrics})

    @training.on(Events.ITERATION_COMPLETED)
    def count(engine: Engine) -> None:
        seen[0] += 1

    return lambda: training.run(loader, max_epochs=task.epochs)


def fit_200_layers(task: Task) -> Run:
    """The factory neither clips nor tracks, so that the step is the user's own."""
    module, loader = task.module(), task.loader()
    parameters = list(module.parameters())
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE)
    norm_sums = torch.zeros(len(parameters))

    def step(engine: Engine, batch: Any) -> Any:
        x, y = batch
        module.train()
        output = module(x)
        loss = CRITERION(output, y)
        (loss / task.accumulate).backward()
        if engine.state.iteration % task.accumulate == 0:
            norm_sums.add_(torch.stack(torch._foreach_norm([parameter.grad for parameter in parameters])))
            nn.utils.clip_grad_norm_(parameters, LARGEST_NORM)
            optimizer.step()
            optimizer.zero_grad()
        return output, y, loss.detach()

    training = Engine(step)
    measure(training)
    return lambda: training.run(loader, max_epochs=task.epochs)


def fit_with_100_handlers(task: Task) -> Run:
    training, loader = trainer(task.module()), task.loader()
    for _ in range(100):
        rows: list[Any] = []
        training.add_event_handler(
            Events.EPOCH_COMPLETED, lambda engine, rows=rows: rows.append(dict(engine.state.metrics))
        )
    return lambda: training.run(loader, max_epochs=task.epochs)


def five_metrics() -> dict[str, Any]:
    return {
        "accuracy": Accuracy(compared),
        "precision": Precision(compared, average=True),
        "recall": Recall(compared, average=True),
        "top_1": TopKCategoricalAccuracy(1, compared),
        "top_2": TopKCategoricalAccuracy(2, compared),
    }


def evaluator_of(module: nn.Module) -> Engine:
    return create_supervised_evaluator(module, metrics={"loss": Loss(CRITERION), "accuracy": Accuracy()})


def evaluating(task: Task) -> Run:
    evaluator, loader = evaluator_of(task.module()), task.loader(shuffle=False)
    return lambda: evaluator.run(loader)


def predicting(task: Task) -> Run:
    predictor, loader = create_supervised_evaluator(task.module()), task.loader(shuffle=False)
    outputs = EpochOutputStore(lambda output: output[0])
    outputs.attach(predictor, "outputs")

    def run() -> Any:
        predictor.run(loader)
        return torch.cat(outputs.data)

    return run


TIMED = {
    "fit-loader": lambda task: fit(task, task.loader()),
    "fit-callbacks": fit_with_callbacks,
    "fit-200-layers": fit_200_layers,
    "evaluate-loader": evaluating,
    "predict-loader": predicting,
    "callbacks-100": fit_with_100_handlers,
    "metrics-5": lambda task: fit(task, task.batches, five_metrics()),
}
