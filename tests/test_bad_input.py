"""Wrong calls: each is refused before the first batch, with the argument's name, what came and what to do."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import fitkit
from fitkit.callbacks import Callback, EarlyStopping

X, Y = torch.ones(10, 3), torch.zeros(10, 1)
LOADER = DataLoader(TensorDataset(X, Y), batch_size=5)
NAN, INF = math.nan, math.inf


class Net(nn.Linear):
    """Counts its calls, so that a test can say that no batch came."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__(3, outputs)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Misspelt(Callback):
    """A hook that would never be called."""

    def on_epoch_ends(self, epoch: int, logs: Any = None) -> None:
        """Is not called."""


class Narrow(Callback):
    """A hook that cannot take its arguments."""

    def on_epoch_end(self, epoch: int) -> None:  # type: ignore[override]
        """Fails when it is called."""


class Pairs(Dataset[Any]):
    """Samples by index."""

    def __init__(self, samples: int = 10) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Any:
        return X[index], Y[index]


class Stream(IterableDataset[Any]):
    """Samples one after the other; does not tell how many."""

    def __iter__(self) -> Iterator[Any]:
        return iter(zip(X, Y, strict=True))


def generator() -> Iterator[Any]:
    yield X, Y


def named(argument: str, text: str) -> str:
    """What a message about a value says: what was expected, the argument's name and the value."""
    return rf"Expected .*received {argument}={text}"


INTEGERS = {"1.5": 1.5, "2.0": 2.0, "nan": NAN, "True": True, "'2'": "2", r"tensor\(2\)": torch.tensor(2)}
NUMBERS = {"True": True, "'1'": "1", r"\[1\]": [1]}
FRACTIONS = {"nan": NAN, "inf": INF, "-0.1": -0.1, "1.1": 1.1}

# Arguments of fit beside (X, Y), and what the message says.
FIT: list[tuple[dict[str, Any], str]] = [
    *(
        ({name: value}, named(name, text))
        for name in (
            *("epochs", "max_nb_epochs", "min_nb_epochs", "initial_epoch", "batch_size", "validation_batch_size"),
            *("steps_per_epoch", "validation_steps", "validation_freq", "accumulate_grad_batches"),
        )
        for text, value in INTEGERS.items()
    ),
    *(
        ({name: value}, named(name, text))
        for name in ("validation_split", "gradient_clip_val", "train_percent_check", "val_percent_check", "overfit_pct")
        for text, value in NUMBERS.items()
    ),
    *(
        ({name: value}, named(name, text))
        for name in ("validation_split", "train_percent_check", "val_percent_check", "overfit_pct")
        for text, value in FRACTIONS.items()
    ),
    # Epochs.
    ({"epochs": -1}, r"Expected an integer of at least 0, received epochs=-1"),
    ({"max_nb_epochs": 0}, r"Expected an integer of at least 1, received max_nb_epochs=0"),
    ({"min_nb_epochs": 0}, r"Expected an integer of at least 1, received min_nb_epochs=0"),
    ({"initial_epoch": -1}, r"Expected an integer of at least 0, received initial_epoch=-1"),
    ({"epochs": 3, "max_nb_epochs": 5}, r"epochs=3 and max_nb_epochs=5 exclude each other\. epochs trains exactly"),
    ({"epochs": 3, "min_nb_epochs": 4}, r"Expected min_nb_epochs to be at most epochs=3, received min_nb_epochs=4"),
    ({"max_nb_epochs": 3, "min_nb_epochs": 4}, r"at most max_nb_epochs=3, received min_nb_epochs=4"),
    ({"min_nb_epochs": 1001}, r"at most max_nb_epochs=1000, received min_nb_epochs=1001"),
    # Batches.
    ({"batch_size": 0}, r"Expected an integer of at least 1, received batch_size=0"),
    ({"batch_size": "auto"}, r"Expected an integer of at least 1, received batch_size='auto'"),
    ({"shuffle": 1}, r"Expected True or False, received shuffle=1"),
    ({"shuffle": "batch"}, r"Expected True or False, received shuffle='batch'"),
    ({"steps_per_epoch": 0}, r"Expected an integer of at least 1, received steps_per_epoch=0"),
    ({"steps_per_epoch": 3, "batch_size": 5}, r"steps_per_epoch of at most 2, the batches in data, received steps_per"),
    (
        {"steps_per_epoch": 1, "train_percent_check": 0.5},
        r"steps_per_epoch=1 and train_percent_check=0\.5 exclude each",
    ),
    ({"steps_per_epoch": 1, "overfit_pct": 0.5}, r"steps_per_epoch=1 and overfit_pct=0\.5 exclude each other"),
    ({"train_percent_check": 0}, r"Expected a fraction above 0 and up to 1, received train_percent_check=0"),
    ({"val_percent_check": 0.0}, r"Expected a fraction above 0 and up to 1, received val_percent_check=0"),
    # Validation.
    ({"validation_split": 1.0}, r"Expected a fraction from 0 up to, not including, 1, received validation_split=1\.0"),
    ({"validation_split": 0.99}, r"received validation_split=0\.99 for 10 samples: 0 for training, 10 for validation"),
    ({"validation_split": 0.5, "validation_data": (X, Y)}, r"validation_split=0\.5 and validation_data=\.\.\. exclude"),
    ({"validation_data": (X, Y[:4])}, r"different lengths: validation_data\[0\] has 10, validation_data\[1\] has 4"),
    ({"validation_data": (X[:0], Y[:0])}, r"at least one sample, received validation_data\[0\] with 0 samples"),
    ({"validation_data": (X, Y, Y, Y)}, r"Expected validation_data to be \(x,\), \(x, y\) or .*received a tuple of 4"),
    ({"validation_data": []}, r"Expected at least one batch, received validation_data that holds none"),
    (
        {"validation_data": Pairs(0)},
        r"Expected at least one sample, received validation_data, a Dataset with 0 samples",
    ),
    ({"validation_data": 0.2}, r"Expected arrays, a Dataset.*received validation_data=0\.2"),
    ({"validation_data": True}, r"Expected arrays, a Dataset.*received validation_data=True"),
    (
        {"validation_data": LOADER, "validation_batch_size": 4},
        r"validation_batch_size=4 goes with .*validation_data=Data",
    ),
    ({"validation_data": generator(), "epochs": 2}, r"Expected validation_data that .* 2 epochs, received a generator"),
    (
        {"validation_data": Stream(), "val_percent_check": 0.5},
        r"val_percent_check=0\.5 .* Pass validation_steps=\.\.\.",
    ),
    (
        {"validation_data": (X, Y), "validation_steps": 2},
        r"validation_steps of at most 1, .* received validation_steps=2",
    ),
    (
        {"validation_data": (X, Y), "validation_steps": 1, "val_percent_check": 0.5},
        r"validation_steps=1 and val_percent",
    ),
    ({"validation_steps": 1}, r"validation_steps=1 needs validation_data=\.\.\. or validation_split=\.\.\."),
    ({"validation_batch_size": 4}, r"validation_batch_size=4 needs validation_data=\.\.\. or validation_split=\.\.\."),
    ({"validation_freq": 0}, r"Expected an integer of at least 1, received validation_freq=0"),
    ({"validation_freq": [0]}, r"Expected an integer of at least 1, received validation_freq's epoch=0"),
    ({"validation_freq": []}, r"Expected the epochs to validate after, received validation_freq=\[\]"),
    # Weights.
    ({"class_weight": [1.0, 2.0]}, r"Expected \{class: weight\}, received class_weight=\[1\.0, 2\.0\]"),
    ({"class_weight": "balanced"}, r"received class_weight='balanced'\. Classes weigh alike with"),
    ({"class_weight": {}}, r"Expected \{class: weight\}, received class_weight=\{\}"),
    ({"class_weight": {"a": 1.0}}, r"Expected an integer of at least 0, received class_weight's class='a'"),
    ({"class_weight": {-1: 1.0}}, r"Expected an integer of at least 0, received class_weight's class=-1"),
    ({"class_weight": {True: 1.0}}, r"Expected an integer of at least 0, received class_weight's class=True"),
    ({"class_weight": {0: -1.0}}, r"Expected a number of at least 0, received class_weight\[0\]=-1\.0"),
    ({"class_weight": {0: NAN}}, r"Expected a number of at least 0, received class_weight\[0\]=nan"),
    (
        {"class_weight": {0: 1.0}, "sample_weight": Y},
        r"class_weight=\.\.\. and sample_weight=\.\.\. exclude each other",
    ),
    ({"sample_weight": torch.ones(4)}, r"different lengths: x has 10, y has 10, sample_weight has 4"),
    ({"sample_weight": 2.0}, r"Expected an array, received sample_weight=2\.0"),
    ({"sample_weight": np.array(["a"] * 10)}, r"Expected numbers, received sample_weight, an array of dtype <U1"),
    # Callbacks and stopping.
    (
        {"callbacks": EarlyStopping},
        r"Expected a list of callbacks, received callbacks=.*It is a class: pass an instance",
    ),
    ({"callbacks": [EarlyStopping]}, r"received callbacks\[0\]=.*It is a class: pass an instance, EarlyStopping\("),
    ({"callbacks": [None]}, r"received callbacks\[0\]=None\. Leave it out"),
    ({"callbacks": [print]}, r"received callbacks\[0\]=.*A function is passed as LambdaCallback"),
    ({"callbacks": "early"}, r"Expected a list of callbacks, received callbacks='early'"),
    ({"callbacks": [Misspelt()]}, r"Misspelt\.on_epoch_ends is no hook.*Did you mean 'on_epoch_end'"),
    ({"callbacks": [Narrow()]}, r"Narrow\.on_epoch_end is called as on_epoch_end\(epoch, logs\), but it takes \(epoch"),
    ({"callbacks": [EarlyStopping()]}, r"EarlyStopping\(monitor='val_loss'\) .*This run has no validation"),
    (
        {"callbacks": [EarlyStopping("los")]},
        r"EarlyStopping\(monitor='los'\) watches .*Did you mean 'loss'\?.*Known keys",
    ),
    (
        {"early_stop_callback": EarlyStopping("val_mae")},
        r"EarlyStopping\(monitor='val_mae'\) watches a key that this ru",
    ),
    ({"early_stop_callback": EarlyStopping}, r"Expected an EarlyStopping, received early_stop_callback=<class"),
    ({"early_stop_callback": True}, r"Expected an EarlyStopping, received early_stop_callback=True"),
    ({"early_stop_callback": "loss"}, r"Expected an EarlyStopping, received early_stop_callback='loss'"),
    ({"enable_early_stop": 0}, r"Expected True or False, received enable_early_stop=0"),
    # The flags of the steps.
    ({"accumulate_grad_batches": 0}, r"Expected an integer of at least 1, received accumulate_grad_batches=0"),
    ({"accumulate_grad_batches": -1}, r"Expected an integer of at least 1, received accumulate_grad_batches=-1"),
    ({"accumulate_grad_batches": {}}, r"Expected \{epoch: batches\}, received accumulate_grad_batches=\{\}"),
    ({"accumulate_grad_batches": {0: 1.5}}, r"at least 1, received accumulate_grad_batches\[0\]=1\.5"),
    ({"accumulate_grad_batches": {1.5: 2}}, r"at least 0, received accumulate_grad_batches' epoch=1\.5"),
    ({"gradient_clip_val": -1}, r"Expected a number of at least 0, received gradient_clip_val=-1"),
    ({"gradient_clip_val": NAN}, r"Expected a number of at least 0, received gradient_clip_val=nan"),
    ({"gradient_clip_val": None}, r"Expected a number, received gradient_clip_val=None"),
    ({"track_grad_norm": 0}, r'Expected -1 \(off\), a number above 0 or "inf", received track_grad_norm=0'),
    ({"track_grad_norm": NAN}, r"Expected a number that is finite, received track_grad_norm=nan"),
    ({"track_grad_norm": True}, r"Expected a number, received track_grad_norm=True"),
    ({"track_grad_norm": "two"}, r"""Expected -1 \(off\), a number above 0 or "inf", received track_grad_norm='two'"""),
    ({"micro_batch_size": 0}, r"Expected an integer of at least 1, received micro_batch_size=0"),
    ({"micro_batch_size": 2.0}, r"Expected an integer of at least 1, received micro_batch_size=2\.0"),
    ({"micro_batch_size": True}, r"Expected an integer of at least 1, received micro_batch_size=True"),
    ({"micro_batch_size": "half"}, r"""Expected a number of samples or "auto", received micro_batch_size='half'"""),
    (
        {"on_nonfinite": "rise"},
        r"Expected one of 'raise', 'stop', 'ignore', received on_nonfinite='rise'\. Did you mean",
    ),
    ({"on_nonfinite": None}, r"Expected one of 'raise', 'stop', 'ignore', received on_nonfinite=None"),
    ({"verbose": 3}, r'Expected "auto", 0 \(nothing\), 1 \(a bar\) or 2 .*received verbose=3'),
    ({"verbose": True}, r'Expected "auto", 0 .*received verbose=True'),
    ({"verbose": "loud"}, r"""Expected "auto", 0 .*received verbose='loud'"""),
]

# Data of fit, further arguments, and what the message says.
DATA: list[tuple[Any, dict[str, Any], str]] = [
    (None, {}, r"Expected arrays, a Dataset, a DataLoader, an iterable of batches or a generator, received data=None"),
    (5, {}, r"Expected arrays, a Dataset.*received data=5"),
    ("x.csv", {}, r"Expected arrays, a Dataset.*received data='x\.csv'"),
    (generator, {}, r"Expected arrays, a Dataset.*received data=<function generator.*It is a function: call it"),
    (X, {"y": Y[:4]}, r"different lengths: x has 10, y has 4\. The first dimension of every array counts samples"),
    (X[:0], {"y": Y[:0]}, r"Expected at least one sample, received x with 0 samples"),
    (X[0, 0], {"y": Y}, r"Expected samples along the first dimension, received x of shape \(\)"),
    ((X, Y), {"y": Y}, r"data is a tuple, which means \(x, y\) .*and y=\.\.\. came as well\. Pass it once"),
    ((X, Y), {"sample_weight": Y}, r"data is a tuple, .*and sample_weight=\.\.\. came as well\. Pass it once"),
    ((X, X, X, Y), {}, r"Expected data to be \(x,\), \(x, y\) or .*received a tuple of 4\. Several inputs are a list"),
    ((), {}, r"Expected data to be \(x,\), .*received a tuple of 0"),
    ({}, {}, r"Expected at least one array, received x=\{\}"),
    ({"a": X, "b": X[:4]}, {"y": Y}, r"different lengths: x\['a'\] has 10, x\['b'\] has 4, y has 10"),
    (
        X,
        {"sample_weight": Y},
        r"Expected targets beside the weights, received sample_weight=Tensor of shape \(10, 1\) an",
    ),
    (
        [1.0, 2.0],
        {"y": [0.0, 1.0]},
        r"Expected an array, received x=\[1\.0, 2\.0\]\. .*make numbers an array with torch",
    ),
    (X, {"y": "labels"}, r"Expected an array, received y='labels'"),
    (X, {"y": np.array(["cat", "dog"] * 5)}, r"received y, an array of dtype <U3\. .*encode its labels as integers"),
    (np.array([[1, None]] * 10), {"y": Y}, r"Expected numbers, received x, an array of dtype object\. Convert it"),
    (pd.DataFrame({"a": ["red"] * 10}), {"y": Y}, r"received x with column 'a' of dtype .*Encode it as numbers"),
    (X.to_sparse(), {"y": Y}, r"Expected a dense tensor, received x, a sparse_coo one\. Convert it with \.to_dense"),
    (LOADER, {"y": Y}, r"y=\.\.\. goes with arrays, received data=DataLoader of length 2, which brings its own"),
    (LOADER, {"sample_weight": Y}, r"sample_weight=\.\.\. goes with arrays, received data=DataLoader of length 2"),
    (LOADER, {"batch_size": 5}, r"batch_size=5 goes with arrays and Datasets, .*Set the batch size where you make it"),
    (LOADER, {"shuffle": True}, r"shuffle=True goes with arrays and map-style Datasets, .*Leave shuffle out"),
    (LOADER, {"validation_split": 0.5}, r"validation_split=0\.5 needs arrays or a map-style Dataset .*Split the data"),
    (
        LOADER,
        {"steps_per_epoch": 3},
        r"Expected steps_per_epoch of at most 2, the batches in data, received steps_per_",
    ),
    (DataLoader(Pairs(), 16, drop_last=True), {}, r"Expected at least one batch, received data that holds none"),
    ([], {}, r"Expected at least one batch, received data that holds none"),
    (Pairs(), {"y": Y}, r"y=\.\.\. goes with arrays, received data=Pairs of length 10, which brings its own"),
    (Pairs(0), {}, r"Expected at least one sample, received data, a Dataset with 0 samples"),
    (Stream(), {"shuffle": True}, r"shuffle=True goes with .*received data=Stream, which has an order of its own"),
    (
        Stream(),
        {"validation_split": 0.5},
        r"validation_split=0\.5 needs arrays or a map-style Dataset that .*received data=S",
    ),
    (
        Stream(),
        {"train_percent_check": 0.5},
        r"train_percent_check=0\.5 .*does not tell its length\. Pass steps_per_ep",
    ),
    (
        Stream(),
        {"overfit_pct": 0.5},
        r"overfit_pct=0\.5 .*does not tell its length\. Pass steps_per_epoch=\.\.\. instead",
    ),
    (generator(), {"y": Y}, r"y=\.\.\. goes with arrays, received data=generator, which brings its own"),
    (generator(), {"epochs": 2}, r"Expected data that can be read once for each of 2 epochs, received a generator"),
    (generator(), {"batch_size": 5}, r"batch_size=5 goes with arrays and Datasets, received data=generator, which"),
]

# Other methods.
CALLS: dict[str, tuple[Callable[[fitkit.Model], Any], str]] = {
    "evaluate batch_size": (lambda m: m.evaluate(X, Y, batch_size=0), named("batch_size", "0")),
    "evaluate loader": (lambda m: m.evaluate(LOADER, batch_size=5), r"batch_size=5 goes with arrays and Datasets"),
    "evaluate y": (lambda m: m.evaluate(LOADER, Y), r"y=\.\.\. goes with arrays, received data=DataLoader"),
    "evaluate lengths": (lambda m: m.evaluate(X, Y[:4]), r"different lengths: x has 10, y has 4"),
    "evaluate steps": (lambda m: m.evaluate(X, Y, steps=0), named("steps", "0")),
    "evaluate steps 1.5": (lambda m: m.evaluate(X, Y, steps=1.5), named("steps", r"1\.5")),  # type: ignore[arg-type]
    "evaluate many steps": (lambda m: m.evaluate(X, Y, steps=2), r"steps of at most 1, .* received steps=2"),
    "evaluate return_dict": (lambda m: m.evaluate(X, Y, return_dict=1), named("return_dict", "1")),  # type: ignore[arg-type]
    "evaluate verbose": (lambda m: m.evaluate(X, Y, verbose=3), r"received verbose=3"),
    "evaluate callbacks": (lambda m: m.evaluate(X, Y, callbacks=[Misspelt()]), r"Misspelt\.on_epoch_ends is no hook"),
    "evaluate nothing": (lambda m: m.evaluate([]), r"Expected at least one batch, received data that holds none"),
    "predict steps": (lambda m: m.predict(X, steps=2), r"steps of at most 1, .* received steps=2"),
    "predict batch_size": (lambda m: m.predict(X, batch_size=True), named("batch_size", "True")),
    "predict data": (lambda m: m.predict(None), r"Expected arrays, a Dataset.*received data=None"),
    "predict four": (lambda m: m.predict((X, X, X, X)), r"Expected data to be \(x,\), .*received a tuple of 4"),
    "predict verbose": (lambda m: m.predict(X, verbose="no"), r"received verbose='no'"),
    "train_on_batch lengths": (lambda m: m.train_on_batch(X, Y[:4]), r"different lengths: x has 10, y has 4"),
    "train_on_batch flag": (lambda m: m.train_on_batch(X, Y, return_dict="yes"), named("return_dict", "'yes'")),  # type: ignore[arg-type]
    "train_on_batch weights": (
        lambda m: m.train_on_batch(X, Y, sample_weight=Y, class_weight={0: 1.0}),
        r"class_weight=\.\.\. and sample_weight=\.\.\. exclude each other",
    ),
    "test_on_batch lengths": (lambda m: m.test_on_batch(X, Y[:4]), r"different lengths: x has 10, y has 4"),
    "predict_on_batch": (lambda m: m.predict_on_batch(torch.ones(0, 3)), r"at least one sample, received x with 0"),
    "summary": (lambda m: m.summary(depth=0), named("depth", "0")),
    "optimizer name": (lambda m: m.compile("adm", "mse"), r"Unknown name: optimizer='adm'\. Did you mean 'adam'\?"),
    "optimizer none": (lambda m: m.compile(None, "mse"), r"Expected a name, a torch\.optim optimizer .*optimizer=None"),  # type: ignore[arg-type]
    "optimizer lbfgs": (lambda m: m.compile("lbfgs", "mse"), r"needs no closure, received optimizer=LBFGS"),
    "optimizer of another": (
        lambda m: m.compile(torch.optim.SGD(nn.Linear(1, 1).parameters()), "mse"),
        r"Expected an optimizer over parameters of the module, received an optimizer that holds none of them",
    ),
    "learning_rate": (lambda m: m.compile("sgd", "mse", learning_rate=-1), named("learning_rate", "-1")),
    "learning_rate nan": (lambda m: m.compile("sgd", "mse", learning_rate=NAN), named("learning_rate", "nan")),
    "learning_rate True": (lambda m: m.compile("sgd", "mse", learning_rate=True), named("learning_rate", "True")),
    "learning_rate beside": (
        lambda m: m.compile(torch.optim.SGD(m.module.parameters()), "mse", learning_rate=0.1),
        r"learning_rate=0\.1 goes with an optimizer by name; received a SGD",
    ),
    "loss name": (lambda m: m.compile("sgd", "mes"), r"Unknown name: loss='mes'\. Did you mean 'mse'\?"),
    "loss class": (lambda m: m.compile("sgd", nn.MSELoss), r"received the class loss=MSELoss\. Write MSELoss\(\)"),
    "loss number": (lambda m: m.compile("sgd", 5), r"Expected a name, a loss module or a callable .*received loss=5"),
    "loss empty": (lambda m: m.compile("sgd", []), r"Expected at least one loss, received loss=\[\]"),
    "loss_weights": (lambda m: m.compile("sgd", "mse", loss_weights=[1.0]), r"loss_weights=\[1\.0\] needs a loss for"),
    "loss_weights none": (lambda m: m.compile("sgd", loss_weights=[1.0]), r"loss_weights=\[1\.0\] needs a loss for ea"),
    "loss_weights count": (
        lambda m: m.compile("sgd", ["mse", "mse"], loss_weights=[1.0]),
        r"Expected one of loss_weights for each of 2 losses, received \[1\.0\]",
    ),
    "loss_weights key": (
        lambda m: m.compile("sgd", {"a": "mse"}, loss_weights={"b": 1.0}),
        r"Expected loss_weights with keys of loss, \['a'\], received the keys \['b'\]",
    ),
    "loss_weights nan": (
        lambda m: m.compile("sgd", {"a": "mse"}, loss_weights={"a": NAN}),
        named(r"loss_weights\['a'\]", "nan"),
    ),
    "metrics text": (lambda m: m.compile("sgd", "mse", metrics="mae"), r"metrics=.*\['mae'\]"),
    "metrics name": (lambda m: m.compile("sgd", "mse", metrics=["maee"]), r"metrics.*'maee'.*Did you mean 'mae'"),
    "metrics number": (lambda m: m.compile("sgd", "mse", metrics=[5]), r"received metrics\[0\]=5"),
    "precision": (lambda m: m.compile("sgd", "mse", precision="16"), r"received precision='16'"),
    "precision number": (lambda m: m.compile("sgd", "mse", precision=32), r"received precision=32"),  # type: ignore[arg-type]
    "jit_compile": (lambda m: m.compile("sgd", "mse", jit_compile=1), named("jit_compile", "1")),  # type: ignore[arg-type]
    "module": (lambda m: fitkit.Model(5), r"Expected a torch\.nn\.Module, received module=5"),  # type: ignore[arg-type]
    "module class": (lambda m: fitkit.Model(Net), r"received module=<class.*It is a class: write Net\(\)"),  # type: ignore[arg-type]
    "device": (lambda m: fitkit.Model(Net(), device="gpu"), r'Expected "auto", a name such as .*received device=.gpu'),
}

# Shapes, which only an output can tell: loss, module, target, and what the message says. The first batch is the last.
SHAPES: list[tuple[Any, nn.Module, Any, str]] = [
    (
        "mse",
        Net(3),
        Y,
        r"same shape for mse_loss, received output of shape \(10, 3\) and target of shape \(10, 1\)\. T",
    ),
    (
        "mse",
        Net(3),
        Y[:, 0],
        r"received output of shape \(10, 3\) and target of shape \(10,\)\. They are never broadca",
    ),
    ("mse", Net(), torch.zeros(10, 10), r"output of shape \(10, 1\) and target of shape \(10, 10\)"),
    ("mse", Net(), torch.zeros(10, 1, 1), r"output of shape \(10, 1\) and target of shape \(10, 1, 1\)"),
    (nn.L1Loss(), Net(3), Y, r"Expected output and target of the same shape for l1_loss"),
    (F.mse_loss, Net(3), Y, r"Expected output and target of the same shape for mse_loss"),
    ("bce_with_logits", Net(3), Y, r"Expected output and target of the same shape for binary_cross_entropy_with_logi"),
    ("cross_entropy", Net(3), Y, r"Expected class indices of shape .*target of shape \(10, 1\) and torch\.float32"),
    ("cross_entropy", Net(3), Y[:, 0], r"Expected class indices .*Convert class labels with \.long\(\)"),
    ("mse", Net(), None, "Expected targets since compile was given a loss, received data of x alone"),
    (["mse", "mse"], Net(), [Y, Y], r"Expected the module's output to have 2 parts since loss has 2, received"),
    (
        None,
        Net(),
        Y,
        r"Expected a module whose output has \.loss.*Pass compile\(loss=\.\.\.\), or override training_ste",
    ),
]


def compiled(module: nn.Module | None = None, loss: Any = "mse") -> fitkit.Model:
    model = fitkit.Model(Net() if module is None else module, device="cpu")
    model.compile("sgd", loss)
    return model


def refused(call: Callable[[fitkit.Model], Any], model: fitkit.Model, message: str, batches_seen: int = 0) -> None:
    """The call raises, and leaves the module as it was."""
    net = model.module
    assert isinstance(net, Net)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net.calls = 0
    with pytest.raises((ValueError, TypeError), match=f"(?s){message}"):
        call(model)
    assert net.calls <= batches_seen
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def identify(value: Any) -> str | None:
    """The arguments, without the addresses of objects, so that a test has the same name in each process."""
    return re.sub(" at 0x[0-9a-f]+", "", str(sorted(value.items(), key=str)))[:70] if isinstance(value, dict) else None


@pytest.mark.parametrize(("arguments", "message"), FIT, ids=identify)
def test_fit_refuses_a_wrong_argument(arguments: dict[str, Any], message: str) -> None:
    free = {"epochs", "max_nb_epochs", "min_nb_epochs"} & set(arguments)
    options: dict[str, Any] = {"verbose": 0, **({} if free else {"epochs": 1}), **arguments}
    refused(lambda model: model.fit(X, Y, **options), compiled(), message)


SIGNS = torch.tensor([[-1.0], [1.0]]).repeat(5, 1)
SIGNED: dict[str, Callable[[Tensor], Any]] = {
    "tensors": lambda y: (X, y),
    "numpy": lambda y: (X.numpy(), y.numpy()),
    "pandas": lambda y: (pd.DataFrame(X.numpy()), pd.Series(y[:, 0].numpy())),
    "weights": lambda y: (X, y, torch.ones(10)),
    "loader": lambda y: DataLoader(TensorDataset(X, y), batch_size=5),
    "shuffling loader": lambda y: DataLoader(TensorDataset(X, y), batch_size=5, shuffle=True, drop_last=True),
    "loader with workers": lambda y: DataLoader(TensorDataset(X, y), batch_size=5, num_workers=1),
    "dataset": lambda y: TensorDataset(X, y),
    "ready batches": lambda y: [(X, y)],
}


@pytest.mark.parametrize("loss", ["bce_with_logits", "bce", nn.BCEWithLogitsLoss(), nn.BCELoss()], ids=str)
@pytest.mark.parametrize("kind", SIGNED)
def test_targets_that_are_no_probabilities_are_refused(kind: str, loss: Any) -> None:
    model, state = compiled(loss=loss), torch.get_rng_state()
    message = r"from 0 to 1 for loss='binary_cross_entropy.*received targets from -1 to 1\. .*become \(y \+ 1\) / 2"
    refused(lambda model: model.fit(SIGNED[kind](SIGNS), epochs=1, verbose=0), model, message)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", SIGNED)
def test_targets_between_0_and_1_are_probabilities(kind: str) -> None:
    model = compiled(loss="bce_with_logits")
    assert len(model.fit(SIGNED[kind](SIGNS / 4 + 0.5), epochs=1, verbose=0).epoch) == 1


def test_targets_that_only_a_batch_tells_are_not_looked_at() -> None:
    part = torch.utils.data.Subset(TensorDataset(X, SIGNS), range(5))
    model = compiled(loss="bce_with_logits")
    assert len(model.fit(DataLoader(part), epochs=1, verbose=0).epoch) == 1


def test_targets_of_validation_and_of_one_output_are_looked_at_too() -> None:
    message = r"from 0 to 1 for loss=.*received targets from -1 to 1"
    model = compiled(loss="bce_with_logits")
    refused(lambda model: model.fit(X, Y, validation_data=(X, SIGNS), epochs=1, verbose=0), model, message)
    refused(lambda model: model.evaluate(X, SIGNS, verbose=0), model, message)
    model = compiled(loss={"a": "mse", "b": "bce_with_logits"})
    refused(lambda model: model.fit(X, {"a": SIGNS, "b": SIGNS}, epochs=1, verbose=0), model, r"for loss\['b'\]=")


@pytest.mark.parametrize(("data", "arguments", "message"), DATA, ids=identify)
def test_fit_refuses_wrong_data(data: Any, arguments: dict[str, Any], message: str) -> None:
    refused(lambda model: model.fit(data, **{"epochs": 1, "verbose": 0, **arguments}), compiled(), message)


@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_call_is_refused(name: str) -> None:
    call, message = CALLS[name]
    refused(call, compiled(), message)


@pytest.mark.parametrize(("loss", "module", "target", "message"), SHAPES)
def test_an_output_that_does_not_fit_is_refused_before_a_step(
    loss: Any, module: Any, target: Any, message: str
) -> None:
    def fit(model: fitkit.Model) -> None:
        model.fit(X, target, epochs=1, verbose=0)

    refused(fit, compiled(module, loss), message, batches_seen=1)
