"""The base of all callbacks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

import fitkit
from fitkit.callbacks import Callback
from fitkit.callbacks.hooks import HOOKS


def test_it_holds_what_it_was_given() -> None:
    callback = Callback()
    model: Any = SimpleNamespace()
    callback.set_model(model)
    callback.set_params({"epochs": 3})
    assert cast(Any, callback.model) is model
    assert callback.params == {"epochs": 3}


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_of_the_base_does_nothing(name: str) -> None:
    callback = Callback()
    before = dict(vars(callback))
    assert getattr(callback, name)(*HOOKS[name]) is None
    assert vars(callback) == before


@pytest.mark.parametrize("method", ["fit", "evaluate"])
def test_a_subclass_need_not_call_the_constructor_of_its_base(method: str) -> None:
    class Counts(Callback):
        def __init__(self) -> None:
            self.calls_seen = 0

        def on_test_begin(self, logs: object = None) -> None:
            self.calls_seen += 1

    model, counts = fitkit.Model(nn.Linear(2, 1)), Counts()
    model.compile("sgd", "mse")
    x, y = torch.randn(8, 2), torch.randn(8, 1)
    options = {"epochs": 1, "validation_data": (x, y)} if method == "fit" else {}
    getattr(model, method)(x, y, callbacks=[counts], verbose=0, **options)
    assert counts.calls_seen == 1
