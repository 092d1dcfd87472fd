"""Lengths of time as users write them: seconds, "10min", "00:10:00", a timedelta."""

from __future__ import annotations

import datetime
import re
from typing import Any

from fitkit.errors import check_number, show

UNITS = {"s": 1.0, "sec": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


def seconds_of(argument: str, value: Any) -> float:
    """The seconds in a length of time.

    Args:
        argument: how messages name it.
        value: seconds as a number; a number with one of the units s, sec, min, h, d; "hours:minutes:seconds"; or a
            datetime.timedelta.

    Raises:
        ValueError: the text is no length of time, or it is not above 0.
        TypeError: it is neither text, number nor timedelta.

    Example:
        >>> seconds_of("duration", "10min"), seconds_of("duration", "01:30:00")
        (600.0, 5400.0)
    """
    if isinstance(value, datetime.timedelta):
        seconds = value.total_seconds()
    elif isinstance(value, str):
        seconds = _seconds_in(argument, value)
    else:
        seconds = check_number(argument, value)
    if seconds <= 0:
        raise ValueError(f"Expected a length of time above 0, received {argument}={show(value)}.")
    return seconds


def _seconds_in(argument: str, text: str) -> float:
    unit = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text)
    if unit is not None and unit[2] in UNITS:
        return float(unit[1]) * UNITS[unit[2]]
    clock = re.fullmatch(r"\s*(\d+):(\d\d):(\d\d)\s*", text)
    if clock is not None:
        return 3600.0 * int(clock[1]) + 60.0 * int(clock[2]) + int(clock[3])
    raise ValueError(
        f'Expected a length of time such as "10min", "1.5h" or "00:10:00" (units: {", ".join(UNITS)}), received '
        f"{argument}={text!r}."
    )
