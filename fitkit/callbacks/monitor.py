"""What callbacks share that watch one number of the epoch's logs and judge whether it got better."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from fitkit.callbacks.callback import Callback
from fitkit.errors import check_number, nearest, show
from fitkit.history import as_number
from fitkit.log_keys import direction_of, improves


class MonitorCallback(Callback):
    """The base of callbacks with a monitor: what it is, when it was measured, and what is an improvement.

    Args:
        monitor: a key of the epoch's logs, such as "val_loss".
        mode: "min" when less is better, "max" when more is, "auto" to go by the monitor's name.
        min_delta: an improvement is a change of more than this, in the monitor's own unit; 0 or more.

    Attributes:
        direction: "min" or "max", what mode came to.

    Raises:
        TypeError: monitor is no string or min_delta no number.
        ValueError: monitor is empty, mode unknown or min_delta negative, NaN or infinite.
    """

    adds_to_logs: Sequence[str] | None = ()
    counts_itself: Mapping[str, str] = dict.fromkeys(
        ("epoch", "batch"), "One with a monitor counts epochs itself: see its patience."
    )

    def __init__(self, monitor: str, mode: str = "auto", min_delta: float = 0.0) -> None:
        super().__init__()
        if not isinstance(monitor, str):
            raise TypeError(f'Expected a key of the logs such as "val_loss", received monitor={show(monitor)}.')
        if not monitor:
            raise ValueError('Expected a key of the logs such as "val_loss", received monitor="".')
        self.monitor = monitor
        self.mode = mode
        self.min_delta = check_number("min_delta", min_delta, least=0.0)
        self.direction = direction_of(monitor, mode)

    @property
    def state_key(self) -> str:
        return f"{type(self).__name__}({self.monitor})"

    def is_improvement(self, value: float, best: float | None) -> bool:
        """Whether value is better than best by more than min_delta. NaN never is; any number is better than None."""
        return improves(value, best, self.direction, self.min_delta)

    def check_monitor(self, known: Collection[str], may_be_added: bool) -> None:
        """Refuses a monitor that can never appear; called before the first batch.

        Args:
            known: the keys that the epoch's logs of this run will have.
            may_be_added: whether another callback or an overridden step may log further keys.

        Raises:
            ValueError: the monitor is not known and nothing can add it.
        """
        if self.monitor in known or may_be_added:
            return
        if self.monitor.startswith("val_") and not any(key.startswith("val_") for key in known):
            advice = f" This run has no validation: give it some, or monitor {self.monitor.removeprefix('val_')!r}."
        else:
            advice = nearest(self.monitor, known)
        raise ValueError(
            f"{type(self).__name__}(monitor={self.monitor!r}) watches a key that this run never logs.{advice} "
            f"Known keys: {', '.join(sorted(known))}."
        )

    def measured(self, logs: Mapping[str, Any]) -> float | None:
        """The monitor's value of this epoch, None when it was not measured.

        A monitor with the prefix ``val_`` is measured only in epochs with a validation, any other in every epoch.

        Args:
            logs: the epoch's logs.

        Raises:
            ValueError: the monitor is missing although it could have been measured.
        """
        if self.monitor in logs:
            return as_number(self.monitor, logs[self.monitor])
        if self.monitor.startswith("val_") and not any(key.startswith("val_") for key in logs):
            return None
        raise ValueError(
            f"{type(self).__name__}(monitor={self.monitor!r}) found no such key in the epoch's logs."
            f"{nearest(self.monitor, logs)} Available keys: {', '.join(sorted(logs))}."
        )
