"""Model.to_script: a plain script that ends with fit's weights, bit for bit, and that a person can go on from."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import math
import os
import random
import runpy
import subprocess
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

import fitkit
from fitkit.callbacks import (
    CSVLogger,
    EarlyStopping,
    LambdaCallback,
    LearningRateScheduler,
    LRScheduler,
    SwapEMAWeights,
)
from fitkit.script.expressions import literal, module_expression

X = torch.randn(203, 6, generator=torch.Generator().manual_seed(0))
LABELS = (X[:, 0] + 0.5 * X[:, 1] > 0).long()
IGNORING = torch.where(torch.arange(203) % 3 == 0, -100, LABELS)
IGNORING[64:96] = -100  # in order, a batch without any target
VALUES = X[:, :1] - X[:, 1:2] ** 2
SOME_BELOW_ZERO = torch.where(
    torch.arange(203)[:, None] // 32 == 1, -1.0, VALUES
)  # in order, a batch without any above
WEIGHTS = torch.linspace(0.1, 2.0, 203)

NETS = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, hidden, outputs=2):
        super().__init__()
        self.hidden = hidden
        self.first = nn.Linear(6, hidden)
        self.second = nn.Linear(hidden, outputs)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, left, right):
        return self.one(left) * self.other(right)


class Secret(nn.Module):
    def __init__(self, sizes):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, sizes[0]), nn.Linear(sizes[0], 2))

    def forward(self, x):
        return self.layers(x)


class Hidden(nn.Linear):
    def __init__(self, factor=1.0):
        super().__init__(6, 2)
        self._factor = factor

    def forward(self, x):
        return self._factor * super().forward(x)


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, output, target):
        return self.factor * (output - target).square().mean()


class Slow(torch.optim.SGD):
    pass


def differences(output, target):
    return (output - target).abs()


def distance(output, target):
    return (output - target).abs().mean() ** 2


def mean_of_those_above_zero(output, target):
    kept = (target > 0).double()
    count = float(kept.sum())
    return ((output - target).abs() * kept).sum() / (count or 1.0), count


class Counting(nn.Module):
    def forward(self, output, target):
        kept = (target >= 0).sum()
        return nn.functional.cross_entropy(output, target, reduction="sum") / kept.clamp(min=1), kept


class Linear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def loss(output, target):
    return (output - target).square().mean()


def scheduler(optimizer):
    return warm_up(optimizer)


def warm_up(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 5))
"""


def make_net() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2))


def regressor() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))


def frozen() -> nn.Module:
    net = make_net()
    net[0].requires_grad_(False)
    net[1].eval()
    return net


def scheduled(make: Any, **options: Any) -> dict[str, Any]:
    return {"callbacks": [LRScheduler(make, **options)]}


def stopping(*arguments: Any, **options: Any) -> dict[str, Any]:
    return {"early_stop_callback": EarlyStopping(*arguments, **options), "epochs": 12, "validation_split": 0.2}


# By name: the module, what compile is given, what fit is given beside the data.
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, Any]]] = {
    "plain": (make_net, {}, {}),
    "unshuffled": (make_net, {}, {"shuffle": False, "batch_size": 50}),
    "accumulation": (make_net, {}, {"accumulate_grad_batches": 3}),
    "a short last window": (make_net, {"optimizer": "sgd"}, {"accumulate_grad_batches": 5, "batch_size": 20}),
    "a window that never fills": (make_net, {}, {"accumulate_grad_batches": 100}),
    "accumulation by epoch": (make_net, {}, {"accumulate_grad_batches": {1: 2, 3: 4}}),
    "clipping": (make_net, {}, {"gradient_clip_val": 0.05}),
    "norms": (make_net, {}, {"track_grad_norm": 2}),
    "clipping and norms": (make_net, {}, {"gradient_clip_val": 0.05, "track_grad_norm": 2}),
    "clipping and other norms": (
        make_net,
        {},
        {"gradient_clip_val": 0.05, "track_grad_norm": "inf", "accumulate_grad_batches": 2},
    ),
    "bf16": (make_net, {"precision": "bf16-mixed"}, {"validation_split": 0.2}),
    "float64": (make_net, {"precision": "64-true"}, {"validation_split": 0.2}),
    "train percent": (make_net, {}, {"train_percent_check": 0.5, "accumulate_grad_batches": 2}),
    "validation percent": (make_net, {}, {"validation_data": (X, LABELS), "val_percent_check": 0.3}),
    "overfit": (make_net, {}, {"overfit_pct": 0.3, "validation_data": (X, LABELS)}),
    "steps": (make_net, {}, {"steps_per_epoch": 3, "validation_data": (X, LABELS), "validation_steps": 2}),
    "validation sometimes": (make_net, {}, {"validation_split": 0.25, "validation_freq": 2}),
    "validation in a list": (make_net, {}, {"validation_split": 0.25, "validation_freq": [1, 3]}),
    "a later beginning": (make_net, {}, {"initial_epoch": 2, **scheduled(lambda o: lr_scheduler.StepLR(o, 1))}),
    "schedule by epoch": (make_net, {}, scheduled(lambda o: lr_scheduler.StepLR(o, 1, gamma=0.3))),
    "milestones": (make_net, {}, scheduled(lambda o: lr_scheduler.MultiStepLR(o, [1, 3], 0.1))),
    "schedule by step": (
        make_net,
        {},
        {
            "accumulate_grad_batches": 2,
            **scheduled(lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=16), interval="step"),
        },
    ),
    "schedules in a row": (
        make_net,
        {"optimizer": "sgd"},
        scheduled(
            lambda o: lr_scheduler.SequentialLR(
                o, [lr_scheduler.LinearLR(o, 0.1, total_iters=5), lr_scheduler.CosineAnnealingLR(o, 20)], [5]
            ),
            interval="step",
        ),
    ),
    "plateau": (
        make_net,
        {},
        {
            "validation_split": 0.2,
            **scheduled(
                lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=0.5), monitor="val_loss"
            ),
        },
    ),
    "rates by epoch": (make_net, {}, {"callbacks": [LearningRateScheduler(lambda epoch, rate: rate * 0.7)]}),
    "early stopping": (make_net, {"learning_rate": 0.3}, stopping("val_loss", patience=1)),
    "early stopping that restores": (
        make_net,
        {"learning_rate": 0.3},
        stopping("val_loss", patience=2, restore_best_weights=True, min_delta=0.001),
    ),
    "early stopping, every option": (
        make_net,
        {"learning_rate": 0.3},
        {
            **stopping("val_loss", patience=2, restore_best_weights=True, baseline=0.5, start_from_epoch=2),
            "min_nb_epochs": 4,
            "validation_freq": 2,
        },
    ),
    "early stopping on the loss": (make_net, {}, {**stopping("loss", 0.05, 1), "validation_split": 0.0}),
    "default early stopping": (
        make_net,
        {"learning_rate": 0.5},
        {"epochs": None, "max_nb_epochs": 15, "min_nb_epochs": 2, "validation_split": 0.2},
    ),
    "everything at once": (
        make_net,
        {"precision": "bf16-mixed", "learning_rate": 0.05, "optimizer": "adamw", "metrics": ["accuracy"]},
        {
            **stopping("val_loss", patience=2, restore_best_weights=True),
            "accumulate_grad_batches": {0: 1, 2: 3},
            "gradient_clip_val": 0.5,
            "track_grad_norm": 2,
            "train_percent_check": 0.8,
            "val_percent_check": 0.5,
            **scheduled(lambda o: lr_scheduler.CosineAnnealingLR(o, 12)),
        },
    ),
    "ignored targets": (make_net, {}, {"y": IGNORING, "shuffle": False, "validation_data": (X, IGNORING)}),
    "ignored targets in windows": (
        make_net,
        {"optimizer": "sgd"},
        {"y": IGNORING, "shuffle": False, "accumulate_grad_batches": 2, "validation_data": (X, IGNORING)},
    ),
    "a window without targets": (
        make_net,
        {"optimizer": "sgd"},
        {"y": torch.where(torch.arange(203) < 64, -100, LABELS), "shuffle": False, "accumulate_grad_batches": 2},
    ),
    "class weights": (make_net, {}, {"class_weight": {0: 0.3, 1: 2.0}, "accumulate_grad_batches": 3}),
    "class weights and validation": (make_net, {}, {"class_weight": {1: 2.0}, "validation_split": 0.2}),
    "sample weights": (make_net, {}, {"sample_weight": WEIGHTS, "validation_split": 0.2}),
    "sample weights of values": (regressor, {"loss": "mse"}, {"y": VALUES, "sample_weight": WEIGHTS}),
    "loss with class weights": (
        make_net,
        {"loss": nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.7]), label_smoothing=0.1)},
        {"accumulate_grad_batches": 3},
    ),
    "mse of a column": (regressor, {"loss": "mse"}, {"y": VALUES[:, 0], "accumulate_grad_batches": 3}),
    "huber of integers": (regressor, {"loss": nn.HuberLoss(delta=0.5)}, {"y": LABELS, "validation_split": 0.1}),
    "binary": (regressor, {"loss": "bce_with_logits"}, {"y": LABELS, "precision": None}),
    "small integers": (make_net, {}, {"y": LABELS[:, None].to(torch.int32)}),
    "probabilities": (make_net, {"precision": "bf16-mixed"}, {"y": torch.softmax(X[:, :2], 1)}),
    "float64 arrays": (regressor, {"loss": "mae"}, {"data": X.double().numpy(), "y": VALUES.double().numpy()}),
    "frozen layers": (frozen, {}, {"gradient_clip_val": 0.1, "validation_split": 0.2}),
    "a tensor loader": (
        make_net,
        {},
        {"data": DataLoader(TensorDataset(X, LABELS), batch_size=30, shuffle=True, drop_last=True), "y": None},
    ),
    "a tensor dataset": (make_net, {}, {"data": TensorDataset(X, LABELS), "y": None, "validation_split": 0.2}),
    "some parameters": (
        make_net,
        {"optimizer": lambda parameters: torch.optim.SGD(parameters[4:], lr=0.1)},
        {"gradient_clip_val": 0.1, "accumulate_grad_batches": 2},
    ),
    "a class of one's own": (lambda: nets().Net(12), {}, {"track_grad_norm": 1}),
    "two inputs": (lambda: nets().Two(), {"loss": "mse"}, {"data": [X[:, :3], X[:, 3:]], "y": X[:, :2]}),
    "inputs by name": (
        lambda: nets().Two(),
        {"loss": "mse"},
        {"data": {"right": X[:, :3], "left": X[:, 3:]}, "y": X[:, :2]},
    ),
    "a loss of one's own": (
        regressor,
        {"loss": None},
        {"y": VALUES, "accumulate_grad_batches": 3, "validation_split": 0.2},
    ),
    "a loss module of one's own": (regressor, {"loss": None}, {"y": VALUES, "accumulate_grad_batches": 3}),
    "a class of one's own in a row": (
        lambda: nn.Sequential(nn.Linear(6, 6), nets().Net(4), nn.Tanh(), nn.Linear(2, 2)),
        {},
        {},
    ),
    "a convolution": (
        lambda: nn.Sequential(nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2), nn.Flatten(), nn.Linear(8, 2)),
        {},
        {},
    ),
    "betas": (make_net, {"optimizer": "adam with betas"}, {}),
    "an optimizer of one's own": (make_net, {"optimizer": "one's own"}, {}),
    "schedules at once": (
        make_net,
        {},
        scheduled(
            lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(o, 0.5), lr_scheduler.StepLR(o, 2)]),
        ),
    ),
    "class weights and ignored targets": (
        make_net,
        {},
        {"y": IGNORING, "class_weight": {0: 0.3, 1: 2.0}, "validation_split": 0.2},
    ),
    "sets of labels": (
        make_net,
        {"loss": "multilabel_margin_loss"},
        {"y": torch.stack([LABELS, torch.full_like(LABELS, -1)], 1)},
    ),
    "similarities as loss": (
        make_net,
        {"loss": nn.CosineSimilarity()},
        {"y": X[:, :2], "accumulate_grad_batches": 3, "validation_split": 0.2},
    ),
    "item losses of one's own": (
        make_net,
        {"loss": None},
        {"y": X[:, :2], "accumulate_grad_batches": 3, "validation_split": 0.2},
    ),
    "a loss with its weight": (
        regressor,
        {"loss": None},
        {"y": SOME_BELOW_ZERO, "shuffle": False, "accumulate_grad_batches": 3, "validation_split": 0.2},
    ),
    "its weight without windows": (
        regressor,
        {"loss": None, "precision": "bf16-mixed"},
        {"y": SOME_BELOW_ZERO, "shuffle": False},
    ),
    "a loss module with its weight": (
        make_net,
        {"loss": None, "optimizer": "sgd"},
        {"y": IGNORING, "shuffle": False, "accumulate_grad_batches": 2, "validation_data": (X, IGNORING)},
    ),
    "a window that weighs nothing": (
        make_net,
        {"loss": None},
        {"y": torch.where(torch.arange(203) < 64, -100, LABELS), "shuffle": False, "accumulate_grad_batches": 2},
    ),
    "another optimizer": (lambda: nn.Linear(6, 2, bias=False), {"optimizer": "rmsprop"}, {}),
    "a schedule of one's own": (make_net, {}, {"callbacks": None}),
    "infinite losses": (make_net, {"learning_rate": 1e30, "optimizer": "sgd"}, {"on_nonfinite": "stop"}),
}


OWN_LOSSES: dict[str, Callable[[], Any]] = {
    "a loss of one's own": lambda: nets().distance,
    "item losses of one's own": lambda: nets().differences,
    "a loss module of one's own": lambda: nets().Scaled(0.5),
    "a loss with its weight": lambda: nets().mean_of_those_above_zero,
    "its weight without windows": lambda: nets().mean_of_those_above_zero,
    "a loss module with its weight": lambda: nets().Counting(),
    "a window that weighs nothing": lambda: nets().Counting(),
}


def nets() -> ModuleType:
    return importlib.import_module("fitkit_test_nets")


def arranged(name: str, folder: Path) -> tuple[fitkit.Model, dict[str, Any]]:
    """The compiled model of a case, and all that fit is given."""
    make, options, arguments = CASES[name]
    torch.manual_seed(1)
    model = fitkit.Model(make(), device="cpu")
    options = {"optimizer": "adam", "loss": "cross_entropy", "learning_rate": 0.02, **options}
    if callable(options["optimizer"]):
        parameters = list(model.module.parameters())
        options |= {"optimizer": torch.optim.SGD(parameters[-2:], lr=0.1), "learning_rate": None}
    if name == "betas":
        options |= {"optimizer": torch.optim.Adam(model.module.parameters(), betas=(0.5, 0.9)), "learning_rate": None}
    if name == "an optimizer of one's own":
        options |= {"optimizer": nets().Slow(model.module.parameters(), lr=0.1), "learning_rate": None}
    if name in OWN_LOSSES:
        options["loss"] = OWN_LOSSES[name]()
    arguments = {"data": X, "y": LABELS, "epochs": 4, "verbose": 0, **arguments}
    if name == "a schedule of one's own":
        arguments["callbacks"] = [LRScheduler(nets().warm_up, interval="step"), CSVLogger(folder / "log.csv")]
    if name == "everything at once" and arguments["callbacks"]:
        arguments["callbacks"] = list(arguments["callbacks"])
    arguments.pop("precision", None)
    model.compile(**options)
    return model, arguments


def script_of(name: str, folder: Path) -> Path:
    return folder / f"{name.replace(' ', '_').replace(',', '').replace(chr(39), '')}.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the scripts are; what they import besides torch lives there."""
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "fitkit_test_nets.py").write_text(NETS)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("fitkit_test_nets", None)


def run_here(path: Path) -> None:
    """Runs one script as it is, and puts the random numbers back that it draws."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runpy.run_path(str(path))


def run_scripts(paths: list[Path], folder: Path) -> None:
    """Runs scripts as they are, one after another in one process without fitkit."""
    code = "import runpy, sys\nfor path in sys.argv[1:]:\n    runpy.run_path(path)\nassert 'fitkit' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, paths)], env=environment, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def fitted(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The weights of every case's fit; the scripts of the same runs have been written before, and run afterwards."""
    weights = {}
    for name in CASES:
        model, arguments = arranged(name, folder)
        torch.manual_seed(2)
        model.to_script(script_of(name, folder), **arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about schedules of zero steps and the like
            model.fit(**arguments)
        weights[name] = model.module.state_dict()
    run_scripts([script_of(name, folder) for name in CASES], folder)
    return weights


@pytest.mark.parametrize("name", CASES)
def test_the_script_ends_with_the_weights_of_fit(name: str, folder: Path, fitted: dict[str, Any]) -> None:
    path = script_of(name, folder)
    trained = torch.load(path.with_name(f"{path.stem}_trained.pt"))
    start = torch.load(path.with_name(f"{path.stem}_start.pt"))["module"]
    assert list(trained) == list(fitted[name])
    assert any(not torch.equal(trained[key], start[key]) for key in trained)
    for key, value in fitted[name].items():
        assert torch.equal(value.nan_to_num(7.0), trained[key].nan_to_num(7.0)), key


@pytest.mark.parametrize("name", CASES)
def test_the_script_is_short_and_imports_torch_alone(name: str, folder: Path, fitted: dict[str, Any]) -> None:
    text = script_of(name, folder).read_text()
    imported = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    assert imported <= {"copy", "itertools", "math", "pathlib", "torch", "torch.utils.data", "fitkit_test_nets"}
    assert len(text.splitlines()) <= (110 if name == "everything at once" else 92)
    assert max(map(len, text.splitlines())) <= 88
    assert "$" not in text
    assert "#?" not in text


@pytest.mark.skipif(importlib.util.find_spec("ruff") is None, reason="ruff is not installed")
def test_formatters_and_linters_have_nothing_to_say(folder: Path, fitted: dict[str, Any]) -> None:
    paths = [str(script_of(name, folder)) for name in CASES]
    for command in (["format", "--diff"], ["check", "--select", "B,C4,E,F,PIE,SIM,UP,W"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--isolated", *paths], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout


def test_nothing_stands_there_that_the_run_does_not_need(folder: Path, fitted: dict[str, Any]) -> None:
    text = script_of("plain", folder).read_text()
    words = ("evaluate", "accumulate", "clip", "norm", "scheduler", "best", "autocast", "islice", "isnan", "weights is")
    assert not [word for word in words if word in text.replace("BatchNorm", "")]
    assert len(text.splitlines()) <= 60


def test_the_default_random_numbers_are_a_seed_to_read(folder: Path, fitted: dict[str, Any]) -> None:
    assert "torch.manual_seed(2)" in script_of("plain", folder).read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Runs in the midst of others, and data that is left to be filled in.
# ---------------------------------------------------------------------------------------------------------------------


class Pairs(Dataset[Any]):
    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index], LABELS[index]


def compiled(module: nn.Module | None = None, **options: Any) -> fitkit.Model:
    torch.manual_seed(1)
    model = fitkit.Model(module or make_net(), device="cpu")
    model.compile(**{"optimizer": "adam", "loss": "cross_entropy", **options})
    return model


def assert_same(path: Path, model: fitkit.Model) -> None:
    trained = torch.load(path.with_name(f"{path.stem}_trained.pt"))
    assert all(torch.equal(value, trained[name]) for name, value in model.module.state_dict().items())


def test_a_second_fit_goes_on_with_optimizer_and_random_numbers(folder: Path) -> None:
    model, path = compiled(), folder / "second.py"
    model.fit(X, LABELS, epochs=2, verbose=0)
    model.to_script(path, data=X, y=LABELS, epochs=2)
    model.fit(X, LABELS, epochs=2, verbose=0)
    run_here(path)
    assert_same(path, model)


def test_a_state_that_torch_does_not_load_exactly_is_refused(tmp_path: Path) -> None:
    model = compiled(optimizer="nadam", precision="64-true")
    model.fit(X, LABELS, epochs=1, verbose=0)
    with pytest.raises(ValueError, match="one that keeps mu_product as torch.float32"):
        model.to_script(tmp_path / "run.py", data=X, y=LABELS, epochs=1)


def test_groups_of_submodules_keep_their_rates(folder: Path) -> None:
    net, path = make_net(), folder / "groups.py"
    groups = [{"params": net[0].parameters(), "lr": 0.1}, {"params": net[4].parameters(), "momentum": 0.9}]
    model = compiled(net, optimizer=torch.optim.SGD(groups, lr=0.01))
    model.to_script(path, data=X, y=LABELS, epochs=2)
    model.fit(X, LABELS, epochs=2, verbose=0)
    run_here(path)
    assert_same(path, model)


def collate(samples: list[Any]) -> Any:
    return default_collate(samples)


FILLED: dict[str, tuple[Callable[[], Any], str]] = {
    "dataset": (Pairs, "TensorDataset(X, Y)"),
    "a loader": (
        lambda: DataLoader(Pairs(), batch_size=32, shuffle=True),
        "DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=32, shuffle=True)",
    ),
    "ready batches": (
        lambda: [(X[:100], LABELS[:100]), (X[100:], LABELS[100:])],
        "[(X[:100], Y[:100]), (X[100:], Y[100:])]",
    ),
    "a loader with a collate_fn": (
        lambda: DataLoader(TensorDataset(X, LABELS), batch_size=32, collate_fn=collate),
        "DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=32)",
    ),
    "a list of python's numbers": (lambda: Floats(), "[(X[i], Y[i].double()) for i in range(203)]"),
}


class Floats(Pairs):
    def __getitem__(self, index: int) -> Any:
        return X[index], float(LABELS[index])


@pytest.mark.parametrize("kind", FILLED)
def test_what_cannot_be_saved_is_a_line_to_fill_in(kind: str, folder: Path) -> None:
    make_data, filling = FILLED[kind]
    floats = kind.endswith("numbers")
    model, path = (
        compiled(regressor() if floats else None, loss="mse" if floats else "cross_entropy"),
        script_of(kind, folder),
    )
    model.to_script(path, data=make_data(), epochs=2, validation_data=(X, LABELS), accumulate_grad_batches=2)
    torch.save([X, LABELS], folder / "filled.pt")
    text = path.read_text()
    assert text.count("...  # FILL THIS IN: the ") == 1
    path.write_text(text.replace("= ...", f'= (lambda X, Y: {filling})(*torch.load(HERE / "filled.pt"))'))
    model.fit(make_data(), epochs=2, validation_data=(X, LABELS), accumulate_grad_batches=2, verbose=0)
    run_here(path)
    assert_same(path, model)


def test_arrays_that_are_too_large_to_be_copied_are_a_line_to_fill_in(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fitkit.script.sources.MOST_BYTES", 1000)
    model, path = compiled(), folder / "large.py"
    model.to_script(path, data=X, y=LABELS, epochs=2)
    torch.save([X, LABELS], folder / "filled.pt")
    assert not (folder / "large_data.pt").exists()
    path.write_text(path.read_text().replace("arrays = ...", 'arrays = torch.load(HERE / "filled.pt")'))
    model.fit(X, LABELS, epochs=2, verbose=0)
    run_here(path)
    assert_same(path, model)


def test_a_dataset_is_overfitted_in_its_batches(folder: Path) -> None:
    torch.save(torch.utils.data.Subset(TensorDataset(X, LABELS), range(100)), folder / "filled.pt")
    dataset = torch.load(folder / "filled.pt", weights_only=False)
    filled = ("= ...", '= torch.load(HERE / "filled.pt", weights_only=False)')
    arguments = {"data": dataset, "batch_size": 8, "epochs": 2, "overfit_pct": 0.5}
    assert_script_matches(folder / "overfit_dataset.py", compiled(), filled, **arguments)


def test_workers_are_left_to_fill_in(folder: Path) -> None:
    path = folder / "workers.py"
    compiled().to_script(path, data=Pairs(), epochs=1, dataloader_options={"num_workers": 1})
    assert "training = ...  # FILL THIS IN: a DataLoader as fit made it" in path.read_text()


def test_of_a_dataset_that_fit_splits_a_script_asks_for_the_parts(folder: Path) -> None:
    path = folder / "split.py"
    compiled().to_script(path, data=Pairs(), epochs=1, validation_split=0.25)
    asked = [line.partition("  # ")[2] for line in path.read_text().splitlines() if "FILL" in line]
    cut = int(0.75 * len(Pairs()))
    assert asked == [
        f"FILL THIS IN: samples 0 to {cut - 1} of the Pairs that fit was given",
        f"FILL THIS IN: samples {cut} to {len(Pairs()) - 1} of the Pairs that fit was given",
    ]


def test_item_losses_weigh_by_their_number(folder: Path) -> None:
    path = folder / "lengths.py"
    batches = [(X[: 24 * length].view(24, length, 6), X[: 24 * length, :2].view(24, length, 2)) for length in (3, 1, 7)]
    model = compiled(nn.Linear(6, 2), loss=nets().differences)
    model.to_script(path, data=batches, epochs=2, accumulate_grad_batches=3)
    torch.save(batches, folder / "filled.pt")
    path.write_text(path.read_text().replace("= ...", '= torch.load(HERE / "filled.pt")'))
    model.fit(batches, epochs=2, accumulate_grad_batches=3, verbose=0)
    run_here(path)
    assert_same(path, model)


def assert_script_matches(
    path: Path, model: fitkit.Model, replaced: tuple[str, str] = ("", ""), **arguments: Any
) -> None:
    """Writes, fits, runs and compares."""
    model.to_script(path, **arguments)
    path.write_text(path.read_text().replace(*replaced))
    model.fit(**arguments, verbose=0)
    run_here(path)
    assert_same(path, model)


def test_a_class_of_a_name_of_torchs_is_not_taken_for_torchs(folder: Path) -> None:
    net = nn.Sequential(nn.Linear(6, 4), nets().Linear(4, 2))
    assert_script_matches(folder / "linear.py", compiled(net), data=X, y=LABELS, epochs=1)


def test_functions_may_have_names_that_a_script_has_too(folder: Path) -> None:
    callbacks = [LRScheduler(nets().scheduler, interval="step")]
    model, path = compiled(regressor(), loss=nets().loss), folder / "names.py"
    assert_script_matches(path, model, data=X, y=VALUES, epochs=2, callbacks=callbacks)
    assert "from fitkit_test_nets import loss as own_loss, scheduler as own_scheduler" in path.read_text()


def test_a_class_may_have_a_name_that_a_script_has_too(folder: Path) -> None:
    (folder / "fitkit_test_words.py").write_text("from torch import nn\n\n\nclass Path(nn.Linear):\n    pass\n")
    net = nn.Sequential(importlib.import_module("fitkit_test_words").Path(6, 2))
    assert_script_matches(folder / "class_name.py", compiled(net), data=X, y=LABELS, epochs=1)


def test_two_things_of_one_name_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "fitkit_test_others.py").write_text(
        "from fitkit_test_nets import warm_up\n\n\ndef Net(optimizer):\n    return warm_up(optimizer)\n"
    )
    callbacks = LRScheduler(importlib.import_module("fitkit_test_others").Net)
    with pytest.raises(ValueError, match="Net of fitkit_test_others and Net of fitkit_test_nets. Rename one of them"):
        compiled(nets().Net(3)).to_script(tmp_path / "run.py", data=X, y=LABELS, epochs=1, callbacks=callbacks)


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
@pytest.mark.parametrize("kind", ["loader", "dataset", "batches", "own order"])
def test_batches_are_in_the_dtype_in_which_fit_takes_them(kind: str, precision: str, folder: Path) -> None:
    pairs = TensorDataset(X, VALUES, WEIGHTS.double())
    order = DataLoader(pairs, batch_size=32, shuffle=True, generator=torch.Generator().manual_seed(1))
    kinds = {"loader": DataLoader(pairs, batch_size=32), "dataset": pairs, "batches": list(order), "own order": order}
    path = folder / f"dtypes_{kind}_{precision}.py".replace(" ", "_")
    torch.save(kinds[kind], folder / "filled.pt")
    filled = ("= ...", '= torch.load(HERE / "filled.pt", weights_only=False)')
    model = compiled(regressor(), loss="mse", precision=precision)
    assert_script_matches(path, model, filled, data=kinds[kind], epochs=2, accumulate_grad_batches=3)


@pytest.mark.parametrize("shape", [(203, 1), (203, 2)], ids=["a column", "elements"])
def test_sample_weights_may_have_the_shape_of_the_items(shape: tuple[int, ...], folder: Path) -> None:
    weights = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    path = folder / f"weights_{shape[1]}.py"
    assert_script_matches(path, compiled(loss="mse"), data=X, y=X[:, :2], sample_weight=weights, epochs=2)


def test_a_column_of_sample_weights_is_one_a_sample_for_classes(folder: Path) -> None:
    path = folder / "weights_column.py"
    assert_script_matches(path, compiled(), data=X, y=LABELS, sample_weight=WEIGHTS.unsqueeze(1), epochs=2)


def test_sample_weights_of_two_shapes_are_refused(tmp_path: Path) -> None:
    validation = (X, X[:, :2], torch.ones(203, 2))
    with pytest.raises(ValueError, match="received sample_weight: one a sample here and one an element there"):
        compiled(loss="mse").to_script(
            tmp_path / "run.py", data=X, y=X[:, :2], sample_weight=WEIGHTS, validation_data=validation, epochs=1
        )


def test_a_validation_without_any_target_is_nan(folder: Path) -> None:
    validation = (X[:5], torch.full((5,), -100))
    path = folder / "nothing_to_validate.py"
    assert_script_matches(path, compiled(), data=X, y=LABELS, validation_data=validation, epochs=2)


def test_looking_at_a_loss_leaves_the_module_as_it_was(tmp_path: Path) -> None:
    net = make_net().eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    compiled(net, loss=nn.PairwiseDistance()).to_script(tmp_path / "run.py", data=X, y=X[:, :2], epochs=1)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(child.training for child in net.modules())


def test_overfitting_a_loader_that_shuffles_is_refused(tmp_path: Path) -> None:
    loader = DataLoader(Pairs(), batch_size=8, shuffle=True)
    with pytest.raises(ValueError, match="received overfit_pct: a DataLoader whose order it changes"):
        compiled().to_script(tmp_path / "run.py", data=loader, epochs=1, overfit_pct=0.5)


def test_a_tensor_loader_is_overfitted_in_order(folder: Path) -> None:
    loader = DataLoader(TensorDataset(X, LABELS), batch_size=8, shuffle=True)
    model, path = compiled(), folder / "overfit_loader.py"
    model.to_script(path, data=loader, epochs=2, overfit_pct=0.5)
    model.fit(loader, epochs=2, overfit_pct=0.5, verbose=0)
    run_here(path)
    assert_same(path, model)


def test_a_class_whose_making_is_unknown_is_left_to_fill_in(folder: Path) -> None:
    model, path = compiled(nets().Secret([5])), folder / "secret.py"
    model.to_script(path, data=X, y=LABELS, epochs=1)
    text = path.read_text()
    assert "from fitkit_test_nets import Secret" in text
    assert "module = Secret(...)  # FILL THIS IN: as you made it" in text
    path.write_text(text.replace("Secret(...)", "Secret([5])"))
    model.fit(X, LABELS, epochs=1, verbose=0)
    run_here(path)
    assert_same(path, model)


@pytest.mark.parametrize("make", [lambda: nets().Hidden(2.0), lambda: nn.Sequential(nets().Hidden(2.0))])
def test_what_a_module_keeps_to_itself_is_not_guessed(make: Callable[[], nn.Module], folder: Path) -> None:
    compiled(make()).to_script(folder / "hidden.py", data=X, y=LABELS, epochs=1)
    assert "(...)  # FILL THIS IN: as you made it" in (folder / "hidden.py").read_text()


def test_hooks_on_a_module_are_not_overlooked(folder: Path) -> None:
    net = make_net()
    net[0].register_forward_hook(lambda module, arguments, output: output * 2)
    compiled(net).to_script(folder / "hooked.py", data=X, y=LABELS, epochs=1)
    assert "module = nn.Sequential(...)  # FILL THIS IN" in (folder / "hooked.py").read_text()


def test_tied_weights_are_not_untied(folder: Path) -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    net[1].weight = net[0].weight
    compiled(net).to_script(folder / "tied.py", data=X, y=LABELS, epochs=1)
    assert "module = nn.Sequential(...)  # FILL THIS IN" in (folder / "tied.py").read_text()


@pytest.mark.long
def test_a_compiled_module_stays_compiled(folder: Path) -> None:
    model, path = compiled(nn.Linear(6, 2), jit_compile=True), folder / "jit.py"
    model.to_script(path, data=X, y=LABELS, epochs=2)
    model.fit(X, LABELS, epochs=2, verbose=0)
    run_here(path)
    assert "output = compiled(x)" in path.read_text()
    assert_same(path, model)


def test_writing_a_script_changes_nothing(folder: Path) -> None:
    model = compiled()
    loader = DataLoader(TensorDataset(X, LABELS), batch_size=20, shuffle=True, generator=torch.Generator())
    before = (str(model.module.state_dict()), torch.get_rng_state(), loader.generator.get_state(), model.history)
    model.to_script(folder / "untouched.py", data=loader, epochs=2, validation_data=Pairs())
    after = (str(model.module.state_dict()), torch.get_rng_state(), loader.generator.get_state(), model.history)
    assert before[0] == after[0]
    assert torch.equal(before[1], after[1])
    assert torch.equal(before[2], after[2])
    assert before[3] is after[3]


CHOICES: dict[str, list[dict[str, Any]]] = {
    "epochs": [{"epochs": 1}, {"epochs": 4}, {"epochs": 3, "initial_epoch": 1}, {"epochs": 3, "min_nb_epochs": 2}],
    "batches": [{"batch_size": 10}, {"batch_size": 32, "shuffle": False}, {"batch_size": 300}],
    "windows": [{}, {"accumulate_grad_batches": 3}, {"accumulate_grad_batches": {1: 3}}],
    "clipping": [{}, {"gradient_clip_val": 0.01}, {"gradient_clip_val": 1}],
    "norms": [{}, {"track_grad_norm": 2}, {"track_grad_norm": "inf"}],
    "part": [{}, {"train_percent_check": 0.77}, {"overfit_pct": 0.4}, {"steps_per_epoch": 1}],
    "validation": [{}, {"validation_split": 0.25}, {"validation_split": 0.25, "validation_freq": [1, 3]}],
    "nonfinite": [{"on_nonfinite": "raise"}, {"on_nonfinite": "ignore"}, {"on_nonfinite": "stop"}],
    "weights": [{}, {"sample_weight": WEIGHTS}, {"class_weight": {1: 2.0}}],
    "callbacks": [
        {},
        scheduled(lambda o: lr_scheduler.ExponentialLR(o, 0.9), interval="step"),
        {"callbacks": EarlyStopping("loss", patience=1, mode="max", restore_best_weights=True)},
    ],
}


@pytest.mark.long
@pytest.mark.parametrize("seed", range(60))
def test_any_settings_together_end_with_the_weights_of_fit(seed: int, folder: Path) -> None:
    chosen = random.Random(seed)
    arguments = {name: value for each in CHOICES.values() for name, value in chosen.choice(each).items()}
    net = chosen.choice([make_net, frozen])()
    optimizer = chosen.choice(["adam", "sgd", "rmsprop", "adagrad", "nadam"])
    model = compiled(net, optimizer=optimizer, precision=chosen.choice(["32-true", "bf16-mixed", "64-true"]))
    path, y = folder / f"any_{seed}.py", chosen.choice([LABELS, IGNORING])
    model.to_script(path, data=X, y=y, **arguments)
    model.fit(X, y, verbose=0, **arguments)
    run_here(path)
    assert_same(path, model)


# ---------------------------------------------------------------------------------------------------------------------
# What a script cannot say.
# ---------------------------------------------------------------------------------------------------------------------


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(Pairs())  # type: ignore[call-overload]


class OwnStep(fitkit.Model):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.module(batch[0]).mean()


class Keeping(nn.Module):
    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return (output * self.kept).mean()


def weighed_elsewhere(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return output.mean(), torch.ones((), device="meta")


class OwnSchedule(lr_scheduler.StepLR):
    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer, 1)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a generator": ({}, {"data": iter([(X, LABELS)]), "y": None, "steps_per_epoch": 1}, "received data: "),
    "a stream": ({}, {"data": Stream(), "y": None}, "received data: "),
    "a stream to validate on": ({}, {"validation_data": Stream()}, "received validation_data: "),
    "micro-batches": ({}, {"micro_batch_size": 4}, "received micro_batch_size: 4"),
    "a callback that does anything": ({}, {"callbacks": LambdaCallback()}, "callbacks: LambdaCallback"),
    "averaged weights": ({}, {"callbacks": SwapEMAWeights()}, "callbacks: SwapEMAWeights"),
    "a lambda of a lambda": (
        {},
        {"callbacks": LRScheduler(lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch))},
        "callbacks: LRScheduler with a scheduler",
    ),
    "a metric as monitor": (
        {"metrics": ["accuracy"]},
        {"callbacks": EarlyStopping("accuracy")},
        r"callbacks: EarlyStopping\(accuracy\)",
    ),
    "a lambda as loss": ({"loss": lambda output, target: output.mean()}, {}, r"compile\(loss=\.\.\.\): a function"),
    "a loss module that keeps what nobody can write": (
        {"loss": Keeping(torch.ones(2))},
        {},
        "a Keeping that a script cannot make anew",
    ),
    "a scheduler of one's own": (
        {},
        {"callbacks": LRScheduler(lambda o: OwnSchedule(o))},
        "callbacks: LRScheduler with a scheduler",
    ),
    "schedules in a row with one of one's own": (
        {},
        {
            "callbacks": LRScheduler(
                lambda o: lr_scheduler.SequentialLR(o, [OwnSchedule(o), lr_scheduler.StepLR(o, 1)], [2])
            )
        },
        "callbacks: LRScheduler with a scheduler",
    ),
    "a loss whose weight is elsewhere": (
        {"loss": weighed_elsewhere},
        {},
        "one whose weight is on meta, where fit does not read it",
    ),
    "a sum": ({"loss": nn.CrossEntropyLoss(reduction="sum")}, {}, r"compile\(loss=\.\.\.\): one with reduction"),
    "several losses": ({"loss": ["mse"]}, {}, r"compile\(loss=\.\.\.\): none, or one for each"),
    "float16": ({"precision": "16-mixed"}, {}, r"compile\(precision=\.\.\.\)"),
    "channels last": ({"channels_last": True}, {}, r"compile\(channels_last=\.\.\.\)"),
    "two that stop": (
        {},
        {"callbacks": [EarlyStopping("loss"), EarlyStopping("loss", mode="max")]},
        "a second EarlySt",
    ),
    "two that set rates": (
        {},
        {
            "callbacks": [
                LearningRateScheduler(lambda epoch, rate: rate),
                LRScheduler(lambda o: lr_scheduler.StepLR(o, 1)),
            ]
        },
        "LearningRateScheduler beside LRScheduler",
    ),
    "rates of many epochs": (
        {},
        {"callbacks": LearningRateScheduler(lambda epoch, rate: rate), "epochs": 201},
        "LearningRateScheduler over many epochs",
    ),
    "a schedule by a metric": (
        {"metrics": ["accuracy"]},
        {"callbacks": LRScheduler(lr_scheduler.ReduceLROnPlateau, monitor="accuracy")},
        r"callbacks: LRScheduler\(accuracy",
    ),
    "weights of very many classes": ({}, {"class_weight": {10**6: 2.0}}, "class_weight: over 1000001 classes"),
    "class weights of a Dataset": (
        {},
        {"data": Pairs(), "y": None, "class_weight": {1: 2.0}},
        "class_weight: over targets that are no saved",
    ),
    "sample weights and a loss of one's own": (
        {"loss": lambda output, target: output.mean(1)},
        {"sample_weight": WEIGHTS},
        "sample_weight: with a loss of your own",
    ),
    "a loss with weights of elements": (
        {"loss": nn.BCEWithLogitsLoss(weight=torch.ones(2))},
        {"y": X[:, :2].sigmoid()},
        "one with weights of its own",
    ),
    "a loss with a tensor": (
        {"loss": nn.BCEWithLogitsLoss(pos_weight=torch.ones(2))},
        {"y": X[:, :2].sigmoid()},
        "one with a tensor pos_weight",
    ),
    "class weights beside ignored targets": (
        {"loss": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0]))},
        {"y": IGNORING},
        "class weights and ignored targets",
    ),
    "targets that are no tensor": ({}, {"data": [(X, {"a": LABELS})], "y": None}, r"batches that are not \(x, y\)"),
    "inputs in nests": ({}, {"data": [([[X]], LABELS)], "y": None}, "inputs that are neither tensors nor a list"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_script_cannot_say_is_an_error_before_anything_is_written(name: str, tmp_path: Path) -> None:
    options, arguments, words = REFUSED[name]
    model = compiled(**options)
    with pytest.raises(ValueError, match=words):
        model.to_script(tmp_path / "run.py", **{"data": X, "y": LABELS, "epochs": 1, **arguments})
    assert list(tmp_path.iterdir()) == []


def eval_around_trained() -> nn.Module:
    net = nn.Sequential(nn.Sequential(nn.Linear(6, 2)))
    net[0].training = False
    return net


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (eval_around_trained(), "received module: 0 in evaluation mode around what is trained"),
        (nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2).double()), "received module: parameters of several dtypes"),
        (nn.Linear(6, 2).requires_grad_(False), "Expected a module with trainable parameters"),
    ],
    ids=["modes", "dtypes", "frozen"],
)
def test_a_module_that_a_script_cannot_make_anew_is_refused(module: nn.Module, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        compiled(module).to_script(tmp_path / "run.py", data=X, y=LABELS, epochs=1)


def test_an_optimizer_that_cannot_be_imported_is_refused(tmp_path: Path) -> None:
    class Local(torch.optim.SGD):
        pass

    model = compiled(optimizer=Local)
    with pytest.raises(ValueError, match="a Local that cannot be imported"):
        model.to_script(tmp_path / "run.py", data=X, y=LABELS, epochs=1)


def test_an_optimizer_over_part_of_a_submodule_is_refused(tmp_path: Path) -> None:
    module = make_net()
    model = compiled(module, optimizer=torch.optim.SGD([module[0].weight], lr=0.1))
    with pytest.raises(ValueError, match="a SGD over parameters or with options that a script has no name for"):
        model.to_script(tmp_path / "run.py", data=X, y=LABELS, epochs=1)


def test_a_scheduler_that_has_stepped_is_refused(tmp_path: Path) -> None:
    model = compiled()
    assert model.optimizer is not None
    scheduler = lr_scheduler.StepLR(model.optimizer, 2)
    model.optimizer.step()
    scheduler.step()
    with pytest.raises(ValueError, match="a scheduler that has stepped"):
        model.to_script(tmp_path / "run.py", data=X, y=LABELS, epochs=1, callbacks=LRScheduler(scheduler))


def test_a_run_that_goes_on_from_a_file_is_refused(tmp_path: Path) -> None:
    model = compiled()
    model.fit(X, LABELS, epochs=1, verbose=0)
    model.save(tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"received resume_from: .*Load it with model.load\(path\) first"):
        model.to_script(tmp_path / "run.py", data=X, y=LABELS, epochs=2, resume_from=tmp_path / "state.pt")


def test_a_step_of_ones_own_is_refused(tmp_path: Path) -> None:
    model = OwnStep(make_net(), device="cpu")
    model.compile("sgd")
    with pytest.raises(ValueError, match="received training_step: one of your own"):
        model.to_script(tmp_path / "run.py", data=X, y=LABELS, epochs=1)


def test_a_class_that_cannot_be_imported_is_refused(tmp_path: Path) -> None:
    class Local(nn.Linear):
        pass

    with pytest.raises(ValueError, match="received module: a Local, which cannot be imported"):
        compiled(Local(6, 2)).to_script(tmp_path / "run.py", data=X, y=LABELS, epochs=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "error", "words"),
    [("run.txt", ValueError, r"ends in .py, received path='run.txt'"), (3, TypeError, "received path=3")],
)
def test_the_path_is_that_of_a_script(path: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        compiled().to_script(path, data=X, y=LABELS, epochs=1)


def test_data_has_to_be_given(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"received no data. Write to_script\(path, data="):
        compiled().to_script(tmp_path / "run.py", epochs=1)


def test_what_fit_refuses_is_refused_with_the_same_words(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="received train_percent_check=0"):
        compiled().to_script(tmp_path / "run.py", data=X, y=LABELS, train_percent_check=0.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'epoch'"):
        compiled().to_script(tmp_path / "run.py", data=X, y=LABELS, epoch=1)


@pytest.mark.parametrize(
    ("value", "text"),
    [(math.inf, 'float("inf")'), ((1,), "(1,)"), ((0.5, 1e20), "(0.5, 1e20)"), ([1, [2]], "[1, [2]]")],
    ids=str,
)
def test_a_literal_is_read_as_what_was_written(value: Any, text: str) -> None:
    assert literal(value) == text
    assert eval(text) == value


@pytest.mark.parametrize("value", [{1, 2}, [1, X], "\0"], ids=["set", "tensor", "unprintable"])
def test_what_has_no_literal_is_not_written(value: Any) -> None:
    assert literal(value) is None


class Small(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        if size > 3:
            raise ValueError("too much")
        self.size = size


def test_a_module_that_cannot_be_made_from_its_attributes_has_no_expression() -> None:
    changed, named = Small(3), nn.Sequential(OrderedDict(first=nn.Linear(6, 2)))
    changed.size = 4
    assert module_expression(changed) is None
    assert module_expression(named) is None
