"""The callbacks of one fit: which there are, and whether they go together.

What each callback checks of itself is in its own file; here is what only all of them together tell.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import Any

from fitkit.callbacks import Callback, EarlyStopping, ModelCheckpoint, SwapEMAWeights
from fitkit.callbacks.hooks import check_callbacks, implemented_hooks
from fitkit.callbacks.monitor import MonitorCallback
from fitkit.errors import show
from fitkit.flags import TrainingFlags


def callbacks_of_fit(
    callbacks: Any, early_stop_callback: Any, flags: TrainingFlags, *, validates: bool
) -> list[Callback]:
    """The user's callbacks, and the early stopping that the arguments of fit ask for.

    Raises:
        TypeError: something among them is no callback, or early_stop_callback no EarlyStopping.
        ValueError: two of them do not go together.
    """
    chosen = check_callbacks(callbacks)
    if early_stop_callback is not None:
        if not isinstance(early_stop_callback, EarlyStopping):
            raise TypeError(f"Expected an EarlyStopping, received early_stop_callback={show(early_stop_callback)}.")
        if early_stop_callback not in chosen:
            chosen.append(early_stop_callback)
    elif flags.default_stop:
        chosen.append(EarlyStopping("val_loss" if validates else "loss", patience=3, mode="min"))
    if not flags.enable_early_stop:
        chosen = [callback for callback in chosen if not isinstance(callback, EarlyStopping)]
    _check_kept_weights(chosen)
    _check_last_files(chosen)
    return chosen


def check_monitors(callbacks: Sequence[Callback], known: Collection[str], *, own_steps: bool) -> None:
    """Refuses a monitor that the logs of the run can never have.

    Args:
        callbacks: of the run, in their order.
        known: the keys that the run logs by itself.
        own_steps: whether there are steps of the user's, which may log further ones.
    """
    known = list(known)
    adding = [callback for callback in callbacks if callback.adds_to_logs is None]
    may_be_added = own_steps or any(
        {"on_epoch_end", "on_test_end"} & set(implemented_hooks(callback)) for callback in adding
    )
    for callback in callbacks:
        if isinstance(callback, MonitorCallback):
            callback.check_monitor(known, may_be_added)
        # What one adds, those after it can watch.
        known += callback.adds_to_logs or ()


def _check_kept_weights(callbacks: Sequence[Callback]) -> None:
    """Refuses to keep the weights that are trained for the numbers of their average, which is what was validated."""
    averaging = [each for each in (*callbacks, *_called(callbacks)) if isinstance(each, SwapEMAWeights)]
    for index, callback in enumerate(callbacks if averaging else ()):
        before = [each for each in callbacks[:index] if isinstance(each, SwapEMAWeights)]
        keeping = _keeping_for_validation(callback)
        if keeping and not any(each.swap_on_epoch for each in before):
            raise ValueError(
                f"{keeping} weights that were never validated: the validation is that of the average which "
                "SwapEMAWeights keeps. Let it have that: callbacks=[SwapEMAWeights(swap_on_epoch=True), "
                f"{type(callback).__name__}(...)], in this order."
            )


def _keeping_for_validation(callback: Callback) -> str | None:
    """Of a callback that keeps an epoch's weights for a number of its validation, the beginning of what it would do."""
    if isinstance(callback, EarlyStopping) and callback.restore_best_weights and callback.monitor.startswith("val_"):
        return f"EarlyStopping(monitor={callback.monitor!r}, restore_best_weights=True) would restore"
    if isinstance(callback, ModelCheckpoint) and callback.validation_key is not None:
        return f"ModelCheckpoint({callback.filepath!r}), which goes by {callback.validation_key!r}, would save"
    return None


def _called(callbacks: Sequence[Callback]) -> list[Callback]:
    return [called for callback in callbacks for called in callback.calls]


def _check_last_files(callbacks: Sequence[Callback]) -> None:
    """Refuses two callbacks that write the same file after every epoch, each over the other's."""
    paths = [
        os.path.abspath(each.last_path) for each in callbacks if isinstance(each, ModelCheckpoint) and each.last_path
    ]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(
                f"Two ModelCheckpoint(save_last=True) would write the same file {path!r}. Give one of them a folder of "
                "its own, or leave out its save_last."
            )
