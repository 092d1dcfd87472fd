"""What compile takes as metrics, the log keys, and what it refuses before there is any data."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import BinaryAUROC, MulticlassF1Score

from fitkit._types import OutputMeaning
from fitkit.metrics import CompiledMetrics


def share(output: Tensor, target: Tensor) -> Tensor:
    return (output > target).float()


def within(output: Tensor, target: Tensor, *, limit: float) -> Tensor:
    return ((output - target).abs() < limit).float()


@pytest.mark.parametrize(
    ("metrics", "names"),
    [
        (None, []),
        ([], []),
        (["accuracy", "MAE"], ["accuracy", "MAE"]),
        (("f1-score",), ["f1-score"]),
        ({"quality": "r2"}, ["quality"]),
        ([share, functools.partial(within, limit=1.0)], ["share", "within"]),
        ([lambda output, target: 0.0], ["lambda"]),
        ([nn.L1Loss()], ["l1_loss"]),
        ([MulticlassF1Score(3), BinaryAUROC()], ["multiclass_f1_score", "binary_auroc"]),
        ({"both": MetricCollection({"a": MeanMetric(), "b": MeanMetric()})}, ["both_a", "both_b"]),
    ],
)
def test_log_keys_are_the_names_that_users_wrote(metrics: Any, names: list[str]) -> None:
    assert CompiledMetrics(metrics).names == names


@pytest.mark.parametrize(
    ("metrics", "names"),
    [
        (["mae", ["f1", "accuracy"]], ["a_mae", "b_f1", "b_accuracy"]),
        ([None, {"own": share}], ["b_own"]),
        ({"b": "mae"}, ["b_mae"]),
        ({"b": ("mae", "mse"), "a": None}, ["b_mae", "b_mse"]),
        ([["mae"], ["mae"]], ["a_mae", "b_mae"]),
    ],
)
def test_metrics_of_several_outputs_carry_their_names(metrics: Any, names: list[str]) -> None:
    assert CompiledMetrics(metrics, output_names=["a", "b"]).names == names


def test_weighted_metrics_come_last() -> None:
    assert CompiledMetrics(["mae"], ["mse", share]).names == ["mae", "mse", "share"]


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ("accuracy", r"Write metrics=\['accuracy'\]"),
        (share, r"Write metrics=\[\.\.\.\]"),
        ({"accuracy"}, "Expected a list, tuple or dict of metrics"),
        (1, "Expected a list, tuple or dict of metrics, received metrics=1"),
        ([None], r"received metrics\[0\]=None"),
        (["mae", True], r"received metrics\[1\]=True"),
        ([0.5], "Expected a name such as"),
        ([MulticlassF1Score], r"received the class metrics\[0\]=MulticlassF1Score. Write MulticlassF1Score\(...\)"),
        ([["accuracy"], ["mae"]], "Metrics for each of several outputs need a loss for each"),
        ({"a": ["accuracy"]}, r"received metrics\['a'\]=\['accuracy'\]. Metrics for each"),
        ({1: "accuracy"}, "Expected log keys, strings, as the keys of metrics, received 1"),
        ({"": "accuracy"}, "Expected log keys"),
    ],
)
def test_what_is_no_metric_is_refused(metrics: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        CompiledMetrics(metrics)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (["acuracy"], r"metrics\[0\]='acuracy'. Did you mean 'accuracy'\?"),
        ({"x": "top_k_accuracy"}, r"metrics\['x'\]='top_k_accuracy'. Did you mean 'top_5_accuracy'\?"),
        (["mae", "mae"], "'mae' stands for two metrics. Name it with a dict"),
        ([lambda o, t: 0.0, lambda o, t: 1.0], "'lambda' stands for two metrics"),
        ({"loss": "mae"}, "'loss' of a metric is used for something else"),
        ({"val_mae": "mae"}, "'val_mae' of a metric is used for something else"),
    ],
)
def test_names_and_keys_that_cannot_be_are_refused(metrics: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompiledMetrics(metrics)


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (["mae"], r"Expected 2 entries in metrics, one for each output \['left', 'right'\] of loss, received 1"),
        ({"lefft": "mae"}, r"as the keys of metrics, received 'lefft'. Did you mean 'left'\?"),
        ([["mae", "acc uracy"], None], r"metrics\[0\]\[1\]='acc uracy'"),
        ({"left": {"loss": "mae"}}, "'left_loss' of a metric is used"),
    ],
)
def test_metrics_that_do_not_follow_the_outputs_are_refused(metrics: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompiledMetrics(metrics, output_names=["left", "right"])


@pytest.mark.parametrize("metric", ["f1", "auroc", "r2", MulticlassF1Score(3)])
def test_what_is_no_mean_over_items_cannot_be_weighted(metric: Any) -> None:
    with pytest.raises(ValueError, match=r"weighted_metrics can be accuracy, .*mae.*, or a callable"):
        CompiledMetrics(None, [metric])


def test_one_name_cannot_be_both_weighted_and_not() -> None:
    with pytest.raises(ValueError, match="'accuracy' stands for two metrics"):
        CompiledMetrics(["accuracy"], ["accuracy"])
    assert CompiledMetrics(["accuracy"], {"weighted": "accuracy"}).names == ["accuracy", "weighted"]


def test_a_run_needs_the_meaning_of_every_output() -> None:
    with pytest.raises(ValueError, match=r"Expected the meaning of 2 output\(s\), received 1"):
        CompiledMetrics(["mae", "mae"], output_names=["a", "b"]).start([OutputMeaning()], torch.device("cpu"))


@pytest.mark.parametrize(
    ("metrics", "told"), [(None, True), (["f1", "auroc"], True), (["mae", share], False), ([BinaryAUROC()], False)]
)
def test_only_metrics_by_name_are_known_to_be_the_same_for_any_batches(metrics: Any, told: bool) -> None:
    assert CompiledMetrics(metrics).are_means_over_data is told


def test_a_metric_in_the_order_of_scikit_learn_is_refused() -> None:
    from sklearn.metrics import mean_absolute_error

    with pytest.raises(ValueError, match=r"received metrics\[0\]=.*with the parameters \(y_true, y_pred\)"):
        CompiledMetrics([mean_absolute_error])
