"""DataLoaders and Datasets: their own batches and draws, their order when it is to be kept, and their workers' end."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import fitkit
from fitkit.callbacks import LambdaCallback
from fitkit.data import Batches, Batching, as_batches, as_split_batches
from fitkit.data.loaders import LoaderBatches

NUMBERS = torch.arange(10.0)
TENSORS = TensorDataset(NUMBERS.reshape(-1, 1), NUMBERS.reshape(-1, 1))


class Pairs(Dataset[Any]):
    """Samples by index."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return NUMBERS[index : index + 1], NUMBERS[index : index + 1]


class Duck:
    """A map-style dataset without torch's base class; it can be iterated as well."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= 10:
            raise IndexError
        return {"x": np.float64(index), "y": index}


class Stream(IterableDataset[Any]):
    """Samples one after the other."""

    def __iter__(self) -> Iterator[Any]:
        return iter([(number.reshape(1), number.reshape(1)) for number in NUMBERS])


class Odd(BatchSampler):
    """A batch sampler of the user's: random batches of random sizes."""

    def __init__(self) -> None:
        pass

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(10).tolist()
        return iter([order[:3], order[3:5], order[5:]])


class Endless:
    """A sampler without an end."""

    def __iter__(self) -> Iterator[int]:
        while True:
            yield 0


def batching(**changes: Any) -> Batching:
    defaults: dict[str, Any] = {"batch_size": None, "shuffle": None, "training": True}
    return Batching(**{**defaults, "dtype": torch.float32, "device": torch.device("cpu"), **changes})


def passes(of: Any, count: int = 1) -> list[list[list[float]]]:
    """The numbers in each batch of each pass."""
    return [[batch[0].flatten().tolist() for batch in of] for _ in range(count)]


def in_order(loader: DataLoader[Any]) -> Batches:
    return LoaderBatches(loader, torch.float32).in_order()


def test_a_loader_gives_its_own_batches_with_its_own_draws() -> None:
    loader = DataLoader(Pairs(), batch_size=4, shuffle=True)
    torch.manual_seed(1)
    expected = passes(loader, 2)
    torch.manual_seed(1)
    assert passes(as_batches(loader, None, None, batching()), 2) == expected


@pytest.mark.parametrize("dataset", [Pairs(), TENSORS], ids=["Dataset", "TensorDataset"])
def test_a_dataset_gives_the_batches_of_a_shuffled_loader(dataset: Any) -> None:
    torch.manual_seed(1)
    expected = passes(DataLoader(dataset, batch_size=4, shuffle=True), 2)
    torch.manual_seed(1)
    assert passes(as_batches(dataset, None, None, batching(batch_size=4)), 2) == expected


def test_a_dataset_has_batches_of_32_when_none_is_said() -> None:
    dataset = TensorDataset(torch.ones(70, 1))
    assert [len(batch[0]) for batch in as_batches(dataset, None, None, batching())] == [32, 32, 6]
    assert len(next(iter(as_batches(Stream(), None, None, batching())))[0]) == 10


def test_floating_samples_of_a_dataset_become_the_dtype_of_arrays() -> None:
    batch = next(iter(as_batches(Duck(), None, None, batching(shuffle=False))))
    assert batch["x"].tolist() == NUMBERS.tolist()
    assert (batch["x"].dtype, batch["y"].dtype) == (torch.float32, torch.int64)


def test_tensors_of_a_loader_stay_as_they_are_and_numpy_becomes_tensors() -> None:
    loader = DataLoader(Duck(), batch_size=4)  # type: ignore[arg-type]
    assert next(iter(as_batches(loader, None, None, batching())))["x"].dtype == torch.float64
    by_numpy = DataLoader(Pairs(), batch_size=4, collate_fn=lambda samples: np.array([float(x) for x, _ in samples]))
    first = next(iter(as_batches(by_numpy, None, None, batching())))
    assert torch.equal(first, torch.tensor([0.0, 1.0, 2.0, 3.0]))


def test_a_split_dataset_keeps_its_last_samples_for_validation() -> None:
    for dataset in (Pairs(), TENSORS):
        training, held_out = as_split_batches(dataset, None, None, batching(batch_size=4), 0.25, 2)
        assert held_out is not None
        assert passes(held_out, 2) == [[[7.0, 8.0], [9.0]]] * 2
        assert sorted(number for batch in passes(training)[0] for number in batch) == NUMBERS[:7].tolist()


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Pairs(), batch_size=4, shuffle=True),
        DataLoader(Pairs(), batch_sampler=BatchSampler(RandomSampler(Pairs()), 4, drop_last=False)),
        DataLoader(Pairs(), batch_size=4, sampler=SequentialSampler(Pairs())),
    ],
)
def test_a_shuffled_loader_in_order_has_the_order_of_its_dataset(loader: DataLoader[Any]) -> None:
    assert passes(in_order(loader), 2) == [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]] * 2


def test_in_order_keeps_drop_last() -> None:
    assert passes(in_order(DataLoader(Pairs(), batch_size=4, shuffle=True, drop_last=True)))[0][-1] == [4, 5, 6, 7]
    sampler = BatchSampler(RandomSampler(Pairs()), 4, drop_last=True)
    assert in_order(DataLoader(Pairs(), batch_sampler=sampler)).length == 2


@pytest.mark.parametrize("options", [{"batch_sampler": Odd()}, {"sampler": SubsetRandomSampler([7, 3, 5])}])
def test_samples_that_a_sampler_chose_stay_chosen(options: dict[str, Any]) -> None:
    fixed = in_order(DataLoader(Pairs(), **options))
    first, second = passes(fixed, 2)
    assert first == second
    assert len(first) == fixed.length == 3


def test_in_order_never_leaves_the_samples_of_a_sampler() -> None:
    weighted = WeightedRandomSampler([0.0] * 9 + [1.0], num_samples=6)
    fixed = in_order(DataLoader(Pairs(), batch_size=4, sampler=weighted))
    assert passes(fixed) == [[[9, 9, 9, 9], [9, 9]]]


def test_in_order_of_a_loader_of_ready_batches_has_their_order() -> None:
    loader = DataLoader([(torch.full((2, 1), number), 0) for number in NUMBERS], batch_size=None, shuffle=True)  # type: ignore[arg-type]
    assert passes(in_order(loader), 2) == [[[number, number] for number in NUMBERS.tolist()]] * 2


def test_in_order_of_data_without_a_length_does_not_hang() -> None:
    endless = DataLoader(Pairs(), batch_size=4, sampler=Endless())  # type: ignore[arg-type]
    assert in_order(endless).length is None
    assert in_order(DataLoader(Stream(), batch_size=4)).length is None


def trained_on(data: Any, epochs: int = 3, **arguments: Any) -> list[list[list[float]]]:
    """The numbers in each batch of each epoch of a fit."""
    seen: list[list[list[float]]] = []

    class Noting(fitkit.Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 0:
                seen.append([])
            seen[-1].append(batch[0].flatten().tolist())
            return super().training_step(batch, batch_idx)

    model = Noting(nn.Linear(1, 1), device="cpu")
    model.compile("sgd", "mse")
    model.fit(data, epochs=epochs, verbose=0, **arguments)
    return seen


@pytest.mark.parametrize(
    "data",
    [
        (NUMBERS.reshape(-1, 1), NUMBERS.reshape(-1, 1)),
        Pairs(),
        TENSORS,
        DataLoader(Pairs(), batch_size=2, shuffle=True),
    ],
    ids=["arrays", "dataset", "tensor dataset", "shuffled loader"],
)
def test_overfit_pct_takes_the_first_batches_unshuffled_at_each_epoch(data: Any) -> None:
    arguments = {} if isinstance(data, DataLoader) else {"batch_size": 2}
    assert trained_on(data, overfit_pct=0.5, **arguments) == [[[0.0, 1.0], [2.0, 3.0]]] * 3


def test_overfit_pct_takes_the_same_batches_of_a_batch_sampler_at_each_epoch() -> None:
    first, second, third = trained_on(DataLoader(Pairs(), batch_sampler=Odd()), overfit_pct=0.7)
    assert first == second == third
    assert [len(batch) for batch in first] == [3, 2]


@pytest.mark.parametrize(
    ("fraction", "batches"), [(1.0, 10), (0.5, 5), (0.99, 9), (0.05, 1), (0.1, 1), (0.29, 2), (1e-9, 1)]
)
def test_a_fraction_is_rounded_down_but_never_to_nothing(fraction: float, batches: int) -> None:
    for data in (DataLoader(Pairs(), batch_size=1), [(x, y) for x, y in DataLoader(Pairs(), batch_size=1)]):
        assert [len(epoch) for epoch in trained_on(data, 2, train_percent_check=fraction)] == [batches] * 2


def test_a_part_of_the_training_data_is_another_at_each_epoch() -> None:
    first, second = trained_on(Pairs(), 2, batch_size=1, train_percent_check=0.5)
    assert len(first) == len(second) == 5
    assert first != second


def test_val_percent_check_takes_the_first_batches_of_the_validation_data() -> None:
    model = fitkit.Model(nn.Linear(1, 1), device="cpu")
    model.compile("sgd", "mse")
    validation = {"validation_data": DataLoader(Pairs(), batch_size=2), "val_percent_check": 0.5}
    history = model.fit(TENSORS, epochs=1, verbose=0, **validation)
    assert history["val_loss"] == [model.evaluate(NUMBERS[:4, None], NUMBERS[:4, None], batch_size=2, verbose=0)]


@pytest.mark.parametrize("dataset", [Pairs(), TENSORS], ids=["Dataset", "TensorDataset"])
def test_sized_data_is_reshuffled_at_each_epoch_of_so_many_steps(dataset: Any) -> None:
    torch.manual_seed(1)
    epochs = trained_on(dataset, batch_size=2, steps_per_epoch=3)
    torch.manual_seed(1)
    loader = DataLoader(Pairs(), batch_size=2, shuffle=True)
    nn.Linear(1, 1)  # draws what the model of trained_on drew
    assert epochs == [[x.flatten().tolist() for x, _ in zip_short(loader, 3)] for _ in range(3)]


def zip_short(loader: DataLoader[Any], count: int) -> list[Any]:
    iterator = iter(loader)
    return [next(iterator) for _ in range(count)]


def test_a_stream_goes_on_where_it_was() -> None:
    epochs = trained_on(DataLoader(Stream(), batch_size=1), steps_per_epoch=9)
    assert [len(epoch) for epoch in epochs] == [9, 9, 9]
    assert epochs[1][:2] == [[9.0], [0.0]]


def end_by_stopping(model: Any) -> LambdaCallback:
    return LambdaCallback(on_train_batch_end=lambda batch, logs: setattr(model, "stop_training", True))


def end_by_error(model: Any) -> LambdaCallback:
    def fail(batch: int, logs: Any) -> None:
        raise KeyboardInterrupt

    return LambdaCallback(on_train_batch_end=fail)


def end_by_itself(model: Any) -> LambdaCallback:
    return LambdaCallback()


@pytest.mark.parametrize("end", [end_by_stopping, end_by_error, end_by_itself])
@pytest.mark.parametrize("dataset", [Pairs(), Stream()], ids=["sized", "stream"])
def test_workers_end_with_the_run(dataset: Any, end: Any) -> None:
    model = fitkit.Model(nn.Linear(1, 1), device="cpu")
    model.compile("sgd", "mse")
    loader = DataLoader(dataset, batch_size=2, num_workers=1)
    error = None
    try:
        model.fit(loader, epochs=1, steps_per_epoch=3, verbose=0, callbacks=[end(model)])
    except KeyboardInterrupt as interrupt:
        error = interrupt  # which is kept, as a notebook keeps it
    assert not multiprocessing.active_children()
    assert (error is not None) == (end is end_by_error)


class Unmeasured(Dataset[Any]):
    """Samples by index; nobody knows how many."""

    def __getitem__(self, index: int) -> Any:
        return NUMBERS[index : index + 1]


def test_a_dataset_without_a_length_is_told_what_it_lacks() -> None:
    with pytest.raises(
        TypeError, match=r"received data=Unmeasured, which has no __len__\. Give it one, or make it an It"
    ):
        trained_on(Unmeasured())
    with pytest.raises(ValueError, match=r"a map-style Dataset that tells its length, received data=Unmeasured"):
        trained_on(Unmeasured(), validation_split=0.5)


@pytest.mark.parametrize(
    ("data", "arguments", "message"),
    [
        (
            DataLoader(TENSORS),
            {"batch_size": 8},
            r"batch_size=8 goes with .* data=DataLoader of length 10, which comes",
        ),
        (DataLoader(TENSORS), {"shuffle": False}, r"shuffle=False goes with arrays .* which has an order of its own"),
        (DataLoader(TENSORS), {"y": NUMBERS}, r"y=\.\.\. goes with arrays, received data=DataLoader of length 10, whi"),
        (
            DataLoader(TENSORS),
            {"sample_weight": NUMBERS},
            r"sample_weight=\.\.\. goes with arrays, received data=DataL",
        ),
        (
            DataLoader(TENSORS),
            {"validation_split": 0.2},
            r"validation_split=0\.2 needs arrays or .* pass validation_dat",
        ),
        (DataLoader(TENSORS), {"steps_per_epoch": 11}, r"steps_per_epoch of at most 10, .* steps_per_epoch=11\. Lower"),
        (TENSORS, {"y": NUMBERS}, r"y=\.\.\. goes with arrays, received data=TensorDataset of length 10"),
        (Pairs(), {"y": NUMBERS, "validation_split": 0.2}, r"y=\.\.\. goes with arrays, received data=Pairs of length"),
        (Stream(), {"shuffle": True}, r"shuffle=True goes with arrays and map-style Datasets, received data=Stream"),
        (Stream(), {"validation_split": 0.2}, r"validation_split=0\.2 needs arrays or a map-style Dataset"),
        (
            Stream(),
            {"train_percent_check": 0.5},
            r"train_percent_check=0\.5 .* does not tell its length\. Pass steps_per",
        ),
        (
            Pairs(),
            {"validation_split": 0.99},
            r"validation_split=0\.99 for 10 samples: 0 for training, 10 for validation",
        ),
        (TensorDataset(NUMBERS[:0]), {}, r"Expected at least one sample, received data\.tensors\[0\] with 0 samples"),
        (DataLoader(TENSORS, 16, drop_last=True), {}, r"received data that holds none\. Check .* drop_last"),
        ([], {"validation_data": Pairs()}, r"Expected at least one batch, received data that holds none"),
    ],
)
def test_data_that_does_not_go_with_the_arguments_is_refused(data: Any, arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trained_on(data, **arguments)


def test_a_loader_that_makes_its_targets_itself_has_some() -> None:
    class Same(DataLoader[Any]):
        def __iter__(self) -> Any:
            for (x,) in super().__iter__():
                yield x, x

    model = fitkit.Model(nn.Linear(4, 4), device="cpu")
    model.compile("sgd", "mse")
    model.fit(Same(TensorDataset(torch.zeros(8, 4)), 4), epochs=1, verbose=0)
    assert len(model.history["loss"]) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": SubsetRandomSampler(range(4, 8))},
        {"batch_sampler": [[4, 5], [6, 7]]},
        {"sampler": WeightedRandomSampler([0.0] * 4 + [1.0] * 4, 8)},
    ],
)
def test_targets_that_a_sampler_leaves_out_are_not_looked_at(options: dict[str, Any]) -> None:
    y = torch.tensor([[-1.0]] * 4 + [[1.0]] * 4)
    model = fitkit.Model(nn.Sequential(nn.Linear(4, 1), nn.Sigmoid()), device="cpu")
    model.compile("sgd", "bce")
    model.fit(DataLoader(TensorDataset(torch.zeros(8, 4), y), **options), epochs=1, verbose=0)
    assert len(model.history["loss"]) == 1


@pytest.mark.parametrize("shuffle", [False, True])
def test_targets_of_a_loader_of_all_samples_are_looked_at(shuffle: bool) -> None:
    model = fitkit.Model(nn.Sequential(nn.Linear(4, 1), nn.Sigmoid()), device="cpu")
    model.compile("sgd", "bce")
    with pytest.raises(ValueError, match="Expected targets from 0 to 1"):
        model.fit(DataLoader(TensorDataset(torch.zeros(8, 4), -torch.ones(8, 1)), 4, shuffle=shuffle), verbose=0)
