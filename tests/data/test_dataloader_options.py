"""dataloader_options: how fit, evaluate and predict make a DataLoader of a Dataset."""

from __future__ import annotations

import multiprocessing
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fitkit
from fitkit.callbacks import LambdaCallback


class Pairs(Dataset[Any]):
    """Samples whose input is 1 and whose target is the id of the process that made it."""

    def __init__(self, samples: int = 12) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.ones(1), torch.tensor([float(os.getpid())])


class Numbers(Dataset[Any]):
    """Samples by index, with a draw of random numbers."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.rand(3) + index, torch.rand(1)


class Watching(fitkit.Model):
    """Notes the targets of each training and validation batch."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1), device="cpu")
        self.seen: list[set[float]] = [set()]
        self.validated: list[set[float]] = [set()]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen[-1].update(batch[1].flatten().tolist())
        return self.module(batch[0]).sum() * 0.0

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.validated[-1].update(batch[1].flatten().tolist())
        return self.module(batch[0]).sum()


def watched(**arguments: Any) -> Watching:
    model = Watching()
    model.compile("sgd")
    note = LambdaCallback(on_epoch_end=lambda epoch, logs: (model.seen.append(set()), model.validated.append(set())))
    model.fit(Pairs(), batch_size=2, epochs=3, callbacks=[note], verbose=0, **arguments)
    return model


def test_workers_stay_from_epoch_to_epoch() -> None:
    seen = watched(dataloader_options={"num_workers": 2}).seen
    assert len(seen[0]) == 2
    assert os.getpid() not in seen[0]
    assert seen[0] == seen[1] == seen[2]


def test_workers_leave_after_an_epoch_when_asked() -> None:
    seen = watched(dataloader_options={"num_workers": 1, "persistent_workers": False}).seen
    assert not seen[0] & seen[1]


def test_the_workers_of_the_validation_stay_too() -> None:
    validated = watched(dataloader_options={"num_workers": 1}, validation_data=Pairs(4)).validated
    assert len(validated[0]) == 1
    assert validated[0] == validated[1] == validated[2]


def test_no_worker_outlives_the_fit() -> None:
    before = set(multiprocessing.active_children())
    watched(dataloader_options={"num_workers": 2}, validation_split=0.25)
    assert set(multiprocessing.active_children()) <= before


@pytest.mark.parametrize("workers", [0, 2])
def test_weights_are_those_of_a_loader_made_with_the_same_options(workers: int) -> None:
    def trained(data: Any, **arguments: Any) -> Tensor:
        torch.manual_seed(3)
        module = nn.Linear(3, 1)
        model = fitkit.Model(module, device="cpu")
        model.compile("sgd", "mse", learning_rate=0.01)
        model.fit(data, epochs=2, verbose=0, **arguments)
        return module.weight.detach()

    options = {"num_workers": workers, "drop_last": True, "persistent_workers": False}
    loader = DataLoader(Numbers(), batch_size=4, shuffle=True, **options)
    assert torch.equal(trained(loader), trained(Numbers(), batch_size=4, dataloader_options=options))


def test_workers_that_stay_change_no_order() -> None:
    class Reading(fitkit.Model):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            read.extend(batch[0].flatten().tolist())
            return self.module(batch[0]).sum()

    def order(**arguments: Any) -> list[float]:
        torch.manual_seed(3)
        model = Reading(nn.Linear(1, 1), device="cpu")
        model.compile("sgd")
        model.fit(TensorDataset(torch.arange(8.0).unsqueeze(1)), batch_size=2, epochs=3, verbose=0, **arguments)
        numbers = list(read)
        read.clear()
        return numbers

    read: list[float] = []
    assert order(dataloader_options={"num_workers": 2}) == order()


def test_drop_last_leaves_samples_out_of_training_only() -> None:
    model = fitkit.Model(nn.Linear(3, 1), device="cpu")
    model.compile("sgd", "mse")
    sizes: list[int] = []
    model.module.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    options = {"drop_last": True}
    model.fit(Numbers(), batch_size=4, epochs=1, validation_data=Numbers(), dataloader_options=options, verbose=0)
    assert sizes == [4, 4, 4, 4, 2]
    assert len(model.predict(Numbers(), batch_size=4, dataloader_options=options, verbose=0)) == 10


def test_a_collate_function_makes_the_batches_of_every_method() -> None:
    def doubled(samples: list[Any]) -> tuple[Tensor, Tensor]:
        return torch.stack([x for x, _ in samples]) * 2, torch.stack([y for _, y in samples])

    data = TensorDataset(torch.ones(4, 3), torch.zeros(4, 1))
    module = nn.Linear(3, 1)
    model = fitkit.Model(module, device="cpu")
    model.compile("sgd", "mse", learning_rate=0.0)
    options = {"collate_fn": doubled}
    output = module(torch.full((1, 3), 2.0)).detach()
    expected = pytest.approx(output.square().item())
    assert model.evaluate(data, dataloader_options=options, verbose=0) == expected
    assert model.fit(data, epochs=1, dataloader_options=options, verbose=0)["loss"][0] == expected
    assert torch.allclose(model.predict(data, dataloader_options=options, verbose=0), output.expand(4, 1))


@pytest.mark.parametrize(
    ("data", "options", "error", "message"),
    [
        (Pairs(), {"batch_size": 3}, ValueError, "batch_size as an argument of its own"),
        (Pairs(), {"sampler": [1]}, ValueError, "Make a DataLoader"),
        (Pairs(), {"num_worker": 1}, ValueError, "Did you mean 'num_workers'"),
        (Pairs(), 4, TypeError, "a dict of options"),
        (torch.ones(4, 1), {"num_workers": 1}, ValueError, "goes with a Dataset"),
        (DataLoader(Pairs()), {"num_workers": 1}, ValueError, "goes with a Dataset"),
        ([torch.ones(4, 1)] * 2, {}, ValueError, "goes with a Dataset"),
    ],
    ids=lambda value: str(value) if isinstance(value, (dict, str)) else type(value).__name__,
)
def test_other_options_and_other_data_are_refused(data: Any, options: Any, error: type, message: str) -> None:
    model = Watching()
    model.compile("sgd")
    with pytest.raises(error, match=message):
        model.fit(data, epochs=1, dataloader_options=options, verbose=0)
