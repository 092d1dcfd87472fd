"""Inputs that are not those of the training: columns in another order, one sample for a batch, rows out of order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import fitkit

FRAME = pd.DataFrame(np.random.default_rng(0).normal(size=(8, 3)).astype("float32"), columns=["age", "calls", "plan"])
Y = pd.Series(np.arange(8, dtype="float32"))


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def fitted(*data: Any, module: nn.Module | None = None) -> fitkit.Model:
    model = fitkit.Model(module or nn.Linear(3, 1), device="cpu")
    model.compile("sgd", "mse")
    model.fit(*data, epochs=1, verbose=0)
    return model


@pytest.mark.parametrize("method", ["evaluate", "predict", "fit"])
def test_columns_in_another_order_are_refused(method: str) -> None:
    model, other = fitted(FRAME, Y), FRAME[["plan", "age", "calls"]]
    calls = {
        "evaluate": lambda: model.evaluate(other, Y, verbose=0),
        "predict": lambda: model.predict(other, verbose=0),
        "fit": lambda: model.fit(FRAME, Y, validation_data=(other, Y), epochs=1, verbose=0),
    }
    with pytest.raises(ValueError, match="columns of the training data in their order, received them in another order"):
        calls[method]()


def test_columns_that_are_missing_or_new_are_listed() -> None:
    with pytest.raises(ValueError, match="received missing: plan; not in the training data: fee"):
        fitted(FRAME, Y).predict(FRAME.rename(columns={"plan": "fee"}), verbose=0)


def test_columns_are_compared_by_their_place_in_a_dict() -> None:
    model = fitted({"x": FRAME}, Y, module=Named())
    model.predict({"x": FRAME}, verbose=0)
    with pytest.raises(ValueError, match=r"Expected x\['x'\] with the columns"):
        model.predict({"x": FRAME[::-1][["plan", "calls", "age"]]}, verbose=0)


@pytest.mark.parametrize("other", [FRAME.to_numpy(), pd.DataFrame(FRAME.to_numpy()), torch.tensor(FRAME.to_numpy())])
def test_what_has_no_names_goes_by_position(other: Any) -> None:
    model = fitted(FRAME, Y)
    assert torch.equal(model.predict(other, verbose=0), model.predict(FRAME, verbose=0))


def test_a_later_fit_sets_other_columns() -> None:
    model = fitted(FRAME, Y)
    model.fit(FRAME.add_suffix("_scaled"), Y, epochs=1, verbose=0)
    model.predict(FRAME.add_suffix("_scaled"), verbose=0)


@pytest.mark.parametrize("row", [FRAME.iloc[0], FRAME.to_numpy()[0], torch.zeros(3)])
def test_one_sample_is_no_batch(row: Any) -> None:
    with pytest.raises(ValueError, match=r"received one sample of shape \(3,\)\. Make it a batch of one: x\[None\]"):
        fitted(FRAME, Y).predict(row, verbose=0)


def test_one_sample_is_no_batch_after_a_fit_on_a_dataset_either() -> None:
    images = TensorDataset(torch.zeros(4, 1, 5, 5), torch.zeros(4, 2, 3, 3))
    model = fitted(images, module=nn.Conv2d(1, 2, 3))
    with pytest.raises(ValueError, match=r"one sample of shape \(1, 5, 5\)"):
        model.predict(images[0][0], verbose=0)


def test_numbers_in_lists_are_answered_with_arrays() -> None:
    with pytest.raises(ValueError, match=r"a list of 4 numbers\. Make lists of numbers an array"):
        fitkit.Model(nn.Linear(4, 1), device="cpu").predict([[0.0, 1.0, 2.0, 3.0]], verbose=0)


def test_rows_in_another_order_than_their_targets_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pass y\.loc\[x\.index\]"):
        fitted(FRAME, Y[::-1])


@pytest.mark.parametrize("y", [Y[::-1].to_numpy(copy=True), Y.set_axis(range(8, 16)), Y[::-1].reset_index(drop=True)])
def test_rows_whose_index_says_nothing_go_by_position(y: Any) -> None:
    fitted(FRAME, y)
