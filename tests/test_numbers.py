"""Numbers wait on the device until many are summed up: whatever happens to the memory that they came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

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
            sizes.extend(each[3].untyped_storage().nbytes() for each in step.numbers._put_off)

    import fitkit.preparation as house

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


class Constant(nn.Module):
    """The output is the parameter itself, seen as one row for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.value.expand(len(x), 1)


def test_what_shares_memory_with_a_parameter_is_measured_before_the_step() -> None:
    model = fitkit.Model(Constant(), device="cpu")
    model.compile("sgd", "mae", ["mae"], learning_rate=1.0)
    loss, mae = model.train_on_batch(torch.zeros(6, 3), torch.full((6, 1), 5.0))  # type: ignore[misc]
    assert (loss, mae) == (5.0, 5.0)


class Counting(fitkit.Model):
    """Logs tensors that change in place."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 1), device="cpu")
        self.total = torch.zeros(())

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        self.total += 1
        return {"loss": self.module(batch).mean(), "count": self.total, "bias": self.module.bias[0]}


def test_what_a_step_logs_is_kept_as_it_was() -> None:
    model = Counting()
    model.compile("sgd", learning_rate=0.5)
    before = float(model.module.bias.detach())
    history = model.fit(torch.randn(8, 3), batch_size=2, epochs=1, verbose=0)
    assert history["count"] == [2.5]
    # The gradient of the mean by the bias is 1, so it falls by 0.5 at each step.
    assert history["bias"] == pytest.approx([before - 0.75])  # type: ignore[comparison-overlap]


def test_an_output_that_the_module_keeps_and_changes_is_counted_as_it_was(batches: RefilledBatches) -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)
            self.kept: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.kept is not None:
                self.kept.zero_()
            output = self.layer(x)
            self.kept = output.detach()
            return output

    module = Keeps()
    x, y = batches.x.flatten(0, 1), batches.y.flatten(0, 1)
    expected = compiled(module.layer, ["spearman"]).evaluate(x, y, verbose=0, return_dict=True)
    history = compiled(module, ["spearman"]).fit(x, y, batch_size=4, shuffle=False, epochs=1, verbose=0)
    assert history["spearman"] == pytest.approx([expected["spearman"]])  # type: ignore[index, call-overload]


def test_a_metric_that_writes_into_its_arguments_changes_no_other_metric() -> None:
    def spoiling(output: Tensor, target: Tensor) -> Tensor:
        target.zero_()
        return output.fill_(0.0).mean()

    def plain(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).abs().mean()

    torch.manual_seed(0)
    x, y = torch.randn(12, 3), torch.randn(12, 1)
    module = nn.Linear(3, 1)
    expected = compiled(module, ["mae"]).evaluate(x, y, batch_size=4, verbose=0, return_dict=True)
    model = fitkit.Model(module, device="cpu")
    model.compile("sgd", "mse", metrics=["mae", spoiling, plain])
    found = model.evaluate(x, y, batch_size=4, verbose=0, return_dict=True)
    assert found["mae"] == pytest.approx(expected["mae"])  # type: ignore[index, call-overload]
    assert found["plain"] == pytest.approx(expected["mae"])  # type: ignore[index, call-overload]


def test_a_loader_of_another_class_may_give_the_same_memory_again() -> None:
    class Refilling(DataLoader[Any]):
        def __iter__(self) -> Any:
            x, y = torch.empty(4, 3), torch.empty(4, 1)
            for batch in super().__iter__():
                yield [x.copy_(batch[0]), y.copy_(batch[1])]

    torch.manual_seed(0)
    x, y = torch.randn(20, 3), torch.randn(20, 1)
    model = compiled(nn.Linear(3, 1), ["spearman"])
    expected = model.evaluate(x, y, verbose=0)
    assert model.evaluate(Refilling(TensorDataset(x, y), 4), verbose=0) == pytest.approx(expected)  # type: ignore[arg-type]


def test_class_weights_that_are_replaced_count_from_then_on() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(50, 3), torch.randint(0, 3, (50,))
    loss = nn.CrossEntropyLoss(torch.ones(3))
    module = nn.Linear(3, 3)
    model = fitkit.Model(module, device="cpu")
    model.compile("sgd", loss)
    loss.weight = torch.tensor([9.0, 1.0, 1.0])
    assert model.evaluate(x, y, batch_size=7, verbose=0) == pytest.approx(loss(module(x), y).item())


@pytest.mark.parametrize("bad", [1, 5])
def test_a_target_that_a_metric_cannot_read_is_an_error_of_its_batch(bad: int) -> None:
    batches = [(torch.randn(4, 3), torch.rand(4, 3).softmax(1)) for _ in range(20)]
    batches[bad] = (torch.randn(4, 3), torch.tensor([0, 1, 2, 0]))  # fine for the loss
    model = fitkit.Model(nn.Linear(3, 3), device="cpu")
    model.compile("sgd", "cross_entropy", ["mae"])
    with pytest.raises(ValueError, match="'mae' expect targets of the output's shape") as caught:
        model.fit(batches, epochs=1, verbose=0)
    words = f"{caught.value} {getattr(caught.value, '__notes__', '')}"  # Python 3.10 has no notes
    assert f"batch {bad + 1} (index {bad})" in words


def test_a_batch_whose_metric_runs_out_of_memory_is_counted_once() -> None:
    def every_pair(output: Tensor, target: Tensor) -> Tensor:
        if len(output) > 4:
            raise torch.OutOfMemoryError("every pair of so many")
        return (output - target).abs().mean()

    torch.manual_seed(0)
    x, y = torch.randn(24, 3), torch.randn(24, 1)
    model = fitkit.Model(nn.Linear(3, 1), device="cpu")
    model.compile("sgd", "mse", [every_pair], learning_rate=0.0)
    loss, pairs = model.evaluate(x, y, batch_size=4, verbose=0)  # type: ignore[misc]
    history = model.fit(x, y, batch_size=8, epochs=1, micro_batch_size="auto", verbose=0)
    assert history["loss"] == pytest.approx([loss])
    assert history["every_pair"] == pytest.approx([pairs])


def test_losses_that_somebody_listens_to_are_kept_as_they_were() -> None:
    loss, given = nn.MSELoss(), list[Tensor]()

    def spoil(module: nn.Module, inputs: object, value: Tensor) -> None:
        for earlier in given:
            earlier.detach().zero_()
        given.append(value)

    torch.manual_seed(0)
    x, y = torch.randn(40, 3), torch.randn(40, 1)
    model = fitkit.Model(nn.Linear(3, 1), device="cpu")
    model.compile("sgd", loss, learning_rate=0.0)
    expected = model.evaluate(x, y, verbose=0)
    loss.register_forward_hook(spoil)
    history = model.fit(x, y, batch_size=4, epochs=1, verbose=0)
    assert history["loss"] == pytest.approx([expected])  # type: ignore[comparison-overlap]
