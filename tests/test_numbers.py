"""Numbers wait on the device until many are summed up: whatever happens to the memory that they came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch
from torch import Tensor, nn

import fitkit


class RefilledBatches:
    """Every batch is written into the same memory, as a loader that spares allocations does."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = torch.empty_like(self.x[0]), torch.empty_like(self.y[0])
        for index in range(len(self.x)):
            yield x.copy_(self.x[index]), y.copy_(self.y[index])


class WritesIntoItsBuffer(nn.Module):
    """The output of every call stands where that of the call before stood."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.register_buffer("place", torch.empty(4, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self.layer(x)
        self.place.copy_(self.layer(x))
        return self.place


def compiled(module: nn.Module, metrics: list[str]) -> fitkit.Model:
    model = fitkit.Model(module, device="cpu")
    model.compile("sgd", "mse", metrics, learning_rate=0.0)
    return model


@pytest.fixture
def batches() -> RefilledBatches:
    torch.manual_seed(0)
    return RefilledBatches(torch.randn(9, 4, 3), torch.randn(9, 4, 1))


def test_batches_in_memory_that_is_filled_again_are_each_counted(batches: RefilledBatches) -> None:
    model = compiled(nn.Linear(3, 1), ["mae", "spearman"])
    expected = model.evaluate(batches.x.flatten(0, 1), batches.y.flatten(0, 1), return_dict=True, verbose=0)
    assert model.evaluate(batches, return_dict=True, verbose=0) == pytest.approx(expected)  # type: ignore[arg-type]
    history = model.fit(batches, epochs=1, verbose=0)
    assert history["spearman"] == pytest.approx([expected["spearman"]])  # type: ignore[index, call-overload]


def test_outputs_in_memory_that_is_filled_again_are_each_counted(batches: RefilledBatches) -> None:
    module = WritesIntoItsBuffer()
    model, plain = compiled(module, ["mae", "spearman"]), compiled(module.layer, ["mae", "spearman"])
    x, y = batches.x.flatten(0, 1), batches.y.flatten(0, 1)
    expected = plain.evaluate(x, y, verbose=0)
    assert model.evaluate(x, y, batch_size=4, verbose=0) == pytest.approx(expected)  # type: ignore[arg-type]


def test_outputs_written_into_a_buffer_under_autograd_are_each_counted(batches: RefilledBatches) -> None:
    class Writes(WritesIntoItsBuffer):
        def forward(self, x: Tensor) -> Tensor:
            self.place = self.place.detach()
            return self.place.copy_(self.layer(x))

    module = Writes()
    x, y = batches.x.flatten(0, 1), batches.y.flatten(0, 1)
    expected = compiled(module.layer, ["spearman"]).evaluate(x, y, verbose=0, return_dict=True)
    history = compiled(module, ["spearman"]).fit(x, y, batch_size=4, shuffle=False, epochs=1, verbose=0)
    assert history["spearman"] == pytest.approx([expected["spearman"]])  # type: ignore[index, call-overload]


def test_a_small_view_of_a_large_output_does_not_keep_the_large_one() -> None:
    sizes: list[int] = []

    class FirstColumn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1000)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[:, :1]

    class Sizes(fitkit.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: object = None) -> None:
            held = step.numbers.metrics._parts[0][1]._held
            sizes.extend(rows[0].untyped_storage().nbytes() for rows in held)

    import fitkit.model as house

    class Watched(house.TrainStep):  # type: ignore[misc]
        def __init__(self, *args: object, **kwargs: object) -> None:
            nonlocal step
            super().__init__(*args, **kwargs)
            step = self

    step: house.TrainStep
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(house, "TrainStep", Watched)
        compiled(FirstColumn(), ["mae"]).fit(
            torch.randn(40, 3), torch.randn(40, 1), batch_size=4, epochs=1, callbacks=[Sizes()], verbose=0
        )
    assert len(sizes) == sum(range(1, 10))
    assert max(sizes) == 4 * 4


@pytest.mark.parametrize("every", [1, 7])
def test_looking_at_numbers_moves_no_digit_of_them(every: int) -> None:
    class Looking(fitkit.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Mapping[str, float] | None = None) -> None:
            if batch % every == 0:
                dict(logs or {})

    def recorded(*callbacks: fitkit.callbacks.Callback) -> dict[str, list[float | None]]:
        torch.manual_seed(0)
        x = torch.randn(700, 3)
        model = compiled(nn.Linear(3, 1), ["mae", "mse", "r2", "spearman"])
        return model.fit(x, x[:, :1] * 3, batch_size=2, epochs=2, callbacks=list(callbacks), verbose=0).history

    assert recorded(Looking()) == recorded()
