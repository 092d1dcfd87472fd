"""What the key of a logged number tells: whether less or more of it is better, whether any is the best, who wants it.

For all who compare the numbers of epochs: History, its plots, callbacks with a monitor.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal

from fitkit.errors import check_choice

Direction = Literal["min", "max"]

# Words in a metric's name that say that more of it is better ...
_MORE = set(
    re.findall(
        r"\w+",
        """acc accuracy auc auroc bleu corr corrcoef correlation dice explained f1 fbeta iou jaccard kappa map matthews
        mcc mrr ndcg pearson precision psnr r2 recall rouge score sensitivity similarity spearman specificity ssim""",
    )
)
# ... and those that say less is better whatever else is there: an accuracy's loss, a Brier score.
_LESS = {"brier", "distance", "divergence", "err", "error", "loss"}


def direction_of(monitor: str, mode: str = "auto") -> Direction:
    """Whether less or more of a number is better.

    Args:
        monitor: the number's key, with or without ``val_``.
        mode: "min" or "max" say it; "auto" goes by the words in the key: "accuracy", "f1", "auroc", "r2", "iou",
            "correlation", "score" and their like mean "max", anything else "min".

    Raises:
        ValueError: mode is unknown.

    Example:
        >>> direction_of("val_accuracy"), direction_of("val_loss"), direction_of("BinaryF1Score")
        ('max', 'min', 'max')
    """
    check_choice("mode", mode, ("auto", "min", "max"))
    if mode != "auto":
        return "min" if mode == "min" else "max"
    spread = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", monitor)
    words = set(re.findall(r"[a-z0-9]+", f"{monitor} {spread}".lower()))
    words |= {word.rstrip("0123456789") for word in words}
    return "max" if words & _MORE and not words & _LESS else "min"


def is_detail(key: str) -> bool:
    """Whether the key is the gradient norm of one parameter: there may be hundreds, and only their total is shown."""
    return re.fullmatch(r"grad_[^_]+_norm_(?!total$).+", key) is not None


def has_no_best(name: str) -> bool:
    """Whether it is a learning rate or a gradient norm, of which none is the best."""
    return name == "learning_rate" or name.startswith("grad_")


def improves(value: float, best: float | None, direction: Direction, min_delta: float = 0.0) -> bool:
    """Whether value is better than best by more than min_delta. NaN never is; any number is better than None."""
    if math.isnan(value):
        return False
    if best is None:
        return True
    return value + min_delta < best if direction == "min" else value - min_delta > best


def best_index(column: Sequence[float | None], direction: Direction) -> int | None:
    """Where the best number is, the first one of equals; None where there is no number."""
    best: float | None = None
    found = None
    for index, value in enumerate(column):
        if value is not None and improves(value, best, direction):
            best, found = value, index
    return found
