"""Losses of several outputs: by position or by key, with their factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fitkit.output_losses import OutputLosses


def test_losses_of_several_outputs_are_named_by_key_or_position() -> None:
    assert OutputLosses({"a": "mse", "b": "bce"}).names == ["a", "b"]
    assert OutputLosses(["mse", None, "bce"]).names == ["output_1", "output_2", "output_3"]


def test_outputs_that_do_not_match_the_losses_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"the keys of loss, \['a', 'b'\], received the keys \['a'\]; missing: \['b'\]"
    ):
        OutputLosses({"a": "mse", "b": "bce"}).select({"a": torch.ones(2)}, "y")
    with pytest.raises(ValueError, match="y to have 2 parts since loss has 2, received tensor of shape"):
        OutputLosses(["mse", "bce"]).select(torch.ones(3), "y")


@pytest.mark.parametrize("loss_weights", [[1.0], {"c": 1.0}, 2.0])
def test_loss_weights_that_do_not_match_are_refused(loss_weights: Any) -> None:
    with pytest.raises(ValueError, match="Expected .*loss_weights"):
        OutputLosses({"a": "mse", "b": "bce"}, loss_weights)


def test_loss_weights_of_one_loss_are_refused() -> None:
    with pytest.raises(ValueError, match="needs a loss for each output"):
        OutputLosses("mse", [1.0])
