"""A loss that is not finite: the error names the epoch, the batch and where it shows first."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import fitkit

X, Y = torch.randn(20, 3), torch.randn(20, 1)


class LogOfMinusOne(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.log(-torch.ones(()))


def _fit(module: nn.Module, x: Tensor = X, learning_rate: float = 0.01, epochs: int = 1) -> None:
    model = fitkit.Model(module, device="cpu")
    model.compile("sgd", "mse", learning_rate=learning_rate)
    model.fit(x, Y, epochs=epochs, batch_size=5, shuffle=False, verbose=0)


def test_the_first_module_whose_output_is_not_finite_is_named() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), LogOfMinusOne(), nn.Linear(4, 1))
    with pytest.raises(
        fitkit.NonFiniteLossError,
        match=r"epoch 1 .*batch 1 .*output on the last batch is not finite is '2' \(LogOfMinusOne\)",
    ):
        _fit(module)


def test_a_batch_that_holds_nan_is_named() -> None:
    x = X.clone()
    x[17] = torch.nan
    with pytest.raises(fitkit.NonFiniteLossError, match=r"batch 4 \(index 3\). The last batch itself holds NaN"):
        _fit(nn.Linear(3, 1), x)


def test_a_learning_rate_that_is_too_large_is_seen_in_the_parameters() -> None:
    with pytest.raises(
        fitkit.NonFiniteLossError, match="parameters are not finite by now, the first being 'weight'"
    ) as caught:
        _fit(nn.Linear(3, 1), learning_rate=1e30, epochs=2)
    assert (caught.value.epoch, caught.value.batch) == (0, 1)


def test_looking_changes_no_buffer_and_no_random_number() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), LogOfMinusOne(), nn.Linear(4, 1))
    with pytest.raises(FloatingPointError, match="LogOfMinusOne"):
        _fit(module)
    assert int(module[1].num_batches_tracked) == 4  # type: ignore[arg-type]


def test_nan_in_the_data_is_named_by_array_rows_and_columns() -> None:
    frame = pd.DataFrame(X.numpy().copy(), columns=["age", "tenure", "calls"])
    frame.loc[[3, 9], "tenure"] = np.nan
    frame.loc[3, "calls"] = np.inf
    model = fitkit.Model(nn.Linear(3, 1), device="cpu")
    model.compile("sgd", "mse")
    target = Y.clone()
    target[0] = torch.nan
    found = r"x in 2 of 20 rows \(columns 'tenure', 'calls'\); y in 1 of 20 rows\. "
    with pytest.raises(fitkit.NonFiniteLossError, match=f"The data hold NaN or infinity: {found}"):
        model.fit(frame, target, epochs=1, verbose=0)
