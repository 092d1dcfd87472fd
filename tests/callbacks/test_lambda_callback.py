"""LambdaCallback: functions as hooks."""

from __future__ import annotations

import pytest

from fitkit.callbacks import LambdaCallback
from fitkit.callbacks.hooks import HOOKS, implemented_hooks


def test_a_function_is_called_with_the_hooks_arguments() -> None:
    seen: list[tuple[object, ...]] = []
    LambdaCallback(on_epoch_end=lambda *given: seen.append(given)).on_epoch_end(2, {"loss": 1.0})
    assert seen == [(2, {"loss": 1.0})]


def test_only_given_functions_count_as_hooks() -> None:
    callback = LambdaCallback(on_train_begin=print, on_exception=print, on_train_end=None)
    assert implemented_hooks(callback) == ["on_train_begin", "on_exception"]


@pytest.mark.parametrize("name", HOOKS)
def test_every_hook_can_be_given(name: str) -> None:
    assert implemented_hooks(LambdaCallback(**{name: print})) == [name]


def test_an_unknown_keyword_names_the_nearest_hook() -> None:
    with pytest.raises(TypeError, match="Did you mean 'on_train_batch_end'"):
        LambdaCallback(on_train_batch_ends=print)


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Expected a function of epoch, logs, received on_epoch_end=3"):
        LambdaCallback(on_epoch_end=3)  # type: ignore[arg-type]
