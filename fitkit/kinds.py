"""Whether what a file holds is of the kinds that are meant there: a dict for a dict, a number for a number.

A checksum tells that a file is as it was written, not that it was fitkit that wrote it so. Values are judged by those
who use them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fitkit.errors import show


def check_kinds(found: Any, like: Any, where: str) -> None:
    """Refuses what is of another kind than its like, at any depth.

    Where the like is None anything may be found; a number goes with a tensor of one number. What only one of the two
    has is not looked at.

    Args:
        found: what the file holds.
        like: what an object has there now.
        where: for the message.

    Raises:
        ValueError: the kinds differ.
    """
    if like is None:
        return
    if _kind(found) != _kind(like):
        raise ValueError(f"Expected {_kind(like)} as {where}, received {show(found)}.")
    if isinstance(like, Mapping):
        for key in like:
            if key in found:
                check_kinds(found[key], like[key], f"{where}[{key!r}]")
    elif isinstance(like, (list, tuple)):
        for index, (item, other) in enumerate(zip(found, like, strict=False)):
            check_kinds(item, other, f"{where}[{index}]")


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return "a dict"
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1):
        return "a number"
    return "a tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"
