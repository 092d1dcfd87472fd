"""A learning rate that is a function of the epoch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, final

from fitkit.callbacks.callback import Callback
from fitkit.callbacks.display import print_line
from fitkit.callbacks.optimizer import LEARNING_RATE, log_learning_rate, optimizer_of
from fitkit.errors import check_choice, check_number, show
from fitkit.optimization import learning_rates, set_learning_rates


@final
class LearningRateScheduler(Callback):
    """Sets the learning rate at the beginning of each epoch, as Keras's does.

    With several parameter groups the schedule is asked once for each, with the group's own rate. The rate that an
    epoch used is in its logs as "learning_rate"; with several parameter groups that is the first one's.

    Args:
        schedule: ``schedule(epoch, rate)`` or ``schedule(epoch)``, which returns the new rate; epoch is 0-based, rate
            the present one.
        verbose: 1 prints a line an epoch.

    Raises:
        TypeError: schedule cannot be called with these arguments, or returns no number.
        ValueError: it returns a number that is negative, NaN or infinite.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        >>> scheduler = LearningRateScheduler(lambda epoch, rate: rate if epoch < 10 else rate / 2)
        >>> scheduler.set_model(SimpleNamespace(optimizer=optimizer))
        >>> scheduler.on_epoch_begin(10)
        >>> optimizer.param_groups[0]["lr"]
        0.05
    """

    adds_to_logs = (LEARNING_RATE,)

    def __init__(self, schedule: Callable[..., float], verbose: int = 0) -> None:
        super().__init__()
        if not callable(schedule):
            raise TypeError(f"Expected a function of epoch and rate, received schedule={show(schedule)}.")
        self.schedule = schedule
        self._takes_rate = _takes_rate(schedule)
        check_choice("verbose", int(verbose) if isinstance(verbose, bool) else verbose, (0, 1))
        self.verbose = bool(verbose)

    def on_train_begin(self, logs: Mapping[str, float] | None = None) -> None:
        """Looks whether there is a rate to set."""
        optimizer_of(self)

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Sets the rate."""
        optimizer = optimizer_of(self)
        asked = [self._ask(epoch, rate) for rate in learning_rates(optimizer)]
        set_learning_rates(optimizer, asked)
        if self.verbose:
            print_line(f"Epoch {epoch + 1} (index {epoch}): the learning rate is {asked[0]:g}.")

    def _ask(self, epoch: int, rate: float) -> float:
        asked: Any = self.schedule(epoch, rate) if self._takes_rate else self.schedule(epoch)
        name = f"schedule({epoch}, {rate:g})" if self._takes_rate else f"schedule({epoch})"
        return check_number(name, asked.item() if hasattr(asked, "item") else asked, least=0.0)

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Logs the rate."""
        log_learning_rate(self, logs)


def _takes_rate(schedule: Callable[..., float]) -> bool:
    try:
        signature = inspect.signature(schedule)
    except ValueError:  # Some functions written in C tell nothing about their arguments.
        return True
    for arguments in ((0, 0.0), (0,)):
        try:
            signature.bind(*arguments)
        except TypeError:
            continue
        return len(arguments) == 2
    raise TypeError(
        f"Expected schedule(epoch, rate) or schedule(epoch), received a schedule that takes {signature}. Give it these "
        "arguments."
    )
