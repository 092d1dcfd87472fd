"""Losses by name, by module and by callable: the value is torch's own, the weight is what it averaged over."""

from __future__ import annotations

import functools
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fitkit
from fitkit.loss_names import BUILT_IN, known_losses
from fitkit.losses import Loss, Part, show_structure

CLASSES = (torch.randn(5, 3), torch.tensor([0, 2, -100, 1, 2]))
PAIRS: dict[Any, tuple[Tensor, Tensor]] = {
    nn.CrossEntropyLoss: CLASSES,
    nn.NLLLoss: (CLASSES[0].log_softmax(1), CLASSES[1]),
    nn.BCELoss: (torch.rand(5, 3), torch.rand(5, 3).round()),
    nn.BCEWithLogitsLoss: (torch.randn(5, 3), torch.rand(5, 3).round()),
    nn.KLDivLoss: (torch.randn(5, 3).log_softmax(1), torch.rand(5, 3).softmax(1)),
    nn.PoissonNLLLoss: (torch.randn(5, 3), torch.rand(5, 3)),
    nn.SoftMarginLoss: (torch.randn(5, 3), torch.rand(5, 3).round() * 2 - 1),
    nn.HingeEmbeddingLoss: (torch.rand(5, 3), torch.rand(5, 3).round() * 2 - 1),
    nn.MultiMarginLoss: (torch.randn(5, 3), torch.tensor([0, 2, 1, 1, 2])),
    nn.MultiLabelMarginLoss: (torch.randn(5, 3), torch.tensor([[0, 2, -1]] * 5)),
    nn.MultiLabelSoftMarginLoss: (torch.randn(5, 3), torch.rand(5, 3).round()),
}


def judge(loss: Any, output: Tensor, target: Tensor, size: int, *weight: Tensor) -> Part:
    """The loss of a batch as a step takes it."""
    made = Loss(loss)
    return made(output, made.fit_target(output, target), size, *weight)


@pytest.mark.filterwarnings("ignore:reduction:UserWarning")
@pytest.mark.parametrize("kind", BUILT_IN, ids=lambda kind: kind.__name__)
def test_every_built_in_loss_is_torchs_own_value(kind: Any) -> None:
    output, target = PAIRS.get(kind, (torch.randn(5, 3), torch.randn(5, 3)))
    part = judge(BUILT_IN[kind].function.__name__, output, target, len(output))
    assert torch.equal(part.value, BUILT_IN[kind].function(output, target))


@pytest.mark.filterwarnings("ignore:reduction:UserWarning")
@pytest.mark.parametrize("kind", BUILT_IN, ids=lambda kind: kind.__name__)
def test_value_times_weight_is_the_sum_of_the_items(kind: Any) -> None:
    output, target = PAIRS.get(kind, (torch.randn(5, 3), torch.randn(5, 3)))
    value, weight, _ = judge(kind(), output, target, len(output))
    summed = BUILT_IN[kind].function(output, target, reduction="none").sum()
    torch.testing.assert_close(value * weight, summed)


@pytest.mark.filterwarnings("ignore:reduction:UserWarning")
@pytest.mark.parametrize("kind", BUILT_IN, ids=lambda kind: kind.__name__)
def test_sample_weights_multiply_items_and_leave_the_denominator(kind: Any) -> None:
    output, target = PAIRS.get(kind, (torch.randn(5, 3), torch.randn(5, 3)))
    sample_weight = torch.tensor([0.0, 1.0, 2.0, 0.5, 3.0])
    value, weight, _ = judge(kind(), output, target, len(output), sample_weight)
    items = BUILT_IN[kind].function(output, target, reduction="none")
    weighted = items * sample_weight.reshape(-1, *(1 for _ in items.shape[1:]))
    torch.testing.assert_close(value * weight, weighted.sum())
    assert weight == judge(kind(), output, target, len(output)).weight


@pytest.mark.parametrize(
    ("short", "function"),
    [
        ("mse", F.mse_loss),
        ("mae", F.l1_loss),
        ("MAE", F.l1_loss),
        ("bce", F.binary_cross_entropy),
        ("huber", F.huber_loss),
    ],
)
def test_short_names_mean_torchs_functions(short: str, function: Any) -> None:
    output, target = torch.rand(5, 3), torch.rand(5, 3).round()
    assert torch.equal(judge(short, output, target, 5).value, function(output, target))


def test_names_go_with_and_without_loss() -> None:
    names = known_losses()
    assert names["smooth_l1"] is names["smooth_l1_loss"] is nn.SmoothL1Loss


def test_an_unknown_name_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(ValueError, match="loss='cross_entropie'.*Did you mean 'cross_entropy'.*Known names: .*mse"):
        Loss("cross_entropie")


def test_a_class_is_refused_with_the_call_to_write() -> None:
    with pytest.raises(TypeError, match=r"Write MSELoss\(\)"):
        Loss(nn.MSELoss)


def test_a_number_is_no_loss() -> None:
    with pytest.raises(TypeError, match="received loss=3"):
        Loss(3)


def test_torchs_functions_are_known_as_their_names_are() -> None:
    assert judge(F.cross_entropy, *CLASSES, 5).weight == 4


@pytest.mark.parametrize("shapes", [((5, 1), (5,)), ((5,), (5, 1))])
def test_a_column_against_a_vector_is_squeezed(shapes: Any) -> None:
    output, target = torch.randn(shapes[0]), torch.randn(shapes[1])
    expected = F.mse_loss(output.flatten(), target.flatten())
    torch.testing.assert_close(judge("mse", output, target, 5).value, expected)


@pytest.mark.parametrize(
    "shapes", [((5, 3), (5, 1)), ((5, 3), (3,)), ((1, 5), (5,)), ((5, 1, 1), (5, 1)), ((5,), (1,))]
)
def test_any_other_broadcast_is_refused(shapes: Any) -> None:
    with pytest.raises(ValueError, match=r"same shape for mse_loss, received output of shape .* and target of shape"):
        judge("mse", torch.randn(shapes[0]), torch.randn(shapes[1]), shapes[0][0])


def test_integer_targets_fit_an_elementwise_loss() -> None:
    output = torch.randn(4, 1)
    part = judge("bce_with_logits", output, torch.tensor([0, 1, 1, 0]), 4)
    assert torch.equal(
        part.value, F.binary_cross_entropy_with_logits(output, torch.tensor([[0.0], [1.0], [1.0], [0.0]]))
    )


def test_small_integers_and_columns_name_classes() -> None:
    part = judge("cross_entropy", CLASSES[0], CLASSES[1].to(torch.int16)[:, None], 5)
    assert torch.equal(part.value, F.cross_entropy(*CLASSES))


def test_float_class_labels_are_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"class indices .* torch.float32. Convert class labels with .long\(\)"):
        judge("cross_entropy", CLASSES[0], torch.zeros(5), 5)


def test_a_batch_of_ignored_targets_weighs_nothing() -> None:
    assert judge("cross_entropy", CLASSES[0], torch.full((5,), -100), 5).weight == 0


def test_class_weights_of_the_loss_are_its_denominator() -> None:
    class_weights = torch.tensor([1.0, 2.0, 4.0])
    assert judge(nn.CrossEntropyLoss(class_weights), *CLASSES, 5).weight == 1 + 4 + 2 + 4


def test_a_sum_reports_per_sample_and_does_not_average() -> None:
    loss = Loss(nn.MSELoss(reduction="sum"))
    part = loss(torch.zeros(5, 3), torch.ones(5, 3), 5)
    assert loss.adds_up
    assert (float(part.value), part.weight) == (15.0, 5)


def test_no_reduction_of_torchs_loss_is_its_mean() -> None:
    output, target = CLASSES
    assert torch.equal(
        judge(nn.CrossEntropyLoss(reduction="none"), output, target, 5).value, F.cross_entropy(output, target)
    )


def test_a_callable_that_gives_a_number_is_weighted_by_samples() -> None:
    assert (
        judge(lambda output, target: (output - target).abs().max(), torch.zeros(5, 2), torch.ones(5, 2), 5).weight == 5
    )


def test_a_callable_may_bring_its_own_weight() -> None:
    part = judge(lambda output, target: (output.mean(), 7), torch.zeros(5, 2), torch.ones(5, 2), 5)
    assert part.weight == 7


@pytest.mark.parametrize("returned", [(torch.zeros(()), 1, 2), (torch.zeros(3), 1), 3.0, None])
def test_a_callable_that_returns_something_else_is_an_error(returned: Any) -> None:
    with pytest.raises(TypeError, match=r"Expected loss\(output, target\) to return"):
        judge(lambda output, target: returned, torch.zeros(5, 2), torch.ones(5, 2), 5)


def test_a_negative_weight_is_an_error() -> None:
    with pytest.raises(ValueError, match="weight returned by loss=-1"):
        judge(lambda output, target: (output.mean(), -1), torch.zeros(5, 2), torch.ones(5, 2), 5)


def test_a_loss_of_one_number_cannot_take_sample_weights() -> None:
    with pytest.raises(ValueError, match="one value per sample"):
        judge(lambda output, target: output.mean(), torch.zeros(5, 2), torch.ones(5, 2), 5, torch.ones(5))


def test_a_callable_with_a_reduction_takes_sample_weights() -> None:
    def half_square(output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
        return F.mse_loss(output, target, reduction=reduction) / 2

    part = judge(half_square, torch.zeros(2, 3), torch.ones(2, 3), 2, torch.tensor([1.0, 3.0]))
    assert float(part.value) == 1.0


def test_a_weight_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sample_weight of shape \(5,\) or .* received sample_weight of shape \(4,\)"):
        judge("mse", torch.zeros(5, 2), torch.ones(5, 2), 5, torch.ones(4))


def test_a_subclass_with_a_forward_of_its_own_is_the_users() -> None:
    class Doubled(nn.MSELoss):
        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return 2 * super().forward(output, target)

    part = judge(Doubled(), torch.zeros(5, 2), torch.ones(5, 2), 5)
    assert (float(part.value), part.weight) == (2.0, 5)


@pytest.mark.parametrize(
    ("loss", "scale"),
    [
        ("cross_entropy", "logits"),
        ("bce_with_logits", "logits"),
        ("bce", "probabilities"),
        ("nll", "log_probabilities"),
        ("mse", "values"),
    ],
)
def test_the_loss_says_what_the_outputs_are(loss: str, scale: str) -> None:
    assert Loss(loss).meaning.scale == scale


@pytest.mark.parametrize("shape", [(1,), (1, 1)])
def test_a_callable_that_gives_one_number_in_any_shape_is_weighted_by_samples(shape: Any) -> None:
    part = judge(
        lambda output, target: (output - target).square().mean().reshape(shape), torch.zeros(5, 2), torch.ones(5, 2), 5
    )
    assert part.value.dim() == 0
    assert part.weight == 5


def test_a_value_per_class_is_a_mean_over_samples_already() -> None:
    part = judge(lambda output, target: (output - target).square().mean(0), torch.zeros(5, 2), torch.ones(5, 2), 5)
    assert (float(part.value), part.weight) == (1.0, 5)


def test_bool_targets_are_classes_and_no_mask() -> None:
    output, target = torch.randn(4, 2), torch.tensor([True, False, True, True])
    class_weights = torch.tensor([0.2, 3.0])
    part = judge(nn.CrossEntropyLoss(class_weights), output, target, 4)
    torch.testing.assert_close(part.value, F.cross_entropy(output, target.long(), class_weights))
    assert part.weight == pytest.approx(9.2)


def test_a_partial_of_torchs_function_is_known_as_its_module_is() -> None:
    part = judge(functools.partial(F.cross_entropy, ignore_index=2), CLASSES[0], torch.tensor([0, 2, 2, 1, 2]), 5)
    assert part.weight == 2


@pytest.mark.parametrize("weight", [-1.0, float("nan"), torch.tensor(-1.0)])
def test_a_weight_that_is_none_is_refused(weight: Any) -> None:
    with pytest.raises(ValueError, match="weight returned by loss="):
        judge(lambda output, target: (output.mean(), weight), torch.zeros(5, 2), torch.ones(5, 2), 5)


@pytest.mark.parametrize("loss", ["sparse_categorical_crossentropy", "mean_squared_error"])
def test_the_names_of_keras_are_answered_with_ours(loss: str) -> None:
    with pytest.raises(ValueError, match="which is Keras's. Here it is"):
        Loss(loss)


def test_a_function_of_torchs_with_options_that_its_module_lacks_is_a_callable() -> None:
    weight = torch.rand(5, 1)
    loss = Loss(functools.partial(F.mse_loss, weight=weight))
    output, target = torch.randn(5, 1), torch.randn(5, 1)
    assert loss(output, target, 5).value == F.mse_loss(output, target, weight=weight)


def test_a_class_without_an_output_is_named_also_where_classes_have_weights() -> None:
    loss = Loss(nn.CrossEntropyLoss(torch.ones(3)))
    with pytest.raises(ValueError, match="Expected class indices below 3"):
        loss(torch.randn(2, 3), torch.tensor([0, 7]), 2, None, torch.tensor([0, 7]))


def test_class_weights_in_float64_become_the_modules_dtype() -> None:
    weight = torch.tensor(numpy.array([1.0, 2.0, 5.0]))
    model = fitkit.Model(nn.Linear(4, 3), device="cpu")
    model.compile("sgd", nn.CrossEntropyLoss(weight=weight))
    x, y = torch.randn(30, 4), torch.arange(30) % 3
    expected = F.cross_entropy(model.module(x), y, weight.float()).item()
    assert model.evaluate(x, y, verbose=0) == pytest.approx(expected, rel=1e-6)


def test_labels_that_are_text_are_told_to_be_encoded() -> None:
    with pytest.raises(TypeError, match="Encode labels that are text as integers"):
        Loss("cross_entropy").fit_target(torch.zeros(2, 3), ["cat", "dog"])


def test_classes_that_come_last_are_told_to_be_moved() -> None:
    with pytest.raises(ValueError, match=r"Classes are dimension 1, as in torch: .* output.movedim\(-1, 1\)"):
        Loss("cross_entropy").fit_target(torch.zeros(2, 5, 3), torch.zeros(2, 5, dtype=torch.long))


def test_a_class_without_an_output_is_told_how_targets_are_ignored() -> None:
    with pytest.raises(
        ValueError, match=r"Target 255 is out of bounds\..* pass loss=nn\.CrossEntropyLoss\(ignore_index"
    ):
        Loss("cross_entropy")(torch.randn(2, 3), torch.tensor([0, 255]), 2)


def test_bce_of_logits_names_bce_with_logits() -> None:
    with pytest.raises(ValueError, match=r"outputs from -2 to 3\. For logits use \"bce_with_logits\""):
        Loss("bce")(torch.tensor([[-2.0], [3.0]]), torch.ones(2, 1), 2)


@pytest.mark.parametrize(
    ("output", "target", "advice"),
    [
        (torch.randn(2, 3, 4, 4), torch.zeros(2, 4, 4), r"Convert class labels with \.long"),
        (torch.randn(2, 3, 4, 4), torch.zeros(2, 4, 4, 3), r"target\.movedim\(-1, 1\)"),
        (torch.randn(2, 3, 4, 4), torch.zeros(2, 2, 2, dtype=torch.int64), "Their shapes differ"),
        (torch.randn(2, 1), torch.zeros(2), "bce_with_logits"),
    ],
)
def test_targets_that_fit_no_classes_get_the_advice_for_their_case(output: Tensor, target: Tensor, advice: str) -> None:
    with pytest.raises(ValueError, match=rf"Expected class indices .*{advice}"):
        Loss("cross_entropy").fit_target(output, target)


def keras_order(y_true: Tensor, y_pred: Tensor) -> Tensor:
    return (y_true - y_pred).square().mean()


class KerasOrder(nn.Module):
    def forward(self, target: Tensor, output: Tensor) -> Tensor:
        return (target - output).square().mean()


@pytest.mark.parametrize("loss", [keras_order, KerasOrder(), functools.partial(keras_order)])
def test_a_loss_in_the_order_of_keras_is_refused(loss: Any) -> None:
    with pytest.raises(ValueError, match=r"Expected a callable\(output, target\), torch's order.*\((y_true|target), "):
        Loss(loss)


def test_ignored_targets_of_a_loss_of_ones_own_are_read_from_its_attribute_or_option() -> None:
    def own(output: Tensor, target: Tensor, ignore_index: int = 7) -> Tensor:
        return F.cross_entropy(output, target, ignore_index=ignore_index)

    assert Loss(functools.partial(own, ignore_index=7)).meaning.ignore_index == 7
    own.ignore_index = 7  # type: ignore[attr-defined]
    assert Loss(own).meaning.ignore_index == 7


def test_a_column_of_sample_weights_is_a_row() -> None:
    loss, output, target = Loss("mse"), torch.randn(4, 3), torch.randn(4, 3)
    weight = torch.tensor([1.0, 2.0, 0.0, 3.0])
    assert torch.equal(loss(output, target, 4, weight[:, None]).value, loss(output, target, 4, weight).value)


def test_a_loss_that_tells_nothing_of_its_arguments_is_called_as_it_is() -> None:
    class Silent:
        __signature__ = "none"

        def __call__(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return (output - target).abs()

    output, target = torch.randn(4), torch.randn(4)
    value = Loss(Silent())(output, target, 4, torch.ones(4)).value
    assert torch.equal(value, (output - target).abs().mean())


def test_a_structure_is_shown_by_its_keys() -> None:
    shown = show_structure({"a": torch.zeros(2, 3), "b": (1, 2)})
    assert shown == "{'a': tensor of shape (2, 3), 'b': tuple of 2: 1, 2}"


def test_a_returned_weight_has_to_be_one_number() -> None:
    with pytest.raises(ValueError, match=r"Expected one number, received weight returned by .* of shape \(2,\)"):
        judge(lambda output, target: (output.mean(), torch.ones(2)), torch.ones(2, 1), torch.ones(2, 1), 2)


def test_an_error_of_bce_that_is_not_about_its_range_is_torchs() -> None:
    with pytest.raises(RuntimeError, match=r"\b7\b"):
        judge(nn.BCELoss(weight=torch.ones(7)), torch.rand(5, 3), torch.ones(5, 3), 5)


def test_an_output_of_no_dimension_is_refused_as_another_shape() -> None:
    with pytest.raises(ValueError, match=r"received output of shape \(\) and target of shape \(1,\)"):
        judge("mse", torch.tensor(1.0), torch.tensor([1.0]), 1)  # what squeeze() makes of a last batch of one sample


def test_a_single_sample_of_several_labels_needs_its_batch_dimension() -> None:
    with pytest.raises(ValueError, match=r"shape \(N, C\) for multilabel_margin_loss, received output of shape \(4,\)"):
        judge("multilabel_margin", torch.randn(4), torch.tensor([1, 2, -1, 0]), 4)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("mse", torch.tensor([[257]])),  # 256 in bfloat16
        ("cross_entropy", torch.tensor([[0.1, 0.9]])),  # 0.10009765625 there
        ("cross_entropy", torch.tensor([[0.1, 0.9]], dtype=torch.float64)),
    ],
)
def test_targets_keep_their_digits_beside_outputs_of_autocast(name: str, target: Tensor) -> None:
    output = torch.randn(target.shape).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        part = judge(name, output, target, 1)
    assert torch.equal(part.value, judge(name, output.float(), target.float(), 1).value)


@pytest.mark.parametrize(
    "target", [None, [2.0], torch.zeros(0), torch.tensor([0.0, 1.0]), torch.tensor([True])], ids=str
)
def test_what_is_no_tensor_of_other_numbers_has_nothing_against_bce(target: Any) -> None:
    Loss("bce").check_targets(target)
