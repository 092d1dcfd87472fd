"""Another callback's hooks, every so many epochs or batches only."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, final

from fitkit._types import ModelProtocol
from fitkit.callbacks.callback import Callback
from fitkit.callbacks.hooks import implemented_hooks
from fitkit.errors import check_choice, check_integer, show

# Ends only: what a callback did at an end, it may have to undo at the very next beginning.
_FILTERED = {
    "epoch": ("on_epoch_end",),
    "batch": ("on_train_batch_end", "on_test_batch_end", "on_predict_batch_end"),
}


@final
class Every(Callback):
    """Calls another callback at the end of every n-th epoch only, or at the end of every n-th batch only.

    ``Every(10, callback)`` calls ``on_epoch_end`` in the 10th, 20th, ... epoch (0-based indices 9, 19, ...), and with
    ``unit="batch"`` the ends of batches in the same way, counted in each epoch; every other hook, the beginnings too,
    is called as always.

    Args:
        n: how many.
        callback: whose hooks; none that counts epochs or batches by itself, such as those with a monitor.
        unit: "epoch" or "batch".

    Raises:
        TypeError: n is no integer, callback no Callback, or one that counts by itself.
        ValueError: n is below 1, or unit unknown.

    Example:
        >>> from fitkit.callbacks import LambdaCallback
        >>> every = Every(2, LambdaCallback(on_epoch_end=lambda epoch, logs: print(epoch)))
        >>> for epoch in range(4):
        ...     every.on_epoch_end(epoch, {})
        1
        3
    """

    counts_itself: Mapping[str, str] = dict.fromkeys(
        _FILTERED, "Write Every(6, callback) for Every(2, Every(3, callback))."
    )

    def __init__(self, n: int, callback: Callback, unit: str = "epoch") -> None:
        super().__init__()
        self.n = check_integer("n", n, least=1)
        check_choice("unit", unit, tuple(_FILTERED))
        if not isinstance(callback, Callback):
            raise TypeError(f"Expected a Callback to call less often, received callback={show(callback)}.")
        if unit in callback.counts_itself:
            raise TypeError(
                f"Expected a callback that does not count by itself, received callback={show(callback)} with "
                f"unit={unit!r}. {callback.counts_itself[unit]}"
            )
        self.callback = callback
        self.calls = (callback,)
        self.only_on_rank_0 = callback.only_on_rank_0
        self.unit = unit
        # Keys that are added in some epochs only are none that a monitor can rely on.
        self.adds_to_logs = None
        self.stops_on_nonfinite = callback.stops_on_nonfinite
        # What it does not have is not called, and not asked for.
        for name in implemented_hooks(callback):
            hook = getattr(callback, name)
            setattr(self, name, partial(_call_every, self.n, hook) if name in _FILTERED[unit] else hook)
        for name in ("state_dict", "load_state_dict"):
            if hasattr(callback, name):
                setattr(self, name, getattr(callback, name))

    def set_model(self, model: ModelProtocol) -> None:
        """Introduces both to the model."""
        super().set_model(model)
        self.callback.set_model(model)

    def set_params(self, params: dict[str, Any]) -> None:
        """Tells both the facts about the run."""
        super().set_params(params)
        self.callback.set_params(params)


def _call_every(n: int, hook: Any, index: int, logs: Mapping[str, Any] | None = None) -> None:
    if (index + 1) % n == 0:
        hook(index, logs)
