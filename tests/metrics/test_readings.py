"""What an output means follows from the loss, from shapes and from dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fitkit._types import OutputMeaning
from fitkit.metrics import CompiledMetrics
from fitkit.metrics.readings import Reading, read_classes, spread_weight

CPU = torch.device("cpu")
CLASSES = OutputMeaning("logits", -100, classes=True)
UNKNOWN = OutputMeaning("unknown")


def measure(name: str, output: Tensor, target: Tensor, meaning: OutputMeaning) -> float:
    running = CompiledMetrics([name]).start([meaning], CPU)
    running.update([output], [target], None)
    return float(running.compute()[name])


def test_logits_between_0_and_1_stay_logits() -> None:
    running = CompiledMetrics(["accuracy"]).start([OutputMeaning("logits")], CPU)
    running.update([torch.tensor([0.2, 0.4])], [torch.tensor([1, 1])], None)
    running.update([torch.tensor([-30.0, 30.0])], [torch.tensor([0, 1])], None)
    assert running.compute()["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("scale", "expected"), [("logits", 1.0), ("probabilities", 0.5), ("log_probabilities", 1.0), ("values", 0.5)]
)
def test_the_threshold_follows_the_loss(scale: str, expected: float) -> None:
    output = torch.tensor([0.3, 0.7]) if scale != "log_probabilities" else torch.tensor([0.6, 0.9]).log()
    meaning = OutputMeaning(scale)  # type: ignore[arg-type]
    assert measure("accuracy", output, torch.tensor([1, 1]), meaning) == expected


@pytest.mark.parametrize("scale", ["logits", "log_probabilities", "probabilities"])
def test_probabilities_of_classes_are_the_same_from_every_scale(scale: str) -> None:
    logits, target = torch.randn(50, 4) * 3, torch.randint(0, 4, (50,))
    output = {
        "logits": logits,
        "log_probabilities": logits.log_softmax(1),
        "probabilities": logits.softmax(1),
    }[scale]
    expected = measure("auroc", logits, target, CLASSES)
    assert measure("auroc", output, target, OutputMeaning(scale, classes=True)) == pytest.approx(expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("output", "target", "task"),
    [
        ((8, 3), (8,), "multiclass"),
        ((8, 3), (8, 1), "multiclass"),
        ((8, 3, 5), (8, 5), "multiclass"),
        ((8, 3, 5), (8, 1, 5), "multiclass"),
        ((8,), (8,), "binary"),
        ((8, 1), (8,), "binary"),
        ((8,), (8, 1), "binary"),
        ((8, 1, 4, 4), (8, 1, 4, 4), "binary"),
        ((8, 3), (8, 3), "multilabel"),
        ((8, 3, 4, 4), (8, 3, 4, 4), "multilabel"),
    ],
)
def test_integer_targets_are_read_by_their_shape(output: tuple[int, ...], target: tuple[int, ...], task: str) -> None:
    zeros = torch.zeros(target, dtype=torch.int64)
    assert read_classes("'accuracy'", torch.zeros(output), zeros, UNKNOWN).task == task


def test_one_hot_targets_of_a_class_loss_name_classes() -> None:
    output, target = torch.randn(40, 3, 2), torch.randint(0, 3, (40, 2))
    soft = one_hot(target, 3).movedim(-1, 1).float() * 0.9
    expected = measure("f1", output, target, CLASSES)
    assert measure("f1", output, soft, CLASSES) == expected
    assert measure("f1", output, (soft > 0).long(), CLASSES) == expected


def test_soft_labels_count_as_what_they_are_nearer_to() -> None:
    output, target = torch.tensor([2.0, -2.0]), torch.tensor([0.9, 0.1])
    assert measure("accuracy", output, target, OutputMeaning("logits")) == 1.0


@pytest.mark.parametrize("name", ["accuracy", "f1", "jaccard", "auroc", "cohen_kappa", "top_2_accuracy", "perplexity"])
@pytest.mark.parametrize("ignored", [-100, 1])
def test_ignored_targets_are_as_if_they_were_not_there(name: str, ignored: int) -> None:
    output, target = torch.randn(60, 3, 4), torch.randint(0, 3, (60, 4))
    target[::2, 1] = ignored
    kept = target != ignored
    meaning = OutputMeaning("logits", ignored, classes=True)
    rows, classes = output.movedim(1, -1)[kept], target[kept]
    expected = measure(name, rows, classes, OutputMeaning("logits", classes=True))
    assert measure(name, output, target, meaning) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["accuracy", "f1", "average_precision"])
def test_ignored_labels_stay_out_one_by_one(name: str) -> None:
    output, target = torch.randn(30, 1), torch.randint(0, 2, (30, 1))
    target[:10] = -1
    expected = measure(name, output[10:], target[10:], OutputMeaning("logits"))
    assert measure(name, output, target, OutputMeaning("logits", -1)) == pytest.approx(expected)


def test_a_batch_of_ignored_targets_alone_changes_nothing() -> None:
    running = CompiledMetrics(["accuracy", "f1", "auroc"]).start([CLASSES], CPU)
    running.update([torch.randn(4, 3)], [torch.full((4,), -100)], None)
    running.update([torch.eye(3)], [torch.arange(3)], None)
    running.update([torch.randn(4, 3)], [torch.full((4,), -100)], None)
    assert {float(value) for value in running.compute().values()} == {1.0}


@pytest.mark.parametrize("name", ["accuracy", "f1"])
@pytest.mark.parametrize("columns", [1, 3])
def test_labels_of_an_unknown_scale_are_not_guessed(name: str, columns: int) -> None:
    kind = "Binary" if columns == 1 else "Multilabel"
    with pytest.raises(ValueError, match=rf"{name}': the loss does not tell whether .*{kind}Accuracy\("):
        measure(name, torch.randn(8, columns), torch.ones(8, columns), UNKNOWN)


def test_probabilities_that_leave_their_range_are_no_logits() -> None:
    output, target = torch.tensor([1.0 + 1e-6, 0.9, 0.2, -1e-6]), torch.tensor([1, 1, 0, 0])
    assert measure("auroc", output, target, OutputMeaning("probabilities")) == 1.0
    logits = torch.tensor([[0.3, 0.4], [0.8, 0.1]])
    halves = measure("perplexity", logits, torch.tensor([1, 0]), CLASSES)
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([1, 0])).exp()
    assert halves == pytest.approx(float(expected))


def test_confident_logits_are_no_ties() -> None:
    output, target = torch.tensor([20.0, 25.0, 30.0]), torch.tensor([0, 1, 1])
    assert measure("auroc", output, target, OutputMeaning("logits")) == 1.0


@pytest.mark.parametrize("name", ["auroc", "perplexity"])
def test_probabilities_of_an_unknown_scale_are_not_guessed(name: str) -> None:
    with pytest.raises(ValueError, match=r"does not tell whether .*MulticlassAUROC\(num_classes=3\)"):
        measure(name, torch.randn(8, 3), torch.zeros(8, dtype=torch.int64), UNKNOWN)


def test_the_order_of_scores_needs_no_scale() -> None:
    output, target = torch.randn(50) * 40, torch.randint(0, 2, (50,))
    assert measure("auroc", output, target, UNKNOWN) == measure("auroc", output, target, OutputMeaning("logits"))


@pytest.mark.parametrize(
    ("name", "output", "target", "meaning", "message"),
    [
        ("accuracy", (8, 3), (8, 3), OutputMeaning("values"), "of classification, but the loss compares values"),
        (
            "accuracy",
            (8, 3),
            (8,),
            CLASSES,
            r"class indices .* received output of shape \(8, 3\) and target of .*float32",
        ),
        ("accuracy", (8, 3), (8, 4), OutputMeaning("logits"), "expect targets of the output's shape"),
        ("mae", (8, 3), (8, 1), OutputMeaning("values"), "nothing is broadcast"),
        ("mae", (8,), (8, 1, 1), OutputMeaning("values"), "nothing is broadcast"),
        ("mae", (8, 3), (8,), CLASSES, "is a metric such as 'accuracy' meant?"),
        ("mae", (8,), (7,), OutputMeaning("values"), "as many targets as outputs"),
        ("mae", (), (), OutputMeaning("values"), "as many targets as outputs"),
        ("balanced_accuracy", (8, 3), (8, 3), OutputMeaning("logits"), "defined for binary and multiclass outputs"),
        ("perplexity", (8,), (8,), OutputMeaning("logits"), "defined for multiclass outputs, received a binary one"),
        ("cosine_similarity", (8,), (8,), OutputMeaning("values"), "2D tensors of shape"),
    ],
)
def test_pairs_that_do_not_fit_are_refused_at_the_first_batch(
    name: str, output: tuple[int, ...], target: tuple[int, ...], meaning: OutputMeaning, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        measure(name, torch.randn(output), torch.rand(target), meaning)


def test_one_column_against_a_vector_is_squeezed() -> None:
    output, target = torch.randn(8, 1), torch.randn(8)
    expected = measure("mae", output[:, 0], target, OutputMeaning("values"))
    assert measure("mae", output, target, OutputMeaning("values")) == expected
    assert measure("mae", target, output, OutputMeaning("values")) == expected


@pytest.mark.parametrize(("shape", "items"), [((4,), (4, 2)), ((4, 1), (4, 2)), ((4, 2), (4, 2)), ((4, 1), (4,))])
def test_weights_are_spread_over_the_items_of_a_sample(shape: tuple[int, ...], items: tuple[int, ...]) -> None:
    weight = torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape)
    spread = spread_weight(weight, torch.Size(items))
    assert spread.shape == items
    assert spread.reshape(-1)[0] == 1.0


def test_weights_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sample_weight of shape \(4,\) or of the items' shape \(4, 2\), received"):
        spread_weight(torch.ones(8), torch.Size((4, 2)))


def test_rows_of_classes_keep_each_item_with_its_target() -> None:
    output, target = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 1, 4, 5))
    rows, classes = Reading("multiclass", 3).align(output, target)
    assert torch.equal(rows[27], output[1, :, 1, 2])
    assert classes[27] == target[1, 0, 1, 2]


def test_complex_numbers_are_refused_not_cut_to_their_real_parts() -> None:
    running = CompiledMetrics(["mae"]).start([OutputMeaning("values")], torch.device("cpu"))
    pair = torch.ones(2, 3, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"'mae' compare real numbers, received output of torch.complex64"):
        running.update([pair], [pair], None)
