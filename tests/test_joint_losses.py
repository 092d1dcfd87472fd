"""Losses and metrics of an evaluation, computed on many batches at once."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fitkit
from fitkit.callbacks import Callback

SAMPLES, CLASSES, BATCH = 350, 3, 4

LOSSES: dict[str, nn.Module] = {
    "cross_entropy": nn.CrossEntropyLoss(),
    "ignored targets": nn.CrossEntropyLoss(ignore_index=1),
    "class weights": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0])),
    "label smoothing": nn.CrossEntropyLoss(label_smoothing=0.2),
    "multi_margin": nn.MultiMarginLoss(),
}


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SAMPLES, 5, generator=generator)
    return x, torch.randint(CLASSES, (SAMPLES,), generator=generator)


def compiled(loss: Any, metrics: list[str] | None = None, module: nn.Module | None = None) -> fitkit.Model:
    torch.manual_seed(0)
    model = fitkit.Model(module or nn.Linear(5, CLASSES))
    model.compile("sgd", loss, metrics)
    return model


class Losses(Callback):
    """The numbers of each test batch, as a callback reads them."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_test_batch_end(self, batch: int, logs: Mapping[str, float] | None = None) -> None:
        self.seen.append(dict(logs or {}))


@pytest.mark.parametrize("name", LOSSES)
def test_an_evaluation_gives_the_loss_of_all_the_data(name: str) -> None:
    x, y = data()
    model = compiled(LOSSES[name])
    with torch.no_grad():
        expected = LOSSES[name](model.module(x), y).item()
    assert model.evaluate(x, y, batch_size=BATCH, verbose=0) == pytest.approx(expected, rel=1e-6)


def test_reduction_sum_is_reported_per_sample() -> None:
    x, y = data()
    model = compiled(nn.CrossEntropyLoss(reduction="sum"))
    mean = compiled("cross_entropy").evaluate(x, y, batch_size=BATCH, verbose=0)
    assert model.evaluate(x, y, batch_size=BATCH, verbose=0) == pytest.approx(mean, rel=1e-6)


def test_a_callback_reads_the_loss_of_each_batch() -> None:
    x, y = data()
    losses = Losses()
    model = compiled("cross_entropy", ["accuracy"])
    model.evaluate(x, y, batch_size=BATCH, callbacks=[losses], verbose=0)
    with torch.no_grad():
        outputs = model.module(x).split(BATCH)
    own = [F.cross_entropy(output, target).item() for output, target in zip(outputs, y.split(BATCH), strict=True)]
    assert [each["batch_loss"] for each in losses.seen] == pytest.approx(own)


def test_a_callback_reads_the_mean_of_the_batches_so_far() -> None:
    x, y = data()
    losses = Losses()
    model = compiled("cross_entropy", ["accuracy"])
    model.evaluate(x, y, batch_size=BATCH, callbacks=[losses], verbose=0)
    for batches in (1, 2, 63, 80):
        part = model.evaluate(x[: batches * BATCH], y[: batches * BATCH], verbose=0)
        seen = losses.seen[batches - 1]
        assert [seen["loss"], seen["accuracy"]] == pytest.approx(part)  # type: ignore[comparison-overlap]


def test_reading_numbers_moves_no_digit_of_them() -> None:
    x, y = data()
    model = compiled("cross_entropy", ["accuracy", "auroc"])
    alone = model.evaluate(x, y, batch_size=BATCH, verbose=0)
    assert model.evaluate(x, y, batch_size=BATCH, callbacks=[Losses()], verbose=0) == alone


@pytest.mark.parametrize("bad", [0, 1, 30])
def test_an_error_in_a_validation_names_the_batch_that_it_came_up_in(bad: int) -> None:
    x, y = data()
    wrong = y.clone()
    wrong[bad * BATCH] = CLASSES
    model = compiled("cross_entropy")
    with pytest.raises(ValueError, match="Target 3 is out of bounds") as caught:
        model.fit(x, y, epochs=1, validation_data=(x, wrong), batch_size=BATCH, verbose=0)
    words = f"{caught.value} {getattr(caught.value, '__notes__', '')}"  # Python 3.10 has no notes
    assert f"the validation of epoch 1 (index 0), batch {bad + 1} (index {bad})" in words


def test_a_loss_that_somebody_listens_to_is_called_for_each_batch() -> None:
    x, y = data()
    loss, calls = nn.CrossEntropyLoss(), []
    loss.register_forward_hook(lambda *_: calls.append(1))
    compiled(loss).evaluate(x, y, batch_size=BATCH, verbose=0)
    assert len(calls) == -(-SAMPLES // BATCH)


def test_outputs_of_varying_shapes_are_each_counted() -> None:
    batches = [(torch.randn(4, 2, length), torch.randn(4, 2, length)) for length in (3, 3, 5, 5, 5, 3, 1)]
    model = compiled("mse", module=nn.Identity())
    total = sum(F.mse_loss(x, y, reduction="sum").item() for x, y in batches)
    elements = sum(y.numel() for _, y in batches)
    assert model.evaluate(batches, verbose=0) == pytest.approx(total / elements)


def test_a_loader_may_refill_its_batches() -> None:
    x, y = data()
    x, y = x[: 80 * BATCH].reshape(80, BATCH, 5), y[: 80 * BATCH].reshape(80, BATCH)
    place = (torch.empty(BATCH, 5), torch.empty(BATCH, dtype=torch.int64))

    class Refilled:
        def __iter__(self) -> Any:
            for index in range(80):
                place[0].copy_(x[index])
                place[1].copy_(y[index])
                yield place

    model = compiled("cross_entropy", ["accuracy"])
    expected = model.evaluate(x.flatten(0, 1), y.flatten(), verbose=0)
    assert model.evaluate(Refilled(), verbose=0) == pytest.approx(expected)  # type: ignore[arg-type]


def test_gradients_are_on_in_the_hooks_between_batches() -> None:
    x, y = data()
    on: list[bool] = []

    class Asks(Callback):
        def on_test_batch_begin(self, batch: int, logs: Mapping[str, float] | None = None) -> None:
            on.append(torch.is_grad_enabled())

    compiled("cross_entropy").evaluate(x, y, callbacks=[Asks()], verbose=0)
    assert set(on) == {True}


def test_gradients_are_on_where_a_dataset_of_the_users_makes_its_samples() -> None:
    on: list[bool] = []

    class Samples(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            on.append(torch.is_grad_enabled())
            return torch.randn(5), torch.tensor(index % CLASSES)

    compiled("cross_entropy").evaluate(Samples(), batch_size=2, verbose=0)
    assert set(on) == {True}


def test_class_weights_that_a_callback_exchanges_count_from_the_next_batch_on() -> None:
    x, y = data()
    first, second = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 1.0, 1.0])
    loss = nn.CrossEntropyLoss(weight=first)

    class Exchanges(Callback):
        def on_test_batch_end(self, batch: int, logs: Mapping[str, float] | None = None) -> None:
            if batch == 20:
                loss.weight = second

    model = compiled(loss)
    found = model.evaluate(x, y, batch_size=BATCH, callbacks=[Exchanges()], verbose=0)
    with torch.no_grad():
        output = model.module(x)
    split = 21 * BATCH
    parts = [(output[:split], y[:split], first), (output[split:], y[split:], second)]
    total = sum(F.cross_entropy(o, t, weight=weight, reduction="sum").item() for o, t, weight in parts)
    assert found == pytest.approx(total / sum(weight[t].sum().item() for _, t, weight in parts))


def test_a_batch_without_samples_changes_nothing() -> None:
    x, y = data()
    whole = [(x[:4], y[:4]), (x[4:8], y[4:8]), (x[8:12], y[8:12])]
    model = compiled("cross_entropy", ["accuracy"])
    expected = model.evaluate(whole, verbose=0)
    assert model.evaluate([*whole[:2], (x[:0], y[:0]), (x[:0], y[:0]), whole[2]], verbose=0) == expected


def test_in_half_precision_a_sum_overflows_in_no_larger_a_batch_than_the_users() -> None:
    x, y = torch.full((2000, 1), 20.0), torch.zeros(2000, 1)
    layer = nn.Linear(1, 1).half()
    nn.init.ones_(layer.weight)
    nn.init.zeros_(layer.bias)
    model = compiled(nn.MSELoss(reduction="sum"), module=layer)
    assert model.evaluate(x, y, verbose=0) == model.evaluate(x, y, batch_size=4, verbose=0) == 400.0


def test_the_first_loss_that_is_not_finite_is_that_of_its_batch_whenever_one_asks() -> None:
    x, y = data()
    x[30 * BATCH] = float("nan")
    found: dict[int, int | None] = {}

    class Asks(Callback):
        def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch in (29, 30, 31, 60, 86):
                found[batch] = logs.first_nonfinite()

    compiled("cross_entropy").evaluate(x, y, batch_size=BATCH, callbacks=[Asks()], verbose=0)
    assert found == {29: None, 30: 30, 31: 30, 60: 30, 86: 30}


@pytest.mark.parametrize("batch_size", [None, 32])
def test_a_loss_that_weighs_the_places_in_a_batch_is_given_no_larger_one(batch_size: int | None) -> None:
    torch.manual_seed(0)
    x, y, weight = torch.randn(96, 5), torch.rand(96, 1), torch.rand(32, 1)
    module = nn.Linear(5, 1)
    with torch.no_grad():
        expected = F.binary_cross_entropy_with_logits(module(x), y, weight.repeat(3, 1)).item()
    for loss in (nn.BCEWithLogitsLoss(weight), partial(F.binary_cross_entropy_with_logits, weight=weight)):
        found = compiled(loss, module=module).evaluate(x, y, batch_size=batch_size, verbose=0)
        assert found == pytest.approx(expected)


def test_an_evaluation_may_be_read_within_an_inference_mode() -> None:
    x, y = data()
    model = compiled("cross_entropy", ["accuracy", "auroc"])
    expected = model.evaluate(x, y, batch_size=BATCH, verbose=0)
    with torch.inference_mode():
        assert model.evaluate(x, y, batch_size=BATCH, callbacks=[Losses()], verbose=0) == expected


def test_a_metric_that_keeps_rows_keeps_them_when_others_wait_in_their_place() -> None:
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(20_000, 5, generator=generator), torch.randn(20_000, CLASSES, generator=generator)
    y = (x[:, :CLASSES] + noise).argmax(1)
    model = compiled("multi_margin", ["auroc", "average_precision"])
    expected = model.evaluate(x, y, batch_size=len(x), verbose=0)
    assert model.evaluate(x, y, batch_size=100, verbose=0) == pytest.approx(expected)  # type: ignore[comparison-overlap]


def test_a_module_that_switches_gradients_on_is_evaluated() -> None:
    class SwitchesOn(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            torch.set_grad_enabled(True)
            return super().forward(x)

    x, y = data()
    expected = compiled("cross_entropy", ["accuracy"]).evaluate(x, y, batch_size=BATCH, verbose=0)
    model = compiled("cross_entropy", ["accuracy"], SwitchesOn(5, CLASSES))
    model.module.load_state_dict(compiled("cross_entropy").module.state_dict())
    assert model.evaluate(x, y, batch_size=BATCH, verbose=0) == expected


def test_some_batches_may_come_within_an_inference_mode() -> None:
    x, y = data()

    class Batches:
        def __iter__(self) -> Any:
            for index, batch in enumerate(zip(x.split(BATCH), y.split(BATCH), strict=True)):
                with torch.inference_mode(index % 3 == 0):
                    yield batch

    model = compiled("cross_entropy", ["accuracy"])
    expected = model.evaluate(x, y, batch_size=BATCH, verbose=0)
    assert model.evaluate(Batches(), verbose=0) == expected  # type: ignore[arg-type]
