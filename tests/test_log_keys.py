"""What a key tells of its number: which direction is better, and what improves."""

from __future__ import annotations

import math

import pytest

from fitkit.log_keys import direction_of, improves

MORE = (
    "accuracy acc f1 auroc r2_score BinaryF1Score MulticlassAUROC IoU explained_variance top1_acc head_precision acc1"
)
LESS = "loss mse mae mean_squared_error perplexity hamming_distance accuracy_loss brier_score lr accurate"


@pytest.mark.parametrize("prefix", ["", "val_"])
@pytest.mark.parametrize(("names", "direction"), [(MORE, "max"), (LESS, "min")])
def test_auto_goes_by_the_words_of_the_name(names: str, direction: str, prefix: str) -> None:
    assert [name for name in names.split() if direction_of(prefix + name) != direction] == []


def test_a_given_mode_wins_over_the_name() -> None:
    assert direction_of("accuracy", "min") == "min"
    assert direction_of("loss", "max") == "max"


def test_an_unknown_mode_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'auto', 'min', 'max', received mode='maximum'"):
        direction_of("loss", "maximum")


@pytest.mark.parametrize(("value", "improvement"), [(1.0, False), (0.75, False), (0.5, True), (math.nan, False)])
def test_an_improvement_exceeds_min_delta(value: float, improvement: bool) -> None:
    assert improves(value, 1.0, "min", min_delta=0.25) is improvement
    assert improves(-value, -1.0, "max", min_delta=0.25) is improvement


def test_any_number_but_nan_improves_on_none() -> None:
    assert improves(math.inf, None, "min")
    assert not improves(math.nan, None, "min")
