"""Runs that have to give the same numbers on any number of processes: `python cases.py FOLDER`, by torchrun or alone.

Each case trains a small module; rank r writes what came of it to FOLDER/r.json. The tests compare.
"""

from __future__ import annotations

import json
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, TensorDataset

import fitkit
from fitkit.callbacks import Callback, EarlyStopping, ReduceLROnPlateau, SwapEMAWeights, TerminateOnNaN
from fitkit.distributed import whole

CASES: dict[str, Callable[[], Any]] = {}
RANK = int(os.environ.get("RANK", "0"))
STRATEGY = os.environ.get("STRATEGY", "auto")


def case(function: Callable[[], Any]) -> Callable[[], Any]:
    CASES[function.__name__] = function
    return function


def classes(samples: int = 50, ignored: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(samples, 4, generator=generator)
    y = torch.randint(0, 3, (samples,), generator=generator)
    y[:ignored] = -100
    return x, y


def values(samples: int = 50) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(8)
    return torch.randn(samples, 4, generator=generator), torch.randn(samples, 2, generator=generator)


def network(outputs: int = 3) -> nn.Module:
    # Each process begins with weights of its own: those of rank 0 have to win.
    torch.manual_seed(0 if RANK == 0 else 1000 + RANK)
    module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, outputs))
    torch.manual_seed(1 if RANK == 0 else 2000 + RANK)
    random.seed(1 if RANK == 0 else 2000 + RANK)
    return module


def compiled(loss: Any = "cross_entropy", metrics: Any = ("accuracy",), *, outputs: int = 3, **options: Any) -> Any:
    model = fitkit.Model(network(outputs), device="cpu", strategy=STRATEGY)
    options.setdefault("optimizer", "adam")
    model.compile(loss=loss, metrics=list(metrics), learning_rate=0.01, **options)
    return model


def result(model: Any, **more: Any) -> dict[str, Any]:
    state = {name: whole(value) for name, value in model.module.state_dict().items()}
    weights = {name: value.double().flatten().tolist() for name, value in state.items()}
    return {"history": model.history.history, "stop_reason": model.history.stop_reason, "weights": weights, **more}


def trained(model: Any, *data: Any, **arguments: Any) -> dict[str, Any]:
    model.fit(*data, **{"epochs": 2, "verbose": 0, "batch_size": 16, **arguments})
    return result(model)


class Points(Dataset[Any]):
    def __init__(self, samples: int = 50) -> None:
        self.x, self.y = classes(samples)
        self.seen: list[int] = []

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.seen.append(int(index))
        return self.x[index], self.y[index]


@case
def arrays() -> Any:
    return trained(compiled(), *classes())


@case
def arrays_in_order() -> Any:
    return trained(compiled(), *classes(), shuffle=False)


@case
def numpy_arrays() -> Any:
    x, y = classes()
    return trained(compiled(), x.double().numpy(), y.numpy())


@case
def nests_of_arrays() -> Any:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, first: Tensor, second: Tensor) -> Tensor:
            return self.inner(torch.cat([first, second], 1))

    x, y = classes()
    model = fitkit.Model(Two(), device="cpu", strategy=STRATEGY)
    model.compile("sgd", "cross_entropy", ["accuracy"])
    return trained(model, {"first": x[:, :1], "second": x[:, 1:]}, y)


@case
def fewer_samples_than_processes() -> Any:
    return trained(compiled(), *classes(33))


@case
def batches_of_one() -> Any:
    return trained(compiled(), *classes(5), batch_size=1)


@case
def a_dataset() -> Any:
    return trained(compiled(), Points(33))


@case
def a_dataset_with_workers() -> Any:
    return trained(compiled(), Points(33), dataloader_options={"num_workers": 1})


@case
def a_split_dataset() -> Any:
    return trained(compiled(), Points(50), validation_split=0.3)


@case
def a_tensor_loader() -> Any:
    return trained(compiled(), DataLoader(TensorDataset(*classes(49)), 16, shuffle=True), batch_size=None)


@case
def a_loader() -> Any:
    return trained(compiled(), DataLoader(Points(49), 16, shuffle=True), batch_size=None)


@case
def a_loader_without_the_rest() -> Any:
    return trained(compiled(), DataLoader(Points(49), 16, shuffle=True, drop_last=True), batch_size=None)


class DrawingSampler(BatchSampler):
    """Draws from Python's and from torch's generator before each batch."""

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(len(self)):
            torch.rand(1)
            yield random.sample(range(len(self.sampler)), self.batch_size)


@case
def a_loader_with_a_sampler_of_its_own() -> Any:
    points = Points(49)
    sampler = DrawingSampler(RandomSampler(points), 7, drop_last=True)
    return trained(compiled(), DataLoader(points, batch_sampler=sampler), batch_size=None)


@case
def ready_batches() -> Any:
    x, y = classes()
    ready = [(x[start : start + 16], y[start : start + 16]) for start in range(0, 50, 16)]
    return trained(compiled(), ready, batch_size=None)


@case
def a_generator() -> Any:
    x, y = classes()
    ready = ((x[start : start + 7], y[start : start + 7]) for start in range(0, 49, 7))
    return trained(compiled(), ready, batch_size=None, steps_per_epoch=3, accumulate_grad_batches=2)


@case
def a_generator_that_draws() -> Any:
    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield torch.randn(7, 4), torch.randint(0, 3, (7,))

    found = trained(compiled(), endless(), batch_size=None, steps_per_epoch=3)
    return {**found, "drawn_next": torch.rand(2).tolist()}


class Shuffling(IterableDataset[Any]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = classes()
        return ((x[index], y[index]) for index in torch.randperm(50).tolist())


@case
def a_stream_that_shuffles() -> Any:
    return trained(compiled(), Shuffling())


@case
def a_loader_with_a_generator_of_its_own() -> Any:
    generator = torch.Generator().manual_seed(5 + RANK)
    return trained(compiled(), DataLoader(Points(), 16, shuffle=True, generator=generator), batch_size=None)


@case
def accumulation() -> Any:
    return trained(compiled(), *classes(49), accumulate_grad_batches=3, batch_size=8)


@case
def accumulation_by_epoch() -> Any:
    return trained(compiled(), *classes(49), accumulate_grad_batches={0: 1, 1: 4}, batch_size=8, epochs=3)


@case
def accumulation_with_ignored_targets() -> Any:
    loss = nn.CrossEntropyLoss(ignore_index=-100)
    return trained(compiled(loss), *classes(49, ignored=20), accumulate_grad_batches=2, batch_size=8, shuffle=False)


@case
def clipping_and_norms() -> Any:
    return trained(compiled(), *classes(), gradient_clip_val=0.1, track_grad_norm=2)


@case
def norms_of_another_order() -> Any:
    return trained(compiled(), *classes(), gradient_clip_val=0.2, track_grad_norm="inf", accumulate_grad_batches=2)


@case
def ignored_targets() -> Any:
    return trained(compiled(), *classes(50, ignored=21), shuffle=False)


@case
def a_window_without_targets() -> Any:
    return trained(compiled(), *classes(50, ignored=32), shuffle=False, batch_size=8, on_nonfinite="ignore")


@case
def class_weights() -> Any:
    return trained(compiled(), *classes(), class_weight={0: 0.2, 2: 5.0})


@case
def class_weights_of_the_loss() -> Any:
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1.0, 7.0]))
    return trained(compiled(loss), *classes(), accumulate_grad_batches=2)


@case
def sample_weights() -> Any:
    x, y = classes()
    model = compiled(metrics=[], weighted_metrics=["accuracy"])
    return trained(model, x, y, sample_weight=torch.linspace(0, 3, len(x)))


@case
def squared_errors() -> Any:
    return trained(compiled("mse", ["mae", "r2"], outputs=2), *values(), accumulate_grad_batches=2)


@case
def sums() -> Any:
    return trained(compiled(nn.MSELoss(reduction="sum"), ["mae"], outputs=2), *values(), accumulate_grad_batches=2)


@case
def a_function() -> Any:
    def loss(output: Tensor, target: Tensor) -> tuple[Tensor, float]:
        weights = target[:, :1].abs()
        return ((output - target) ** 2 * weights).sum() / weights.sum(), float(weights.sum())

    return trained(compiled(loss, [], outputs=2), *values(), accumulate_grad_batches=2)


class Outputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = network(5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        both = self.inner(x)
        return {"kind": both[:, :3].clone(), "place": both[:, 3:].clone()}


def several(kind: Any) -> Any:
    model = fitkit.Model(Outputs(), device="cpu", strategy=STRATEGY)
    model.compile("adam", {"kind": kind, "place": "mse"}, {"kind": ["accuracy"]}, loss_weights={"kind": 0.3})
    return model


@case
def several_outputs() -> Any:
    x, kinds = classes(49, ignored=11)
    return trained(several("cross_entropy"), x, {"kind": kinds, "place": values(49)[1]}, accumulate_grad_batches=2)


@case
def several_outputs_alike() -> Any:
    class Both(Outputs):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            both = self.inner(x)
            return {"one": both[:, :1].clone(), "four": both[:, 1:].clone()}

    model = fitkit.Model(Both(), device="cpu", strategy=STRATEGY)
    model.compile("sgd", {"one": "mse", "four": "l1"})
    x, y = values(49)
    return trained(model, x, {"one": y[:, :1], "four": torch.cat([y, y], 1)})


@case
def heads_of_which_a_process_has_no_target() -> Any:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.first, self.second = network(8), nn.Linear(8, 3), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            body = self.body(x)
            return {"first": self.first(body), "second": self.second(body)}

    x, y = classes(48)
    half = torch.arange(48) % 16 < 8
    model = fitkit.Model(Heads(), device="cpu", strategy=STRATEGY)
    model.compile("sgd", {"first": "cross_entropy", "second": "cross_entropy"})
    ignored = torch.full_like(y, -100)
    targets = {"first": torch.where(half, y, ignored), "second": torch.where(half, ignored, y)}
    return trained(model, x, targets, shuffle=False)


@case
def a_single_layer() -> Any:
    network()  # the same random numbers as in others
    torch.manual_seed(RANK)
    layer = nn.Linear(4, 3)
    torch.manual_seed(1)
    model = fitkit.Model(layer, device="cpu", strategy=STRATEGY)
    model.compile("adam", "cross_entropy", learning_rate=0.01)
    evaluated = model.evaluate(*classes(), verbose=0)
    return {"evaluated": evaluated, **trained(model, *classes(), epochs=3, validation_split=0.3)}


@case
def metrics_that_keep_all_rows() -> Any:
    return trained(compiled(metrics=["auroc", "f1", "top_2_accuracy"]), *classes(), validation_split=0.3)


@case
def a_metric_of_torchmetrics() -> Any:
    import torchmetrics

    return trained(
        compiled(metrics=[torchmetrics.classification.MulticlassF1Score(3)]), *classes(), validation_split=0.2
    )


@case
def metrics_of_torchmetrics_without_rows_in_a_process() -> Any:
    import torchmetrics

    given = {"task": "multiclass", "num_classes": 3}
    counts = torchmetrics.MetricCollection([torchmetrics.Accuracy(**given), torchmetrics.F1Score(**given)])

    class Median(torchmetrics.Metric):
        """Keeps rows, and as many entries as it had batches."""

        def __init__(self) -> None:
            super().__init__()
            self.add_state("labels", [], dist_reduce_fx="cat")
            self.add_state("tops", [], dist_reduce_fx=None)

        def update(self, output: Tensor, target: Tensor) -> None:
            self.labels.append(target)
            self.tops.extend(output.max(1).values)

        def compute(self) -> Tensor:
            labels = self.labels if isinstance(self.labels, Tensor) else torch.cat(self.labels)
            return torch.stack(self.tops).median() + labels.float().mean()

    model = compiled(metrics=[counts, Median()])
    return trained(model, *classes(), validation_data=classes(1))


@case
def a_metric_function() -> Any:
    return trained(compiled("mse", [lambda output, target: (output - target).abs().mean(1)], outputs=2), *values())


@case
def percent_flags() -> Any:
    flags = {"train_percent_check": 0.5, "val_percent_check": 0.5}
    return trained(compiled(), *classes(90), validation_split=0.3, batch_size=8, **flags)


@case
def overfitting() -> Any:
    return trained(compiled(), *classes(90), validation_data=classes(20), overfit_pct=0.3, batch_size=8)


@case
def micro_batches() -> Any:
    return trained(compiled(), *classes(49, ignored=9), micro_batch_size=3)


@case
def micro_batches_of_which_a_process_has_fewer() -> Any:
    return trained(compiled(), *classes(49), batch_size=8, micro_batch_size=1, accumulate_grad_batches={0: 1, 1: 2})


@case
def micro_batches_that_fit() -> Any:
    return trained(compiled(), *classes(49, ignored=9), micro_batch_size="auto", accumulate_grad_batches=2)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = network()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(2, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return self.inner(x)


@case
def a_module_with_buffers() -> Any:
    model = fitkit.Model(Counting(), device="cpu", strategy=STRATEGY)
    model.compile("adam", "cross_entropy")
    return trained(model, *classes(49), validation_split=0.2)


@case
def scaled_losses() -> Any:
    """In float16 sums of parts differ from the sum, and steps may be skipped: the run is near that in float32."""
    losses = []
    for precision in ("16-mixed", "32-true"):
        model = compiled(precision=precision)
        model.fit(*classes(49), epochs=4, batch_size=16, verbose=0, gradient_clip_val=1.0)
        losses.append(model.history["loss"][-1])
    return {"is near": abs(losses[0] - losses[1]) < 0.05}


@case
def bfloat16() -> Any:
    model = compiled(precision="bf16-mixed")
    model.fit(*classes(49), epochs=2, batch_size=16, verbose=0, accumulate_grad_batches=2)
    return {"loss": [round(loss, 2) for loss in model.history["loss"]]}


@case
def double_precision() -> Any:
    return trained(compiled(precision="64-true"), *classes())


class Stepping(fitkit.Model):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        output = self.module(x)
        again = self.module(x.flip(0)).flip(0)
        return {
            "loss": nn.functional.cross_entropy((output + again) / 2, y),
            "spread": output.std(),
            "output": output,
            "target": y,
        }


@case
def a_step_of_ones_own() -> Any:
    model = Stepping(network(), device="cpu")
    model.compile("adam", "cross_entropy", ["accuracy"])
    made = trained(model, *classes(), accumulate_grad_batches=2, validation_split=0.2)
    made["history"].pop("spread")  # a mean of what each process computes of its own samples
    return made


@case
def a_part_that_takes_no_part() -> Any:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.idle = network(), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    model = fitkit.Model(Idle(), device="cpu", strategy=STRATEGY)
    model.compile(lambda parameters: torch.optim.AdamW(parameters, weight_decay=0.1), "cross_entropy")
    return trained(model, *classes(49))


class Unfreezing(Callback):
    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.model.module[0].requires_grad_(epoch > 0)


@case
def a_layer_that_is_frozen_for_an_epoch() -> Any:
    return trained(compiled(), *classes(), callbacks=[Unfreezing()], epochs=3)


@case
def early_stopping() -> Any:
    stopping = EarlyStopping("val_loss", patience=1, restore_best_weights=True)
    reducing = ReduceLROnPlateau("val_loss", patience=0, verbose=0)
    x, y = classes(40)
    model = compiled()
    return trained(model, x, y, validation_data=classes(30), callbacks=[reducing, stopping], epochs=30)


@case
def an_average_of_weights() -> Any:
    return trained(compiled(), *classes(), callbacks=[SwapEMAWeights(momentum=0.5)], validation_split=0.2)


class StopAt(Callback):
    def __init__(self, batch: int, rank: int | None = None) -> None:
        super().__init__()
        self.batch, self.rank, self.batches = batch, rank, 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.batches += 1
        if batch == self.batch and self.rank in (None, RANK):
            self.model.stop_training = True


@case
def a_stop_at_a_batch() -> Any:
    return trained(compiled(), *classes(), callbacks=[StopAt(1)])


@case
def a_stop_of_the_last_process() -> Any:
    last = int(os.environ.get("WORLD_SIZE", "1")) - 1
    stop = StopAt(1, last)
    made = trained(compiled(), *classes(), callbacks=[stop, TerminateOnNaN()])
    return {**made, "batches": stop.batches}


@case
def a_stop_within_a_window() -> Any:
    return trained(compiled(), *classes(), callbacks=[StopAt(2)], accumulate_grad_batches=4, batch_size=8)


@case
def evaluating() -> Any:
    model = compiled(metrics=["accuracy", "auroc"])
    x, y = classes(50, ignored=3)
    made = {f"evaluated {size}": model.evaluate(x, y, batch_size=size, verbose=0) for size in (None, 1, 7)}
    made["a dataset"] = model.evaluate(Points(50), verbose=0)
    made["steps"] = model.evaluate(x, y, batch_size=7, steps=2, verbose=0)
    return {**made, "stop_reason": None}


@case
def predicting() -> Any:
    model = compiled()
    x, _ = classes(50)
    made = {f"predicted {size}": model.predict(x, batch_size=size, verbose=0).tolist() for size in (None, 1, 7)}
    made["a loader"] = model.predict(DataLoader(TensorDataset(x), 7), verbose=0).tolist()
    return made


@case
def evaluating_in_a_callback() -> Any:
    found: list[Any] = []
    x, y = classes(20)

    class Looking(Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            found.append(self.model.evaluate(x, y, verbose=0))  # type: ignore[attr-defined]
            found.append(self.model.predict(x, verbose=0).tolist())  # type: ignore[attr-defined]

    return {**trained(compiled(), *classes(), callbacks=[Looking()]), "found": found}


@case
def evaluating_within_a_window() -> Any:
    found: list[Any] = []
    x, y = classes(20)

    class Looking(Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            found.append(self.model.evaluate(x, y, verbose=0))  # type: ignore[attr-defined]

    made = trained(compiled(), *classes(), callbacks=[Looking()], accumulate_grad_batches=3, batch_size=8)
    return {**made, "found": found}


@case
def single_batches() -> Any:
    model = compiled()
    x, y = classes(17)
    losses = [model.train_on_batch(x, y) for _ in range(3)]
    return {"losses": losses, "tested": model.test_on_batch(x, y), "weights": result(model)["weights"]}


@case
def one_fit_after_another() -> Any:
    model = compiled()
    first = trained(model, *classes())
    return {"first": first, "second": trained(model, *classes(33))}


@case
def saved_and_resumed() -> Any:
    folder = Path(sys.argv[1])
    path = folder / "saved.fitkit"
    model = compiled()
    model.fit(*classes(), epochs=1, batch_size=16, verbose=0)
    model.save(path)
    other = compiled()
    other.fit(*classes(), epochs=3, batch_size=16, verbose=0, resume_from=path)
    return result(other)


class SaveAt(Callback):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.epoch = path, 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        # Of a sharded module an open window cannot be saved.
        if (self.epoch, batch) == (1, 3 if STRATEGY == "fsdp" else 2):
            self.model.save(self.path)


@case
def saved_in_mid_epoch() -> Any:
    path = Path(sys.argv[1]) / "middle.fitkit"
    arguments: dict[str, Any] = {"epochs": 3, "batch_size": 7, "verbose": 0, "accumulate_grad_batches": 2}
    model = compiled()
    model.fit(*classes(), callbacks=[SaveAt(path)], **arguments)
    other = compiled()
    other.fit(*classes(), resume_from=path, **arguments)
    return {"undisturbed": result(model), "resumed": result(other)}


@case
def saved_beside_draws_in_the_module() -> Any:
    path = Path(sys.argv[1]) / "drawing.fitkit"
    found: list[Any] = []
    for more in ({"callbacks": [SaveAt(path)]}, {"resume_from": path}):
        torch.manual_seed(0)
        model = fitkit.Model(nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)), device="cpu", strategy=STRATEGY)
        model.compile("adam", "cross_entropy")
        found.append(trained(model, Shuffling(), batch_size=7, **more))
    # With dropout they are not those of one process. A sum over three may differ in its last digit.
    one, other = ([each["history"]["loss"], *each["weights"].values()] for each in found)
    pairs = zip(one, other, strict=True)
    return all(torch.allclose(torch.tensor(a), torch.tensor(b), rtol=1e-5, atol=1e-6) for a, b in pairs)


def main(folder: Path, names: list[str]) -> None:
    warnings.simplefilter("error")
    found = {}
    for name in names or CASES:
        if name not in CASES:
            raise SystemExit(f"There is no case {name}.")
        np.random.seed(0)
        found[name] = CASES[name]()
    (folder / f"{RANK}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
