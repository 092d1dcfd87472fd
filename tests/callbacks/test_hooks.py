"""The hook table: who is called, in what order, and which mistakes are found before the first batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fitkit
from fitkit.callbacks import Callback, EarlyStopping, Every, LambdaCallback, LRScheduler, SwapEMAWeights
from fitkit.callbacks.hooks import HOOKS, HookTable, check_callbacks, finish, implemented_hooks
from fitkit.history import History


class Noted(Callback):
    """Notes its name at the end of an epoch."""

    def __init__(self, name: str, seen: list[str]) -> None:
        super().__init__()
        self.name, self.seen = name, seen

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self.seen.append(self.name)


def raising(error: BaseException) -> Callable[..., None]:
    """A hook that raises the error."""

    def hook(*arguments: object) -> None:
        raise error

    return hook


def test_a_hook_that_nobody_implements_has_no_methods() -> None:
    table = HookTable([Noted("a", []), Callback()])
    assert [name for name in HOOKS if getattr(table, name)] == ["on_epoch_end"]


def test_the_hooks_are_those_of_keras_and_on_exception() -> None:
    kinds = ["train", "epoch", "train_batch", "test", "test_batch", "predict", "predict_batch"]
    assert set(HOOKS) == {f"on_{kind}_{end}" for kind in kinds for end in ("begin", "end")} | {"on_exception"}


def test_hooks_are_called_in_the_order_of_the_callbacks() -> None:
    seen: list[str] = []
    table = HookTable([Noted("b", seen), LambdaCallback(on_epoch_end=lambda *_: seen.append("f")), Noted("a", seen)])
    for hook in table.on_epoch_end:
        hook(0, {})
    assert seen == ["b", "f", "a"]


def test_a_function_set_on_the_instance_counts() -> None:
    callback = Callback()
    callback.on_train_begin = print  # type: ignore[assignment,method-assign]
    assert HookTable([callback]).on_train_begin == [print]


def test_an_inherited_hook_of_the_users_own_base_counts() -> None:
    class Child(Noted):
        pass

    assert implemented_hooks(Child("a", [])) == ["on_epoch_end"]


def test_a_hook_that_is_there_only_later_is_not_implemented_yet() -> None:
    class Later(Callback):
        __slots__ = ("on_epoch_end",)

        @property
        def on_train_end(self) -> Any:
            return self.model.on_end

    later = Later()
    assert implemented_hooks(later) == []
    later.on_epoch_end = print
    assert implemented_hooks(later) == ["on_epoch_end"]


def test_the_hooks_of_a_proxy_are_those_behind_it() -> None:
    class Proxy:
        __class__ = Callback

        def __getattr__(self, name: str) -> Any:
            return getattr(LambdaCallback(on_epoch_end=print, on_exception=print), name)

    assert check_callbacks(Proxy())[0].on_epoch_end is print
    assert implemented_hooks(Proxy()) == ["on_epoch_end", "on_exception"]


def test_history_counts_though_it_is_no_callback() -> None:
    history = History()
    assert HookTable([history]).on_epoch_end == [history.on_epoch_end]


def test_all_end_hooks_are_called_and_the_first_error_is_raised(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[object] = []
    hooks = [raising(OSError("first")), seen.append, raising(KeyError("second"))]
    with pytest.raises(OSError, match="first"):
        finish(hooks, "logs")
    assert seen == ["logs"]
    assert "KeyError: 'second'" in capsys.readouterr().err


def test_an_error_of_on_exception_is_raised_from_the_runs_error() -> None:
    cause = KeyboardInterrupt()
    with pytest.raises(OSError, match="disk full") as caught:
        finish([raising(OSError("disk full"))], cause, cause=cause)
    assert caught.value.__cause__ is cause


def test_a_hook_that_raises_the_runs_error_again_makes_no_circle() -> None:
    cause = ValueError("the run's")
    with pytest.raises(ValueError, match="the run's") as caught:
        finish([raising(cause)], cause, cause=cause)
    assert caught.value.__cause__ is None


def test_end_hooks_without_errors_raise_nothing() -> None:
    finish([], {})
    finish([lambda error: None], ValueError(), cause=ValueError())


def test_none_and_a_single_callback_become_lists() -> None:
    callback = Callback()
    assert check_callbacks(None) == []
    assert check_callbacks(callback) == [callback]
    pair = (callback, Callback())
    assert check_callbacks(pair) == list(pair)


@pytest.mark.parametrize(
    ("value", "advice"),
    [
        (EarlyStopping, r"callbacks\[0\]=.* pass an instance, EarlyStopping\(\.\.\.\)"),
        (None, r"callbacks\[0\]=None\. Leave it out"),
        (print, r"LambdaCallback\(on_epoch_end=function\)"),
        ("early", r"received callbacks\[0\]='early'\. Derive its class from Callback"),
        (
            torch.optim.lr_scheduler.StepLR(torch.optim.SGD(nn.Linear(1, 1).parameters()), 1),
            r"A torch scheduler is passed as fitkit\.callbacks\.LRScheduler",
        ),
    ],
)
def test_what_is_no_callback_is_refused_with_advice(value: object, advice: str) -> None:
    with pytest.raises(TypeError, match=advice):
        check_callbacks([value])


@pytest.mark.parametrize("value", [EarlyStopping, {"stop": EarlyStopping()}, 3])
def test_what_is_no_list_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match="Expected a list of callbacks, received callbacks="):
        check_callbacks(value)


def test_a_misspelt_hook_names_the_nearest() -> None:
    class Misspelt(Callback):
        def on_epoch_ends(self, epoch: int, logs: Any = None) -> None:
            raise AssertionError

    with pytest.raises(ValueError, match=r"Misspelt\.on_epoch_ends is no hook .*Did you mean 'on_epoch_end'"):
        check_callbacks([Misspelt()])


def test_a_misspelt_function_on_the_instance_is_found() -> None:
    callback = Callback()
    callback.on_batch_end = print  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"Callback\.on_batch_end is no hook"):
        check_callbacks([callback])


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("on_batch_begin", "on_train_batch_begin"),
        ("on_batch_end", "on_train_batch_end"),
        ("on_epoch_start", "on_epoch_begin"),
        ("on_train_epoch_end", "on_epoch_end"),
        ("on_fit_start", "on_train_begin"),
        ("on_validation_epoch_start", "on_test_begin"),
        ("on_validation_batch_end", "on_test_batch_end"),
    ],
)
def test_a_hook_of_another_library_names_the_hook_of_that_moment(theirs: str, ours: str) -> None:
    callback = Callback()
    setattr(callback, theirs, print)
    with pytest.raises(ValueError, match=f"{theirs} is no hook .*Did you mean '{ours}'"):
        check_callbacks([callback])


def test_a_misspelt_static_method_is_found() -> None:
    class Static(Callback):
        @staticmethod
        def on_begin(logs: Any = None) -> None:
            raise AssertionError

    with pytest.raises(ValueError, match=r"Static\.on_begin is no hook"):
        check_callbacks([Static()])


def test_attributes_and_properties_that_start_with_on_are_allowed() -> None:
    class Switched(Callback):
        on_gpu = True

        @property
        def on_call(self) -> bool:
            raise AssertionError("a property must not run before the run")

    assert len(check_callbacks([Switched()])) == 1


def test_a_hook_that_cannot_take_its_arguments_is_refused() -> None:
    class Short(Callback):
        def on_epoch_end(self, epoch: int) -> None:  # type: ignore[override]
            raise AssertionError

    with pytest.raises(TypeError, match=r"Short\.on_epoch_end is called as on_epoch_end\(epoch, logs\)"):
        check_callbacks([Short()])


def test_a_builtin_function_as_a_hook_is_allowed() -> None:
    seen: list[object] = []
    assert len(check_callbacks(LambdaCallback(on_train_end=seen.append, on_train_begin=dict))) == 1


def test_the_same_object_in_two_places_is_refused() -> None:
    one = Noted("a", [])
    with pytest.raises(ValueError, match=r"callbacks\[0\] and callbacks\[2\] are the same object.*make a second one"):
        check_callbacks([one, Callback(), one])


def test_an_object_beside_one_that_calls_it_is_refused() -> None:
    one = Noted("a", [])
    with pytest.raises(ValueError, match=r"callbacks\[0\] and callbacks\[1\] are the same object"):
        check_callbacks([Every(2, one), one])


def test_equal_objects_are_no_same_object() -> None:
    chosen = [Noted("a", []), Noted("a", [])]
    assert check_callbacks(chosen) == chosen


@pytest.mark.parametrize(
    "listening",
    [
        SwapEMAWeights(),
        LRScheduler(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 9), interval="step"),
    ],
    ids=["SwapEMAWeights", "LRScheduler"],
)
def test_one_that_begins_again_without_an_end_listens_once(listening: Callback) -> None:
    model = fitkit.Model(nn.Linear(1, 1), device="cpu")
    model.compile("sgd", "mse")
    listening.set_model(model)
    listening.on_train_begin()
    listening.on_train_begin()
    assert model.optimizer is not None
    assert len(model.optimizer._optimizer_step_post_hooks) == 1
