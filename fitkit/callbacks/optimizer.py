"""What callbacks share that follow the model's optimizer: its steps, as they are made, and its learning rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

from torch.optim import Optimizer

from fitkit.callbacks.callback import Callback
from fitkit.optimization import learning_rates

LEARNING_RATE = "learning_rate"


def optimizer_of(callback: Callback) -> Optimizer:
    """The optimizer of the callback's model.

    Raises:
        ValueError: there is none, as every parameter is frozen.
    """
    optimizer = callback.model.optimizer
    if optimizer is None:
        raise ValueError(
            f"{type(callback).__name__} needs an optimizer, received a model that has none: every parameter is frozen."
        )
    return optimizer


def log_learning_rate(callback: Callback, logs: dict[str, Any] | None, rate: float | None = None) -> None:
    """Adds the learning rate that an epoch used to its logs, unless another callback was first.

    Args:
        callback: who is about to change the rate for the next epoch.
        logs: of the epoch.
        rate: None is the present one of the optimizer's first parameter group.
    """
    if logs is not None and LEARNING_RATE not in logs:
        logs[LEARNING_RATE] = learning_rates(optimizer_of(callback))[0] if rate is None else rate


@final
class StepListener:
    """Calls a function after each step that the optimizer made, until it is removed.

    Steps, not batches: a window of several batches is one step, and one that a GradScaler skips is none. A fused
    optimizer skips on the device by itself; with precision="16-mixed" each of its steps asks whether it did.

    Args:
        optimizer: whose steps.
        function: what to call.
    """

    def __init__(self, optimizer: Optimizer, function: Callable[[], object]) -> None:
        self._function = function
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, optimizer: Optimizer, arguments: Any, keywords: Any) -> None:
        skipped = getattr(optimizer, "found_inf", None)
        if skipped is None or not bool(skipped):
            self._function()

    def remove(self) -> None:
        """Leaves nothing on the optimizer."""
        self._handle.remove()
