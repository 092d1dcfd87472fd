"""Which callback answers which hook: checked before a run, looked up once, called without a detour.

`check_callbacks` judges what the user passed, `HookTable` lists the bound methods that the loop calls, `finish`
calls the hooks that end a run. When hooks are called is the loop's business.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any, final

from torch.optim.lr_scheduler import LRScheduler

from fitkit.callbacks.callback import Callback
from fitkit.errors import nearest, show

Hook = Callable[..., Any]

# Every hook with the names of the arguments it is called with, by position.
HOOKS: dict[str, tuple[str, ...]] = {
    name: tuple(inspect.signature(function).parameters)[1:]
    for name, function in vars(Callback).items()
    if name.startswith("on_")
}

# What other libraries and older versions of Keras call the same moments, part by part of a name.
SYNONYMS = (
    ("_start", "_begin"),
    ("validation_", "test_"),
    ("on_batch_", "on_train_batch_"),
    ("fit_", "train_"),
    ("train_epoch_", "epoch_"),
    ("test_epoch_", "test_"),
    ("predict_epoch_", "predict_"),
)


@final
class HookTable:
    """For each hook, the bound methods of those who implement it, in the callbacks' order.

    After batches those with ``is_last_after_batches`` come last.

    The loop runs ``for hook in hooks.on_train_batch_end: hook(batch, logs)``: a hook that nobody implements costs
    nothing. Hooks are called by position with all their arguments.

    Args:
        callbacks: in the order in which they are called. History, which is no Callback, counts by its methods.
    """

    __slots__ = (*HOOKS, "_owners", "listeners")

    def __init__(self, callbacks: Iterable[object]) -> None:
        self.listeners = list(callbacks)
        self._owners: dict[str, list[object]] = {name: [] for name in HOOKS}
        for callback in self.listeners:
            for name in implemented_hooks(callback):
                self._owners[name].append(callback)
        for name in ("on_train_batch_end", "on_test_batch_end"):
            self._owners[name].sort(key=lambda each: getattr(each, "is_last_after_batches", False))
        self.on_train_begin = self._bound("on_train_begin")
        self.on_train_end = self._bound("on_train_end")
        self.on_epoch_begin = self._bound("on_epoch_begin")
        self.on_epoch_end = self._bound("on_epoch_end")
        self.on_train_batch_begin = self._bound("on_train_batch_begin")
        self.on_train_batch_end = self._bound("on_train_batch_end")
        self.on_test_begin = self._bound("on_test_begin")
        self.on_test_end = self._bound("on_test_end")
        self.on_test_batch_begin = self._bound("on_test_batch_begin")
        self.on_test_batch_end = self._bound("on_test_batch_end")
        self.on_predict_begin = self._bound("on_predict_begin")
        self.on_predict_end = self._bound("on_predict_end")
        self.on_predict_batch_begin = self._bound("on_predict_batch_begin")
        self.on_predict_batch_end = self._bound("on_predict_batch_end")
        self.on_exception = self._bound("on_exception")

    def _bound(self, name: str) -> list[Hook]:
        return [getattr(callback, name) for callback in self._owners[name]]

    def owners(self, name: str) -> list[object]:
        """Whose hooks of that name are listed, in the same order."""
        return self._owners[name]


def implemented_hooks(callback: object) -> list[str]:
    """The names of the hooks that the callback implements; functions set on the instance count too."""
    kind = type(callback)
    # What looks its attributes up in a way of its own, as a proxy does, has to be asked for each.
    asked = kind.__getattribute__ is not object.__getattribute__ or not issubclass(kind, Callback)
    names = HOOKS if asked else _own_names(callback)
    return [name for name in HOOKS if name in names and _implements(callback, name)]


def _own_names(callback: object) -> set[str]:
    """What a callback has beside what every callback has: its own attributes, and those of its classes."""
    names = set(getattr(callback, "__dict__", ()))
    for owner in type(callback).__mro__:
        if owner is not Callback and owner is not object:
            names.update(vars(owner))
    return names


def _implements(callback: object, name: str) -> bool:
    hook = getattr(callback, name, None)
    return hook is not None and getattr(hook, "__func__", None) is not vars(Callback)[name]


def finish(hooks: Sequence[Hook], *arguments: object, cause: BaseException | None = None) -> None:
    """Calls all hooks of a run's end, also when one of them raises: files are closed, weights come back.

    The first error is raised when all have been called, from ``cause`` when the run itself ended by an error. Only
    one error can be raised; the traceback of any further one is printed.

    Args:
        hooks: such as ``HookTable.on_train_end``.
        arguments: what each hook is called with.
        cause: the error that ended the run.
    """
    errors: list[BaseException] = []
    for hook in hooks:
        try:
            hook(*arguments)
        except BaseException as error:
            errors.append(error)
    for further in errors[1:]:
        traceback.print_exception(further)
    if errors and (cause is None or errors[0] is cause):
        raise errors[0]
    if errors:
        raise errors[0] from cause


def check_callbacks(callbacks: object) -> list[Callback]:
    """The callbacks that the user passed, as a list.

    Args:
        callbacks: None, a Callback, or a list or tuple of them.

    Raises:
        TypeError: something in it is no instance of Callback, a hook cannot take its arguments, or adds_to_logs is one
            string.
        ValueError: a method whose name starts with ``on_`` is no hook, or the same object stands in two places.
    """
    if callbacks is None:
        return []
    if isinstance(callbacks, Callback):
        callbacks = [callbacks]
    if not isinstance(callbacks, (list, tuple)):
        raise TypeError(
            f"Expected a list of callbacks, received callbacks={show(callbacks)}. {_advice(callbacks)}".rstrip()
        )
    places: dict[int, str] = {}
    for index, callback in enumerate(callbacks):
        if not isinstance(callback, Callback):
            raise TypeError(
                "Expected instances of fitkit.callbacks.Callback, received "
                f"callbacks[{index}]={show(callback)}. {_advice(callback)}".rstrip()
            )
        _check_names(callback)
        _check_arguments(callback)
        if isinstance(callback.adds_to_logs, str):
            raise TypeError(
                f"Expected the keys in a tuple, received {type(callback).__name__}.adds_to_logs="
                f"{callback.adds_to_logs!r}. Write ({callback.adds_to_logs!r},)."
            )
        for each in (callback, *callback.calls):
            if id(each) in places:
                raise ValueError(
                    f"{places[id(each)]} and callbacks[{index}] are the same object, {show(each)}, whose hooks would "
                    "be called twice. Leave one out, or make a second one."
                )
        places |= {id(each): f"callbacks[{index}]" for each in (callback, *callback.calls)}
    return list(callbacks)


def _advice(value: object) -> str:
    if isinstance(value, type) and issubclass(value, Callback):
        return f"It is a class: pass an instance, {value.__name__}(...)."
    if value is None:
        return "Leave it out."
    if isinstance(value, LRScheduler):
        return "A torch scheduler is passed as fitkit.callbacks.LRScheduler(lambda optimizer: ...)."
    if callable(value):
        return "A function is passed as LambdaCallback(on_epoch_end=function)."
    return "Derive its class from Callback."


def _in_our_words(name: str) -> str:
    for theirs, ours in SYNONYMS:
        name = name.replace(theirs, ours)
    return name


def _check_names(callback: Callback) -> None:
    """Refuses a misspelt hook, which would otherwise never be called."""
    for name in sorted(name for name in _own_names(callback) if name.startswith("on_") and name not in HOOKS):
        # Read statically: a property must not run before the callback knows its model.
        attribute = inspect.getattr_static(callback, name)
        if callable(attribute) or isinstance(attribute, (classmethod, staticmethod)):
            raise ValueError(
                f"{type(callback).__name__}.{name} is no hook and would never be called."
                f"{nearest(_in_our_words(name), HOOKS)} The hooks are {', '.join(HOOKS)}; give any other method a name "
                "that does not start with on_."
            )


def _check_arguments(callback: Callback) -> None:
    """Refuses a hook that would fail when it is called, perhaps only at the end of the first epoch."""
    for name in implemented_hooks(callback):
        hook = getattr(callback, name)
        code = getattr(getattr(hook, "__func__", None), "__code__", None)
        if code is not None and code.co_varnames[1 : code.co_argcount] == HOOKS[name] and not code.co_kwonlyargcount:
            continue  # the usual case, written as in the base
        try:
            signature = inspect.signature(hook)
        except ValueError:  # Some functions written in C tell nothing about their arguments.
            continue
        try:
            signature.bind(*HOOKS[name])
        except TypeError as error:
            raise TypeError(
                f"{type(callback).__name__}.{name} is called as {name}({', '.join(HOOKS[name])}), "
                f"but it takes {signature}. Give it these arguments."
            ) from error
