"""TrainingFlags: what each argument of fit may be, and what its value means at an epoch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fitkit.flags import TrainingFlags


def test_without_arguments_a_run_has_1000_epochs_and_the_default_stopping() -> None:
    flags = TrainingFlags()
    assert (flags.last_epoch, flags.default_stop, flags.window(0), flags.validates(0)) == (1000, True, 1, True)


def test_epochs_are_exact_and_without_the_default_stopping() -> None:
    flags = TrainingFlags(epochs=7)
    assert (flags.last_epoch, flags.default_stop) == (7, False)


def test_max_nb_epochs_is_a_limit_with_the_default_stopping() -> None:
    flags = TrainingFlags(max_nb_epochs=7)
    assert (flags.last_epoch, flags.default_stop) == (7, True)
    assert not TrainingFlags(max_nb_epochs=7, enable_early_stop=False).default_stop


@pytest.mark.parametrize("epochs", [0, 1, np.int64(3)])
def test_epochs_may_be_any_integer_from_0_on(epochs: Any) -> None:
    assert TrainingFlags(epochs=epochs).last_epoch == epochs


def test_epochs_exclude_max_nb_epochs_even_when_they_agree() -> None:
    with pytest.raises(ValueError, match=r"epochs=1000 and max_nb_epochs=1000 exclude each other\. epochs trains exac"):
        TrainingFlags(epochs=1000, max_nb_epochs=1000)


@pytest.mark.parametrize(("limit", "value"), [("epochs", 3), ("max_nb_epochs", 3)])
def test_min_nb_epochs_may_reach_the_maximum_and_no_more(limit: str, value: int) -> None:
    assert TrainingFlags(min_nb_epochs=3, **{limit: value}).min_nb_epochs == 3  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"min_nb_epochs to be at most {limit}=3, received min_nb_epochs=4"):
        TrainingFlags(min_nb_epochs=4, **{limit: value})  # type: ignore[arg-type]


def test_a_window_counts_from_the_epoch_it_is_said_for() -> None:
    flags = TrainingFlags(accumulate_grad_batches={2: 4, 5: 8})
    assert [flags.window(epoch) for epoch in range(7)] == [1, 1, 4, 4, 4, 8, 8]
    assert TrainingFlags(accumulate_grad_batches=3).window(100) == 3


def test_the_order_of_the_windows_said_does_not_matter() -> None:
    flags = TrainingFlags(accumulate_grad_batches={5: 8, 0: 2, np.int64(2): np.int64(4)})
    assert [flags.window(epoch) for epoch in (0, 1, 2, 4, 5, 9)] == [2, 2, 4, 4, 8, 8]


@pytest.mark.parametrize(
    ("frequency", "epochs"),
    [(1, [0, 1, 2, 3, 4, 5]), (2, [1, 3, 5]), ([1, 4], [0, 3]), ({6}, [5]), (range(2, 4), [1, 2]), ((3, 3), [2])],
)
def test_validation_is_every_so_many_epochs_or_after_those_listed(frequency: Any, epochs: list[int]) -> None:
    flags = TrainingFlags(validation_freq=frequency)
    assert [epoch for epoch in range(6) if flags.validates(epoch)] == epochs


@pytest.mark.parametrize(
    ("order", "means"),
    [(-1, -1), (2, 2), (2.0, 2), (0.5, 0.5), ("inf", math.inf), (math.inf, math.inf), (np.float32("inf"), math.inf)],
)
def test_a_norm_is_off_or_of_an_order(order: Any, means: float) -> None:
    assert TrainingFlags(track_grad_norm=order).track_grad_norm == means


NO_INTEGERS = [True, 2.0, 1.5, math.nan, math.inf, "2", None, torch.tensor(2), np.float64(2), [2]]
COUNTS = ["min_nb_epochs", "max_nb_epochs", "initial_epoch", "accumulate_grad_batches"]
OPTIONAL_COUNTS = ["epochs", "steps_per_epoch", "validation_steps", "micro_batch_size"]
NO_NUMBERS = [True, "1", None, [0.5]]
FRACTIONS = ["train_percent_check", "val_percent_check"]


@pytest.mark.parametrize("value", NO_INTEGERS, ids=repr)
@pytest.mark.parametrize("name", [*COUNTS, *OPTIONAL_COUNTS])
def test_a_count_is_an_integer(name: str, value: Any) -> None:
    if value is None and name in OPTIONAL_COUNTS:
        return
    expected = r'Expected an integer of at least [01], received|Expected a number of samples or "auto", received'
    with pytest.raises((TypeError, ValueError), match=rf"({expected}) {name}="):
        TrainingFlags(**{name: value})


@pytest.mark.parametrize("value", [value for value in NO_INTEGERS if not isinstance(value, list)], ids=repr)
def test_a_validation_frequency_is_made_of_integers(value: Any) -> None:
    with pytest.raises(TypeError, match=r"Expected an integer of at least 1, received validation_freq="):
        TrainingFlags(validation_freq=value)
    with pytest.raises(TypeError, match=r"Expected an integer of at least 1, received validation_freq's epoch="):
        TrainingFlags(validation_freq=[1, value])  # type: ignore[list-item, arg-type]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize("name", [*FRACTIONS, "overfit_pct", "gradient_clip_val", "track_grad_norm"])
def test_a_number_is_a_number(name: str, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"Expected .*number.*, received {name}="):
        TrainingFlags(**{name: value})


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf, -math.inf, 0])
@pytest.mark.parametrize("name", FRACTIONS)
def test_a_fraction_of_the_data_is_above_0_and_up_to_1(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"Expected a (number|fraction) .* received {name}={value}"):
        TrainingFlags(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": -1}, r"Expected an integer of at least 0, received epochs=-1"),
        ({"max_nb_epochs": 0}, r"Expected an integer of at least 1, received max_nb_epochs=0"),
        ({"min_nb_epochs": 0}, r"Expected an integer of at least 1, received min_nb_epochs=0"),
        ({"initial_epoch": -1}, r"Expected an integer of at least 0, received initial_epoch=-1"),
        ({"steps_per_epoch": 0}, r"Expected an integer of at least 1, received steps_per_epoch=0"),
        ({"validation_steps": 0}, r"Expected an integer of at least 1, received validation_steps=0"),
        ({"validation_freq": 0}, r"Expected an integer of at least 1, received validation_freq=0"),
        ({"validation_freq": [0]}, r"Expected an integer of at least 1, received validation_freq's epoch=0"),
        ({"validation_freq": []}, r"Expected the epochs to validate after, received validation_freq=\[\]"),
        ({"accumulate_grad_batches": 0}, r"Expected an integer of at least 1, received accumulate_grad_batches=0"),
        ({"accumulate_grad_batches": -1}, r"Expected an integer of at least 1, received accumulate_grad_batches=-1"),
        ({"accumulate_grad_batches": {}}, r"Expected \{epoch: batches\}, received accumulate_grad_batches=\{\}"),
        ({"accumulate_grad_batches": {0: 0}}, r"at least 1, received accumulate_grad_batches\[0\]=0"),
        ({"accumulate_grad_batches": {-1: 2}}, r"at least 0, received accumulate_grad_batches' epoch=-1"),
        ({"gradient_clip_val": -1}, r"Expected a number of at least 0, received gradient_clip_val=-1"),
        ({"gradient_clip_val": math.nan}, r"Expected a number of at least 0, received gradient_clip_val=nan"),
        ({"gradient_clip_val": math.inf}, r"Expected a number of at least 0, received gradient_clip_val=inf"),
        ({"track_grad_norm": 0}, r'Expected -1 \(off\), a number above 0 or "inf", received track_grad_norm=0'),
        ({"track_grad_norm": -2}, r'Expected -1 \(off\), a number above 0 or "inf", received track_grad_norm=-2'),
        ({"track_grad_norm": "2"}, r"""a number above 0 or "inf", received track_grad_norm='2'"""),
        ({"track_grad_norm": math.nan}, r"received track_grad_norm=nan"),
        ({"overfit_pct": -0.1}, r"Expected a number from 0 to 1, received overfit_pct=-0\.1"),
        ({"overfit_pct": 1.1}, r"Expected a number from 0 to 1, received overfit_pct=1\.1"),
        ({"overfit_pct": math.nan}, r"Expected a number from 0 to 1, received overfit_pct=nan"),
        ({"micro_batch_size": 0}, r"Expected an integer of at least 1, received micro_batch_size=0"),
        ({"micro_batch_size": "half"}, r"""Expected a number of samples or "auto", received micro_batch_size='half'"""),
        ({"on_nonfinite": "rise"}, r"""received on_nonfinite='rise'\. Did you mean 'raise'\?"""),
        ({"on_nonfinite": None}, r"Expected one of 'raise', 'stop', 'ignore', received on_nonfinite=None"),
    ],
)
def test_a_value_out_of_range_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingFlags(**arguments)


@pytest.mark.parametrize("value", [1, 0, "yes", None])
def test_a_switch_is_true_or_false(value: Any) -> None:
    with pytest.raises(TypeError, match=r"Expected True or False, received enable_early_stop="):
        TrainingFlags(enable_early_stop=value)
