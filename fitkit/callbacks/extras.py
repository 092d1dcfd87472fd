"""What callbacks share that hand numbers to another package: importing it, and the numbers of an epoch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from fitkit.callbacks.callback import Callback
from fitkit.callbacks.optimizer import LEARNING_RATE
from fitkit.errors import needing, show
from fitkit.history import as_number
from fitkit.optimization import learning_rates


def import_extra(module: str, extra: str, user: str) -> Any:
    """The module of a package that only this callback needs.

    Args:
        module: its name.
        extra: of fitkit's extras, the one that installs it.
        user: the callback's name.

    Raises:
        ImportError: it is not installed.
    """
    with needing(extra, extra, user):
        found = importlib.import_module(module)
        # A folder of that name, such as the one that W&B keeps its files in, can be imported as an empty package.
        if getattr(found, "__file__", None) is None:
            raise ImportError(f"{module} is a folder here, {show(list(found.__path__))}, and no package")
    return found


def check_hyperparameters(value: Any) -> dict[str, Any]:
    """The mapping as a dict; empty for None."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"Expected {{name: value}}, received hyperparameters={show(value)}.")
    return dict(value)


def measured_numbers(callback: Callback, logs: Mapping[str, Any] | None) -> dict[str, float]:
    """The numbers that an epoch has, as floats, with the present learning rate where the logs have none."""
    numbers = {key: as_number(key, value) for key, value in (logs or {}).items()}
    optimizer = callback.model.optimizer
    if optimizer is not None:
        numbers.setdefault(LEARNING_RATE, learning_rates(optimizer)[0])
    return {key: number for key, number in numbers.items() if number is not None}
