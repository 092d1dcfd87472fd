"""The base of all callbacks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

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
