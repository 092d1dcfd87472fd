"""A limit to the time that a run takes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, final

from fitkit.callbacks.callback import Callback
from fitkit.callbacks.display import print_line
from fitkit.durations import seconds_of
from fitkit.errors import check_number


@final
class Timer(Callback):
    """Ends training after the batch in which its time is over, by ``model.stop_training``.

    The time of the whole fit counts, validations and other callbacks included, and on a resumed run that of the run
    before. It is the host's time, which on an accelerator may be some batches ahead of the device's. The epoch that
    is cut short is validated and recorded, as always.

    Args:
        duration: seconds; "hours:minutes:seconds" ("00:10:00"), with days in front ("1:00:00:00"); a number with a
            unit, "s", "sec", "min", "h" or "d", or several ("1h 30min"); or a timedelta.
        verbose: whether to print a line when it stops.

    Attributes:
        duration: in seconds.
        has_stopped: whether it ended the latest run.

    Raises:
        TypeError: duration is none of these.
        ValueError: duration is no such text, or not above 0.

    Example:
        >>> Timer("00:10:00").duration, Timer("10min").duration, Timer("1h 30min").duration
        (600.0, 600.0, 5400.0)
    """

    adds_to_logs = ()

    def __init__(self, duration: float | str | timedelta, *, verbose: bool = False) -> None:
        super().__init__()
        self.duration = seconds_of("duration", duration)
        self.verbose = bool(check_number("verbose", int(verbose), least=0, most=1))
        self.has_stopped = False
        self._before = 0.0
        self._began: float | None = None

    @property
    def elapsed(self) -> float:
        """Seconds that the latest fit has taken so far, with those of the run that it resumed."""
        return self._before + (0.0 if self._began is None else time.monotonic() - self._began)

    def on_train_begin(self, logs: Mapping[str, float] | None = None) -> None:
        """Starts the clock."""
        self.has_stopped = False
        self._before = 0.0
        self._began = time.monotonic()

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Looks at the clock."""
        self._look()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Looks at the clock after a validation."""
        self._look()

    def _look(self) -> None:
        if self.elapsed < self.duration or self.has_stopped:
            return
        self.has_stopped = True
        self.model.stop_training = True
        if self.verbose:
            print_line(f"Training stops after {self.elapsed:.1f} seconds of {self.duration:g}.")

    def on_train_end(self, logs: Mapping[str, float] | None = None) -> None:
        """Stops the clock."""
        self._stop_clock()

    def on_exception(self, error: BaseException) -> None:
        """Stops the clock."""
        self._stop_clock()

    def _stop_clock(self) -> None:
        self._before, self._began = self.elapsed, None

    def state_dict(self) -> dict[str, Any]:
        """The seconds so far."""
        return {"elapsed": self.elapsed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state; called after ``on_train_begin``.

        Args:
            state: what ``state_dict`` returned.
        """
        self._before = state["elapsed"]
        self._look()
