"""Lengths of time as users write them: seconds, "10min", "1h 30min", "00:10:00", a timedelta."""

from __future__ import annotations

import datetime
import re
from typing import Any

from fitkit.errors import check_number, show

SECONDS = {"s": 1.0, "sec": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
UNITS = re.compile(r"(?:\d+(?:\.\d+)?\s*(?:sec|s|min|h|d)\s*)+")
CLOCK = re.compile(r"(?:(?P<days>\d+):)?(?P<hours>\d+):(?P<minutes>[0-5]\d):(?P<seconds>[0-5]\d(?:\.\d+)?)")


def seconds_of(argument: str, value: Any) -> float:
    """The seconds in a length of time.

    Args:
        argument: how messages name it.
        value: seconds as a number; "hours:minutes:seconds", with days in front ("1:00:00:00"); numbers with the units
            s, sec, min, h, d; or a datetime.timedelta.

    Raises:
        ValueError: the text is no length of time, or it is not above 0.
        TypeError: it is neither text, number nor timedelta.

    Example:
        >>> seconds_of("duration", "10min"), seconds_of("duration", "01:30:00"), seconds_of("duration", "1h 30min")
        (600.0, 5400.0, 5400.0)
    """
    if isinstance(value, datetime.timedelta):
        seconds = value.total_seconds()
    else:
        seconds = _seconds_in(value.strip()) if isinstance(value, str) else check_number(argument, value)
    if seconds <= 0:
        raise ValueError(
            'Expected a length of time such as "10min", "1h 30min", "00:10:00", seconds or a timedelta (units: '
            f"{', '.join(SECONDS)}), above 0; received {argument}={show(value)}."
        )
    return seconds


def _seconds_in(text: str) -> float:
    """The seconds that a text says; 0 where it says none."""
    if clock := CLOCK.fullmatch(text):
        days, hours, minutes, rest = (float(part or 0) for part in clock.groups())
        return 86400 * days + 3600 * hours + 60 * minutes + rest
    if UNITS.fullmatch(text):
        return sum(float(number) * SECONDS[unit] for number, unit in re.findall(r"(\d+(?:\.\d+)?)\s*([a-z]+)", text))
    return 0.0
