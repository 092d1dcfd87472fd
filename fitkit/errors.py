"""What fitkit raises, and how its messages are put together.

Every message says what was expected, what came (as ``name=value``) and what to do. This file holds the
public exception types and the small checks that all floors share; it knows nothing about models or data.
"""

from __future__ import annotations

import difflib
import inspect
import math
import operator
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class NonFiniteLossError(FloatingPointError):
    """The training loss of an epoch is NaN or infinite.

    Raised by ``fit(..., on_nonfinite="raise")`` where the epoch's numbers are read anyway.

    Attributes:
        epoch: 0-based index of the epoch.
        batch: 0-based index of the first batch whose loss was not finite.
    """

    def __init__(self, message: str, *, epoch: int = -1, batch: int = -1) -> None:
        super().__init__(message)
        self.epoch = epoch
        self.batch = batch


class CheckpointError(ValueError):
    """A saved file cannot be used: damaged, foreign, from a newer fitkit, or not for this module.

    The message names the path and the reason. What was to be filled from the file is unchanged.
    """


class NotNowError(ValueError):
    """What is asked for can be done later in the run, but not at this place."""


def add_note(error: Exception, note: str) -> None:
    """Adds a line below an error's message, where tracebacks show it; the error stays the same object."""
    if sys.version_info >= (3, 11):
        error.add_note(note)
    elif isinstance(error, OSError) and error.strerror is not None:
        error.strerror = f"{error.strerror}\n{note}"
    elif not error.args or isinstance(error.args[0], str):
        # Before Python 3.11 tracebacks know no notes. Most errors make their message of their arguments.
        message, *others = error.args or ("",)
        error.args = (f"{message}\n{note}", *others)


@contextmanager
def needing(package: str, extra: str, user: str) -> Iterator[None]:
    """Around the import of an optional package: where it is missing, says who needs it and how it is installed.

    Args:
        package: its name.
        extra: of fitkit's extras, the one that installs it.
        user: what needs it.
    """
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{user} needs {package}: pip install 'fitkit[{extra}]'. ({error})") from error


def show(value: object) -> str:
    """The value as a message shows it: short, and a tensor or array by dtype and shape."""
    shape = getattr(value, "shape", None)
    if shape is not None and len(shape) > 0:
        return f"{type(value).__name__} of shape {tuple(shape)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def classes_last(output: torch.Tensor, target: torch.Tensor) -> str:
    """A sentence about where classes stand, if they are likely to be the output's last dimension; else nothing."""
    if output.ndim < 3 or target.is_floating_point() or target.shape != output.shape[:-1]:
        return ""
    return " Classes are dimension 1, as in torch: for an output (N, ..., C) write output.movedim(-1, 1)."


def nearest(word: str, known: Iterable[str]) -> str:
    """A sentence that names the nearest known word, or nothing when none is near."""
    matches = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def unknown_name(argument: str, value: str, known: Iterable[str]) -> ValueError:
    """The error for a name that is in no list: the list, and the nearest of its names."""
    names = sorted(known)
    return ValueError(f"Unknown name: {argument}={value!r}.{nearest(value, names)} Known names: {', '.join(names)}.")


# What functions in the order of Keras and scikit-learn, (y_true, y_pred), call their first two parameters.
_TARGETS = ("y_true", "true", "truth", "target", "targets", "label", "labels")
_OUTPUTS = ("y_pred", "y_score", "y_proba", "output", "outputs", "pred", "preds", "prediction", "predictions", "logits")


def check_order(argument: str, function: Callable[..., Any]) -> None:
    """Refuses a function whose parameters say that it takes the target first: both are tensors, so it would run."""
    try:
        parameters = list(inspect.signature(function).parameters)[:2]
    except (TypeError, ValueError):  # Some functions written in C tell nothing about their parameters.
        return
    if len(parameters) == 2 and parameters[0] in _TARGETS and parameters[1] in _OUTPUTS:
        raise ValueError(
            f"Expected a callable(output, target), torch's order, received {argument}={show(function)} with the "
            f"parameters ({', '.join(parameters)}). Swap them, or write lambda output, target: f(target, output)."
        )


def check_integer(argument: str, value: Any, *, least: int) -> int:
    """Returns value as an int; True, 2.0 and NaN are not integers where a count is meant."""
    refused = TypeError(f"Expected an integer of at least {least}, received {argument}={show(value)}.")
    if isinstance(value, (bool, torch.Tensor)):
        raise refused
    try:
        number = operator.index(value)
    except TypeError:
        raise refused from None
    if number < least:
        raise ValueError(f"Expected an integer of at least {least}, received {argument}={number}.")
    return number


def check_number(
    argument: str, value: Any, *, least: float = -math.inf, most: float = math.inf, finite: bool = True
) -> float:
    """Returns value as a float; refuses what is no number, out of range or, with ``finite``, NaN and infinity."""
    refused = TypeError(f"Expected a number, received {argument}={show(value)}.")
    if isinstance(value, (bool, str, torch.Tensor)):
        raise refused
    try:
        number = float(value)
    except TypeError:
        raise refused from None
    if (finite and not math.isfinite(number)) or number < least or number > most:
        bounds = f"from {least:g} to {most:g}" if math.isfinite(most) else f"of at least {least:g}"
        bounds = "that is finite" if least == -math.inf and most == math.inf else bounds
        hint = " It must be finite." if number == math.inf else ""
        raise ValueError(f"Expected a number {bounds}, received {argument}={value!r}.{hint}")
    return number


def check_choice(argument: str, value: Any, choices: Iterable[Any]) -> None:
    """Refuses a value that is not one of the choices."""
    known = list(choices)
    if isinstance(value, (str, int)) and any(value == choice and type(value) is type(choice) for choice in known):
        return
    near = nearest(value, [str(choice) for choice in known]) if isinstance(value, str) else ""
    raise ValueError(f"Expected one of {', '.join(map(repr, known))}, received {argument}={show(value)}.{near}")


def check_flag(argument: str, value: Any) -> bool:
    """Returns value when it is True or False; refuses numbers and strings that merely look like it."""
    if not isinstance(value, bool):
        raise TypeError(f"Expected True or False, received {argument}={show(value)}.")
    return value
