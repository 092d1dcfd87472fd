"""Metrics by name against scikit-learn, torchmetrics and numbers worked out by hand."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import sklearn.metrics as reference
import torch
import torchmetrics.classification as classification
import torchmetrics.functional as functional
import torchmetrics.regression as regression
from torch import Tensor

from fitkit._types import OutputMeaning
from fitkit.metrics import CompiledMetrics, higher_is_better
from fitkit.metrics.names import ALIASES, NAMED, find_metric

CPU = torch.device("cpu")
CLASSES = OutputMeaning("logits", -100, classes=True)
LOGITS = OutputMeaning("logits")
VALUES = OutputMeaning("values")


def measure(name: str, output: Tensor, target: Tensor, meaning: OutputMeaning) -> float:
    running = CompiledMetrics([name]).start([meaning], CPU)
    running.update([output], [target], None)
    return float(running.compute()[name])


def some_classes(count: int = 200, classes: int = 5) -> tuple[Tensor, Tensor]:
    target = torch.randint(0, classes, (count,))
    return torch.randn(count, classes) + torch.nn.functional.one_hot(target, classes), target


def some_labels(*shape: int) -> tuple[Tensor, Tensor]:
    target = torch.randint(0, 2, shape)
    return torch.randn(shape) + target - 0.5, target


def some_values(*shape: int) -> tuple[Tensor, Tensor]:
    target = torch.randn(shape) * 3 + 10
    return target + torch.randn(shape), target


MULTICLASS = {
    "accuracy": lambda y, p: reference.accuracy_score(y, p.argmax(1)),
    "f1": lambda y, p: reference.f1_score(y, p.argmax(1), average="macro"),
    "precision": lambda y, p: reference.precision_score(y, p.argmax(1), average="macro"),
    "recall": lambda y, p: reference.recall_score(y, p.argmax(1), average="macro"),
    "jaccard": lambda y, p: reference.jaccard_score(y, p.argmax(1), average="macro"),
    "balanced_accuracy": lambda y, p: reference.balanced_accuracy_score(y, p.argmax(1)),
    "cohen_kappa": lambda y, p: reference.cohen_kappa_score(y, p.argmax(1)),
    "matthews_corrcoef": lambda y, p: reference.matthews_corrcoef(y, p.argmax(1)),
    "auroc": lambda y, p: reference.roc_auc_score(y, p, multi_class="ovr", average="macro"),
    "average_precision": lambda y, p: reference.average_precision_score(y, p, average="macro"),
    "top_2_accuracy": lambda y, p: reference.top_k_accuracy_score(y, p, k=2),
    "perplexity": lambda y, p: math.exp(reference.log_loss(y, p)),
}


@pytest.mark.parametrize("name", MULTICLASS)
def test_classes_give_what_scikit_learn_gives(name: str) -> None:
    output, target = some_classes()
    expected = MULTICLASS[name](target, output.double().softmax(1))
    assert measure(name, output, target, CLASSES) == pytest.approx(expected, rel=1e-12)


BINARY = {
    "accuracy": reference.accuracy_score,
    "f1": reference.f1_score,
    "precision": reference.precision_score,
    "recall": reference.recall_score,
    "jaccard": reference.jaccard_score,
    "balanced_accuracy": reference.balanced_accuracy_score,
    "cohen_kappa": reference.cohen_kappa_score,
    "matthews_corrcoef": reference.matthews_corrcoef,
}


@pytest.mark.parametrize("name", BINARY)
def test_a_binary_label_gives_what_scikit_learn_gives(name: str) -> None:
    output, target = some_labels(300, 1)
    expected = BINARY[name](target[:, 0], output[:, 0] > 0)
    assert measure(name, output, target, LOGITS) == pytest.approx(expected, rel=1e-12)


MULTILABEL = {
    "f1": lambda y, p: reference.f1_score(y, p > 0, average="macro"),
    "precision": lambda y, p: reference.precision_score(y, p > 0, average="macro"),
    "recall": lambda y, p: reference.recall_score(y, p > 0, average="macro"),
    "jaccard": lambda y, p: reference.jaccard_score(y, p > 0, average="macro"),
    "auroc": lambda y, p: reference.roc_auc_score(y, p, average="macro"),
    "average_precision": lambda y, p: reference.average_precision_score(y, p, average="macro"),
}


@pytest.mark.parametrize("name", MULTILABEL)
def test_labels_give_what_scikit_learn_gives(name: str) -> None:
    output, target = some_labels(200, 4)
    expected = MULTILABEL[name](target.numpy(), output.numpy())
    assert measure(name, output, target.float(), LOGITS) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "curve"), [("auroc", "roc_auc_score"), ("average_precision", "average_precision_score")]
)
def test_tied_scores_count_as_in_scikit_learn(name: str, curve: str) -> None:
    output, target = some_labels(300)
    output = (output * 2).round()
    expected = getattr(reference, curve)(target, output)
    assert measure(name, output, target, LOGITS) == pytest.approx(expected, rel=1e-12)


REGRESSION = {
    "mae": reference.mean_absolute_error,
    "mse": reference.mean_squared_error,
    "rmse": reference.root_mean_squared_error,
    "mape": reference.mean_absolute_percentage_error,
    "msle": reference.mean_squared_log_error,
    "r2": reference.r2_score,
    "explained_variance": reference.explained_variance_score,
}


@pytest.mark.parametrize("name", REGRESSION)
@pytest.mark.parametrize("shape", [(100,), (100, 3)])
def test_values_give_what_scikit_learn_gives(name: str, shape: tuple[int, ...]) -> None:
    output, target = some_values(*shape)
    output, target = output.abs(), target.abs()
    expected = REGRESSION[name](target.double(), output.double())
    if name == "rmse":  # scikit-learn takes the root per column
        expected = math.sqrt(reference.mean_squared_error(target.double(), output.double()))
    assert measure(name, output, target, VALUES) == pytest.approx(expected, rel=1e-9)


TORCHMETRICS: list[tuple[str, Any, str]] = [
    ("accuracy", classification.MulticlassAccuracy(5, average="micro"), "classes"),
    ("top_3_accuracy", classification.MulticlassAccuracy(5, top_k=3, average="micro"), "classes"),
    ("f1", classification.MulticlassF1Score(5, average="macro"), "classes"),
    ("specificity", classification.MulticlassSpecificity(5, average="macro"), "classes"),
    ("auroc", classification.MulticlassAUROC(5), "classes"),
    ("accuracy", classification.MultilabelAccuracy(5, average="micro"), "labels"),
    ("specificity", classification.MultilabelSpecificity(5), "labels"),
    ("matthews_corrcoef", classification.MultilabelMatthewsCorrCoef(5), "labels"),
    ("auroc", classification.MultilabelAUROC(5), "labels"),
    ("mae", regression.MeanAbsoluteError(), "values"),
    ("mape", regression.MeanAbsolutePercentageError(), "values"),
    ("r2", regression.R2Score(), "values"),
    ("explained_variance", regression.ExplainedVariance(), "values"),
    ("cosine_similarity", regression.CosineSimilarity(reduction="mean"), "values"),
]


@pytest.mark.parametrize(("name", "metric", "kind"), TORCHMETRICS)
def test_a_name_gives_what_torchmetrics_gives(name: str, metric: Any, kind: str) -> None:
    output, target = {
        "classes": some_classes,
        "labels": lambda: some_labels(200, 5),
        "values": lambda: some_values(200, 5),
    }[kind]()
    meaning = {"classes": CLASSES, "labels": LOGITS, "values": VALUES}[kind]
    assert measure(name, output, target, meaning) == pytest.approx(float(metric(output, target)), rel=1e-5)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_correlations_are_means_over_columns(name: str) -> None:
    output, target = some_values(100, 3)
    expected = getattr(functional, f"{name}_corrcoef")(output, target).mean()
    assert measure(name, output, target, VALUES) == pytest.approx(float(expected), rel=1e-4)


def test_metrics_worked_out_by_hand() -> None:
    output, target = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 4.0, 1.0])
    assert measure("mae", output, target, VALUES) == pytest.approx(5 / 3)
    assert measure("rmse", output, target, VALUES) == pytest.approx(math.sqrt(13 / 3))
    assert measure("max_error", output, target, VALUES) == 3.0
    assert measure("r2", output, target, VALUES) == pytest.approx(1 - 13 / 6)
    assert measure("spearman", output, target, VALUES) == pytest.approx(0.0)


def test_ranks_of_a_hundred_thousand_ties_do_not_overflow() -> None:
    target = torch.arange(4).repeat_interleave(100_000).float()
    assert measure("spearman", target, target, VALUES) == pytest.approx(1.0)


def test_a_class_without_items_stays_out_of_auroc() -> None:
    output, target = some_classes(classes=3)
    absent = torch.cat([output, torch.full((200, 1), -50.0)], 1)
    with_absent, without = measure("auroc", absent, target, CLASSES), measure("auroc", output, target, CLASSES)
    assert with_absent == pytest.approx(without)


def test_mcc_of_a_constant_decision_is_zero() -> None:
    assert measure("mcc", torch.ones(5), torch.tensor([1, 1, 1, 0, 0]), LOGITS) == 0.0


@pytest.mark.parametrize("name", ["r2", "explained_variance", "pearson", "spearman"])
def test_one_sample_has_no_correlation(name: str) -> None:
    assert math.isnan(measure(name, torch.tensor([1.0]), torch.tensor([2.0]), VALUES))


@pytest.mark.parametrize("name", ["auroc", "pearson", "cohen_kappa"])
def test_what_is_not_defined_is_nan_and_warns_nobody(name: str) -> None:
    meaning = VALUES if name == "pearson" else LOGITS
    target = torch.ones(4) if name == "pearson" else torch.ones(4, dtype=torch.int64)
    assert math.isnan(measure(name, torch.tensor([1.0, 2.0, 3.0, 4.0]), target, meaning))


@pytest.mark.parametrize("name", ["auroc", "average_precision", "spearman", "r2", "mae", "max_error"])
def test_a_nan_output_is_not_hidden(name: str) -> None:
    output, target = some_labels(20)
    output[3] = torch.nan
    meaning = VALUES if NAMED[name].tasks == ("regression",) else LOGITS
    assert math.isnan(measure(name, output, target, meaning))


def test_a_constant_target_is_explained_wholly_or_not_at_all() -> None:
    target = torch.full((7,), 0.1)
    assert measure("r2", target, target, VALUES) == 1.0
    assert measure("r2", target + torch.randn(7), target, VALUES) == 0.0


def test_r2_of_tiny_targets_is_no_special_case() -> None:
    output, target = some_values(50)
    assert measure("r2", output * 1e-6, target * 1e-6, VALUES) == pytest.approx(measure("r2", output, target, VALUES))


@pytest.mark.parametrize("written", ["F1", "f1-score", "Top_2_Accuracy", "mean squared error", "MCC"])
def test_names_are_read_in_any_case_and_with_hyphens_or_spaces(written: str) -> None:
    assert find_metric("metrics", written).name in {"f1", "top_2_accuracy", "mse", "matthews_corrcoef"}


def test_every_alias_names_a_metric() -> None:
    assert set(ALIASES.values()) <= set(NAMED)


def test_an_unknown_name_is_answered_with_the_nearest_and_all() -> None:
    with pytest.raises(ValueError, match=r"metrics\[0\]='accurracy'. Did you mean 'accuracy'\? Known names: .*auroc"):
        CompiledMetrics(["accurracy"])


def test_top_k_says_when_there_are_too_few_classes() -> None:
    with pytest.raises(ValueError, match="Expected at least 9 classes for 'top_9_accuracy', received 5"):
        measure("top_9_accuracy", *some_classes(), CLASSES)


@pytest.mark.parametrize(("name", "better"), [("F1", True), ("rmse", False), ("top_5_accuracy", True), ("loss", None)])
def test_the_better_direction_is_known(name: str, better: bool | None) -> None:
    assert higher_is_better(name) is better


def test_names_need_no_torchmetrics() -> None:
    program = (
        "import sys; from fitkit.metrics import CompiledMetrics; "
        "CompiledMetrics(['accuracy', 'f1', 'auroc']); print('torchmetrics' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
