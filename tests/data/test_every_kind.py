"""Every kind of data that fit, evaluate and predict take: the same numbers for the same data."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import fitkit

# Zeros and ones, which every dtype has; 3 batches of 8, 8 and 4.
X = torch.randint(0, 2, (20, 3), generator=torch.Generator().manual_seed(0)).float()
Y = X.sum(1, keepdim=True) / 4
SIZE = 8
BATCHES = list(zip(X.split(SIZE), Y.split(SIZE), strict=True))


class Net(nn.Module):
    """Takes one input or two, of any dtype; given labels, it returns its own loss, as those of Hugging Face do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.linear = nn.Linear(3, 1)

    def forward(self, a: Tensor, b: Tensor | None = None, labels: Tensor | None = None) -> Any:
        x = a if b is None else torch.cat([a, b], 1)
        logits = self.linear(x.float())
        return logits if labels is None else {"loss": F.mse_loss(logits, labels), "logits": logits}


class Pairs(Dataset[Any]):
    """Samples by index."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> Any:
        return X[index], Y[index]


class Foreign(Pairs):
    """Samples of NumPy arrays and Python's numbers, which torch collates to float64."""

    def __getitem__(self, index: int) -> Any:
        return X[index].double().numpy(), Y[index].item()


class Nested(Pairs):
    """Samples of two inputs."""

    def __getitem__(self, index: int) -> Any:
        return (X[index, :1], X[index, 1:]), Y[index]


class Named(Pairs):
    """Samples that are dicts."""

    def __getitem__(self, index: int) -> Any:
        return {"a": X[index], "labels": Y[index]}


class Stream(IterableDataset[Any]):
    """Samples one after the other."""

    def __iter__(self) -> Iterator[Any]:
        return iter(zip(X, Y, strict=True))


class SizedStream(Stream):
    """The same, and tells how many."""

    def __len__(self) -> int:
        return len(X)


class Batched:
    """Ready batches that can be iterated again."""

    def __iter__(self) -> Iterator[Any]:
        return iter(BATCHES)


class Columns(NamedTuple):
    """A tuple with names is a tuple."""

    inputs: Any
    targets: Any


def memory_map() -> Any:
    """X in a file that cannot be written to."""
    handle, path = tempfile.mkstemp()
    os.write(handle, X.double().numpy().tobytes())
    os.close(handle)
    mapped = np.memmap(path, dtype="float64", mode="r", shape=(20, 3))
    os.unlink(path)  # the mapping stays
    return mapped


def frame(dtype: str) -> Any:
    return pd.DataFrame(X.numpy(), columns=["a", "b", "c"]).astype(dtype)


# Samples, of which fitkit makes batches.
SAMPLES: dict[str, Callable[[], Any]] = {
    "tensors": lambda: (X, Y),
    "tensors of float64": lambda: (X.double(), Y.double()),
    **{
        f"numpy {dtype}": functools.partial(lambda dtype: (X.numpy().astype(dtype), Y.numpy()), dtype)
        for dtype in ("float64", "float32", "float16", "int64", "int32", "uint8", "bool", ">f8", "uint16")
    },
    "numpy targets of one dimension": lambda: (X.numpy(), Y[:, 0].double().numpy()),
    "memory map": lambda: (memory_map(), Y),
    "data frame": lambda: (frame("float64"), pd.DataFrame(Y.numpy())),
    "data frame of integers and a series": lambda: (frame("int64"), pd.Series(Y[:, 0].numpy())),
    "data frame of several kinds": lambda: (frame("int64").astype({"a": "bool", "b": "float32"}), Y),
    "nullable columns": lambda: (frame("int64").astype({"a": "Int64", "b": "boolean", "c": "Float64"}), Y),
    "nullable series": lambda: (frame("Int8"), pd.Series(Y[:, 0].numpy(), dtype="Float32")),
    "tuple inside": lambda: ((X[:, :1], X[:, 1:].numpy()), Y),
    "list": lambda: ([X[:, :1], X[:, 1:].int()], Y),
    "dict": lambda: ({"b": X[:, 1:], "a": X[:, :1]}, Y),
    "named tuple": lambda: Columns(X, Y),
    "weights": lambda: (X, Y, torch.ones(20)),
    "weights in numpy": lambda: (X, Y, np.ones(20)),
    "tensor dataset": lambda: TensorDataset(X, Y),
    "dataset": Pairs,
    "dataset of numpy and numbers": Foreign,
    "dataset of nested samples": Nested,
}
# Batches that can be read again, or samples that come in an order of their own.
ORDERED: dict[str, Callable[[], Any]] = {
    "loader": lambda: DataLoader(Pairs(), SIZE),
    "loader with workers": lambda: DataLoader(Pairs(), SIZE, num_workers=2),
    "loader of nested samples": lambda: DataLoader(Nested(), SIZE),
    "loader of a stream": lambda: DataLoader(Stream(), SIZE),
    "list of batches": lambda: list(BATCHES),
    "list of lists": lambda: [list(batch) for batch in BATCHES],
    "list of numpy batches": lambda: [(x.double().numpy(), y.numpy()) for x, y in BATCHES],
    "list of frames": lambda: [(pd.DataFrame(x.numpy()), y) for x, y in BATCHES],
    "iterable": Batched,
}
STREAMS: dict[str, Callable[[], Any]] = {"stream": Stream, "sized stream": SizedStream}
KINDS = {
    **{name: (make, {"batch_size": SIZE, "shuffle": False}) for name, make in SAMPLES.items()},
    **{name: (make, {}) for name, make in ORDERED.items()},
    **{name: (make, {"batch_size": SIZE}) for name, make in STREAMS.items()},
}


def make_model() -> fitkit.Model:
    net = Net()
    model = fitkit.Model(net, device="cpu")
    model.compile(torch.optim.SGD(net.parameters(), lr=0.1), "mse", metrics=["mae"])
    return model


@functools.cache
def reference(epochs: int = 2) -> tuple[dict[str, Any], Tensor]:
    """History and weights after a fit on plain tensors."""
    model = make_model()
    arguments = {"validation_data": (X, Y), "validation_batch_size": SIZE}
    history = model.fit(X, Y, epochs=epochs, batch_size=SIZE, shuffle=False, verbose=0, **arguments)
    return history.history, model.module.get_submodule("linear").get_parameter("weight").detach()


def assert_as_reference(model: fitkit.Model, epochs: int = 2) -> None:
    history, weight = reference(epochs)
    assert model.history.history == history
    assert torch.equal(model.module.get_submodule("linear").get_parameter("weight"), weight)


@pytest.mark.parametrize("kind", KINDS)
def test_fit_gives_the_same_numbers_on_every_kind(kind: str) -> None:
    make, arguments = KINDS[kind]
    model = make_model()
    size = {"validation_batch_size": SIZE} if "batch_size" in arguments else {}
    model.fit(make(), epochs=2, verbose=0, validation_data=make(), **arguments, **size)
    assert_as_reference(model)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluate_gives_the_same_numbers_on_every_kind(kind: str) -> None:
    make, arguments = KINDS[kind]
    size = {"batch_size": SIZE} if "batch_size" in arguments else {}
    assert make_model().evaluate(make(), verbose=0, **size) == make_model().evaluate(X, Y, batch_size=SIZE, verbose=0)


@pytest.mark.parametrize("kind", KINDS)
def test_predict_gives_the_same_numbers_on_every_kind(kind: str) -> None:
    make, arguments = KINDS[kind]
    size = {"batch_size": SIZE} if "batch_size" in arguments else {}
    expected = make_model().predict((X,), batch_size=SIZE, verbose=0)
    assert torch.equal(make_model().predict(make(), verbose=0, **size), expected)


@pytest.mark.parametrize("data", [X, (X,), X.numpy(), [X[:, :1], X[:, 1:]], {"a": X}, frame("float64")])
def test_predict_takes_x_alone(data: Any) -> None:
    assert torch.equal(make_model().predict(data, verbose=0), make_model().predict((X, Y), verbose=0))


def test_x_and_y_may_be_two_arguments() -> None:
    model = make_model()
    arguments = {"validation_data": (X, Y), "validation_batch_size": SIZE, "shuffle": False}
    model.fit(X.numpy(), Y, sample_weight=np.ones(20), batch_size=SIZE, epochs=2, verbose=0, **arguments)
    assert_as_reference(model)
    assert model.evaluate(X, Y, sample_weight=torch.ones(20), verbose=0) == model.evaluate((X, Y), verbose=0)


def generator(passes: int = 1) -> Iterator[Any]:
    for _ in range(passes):
        yield from BATCHES


def test_a_generator_with_steps_gives_the_same_numbers() -> None:
    model = make_model()
    validation = {"validation_data": generator(2), "validation_steps": 3}
    model.fit(generator(2), epochs=2, steps_per_epoch=3, verbose=0, **validation)
    assert_as_reference(model)


def test_a_generator_is_one_epoch() -> None:
    model = make_model()
    model.fit(generator(), epochs=1, verbose=0, validation_data=generator())
    assert_as_reference(model, epochs=1)


def test_a_generator_can_be_evaluated_and_predicted() -> None:
    model = make_model()
    assert model.evaluate(generator(), verbose=0) == model.evaluate(X, Y, batch_size=SIZE, verbose=0)
    assert torch.equal(model.predict(generator(), verbose=0), model.predict(X, batch_size=SIZE, verbose=0))


@pytest.mark.parametrize("data", [Named(), DataLoader(Named(), SIZE), [{"a": x, "labels": y} for x, y in BATCHES]])
def test_a_batch_that_is_a_dict_goes_to_the_module_whole(data: Any) -> None:
    net = Net()
    model = fitkit.Model(net, device="cpu")
    model.compile(torch.optim.SGD(net.parameters(), lr=0.1))
    arguments = {"batch_size": SIZE, "shuffle": False} if isinstance(data, Named) else {}
    assert model.fit(data, epochs=2, verbose=0, **arguments)["loss"] == reference()[0]["loss"]
    predicted = model.predict(data, verbose=0)["logits"]
    torch.testing.assert_close(predicted, model.predict(X, verbose=0))


@pytest.mark.parametrize(
    "targets",
    [
        *(X[:, 0].numpy().astype(dtype) for dtype in ("int64", "int32", "uint8", "bool", "uint16", ">i4")),
        pd.Series(X[:, 0].numpy()).astype("Int64"),
        pd.Series(X[:, 0].numpy()).astype("boolean"),
        pd.DataFrame(X[:, :1].numpy()).astype("int8"),
    ],
)
def test_integer_targets_stay_integers(targets: Any) -> None:
    model = fitkit.Model(nn.Linear(3, 2), device="cpu")
    model.compile("sgd", "cross_entropy")
    assert model.evaluate(X, targets, verbose=0) == model.evaluate(X, X[:, 0].long(), verbose=0)


@pytest.mark.parametrize("kind", [kind for kind in SAMPLES if kind != "weights"])
def test_every_kind_of_samples_can_be_split(kind: str) -> None:
    arguments = {"epochs": 2, "verbose": 0, "batch_size": SIZE, "validation_split": 0.25, "shuffle": False}
    expected = make_model().fit(X, Y, **arguments)
    assert make_model().fit(SAMPLES[kind](), **arguments).history == expected.history
