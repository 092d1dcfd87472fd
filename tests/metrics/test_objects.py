"""Callables and torchmetrics objects that users bring."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torchmetrics
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchmetrics.classification import BinaryAccuracy, BinaryF1Score, MulticlassAccuracy, MulticlassConfusionMatrix

from fitkit._types import OutputMeaning
from fitkit.metrics import CompiledMetrics, RunningMetrics
from fitkit.metrics.gathering import HELD_BATCHES

CPU = torch.device("cpu")


def start(metric: object, *, weighted: bool = False) -> RunningMetrics:
    metrics = {"it": metric}
    compiled = CompiledMetrics(None, metrics) if weighted else CompiledMetrics(metrics)
    return compiled.start([OutputMeaning()], CPU)


def largest_gap(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).abs().mean()


def gaps(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).abs()


@given(cut=st.integers(1, 9))
def test_the_mean_of_a_batch_is_weighted_by_its_samples(cut: int) -> None:
    output, target = torch.arange(10.0), torch.zeros(10)
    running = start(largest_gap)
    running.update([output[:cut]], [target[:cut]], None)
    running.update([output[cut:]], [target[cut:]], None)
    assert float(running.compute()["it"]) == pytest.approx(4.5)


def test_values_of_items_are_averaged_over_items() -> None:
    running = start(gaps)
    running.update([torch.ones(1, 4)], [torch.zeros(1, 4)], None)
    running.update([torch.ones(2, 1) * 4], [torch.zeros(2, 1)], None)
    assert float(running.compute()["it"]) == pytest.approx((4 + 8) / 6)


@pytest.mark.parametrize("result", [2, 2.0, np.float32(2), torch.tensor([2.0]), torch.tensor(2), torch.ones(3, 1) * 2])
def test_a_callable_may_return_numbers_of_any_kind(result: object) -> None:
    running = start(lambda output, target: result)
    running.update([torch.zeros(3)], [torch.zeros(3)], None)
    assert running.compute()["it"] == 2.0


@pytest.mark.parametrize("result", [None, "2", [2.0], {"it": 2.0}])
def test_a_callable_that_returns_no_number_is_refused(result: object) -> None:
    running = start(lambda output, target: result)
    with pytest.raises(TypeError, match="Expected metric 'it' to return a tensor or a number, received"):
        running.update([torch.zeros(3)], [torch.zeros(3)], None)


def test_a_callable_that_returns_neither_one_number_nor_one_per_sample_is_refused() -> None:
    running = start(lambda output, target: torch.zeros(2))
    with pytest.raises(ValueError, match=r"one or more for each of 3 samples, received shape \(2,\)"):
        running.update([torch.zeros(3)], [torch.zeros(3)], None)


def test_a_callable_may_return_the_same_tensor_again() -> None:
    total = torch.zeros(())
    running = start(lambda output, target: total.add_(output.sum()))
    for _ in range(3):
        running.update([torch.ones(1)], [torch.ones(1)], None)
    assert running.compute()["it"] == 2.0


def test_a_callable_gets_whole_structures() -> None:
    running = start(lambda output, target: (output["a"] - target["a"]).abs())
    running.update([{"a": torch.ones(2), "b": None}], [{"a": torch.zeros(2)}], None)
    assert running.compute()["it"] == 1.0


def test_a_module_runs_without_gradients() -> None:
    running = start(nn.L1Loss())
    running.update([torch.ones(2, requires_grad=True)], [torch.zeros(2)], None)
    assert not running.compute()["it"].requires_grad


def test_many_batches_hold_a_bounded_number_of_values() -> None:
    running = start(largest_gap)
    for _ in range(1000):
        running.update([torch.ones(1)], [torch.zeros(1)], None)
        assert len(running._groups[0][1]._held) < HELD_BATCHES  # type: ignore[union-attr]
    assert running.compute()["it"] == 1.0


def test_weighted_values_are_divided_by_the_sum_of_weights() -> None:
    running = start(gaps, weighted=True)
    running.update([torch.tensor([1.0, 2.0])], [torch.zeros(2)], [torch.tensor([1.0, 3.0])])
    running.update([torch.tensor([7.0, 7.0])], [torch.zeros(2)], [torch.zeros(2)])
    running.update([torch.tensor([4.0])], [torch.zeros(1)], None)
    assert float(running.compute()["it"]) == pytest.approx((1 + 6 + 4) / 5)


def test_a_single_number_cannot_be_weighted() -> None:
    running = start(largest_gap, weighted=True)
    running.update([torch.ones(2)], [torch.zeros(2)], None)
    with pytest.raises(ValueError, match=r"to return one value or more for each of 2 samples, received shape \(\)"):
        running.update([torch.ones(2)], [torch.zeros(2)], [torch.ones(2)])


def test_a_torchmetrics_metric_gives_what_it_gives_by_hand() -> None:
    metric, by_hand = MulticlassAccuracy(3), MulticlassAccuracy(3)
    running = start(metric)
    for _ in range(3):
        output, target = torch.randn(5, 3), torch.randint(0, 3, (5,))
        running.update([output], [target], None)
        by_hand.update(output, target)
    assert running.compute()["it"] == by_hand.compute()


def test_the_users_own_metric_is_never_touched() -> None:
    metric = BinaryAccuracy()
    metric.update(torch.tensor([0.9]), torch.tensor([1]))
    before = copy.deepcopy(metric.metric_state)
    running = start(metric)
    running.update([torch.tensor([0.1, 0.2])], [torch.tensor([1, 1])], None)
    assert running.compute()["it"] == 0.0
    assert metric.metric_state == before
    assert metric.compute_with_cache


def test_a_collection_brings_its_own_names() -> None:
    collection = torchmetrics.MetricCollection({"share": BinaryAccuracy(), "f": BinaryF1Score()}, prefix="b_")
    running = CompiledMetrics([collection]).start([OutputMeaning()], CPU)
    running.update([torch.tensor([0.9, 0.2])], [torch.tensor([1, 1])], None)
    assert running.names == ["b_f", "b_share"]
    assert {key: round(float(value), 4) for key, value in running.compute().items()} == {"b_f": 0.6667, "b_share": 0.5}


@pytest.mark.parametrize("metric", [MulticlassConfusionMatrix(3), MulticlassAccuracy(3, average="none")])
def test_a_metric_that_computes_no_single_number_is_refused(metric: torchmetrics.Metric) -> None:
    running = start(metric)
    running.update([torch.eye(3)], [torch.arange(3)], None)
    with pytest.raises(ValueError, match="Expected metric 'it' to compute one number.* Choose an average"):
        running.compute()


class Batches(torchmetrics.Metric):
    """A metric of a user's own that computes a plain number."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("seen", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, output: Tensor, target: Tensor) -> None:
        self.seen += 1

    def compute(self) -> int:
        return int(self.seen)


def test_a_metric_is_updated_once_for_each_batch() -> None:
    running = start(Batches())
    for _ in range(5):
        running.update([torch.ones(2)], [torch.zeros(2)], None)
        running.update([torch.ones(0)], [torch.zeros(0)], None)
    assert running.compute()["it"] == 5


def test_what_a_run_in_inference_mode_took_in_can_be_added_to_outside() -> None:
    running = start(torchmetrics.MeanSquaredError())
    with torch.inference_mode():
        running.update([torch.ones(2)], [torch.zeros(2)], None)
    running.update([torch.zeros(2)], [torch.zeros(2)], None)
    assert running.compute()["it"] == 0.5
