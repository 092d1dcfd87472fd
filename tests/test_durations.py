"""Lengths of time as users write them."""

from __future__ import annotations

import datetime
import math
from typing import Any

import pytest

from fitkit.durations import seconds_of


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (2, 2.0),
        (0.5, 0.5),
        ("90s", 90.0),
        ("1.5 h", 5400.0),
        (" 10min ", 600.0),
        ("2d", 172800.0),
        ("00:10:05", 605.0),
        ("100:00:00", 360000.0),
        (datetime.timedelta(minutes=3), 180.0),
    ],
)
def test_a_length_of_time_is_read(value: Any, seconds: float) -> None:
    assert seconds_of("duration", value) == seconds


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "0s", "10", "10 parsecs", "1:2:3", "", "-5min"])
def test_what_is_none_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="received duration="):
        seconds_of("duration", value)


@pytest.mark.parametrize("value", [None, True, [1]])
def test_what_is_of_another_type_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="received duration="):
        seconds_of("duration", value)
