"""A callback made of functions, for what is not worth a class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from fitkit.callbacks.callback import Callback
from fitkit.callbacks.hooks import HOOKS
from fitkit.errors import nearest, show


@final
class LambdaCallback(Callback):
    """Calls the given functions at their hooks.

    Args:
        functions: for any hook of `Callback`, what to call; it takes the hook's arguments without ``self``. None
            stands for no function.

    Raises:
        TypeError: a keyword is no hook, or its value cannot be called.

    Example:
        >>> callback = LambdaCallback(on_epoch_end=lambda epoch, logs: print(epoch, logs["loss"]))
        >>> callback.on_epoch_end(3, {"loss": 0.25})
        3 0.25
    """

    def __init__(self, **functions: Callable[..., Any] | None) -> None:
        super().__init__()
        for name, function in functions.items():
            if name not in HOOKS:
                raise TypeError(
                    f"LambdaCallback got {name}={show(function)}, but there is no such hook."
                    f"{nearest(name, HOOKS)} The hooks are {', '.join(HOOKS)}."
                )
            if function is not None and not callable(function):
                raise TypeError(f"Expected a function of {', '.join(HOOKS[name])}, received {name}={show(function)}.")
            if function is not None:
                setattr(self, name, function)
