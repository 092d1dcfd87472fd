"""Metrics by name against torchmetrics called by hand, scikit-learn and numbers worked out by hand."""

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
import torchmetrics.text as text
from torch import Tensor

from fitkit._types import OutputMeaning
from fitkit.log_keys import direction_of
from fitkit.metrics import CompiledMetrics
from fitkit.metrics.names import ALIASES, NAMED, find_metric
from fitkit.metrics.readings import Reading

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
    assert measure(name, output, target, CLASSES) == pytest.approx(expected, rel=1e-6)


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
    assert measure(name, output, target, LOGITS) == pytest.approx(expected, rel=1e-6)


MULTILABEL = {
    "f1": lambda y, p: reference.f1_score(y, p > 0, average="macro"),
    "precision": lambda y, p: reference.precision_score(y, p > 0, average="macro"),
    "recall": lambda y, p: reference.recall_score(y, p > 0, average="macro"),
    "jaccard": lambda y, p: reference.jaccard_score(y, p > 0, average="macro"),
    "accuracy": lambda y, p: ((p > 0) == y).mean(),
    "auroc": lambda y, p: reference.roc_auc_score(y, p, average="macro"),
    "average_precision": lambda y, p: reference.average_precision_score(y, p, average="macro"),
}


@pytest.mark.parametrize("name", MULTILABEL)
def test_labels_give_what_scikit_learn_gives(name: str) -> None:
    output, target = some_labels(200, 4)
    expected = MULTILABEL[name](target.numpy(), output.numpy())
    assert measure(name, output, target.float(), LOGITS) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "curve"), [("auroc", "roc_auc_score"), ("average_precision", "average_precision_score")]
)
def test_tied_scores_count_as_in_scikit_learn(name: str, curve: str) -> None:
    output, target = some_labels(300)
    output = (output * 2).round()
    expected = getattr(reference, curve)(target, output)
    assert measure(name, output, target, LOGITS) == pytest.approx(expected, rel=1e-6)


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


# By kind of data: what a user would write, given all the data at once as the module puts it out.
BY_HAND: dict[str, dict[str, Any]] = {
    "classes": {
        "accuracy": classification.MulticlassAccuracy(5, average="micro"),
        "top_3_accuracy": classification.MulticlassAccuracy(5, top_k=3, average="micro"),
        "f1": classification.MulticlassF1Score(5),
        "precision": classification.MulticlassPrecision(5),
        "recall": classification.MulticlassRecall(5),
        "specificity": classification.MulticlassSpecificity(5),
        "jaccard": classification.MulticlassJaccardIndex(5),
        "balanced_accuracy": classification.MulticlassAccuracy(5, average="macro"),
        "cohen_kappa": classification.MulticlassCohenKappa(5),
        "mcc": classification.MulticlassMatthewsCorrCoef(5),
        "auroc": classification.MulticlassAUROC(5),
        "average_precision": classification.MulticlassAveragePrecision(5),
    },
    "labels": {
        "accuracy": classification.MultilabelAccuracy(5, average="micro"),
        "f1": classification.MultilabelF1Score(5),
        "precision": classification.MultilabelPrecision(5),
        "recall": classification.MultilabelRecall(5),
        "specificity": classification.MultilabelSpecificity(5),
        "iou": classification.MultilabelJaccardIndex(5),
        "mcc": classification.MultilabelMatthewsCorrCoef(5),
        "auc": classification.MultilabelAUROC(5),
        "average_precision": classification.MultilabelAveragePrecision(5),
    },
    "label": {
        "accuracy": classification.BinaryAccuracy(),
        "f1": classification.BinaryF1Score(),
        "precision": classification.BinaryPrecision(),
        "recall": classification.BinaryRecall(),
        "specificity": classification.BinarySpecificity(),
        "jaccard": classification.BinaryJaccardIndex(),
        "cohen_kappa": classification.BinaryCohenKappa(),
        "mcc": classification.BinaryMatthewsCorrCoef(),
        "auroc": classification.BinaryAUROC(),
        "average_precision": classification.BinaryAveragePrecision(),
    },
    "values": {
        "mae": regression.MeanAbsoluteError(),
        "mse": regression.MeanSquaredError(),
        "rmse": regression.MeanSquaredError(squared=False),
        "mape": regression.MeanAbsolutePercentageError(),
        "msle": regression.MeanSquaredLogError(),
        "r2": regression.R2Score(),
        "explained_variance": regression.ExplainedVariance(),
        "pearson": regression.PearsonCorrCoef(num_outputs=5),
        "cosine_similarity": regression.CosineSimilarity(reduction="mean"),
    },
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in BY_HAND for name in BY_HAND[kind]])
def test_a_name_gives_what_torchmetrics_gives_by_hand(kind: str, name: str) -> None:
    output, target, meaning = {
        "classes": lambda: (*some_classes(), CLASSES),
        "labels": lambda: (*some_labels(200, 5), LOGITS),
        "label": lambda: (*some_labels(200), LOGITS),
        "values": lambda: (*some_values(200, 5), VALUES),
    }[kind]()
    # By hand in float64 where torchmetrics' sums of squares would lose what is compared.
    by_hand = BY_HAND[kind][name].set_dtype(torch.float64)
    expected = by_hand(output.double(), target.double() if kind == "values" else target).mean()
    assert measure(name, output, target, meaning) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("shape", [(50,), (50, 1), (50, 3)])
def test_spearman_is_the_mean_over_columns(shape: tuple[int, ...]) -> None:
    output, target = some_values(*shape)
    expected = functional.spearman_corrcoef(output, target).mean()
    assert measure("spearman", output, target, VALUES) == pytest.approx(float(expected), rel=1e-6)


def test_perplexity_is_that_of_torchmetrics() -> None:
    output, target = torch.randn(4, 7, 5), torch.randint(0, 5, (4, 7))
    target[0, :3] = -100
    expected = text.Perplexity(ignore_index=-100)(output, target)
    assert measure("perplexity", output.movedim(-1, 1), target, CLASSES) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.filterwarnings("ignore:Metric `SpearmanCorrcoef` will save all")
@pytest.mark.parametrize("name", [name for name, metric in NAMED.items() if metric.computed_by is not None])
def test_the_direction_that_auto_goes_by_is_that_of_torchmetrics(name: str) -> None:
    metric = find_metric("metrics", name)
    built: Any = metric.build(Reading(metric.tasks[0], 3), CPU)
    # torchmetrics leaves it open for specificity and pearson.
    assert built.higher_is_better in (direction_of(name) == "max", None)


@pytest.mark.parametrize("name", ["accuracy", "top_2_accuracy", "mae", "mse", "rmse"])
def test_a_weighted_metric_counts_a_sample_as_often_as_it_weighs(name: str) -> None:
    meaning = CLASSES if "accuracy" in name else VALUES
    output, target = some_classes(50) if meaning is CLASSES else some_values(50, 2)
    weight = torch.randint(0, 4, (50,))
    running = CompiledMetrics(None, [name]).start([meaning], CPU)
    for rows in (slice(0, 20), slice(20, 50)):
        running.update([output[rows]], [target[rows]], [weight[rows].float()])
    expected = measure(name, output.repeat_interleave(weight, 0), target.repeat_interleave(weight, 0), meaning)
    assert float(running.compute()[name]) == pytest.approx(expected, rel=1e-9)


def test_metrics_worked_out_by_hand() -> None:
    output, target = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 4.0, 1.0])
    assert measure("mae", output, target, VALUES) == pytest.approx(5 / 3)
    assert measure("rmse", output, target, VALUES) == pytest.approx(math.sqrt(13 / 3))
    assert measure("r2", output, target, VALUES) == pytest.approx(1 - 13 / 6)
    assert measure("spearman", output, target, VALUES) == pytest.approx(0.0, abs=1e-6)


def test_balanced_accuracy_of_a_label_is_the_mean_over_both_classes() -> None:
    output, target = torch.tensor([1.0, 1.0, -1.0, 1.0]), torch.tensor([1, 1, 0, 0])
    assert measure("balanced_accuracy", output, target, LOGITS) == 0.75


@pytest.mark.parametrize("name", ["r2", "explained_variance", "pearson", "spearman"])
def test_one_sample_has_no_correlation(name: str) -> None:
    assert math.isnan(measure(name, torch.tensor([1.0]), torch.tensor([2.0]), VALUES))


@pytest.mark.parametrize("name", ["auroc", "average_precision", "perplexity", "cohen_kappa"])
@pytest.mark.parametrize("meaning", [CLASSES, OutputMeaning("logits", -100)], ids=["classes", "labels"])
def test_what_no_target_defines_is_nan(name: str, meaning: OutputMeaning) -> None:
    if name == "perplexity" and not meaning.classes:
        pytest.skip("a metric of classes")
    output = torch.randn(4, 3) if meaning.classes else torch.randn(4)
    assert math.isnan(measure(name, output, torch.full((4,), -100), meaning))


@pytest.mark.parametrize("name", [name for name, metric in NAMED.items() if "binary" in metric.tasks])
def test_a_label_that_is_always_so_crashes_and_warns_nobody(name: str) -> None:
    measure(name, torch.randn(4), torch.ones(4, dtype=torch.int64), LOGITS)


@pytest.mark.parametrize("name", REGRESSION)
def test_a_constant_target_crashes_and_warns_nobody(name: str) -> None:
    measure(name, torch.rand(4), torch.ones(4), VALUES)


@pytest.mark.parametrize("name", [*REGRESSION, "pearson"])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_nan_output_is_not_hidden(name: str, weighted: bool) -> None:
    if weighted and not find_metric("metrics", name).takes_weights:
        pytest.skip("cannot be weighted")
    output, target = some_values(20)
    output[3] = torch.nan
    running = (CompiledMetrics(None, [name]) if weighted else CompiledMetrics([name])).start([VALUES], CPU)
    running.update([output], [target], [torch.rand(20)])
    assert math.isnan(float(running.compute()[name]))


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


def test_names_need_no_torchmetrics() -> None:
    program = (
        "import sys; from fitkit.metrics import CompiledMetrics; "
        "CompiledMetrics(['accuracy', 'f1', 'auroc']); print('torchmetrics' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
