"""How a run shows where it is: a bar in a terminal or notebook, one line an epoch anywhere else.

Numbers are read from the device only when something is drawn, about ten times a second at most.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO, final

from tqdm import tqdm

from fitkit.callbacks.callback import Callback
from fitkit.callbacks.display import TextBar, in_notebook, notebook_bar, print_line, shows_bars
from fitkit.errors import check_number
from fitkit.history import as_number
from fitkit.log_keys import is_detail

# Bars longer than the interval spend at most this part of the time on reading metrics and drawing.
LARGEST_SHARE = 0.1


@final
class ProgressBar(Callback):
    """Shows the progress of fit, evaluate and predict.

    In a terminal or notebook a bar with the count of batches, their rate, the time elapsed and left and the running
    numbers, replaced by one line when the epoch is over. Elsewhere, and with ``verbose=2``, only that line. A Model
    adds it by itself unless ``verbose=0``; pass one to change its settings.

    Args:
        refresh_interval: the least time between two drawings, in seconds. It grows by itself when reading the
            metrics takes long.
        stream: where to write; None is ``sys.stdout`` as it is when the run begins.

    Raises:
        TypeError: refresh_interval is no number.
        ValueError: refresh_interval is negative, NaN or infinite.
    """

    adds_to_logs = ()
    only_on_rank_0 = True

    def __init__(self, refresh_interval: float = 0.1, stream: TextIO | None = None) -> None:
        super().__init__()
        self.refresh_interval = check_number("refresh_interval", refresh_interval, least=0.0)
        self.stream = stream
        self._output = stream
        self._draws = False
        self._next_drawing = math.inf
        self._epoch: _Phase | None = None
        self._phase = _Phase("", None)
        self._drawn: _Phase | None = None
        self._bar: tqdm[Any] | None = None
        # Batches of the epoch and of the validation before, for data that do not tell their length.
        self._steps: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        drawing = {"_output": self.stream, "_epoch": None, "_drawn": None, "_bar": None}
        return super().__getstate__() | drawing

    def on_train_begin(self, logs: Mapping[str, float] | None = None) -> None:
        """Looks where to write."""
        self._begin()

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Starts the epoch's bar."""
        last = self.params.get("epochs")
        name = f"Epoch {epoch + 1}" if last is None else f"Epoch {epoch + 1}/{last}"
        self._epoch = _Phase(name, self._total("steps"))
        self._enter(self._epoch)

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Counts the batch, and draws when it is time."""
        self._phase.batches = batch + 1
        if time.monotonic() >= self._next_drawing:
            self._draw(logs or {})

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Ends the bar and writes the epoch's line."""
        if self._epoch is not None:
            self._phase, self._epoch = self._epoch, None
            self._steps["steps"] = self._phase.batches
            self._end(logs or {})

    def on_test_begin(self, logs: Mapping[str, float] | None = None) -> None:
        """Starts the bar of an epoch's validation or of an evaluate."""
        if self._epoch is None:
            self._begin()
            self._enter(_Phase("Evaluating", self._total("steps")))
        else:
            self._enter(_Phase(f"{self._epoch.name} validating", self._total("validation_steps")))

    def on_test_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Counts the batch, and draws when it is time."""
        self._phase.batches = batch + 1
        if time.monotonic() >= self._next_drawing:
            self._draw(logs or {})

    def on_test_end(self, logs: Mapping[str, float] | None = None) -> None:
        """Ends an evaluate; a validation's numbers stand in the line of its epoch."""
        if self._epoch is None:
            self._end(logs or {})
        else:
            self._steps["validation_steps"] = self._phase.batches
            self._phase = self._epoch

    def on_predict_begin(self, logs: Mapping[str, float] | None = None) -> None:
        """Starts the bar of a predict."""
        self._begin()
        self._enter(_Phase("Predicting", self._total("steps")))

    def on_predict_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Counts the batch, and draws when it is time; there are no numbers to show."""
        self._phase.batches = batch + 1
        if time.monotonic() >= self._next_drawing:
            self._draw({})

    def on_predict_end(self, logs: Mapping[str, float] | None = None) -> None:
        """Ends the bar and writes how long it took."""
        self._end({})

    def on_exception(self, error: BaseException) -> None:
        """Leaves the bar where it was, and the cursor on a fresh line."""
        self._epoch = None
        self._close(leave=True)

    def _begin(self) -> None:
        self._output = self.stream if self.stream is not None else sys.stdout
        self._epoch = None
        self._steps.clear()
        self._draws = self.params.get("verbose") != 2 and shows_bars(self._output)
        self._next_drawing = -math.inf if self._draws else math.inf

    def _total(self, key: str) -> int | None:
        steps: int | None = self.params.get(key)
        return self._steps.get(key) if steps is None else steps

    def _enter(self, phase: _Phase) -> None:
        self._phase = phase
        if time.monotonic() >= self._next_drawing:
            self._draw({})

    def _draw(self, logs: Mapping[str, Any]) -> None:
        bar = self._open()
        keys = _shown(logs)
        numbers = {key: logs[key] for key in keys[:1]}
        # The first number waits for the work in the device's queue, which is no loss. What comes after it is.
        began = time.monotonic()
        numbers.update((key, logs[key]) for key in keys[1:])
        bar.set_postfix_str(_text(numbers, ", "), refresh=False)
        bar.update(self._phase.batches - bar.n)
        now = time.monotonic()
        self._next_drawing = now + max(self.refresh_interval, (now - began) / LARGEST_SHARE)

    def _open(self) -> tqdm[Any]:
        """The bar of the phase, made when it is first drawn: short epochs never need one."""
        if self._bar is None or self._drawn is not self._phase:
            self._close(leave=False)
            self._drawn = self._phase
            kind = notebook_bar() if self._output is sys.stdout and in_notebook() else TextBar
            self._bar = kind(
                desc=self._phase.name,
                total=self._phase.total,
                file=self._output,
                dynamic_ncols=True,
                mininterval=0,
                miniters=0,
                # Any delay keeps the bar from drawing itself before it has its numbers.
                delay=1e-9,
            )
            self._bar.start_t -= time.monotonic() - self._phase.started
            self._bar.last_print_t = self._bar.start_t
        return self._bar

    def _close(self, *, leave: bool) -> None:
        if self._bar is None or self._drawn is None:
            return
        self._bar.n = self._drawn.batches
        if not leave:
            # In a notebook an incomplete bar would stay, in red; an epoch that was cut short is no error.
            self._bar.total = self._bar.n
        self._bar.leave = leave
        self._bar.close()
        self._bar = self._drawn = None

    def _end(self, logs: Mapping[str, Any]) -> None:
        """Puts the finished line in the bar's place."""
        self._close(leave=False)
        seconds = time.monotonic() - self._phase.started
        count = f"{self._phase.batches} {'batch' if self._phase.batches == 1 else 'batches'}"
        numbers = {key: logs[key] for key in _shown(logs)}
        line = " - ".join(filter(None, (self._phase.name, f"{seconds:.1f}s", count, _text(numbers, " - "))))
        if self._draws:
            print_line(line, self._output)
        elif self._output is not None:
            self._output.write(f"{line}\n")
            self._output.flush()


@dataclass
class _Phase:
    """One pass over batches: the training of an epoch, its validation, an evaluate or a predict."""

    name: str
    total: int | None
    batches: int = 0
    started: float = field(default_factory=time.monotonic)


def _shown(logs: Mapping[str, Any]) -> list[str]:
    """The keys with a place in a line: neither the single batch's loss nor the gradient norm of each parameter."""
    return [key for key in logs if key != "batch_loss" and not is_detail(key)]


def _text(numbers: Mapping[str, Any], separator: str) -> str:
    return separator.join(f"{key}: {_format(as_number(key, number))}" for key, number in numbers.items())


def _format(number: float | None) -> str:
    """Four decimals, or four digits and an exponent where these would say too little or too much."""
    if number is None:
        return "none"
    if number == 0 or 1e-3 <= abs(number) < 1e6 or not math.isfinite(number):
        return f"{number:.4f}"
    return f"{number:.3e}"
