"""The way to the device: what arrives is what left, counted on the host; without a wait where there is a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fitkit
import fitkit.preparation
from fitkit.batch import Placed, split, tensors
from fitkit.data import Batching, as_batches
from fitkit.transfer import Transfer

CPU = torch.device("cpu")
X, Y = torch.randn(37, 3), torch.randint(0, 2, (37,))
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def batches_of(data: Any, *, shuffle: bool = True) -> Any:
    return as_batches(data, None, None, Batching(4, shuffle, True, torch.float32, CPU))


def kept(data: Any, **options: Any) -> Any:
    return batches_of(data, **options).kept_on(CPU, 2**30)


@pytest.mark.parametrize("shuffle", [True, False])
def test_data_kept_on_the_device_gives_the_same_batches_and_draws(shuffle: bool) -> None:
    torch.manual_seed(1)
    expected = [*batches_of((X, Y), shuffle=shuffle), *batches_of((X, Y), shuffle=shuffle), torch.rand(1)]
    torch.manual_seed(1)
    batches = kept((X, Y), shuffle=shuffle)
    found = [*(each.on_device for each in batches), *(each.on_device for each in batches), torch.rand(1)]
    assert all(map(torch.equal, tensors(found), tensors(expected)))
    assert len(found) == len(expected)


def test_a_placed_batch_has_its_targets_on_the_host() -> None:
    for placed in kept(({"a": X, "b": X}, [Y, Y])):
        assert set(placed.on_device[0]) == {"a", "b"}
        assert placed.on_host[0] == {"a": None, "b": None}
        assert all(map(torch.equal, placed.on_host[1], placed.on_device[1]))


def test_a_batch_of_x_alone_is_placed_too() -> None:
    assert torch.equal(torch.cat([placed.on_device for placed in kept(X, shuffle=False)]), X)


def test_tensors_are_copied_again_only_when_they_change() -> None:
    x = X.clone()
    batches = kept((x, Y), shuffle=False)
    list(batches)
    copy = batches._rows[0]._copy
    list(batches)
    assert batches._rows[0]._copy is copy
    x.add_(1)
    assert torch.equal(next(iter(batches)).on_device[0], x[:4])


def test_arrays_of_numpy_are_copied_at_each_pass_as_their_changes_leave_no_trace() -> None:
    x = X.numpy().copy()
    batches = kept((x, Y.numpy()), shuffle=False)
    list(batches)
    x += 1
    assert np.array_equal(next(iter(batches)).on_device[0].numpy(), x[:4])


def test_data_without_room_stays_on_the_host() -> None:
    batches = batches_of((X, Y))
    assert batches.kept_on(CPU, X.nbytes + Y.nbytes - 1) is batches
    assert batches.kept_on(CPU, X.nbytes + Y.nbytes) is not batches


def test_a_placed_batch_is_split_on_both_sides() -> None:
    parts = split(Placed((X[:10], Y[:10]), (None, Y[:10])), 4)
    assert [len(part.on_device[0]) for part in parts] == [4, 4, 2]
    assert all(torch.equal(part.on_device[1], part.on_host[1]) for part in parts)


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 3}, {"accumulate_grad_batches": 2}], ids=str)
def test_training_from_data_on_the_device_gives_the_same_weights(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    y = Y.masked_fill(torch.arange(37) % 5 == 0, -100)

    def trained() -> tuple[list[Tensor], Any]:
        torch.manual_seed(5)
        model = fitkit.Model(nn.Linear(3, 2), device="cpu")
        model.compile("sgd", "cross_entropy", ["accuracy"], learning_rate=0.1)
        history = model.fit(
            (X, y), batch_size=8, epochs=3, validation_split=0.2, enable_early_stop=False, verbose=0, **options
        )
        return list(model.module.parameters()), history.history

    weights, numbers = trained()
    monkeypatch.setattr(fitkit.preparation, "room_for_data", lambda device: 2**30)
    original = Transfer.__init__
    monkeypatch.setattr(
        Transfer,
        "__init__",
        lambda self, *args, **options: (original(self, *args, **options), setattr(self, "is_needed", True))[0],
    )
    on_device, same_numbers = trained()
    assert all(map(torch.equal, weights, on_device))
    assert numbers == same_numbers


class PythonPairs(Dataset[Any]):
    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.full((1024,), float(index)), torch.tensor(index % 2)


@gpu
@pytest.mark.parametrize("kind", ["arrays", "loader of tensors", "loader"])
def test_no_step_waits_for_the_gpu(kind: str) -> None:
    data: Any = (torch.randn(512, 1024), torch.randint(0, 2, (512,)))
    if kind != "arrays":
        data = DataLoader(TensorDataset(*data) if "tensors" in kind else PythonPairs(), 64, shuffle=True)
    model = fitkit.Model(nn.Linear(1024, 2), device="cuda")
    model.compile("adam", "cross_entropy", ["accuracy"])
    watching = fitkit.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: torch.cuda.set_sync_debug_mode("error" if batch > 1 else "default"),
        on_train_batch_end=lambda batch, logs: torch.cuda.set_sync_debug_mode("default"),
    )
    model.fit(data, epochs=2, callbacks=[watching], gradient_clip_val=1.0, track_grad_norm=2, verbose=0)


@gpu
def test_batches_arrive_on_the_gpu_as_they_left() -> None:
    transfer = Transfer(torch.device("cuda"))
    for index in range(50):
        host = {"x": torch.full((64, 4096), float(index)), "y": [torch.full((7,), index)]}
        placed = transfer(host)
        assert all(map(torch.equal, tensors(host), (tensor.cpu() for tensor in tensors(placed.on_device))))
