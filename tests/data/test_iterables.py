"""Ready batches: lists, objects that can be iterated again, and generators."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fitkit
from fitkit.callbacks import LambdaCallback

PAIRS = [(torch.full((4, 2), float(index)), torch.full((4, 1), float(index))) for index in range(10)]


class Stream:
    """Ready batches that can be iterated again; does not tell how many."""

    def __init__(self, pairs: list[tuple[Tensor, Tensor]] = PAIRS) -> None:
        self.pairs = pairs

    def __iter__(self) -> Iterator[Any]:
        return iter(self.pairs)


class SizedStream(Stream):
    """The same, and tells how many."""

    def __len__(self) -> int:
        return len(self.pairs)


class Once:
    """Gives the same iterator at each pass, as an open file does."""

    def __init__(self) -> None:
        self.iterator = iter(PAIRS)

    def __iter__(self) -> Iterator[Any]:
        return self.iterator


def generator(pairs: list[tuple[Tensor, Tensor]] = PAIRS) -> Iterator[Any]:
    yield from pairs


def trained_on(data: Any, epochs: int = 3, **arguments: Any) -> list[list[float]]:
    """The batches, by the number each is filled with, of every epoch."""
    seen: list[list[float]] = [[] for _ in range(epochs)]

    class Noting(fitkit.Model):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen[epoch[0]].append(batch[0][0, 0].item())
            return super().training_step(batch, batch_idx)  # type: ignore[no-any-return]

    epoch = [0]
    model = Noting(nn.Linear(2, 1), device="cpu")
    model.compile("sgd", "mse", learning_rate=0.0)
    noting = LambdaCallback(on_epoch_begin=lambda index, logs: epoch.__setitem__(0, index))
    model.fit(data, epochs=epochs, verbose=0, callbacks=[noting], **arguments)
    return seen


@pytest.mark.parametrize("data", [PAIRS, deque(PAIRS), Stream(), SizedStream()], ids=lambda data: type(data).__name__)
def test_ready_batches_are_given_in_their_order_at_each_epoch(data: Any) -> None:
    assert trained_on(data) == [[float(index) for index in range(10)]] * 3


@pytest.mark.parametrize("data", [PAIRS, SizedStream()], ids=["list", "sized"])
def test_sized_batches_start_anew_at_each_epoch(data: Any) -> None:
    assert trained_on(data, steps_per_epoch=2) == [[0.0, 1.0]] * 3


def test_ten_batches_and_nine_steps_give_nine_and_nine_and_nine() -> None:
    seen = trained_on(Stream(), steps_per_epoch=9)
    assert [len(epoch) for epoch in seen] == [9, 9, 9]
    assert seen[1][:2] == [9.0, 0.0]


def test_a_generator_goes_on_at_each_epoch_and_stays_open() -> None:
    data = generator()
    assert trained_on(data, steps_per_epoch=3) == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0], [6.0, 7.0, 8.0]]
    assert [x[0, 0].item() for x, _ in data] == [9.0]


def test_a_generator_without_steps_is_one_epoch() -> None:
    assert trained_on(generator(), epochs=1) == [[float(index) for index in range(10)]]


def test_a_run_that_stops_leaves_the_rest_in_the_generator() -> None:
    def stop(batch: int, logs: Any) -> None:
        model.stop_training = batch == 2

    data = generator()
    model = fitkit.Model(nn.Linear(2, 1), device="cpu")
    model.compile("sgd", "mse")
    model.fit(data, epochs=1, verbose=0, callbacks=[LambdaCallback(on_train_batch_end=stop)])
    assert next(data)[0][0, 0].item() == 3.0


def test_a_run_that_fails_leaves_the_rest_in_the_generator() -> None:
    def fail(batch: int, logs: Any) -> None:
        raise KeyboardInterrupt

    data = generator()
    with pytest.raises(KeyboardInterrupt):
        trained_on_with(data, LambdaCallback(on_train_batch_end=fail), steps_per_epoch=5)
    assert next(data)[0][0, 0].item() == 1.0


def trained_on_with(data: Any, callback: Any, **arguments: Any) -> None:
    model = fitkit.Model(nn.Linear(2, 1), device="cpu")
    model.compile("sgd", "mse")
    model.fit(data, epochs=2, verbose=0, callbacks=[callback], **arguments)


def test_steps_of_evaluate_and_predict_leave_the_rest_in_the_generator() -> None:
    data = generator()
    model = fitkit.Model(nn.Linear(2, 1), device="cpu")
    model.compile("sgd", "mse")
    model.evaluate(data, steps=2, verbose=0)
    assert len(model.predict(data, steps=3, verbose=0)) == 12
    assert next(data)[0][0, 0].item() == 5.0


def test_numpy_batches_are_trained_on_as_tensors() -> None:
    data = [(x.double().numpy(), y.double().numpy()) for x, y in PAIRS]
    assert trained_on(data) == trained_on(PAIRS)
    assert trained_on(iter(data), epochs=1) == trained_on(PAIRS, epochs=1)


def test_numpy_batches_are_not_changed_by_a_module_that_works_in_place() -> None:
    x = np.full((4, 2), -1.0, dtype="float32")
    model = fitkit.Model(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(2, 1)), device="cpu")
    model.compile("sgd", "mse")
    model.fit([(x, np.ones((4, 1), "float32"))], epochs=1, verbose=0)
    assert (x == -1.0).all()


@pytest.mark.parametrize(
    ("data", "arguments", "message"),
    [
        ([], {}, r"Expected at least one batch, received data that holds none"),
        (SizedStream([]), {}, r"Expected at least one batch, received data that holds none"),
        (Stream([]), {}, r"Expected at least one batch, received data that gave none"),
        (generator([]), {"epochs": 1}, r"received data that gave none\. It is a generator"),
        (Stream(), {"steps_per_epoch": 11}, r"data ran dry: it gave 10 batches of the 11 that steps_per_epoch=11"),
        (SizedStream(), {"steps_per_epoch": 11}, r"Expected steps_per_epoch of at most 10, the batches in data"),
        (generator(), {"steps_per_epoch": 4}, r"data ran dry: it gave 2 batches of the 4"),
        (generator(), {}, r"Expected data that can be read once for each of 3 epochs, received a generator"),
        (Once(), {}, r"received data that gave none\. .*must give a new iterator each time"),
        (
            Stream(),
            {"train_percent_check": 0.5},
            r"train_percent_check=0\.5 is a fraction .*Pass steps_per_epoch=\.\.\.",
        ),
        (generator(), {"overfit_pct": 0.5}, r"overfit_pct=0\.5 is a fraction of data .*Pass steps_per_epoch"),
        (Stream(), {"validation_split": 0.5}, r"validation_split=0\.5 needs arrays or a map-style Dataset that tells"),
        (PAIRS, {"batch_size": 4}, r"batch_size=4 goes with arrays and Datasets, .*Set the batch size where you make"),
        (PAIRS, {"shuffle": True}, r"shuffle=True goes with arrays and map-style Datasets, .*Leave shuffle out"),
        (generator(), {"y": PAIRS[0][1]}, r"y=\.\.\. goes with arrays, received data=generator, which"),
    ],
)
def test_batches_that_do_not_go_with_the_arguments_are_refused(data: Any, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trained_on(data, **arguments)


def test_validation_that_goes_on_gives_each_epoch_its_steps() -> None:
    model = fitkit.Model(nn.Linear(2, 1), device="cpu")
    model.compile("sgd", "mse", learning_rate=0.0)
    validation = {"validation_data": generator(), "validation_steps": 2}
    history = model.fit(PAIRS, epochs=3, verbose=0, **validation)
    expected = [model.evaluate(PAIRS[start : start + 2], verbose=0) for start in (0, 2, 4)]
    assert history["val_loss"] == expected
