"""micro_batch_size: the parts that fit, found by running out of memory, and nothing left of the failed tries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fitkit

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
Y = torch.randn(40, 1, generator=torch.Generator().manual_seed(1))


class Tight(nn.Module):
    """Has room for so many samples, in forward or in backward."""

    def __init__(self, room: int, in_backward: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.room, self.in_backward, self.sizes = room, in_backward, []  # type: ignore[var-annotated]
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.4), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.layers(x)
        if len(x) <= self.room:
            self.sizes.append(len(x))
        elif self.in_backward and output.requires_grad:
            # The last layer's gradients are there when memory runs out in the middle of the backward pass.
            self.layers[1].weight.register_hook(self._refuse)
        elif self.training:
            self._refuse()
        return output

    def _refuse(self, *_: Any) -> None:
        if self.in_backward:
            self.layers[1].weight._backward_hooks = None
        raise torch.OutOfMemoryError("CUDA out of memory.")


def _fit(module: nn.Module, size: Any, **arguments: Any) -> fitkit.History:
    model = fitkit.Model(module, device="cpu")
    model.compile(torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9), "mse")
    torch.manual_seed(4)
    arguments = {"epochs": 3, "batch_size": 16, "verbose": 0} | arguments
    return model.fit(X, Y, micro_batch_size=size, **arguments)


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("in_backward", [False, True], ids=["forward", "backward"])
def test_auto_finds_the_parts_that_fit_and_trains_as_if_they_had_been_given(in_backward: bool, window: int) -> None:
    found, given = Tight(5, in_backward), Tight(1000)
    history = _fit(found, "auto", accumulate_grad_batches=window)
    expected = _fit(given, 4, accumulate_grad_batches=window)
    assert max(found.sizes) == 4
    assert history.history == expected.history
    for one, other in zip(found.state_dict().values(), given.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_auto_with_enough_room_is_the_plain_fit() -> None:
    split, plain = Tight(1000), Tight(1000)
    assert _fit(split, "auto").history == _fit(plain, None).history
    assert all(map(torch.equal, split.state_dict().values(), plain.state_dict().values()))


def test_a_single_sample_that_does_not_fit_is_a_clear_error() -> None:
    module = Tight(0)
    module.layers[1] = nn.Identity()
    with pytest.raises(torch.OutOfMemoryError, match='single sample, so micro_batch_size="auto" cannot split further'):
        _fit(module, "auto")


def test_without_auto_running_out_of_memory_is_the_error_that_it_was() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        _fit(Tight(5), None)


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "automatic", float("nan")])
def test_what_is_no_number_of_samples_is_refused(size: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="received micro_batch_size="):
        _fit(Tight(1000), size)


def test_parts_are_no_batches_to_callbacks() -> None:
    seen: list[int] = []
    counting = fitkit.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(batch))
    _fit(Tight(1000), 4, epochs=1, callbacks=[counting])
    assert seen == [0, 1, 2]


def test_a_batch_that_only_its_library_can_cut_is_refused() -> None:
    class Graphs:
        num_graphs = 9

    class Model(fitkit.Model):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.module(torch.ones(1, 2)).sum()

    model = Model(nn.Linear(2, 1), device="cpu")
    model.compile("sgd")
    with pytest.raises(TypeError, match="split by micro_batch_size, received"):
        model.fit([Graphs()], epochs=1, micro_batch_size=4, verbose=0)


def test_an_expanded_buffer_does_not_hinder_a_retry() -> None:
    module = Tight(5)
    module.register_buffer("expanded", torch.zeros(1).expand(5))
    assert len(_fit(module, "auto")) == 3


def test_splitting_reads_no_number() -> None:
    class Reads(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Reads.seen += "_local_scalar_dense" in str(func)
            return func(*args, **(kwargs or {}))

    with Reads():
        _fit(Tight(1000), 4)
    assert Reads.seen == 0


@pytest.mark.parametrize(("size", "noted"), [(None, None), (4, 4), ("auto", None)])
def test_history_notes_the_samples_in_a_part(size: Any, noted: int | None) -> None:
    assert _fit(Tight(1000), size).params["micro_batch_size"] == noted


def test_auto_reports_the_size_that_it_found(capsys: pytest.CaptureFixture[str]) -> None:
    history = _fit(Tight(5), "auto", verbose=2)
    assert history.params["micro_batch_size"] == 4
    assert capsys.readouterr().out.splitlines()[-1] == (
        'micro_batch_size="auto": parts of at most 4 samples fit into the memory'
    )


def test_auto_says_when_nothing_was_split(capsys: pytest.CaptureFixture[str]) -> None:
    _fit(Tight(1000), "auto", verbose=2)
    assert 'micro_batch_size="auto": batches fit whole into the memory' in capsys.readouterr().out


def test_the_size_found_is_noted_also_when_the_run_fails(capsys: pytest.CaptureFixture[str]) -> None:
    def stop(epoch: int, logs: Any) -> None:
        raise KeyboardInterrupt("Ctrl-C")

    module = Tight(5)
    model = fitkit.Model(module, device="cpu")
    model.compile("sgd", "mse")
    stopping = fitkit.callbacks.LambdaCallback(on_epoch_end=stop)
    with pytest.raises(KeyboardInterrupt, match="Ctrl-C"):
        model.fit(X, Y, batch_size=16, epochs=3, micro_batch_size="auto", callbacks=[stopping], verbose=0)
    assert model.history.params["micro_batch_size"] == 4
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("size", [4, "auto"])
def test_the_size_is_noted_also_where_processes_share_batches(size: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert _fit(Tight(5), size).params["micro_batch_size"] == 4
    finally:
        torch.distributed.destroy_process_group()
