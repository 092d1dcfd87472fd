"""Whether inputs are those that the module was trained on, as far as names and dimensions tell.

A frame with its columns in another order has the right shape and gives the wrong answer; a sample without its batch
dimension may be taken for several samples. Both are refused here. Data that comes in batches is not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fitkit.errors import show


@dataclass(frozen=True)
class Input:
    """One array of x.

    Attributes:
        argument: how messages name it.
        place: where it is in x: empty for x itself, "['age']" for an entry of a dict.
        shape: of the whole array, samples first.
        columns: of a frame, their names where these are words.
    """

    argument: str
    place: str
    shape: tuple[int, ...]
    columns: tuple[str, ...]


def columns_of(inputs: Sequence[Input]) -> dict[str, tuple[str, ...]]:
    """The names of the columns by place."""
    return {each.place: each.columns for each in inputs if each.columns}


def check_columns(inputs: Sequence[Input], trained: Mapping[str, tuple[str, ...]]) -> None:
    """Refuses frames whose columns are not those of the training in its order."""
    for each in inputs:
        before = trained.get(each.place)
        if before is None or not each.columns or each.columns == before:
            continue
        missing = [name for name in before if name not in each.columns]
        unknown = [name for name in each.columns if name not in before]
        differences = {"missing": missing, "not in the training data": unknown}
        listed = "; ".join(f"{word}: {', '.join(names[:10])}" for word, names in differences.items() if names)
        raise ValueError(
            f"Expected {each.argument} with the columns of the training data in their order, received "
            f"{listed or 'them in another order'}. Select them by name, or pass .to_numpy() if only positions count."
        )


def check_is_batch(inputs: Sequence[Input], trained: Mapping[str, Any]) -> None:
    """Refuses one sample in the place of a batch.

    Args:
        inputs: what came.
        trained: a tensor of the shape of a batch of the training, by place.
    """
    for each in inputs:
        before = trained.get(each.place)
        if before is not None and len(each.shape) > 0 and each.shape == tuple(before.shape[1:]):
            raise ValueError(
                f"Expected {each.argument} with samples along the first dimension, as in the training, received one "
                f"sample of shape {each.shape}. Make it a batch of one: x[None], or .iloc[[0]] of a frame."
            )


def check_same_rows(x: Any, y: Any) -> None:
    """Refuses a pandas x and y whose index says that one of them is in another order; rows go together by position."""
    one, other = getattr(x, "index", None), getattr(y, "index", None)
    if one is None or other is None or len(one) != len(other) or one.equals(other):
        return
    if one.is_unique and other.is_unique and bool(one.isin(other).all()):
        raise ValueError(
            f"Expected x and y with their rows in the same order, received y={show(y)} with the index of x in another "
            "order. Rows go together by position: pass y.loc[x.index], or y.to_numpy() if they do."
        )
