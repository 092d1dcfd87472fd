"""The numbers of each epoch in a run of Weights & Biases."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, final

from fitkit.callbacks.callback import Callback
from fitkit.callbacks.extras import import_extra, measured_numbers


@final
class WandbLogger(Callback):
    """Logs each epoch's numbers to Weights & Biases, with the 0-based "epoch" and the learning rate among them.

    It logs to the run that is active (``wandb.run``) when the first epoch begins and leaves that open. Without one it
    starts a run and finishes it, after an error with exit code 1. Offline is ``WandbLogger(mode="offline")`` or the
    environment variable WANDB_MODE. A resumed fit goes on in the run that it began.

    Args:
        options: what ``wandb.init`` takes, such as project, name, config and mode.

    Attributes:
        run_id: of the latest run, None before the first epoch.

    Raises:
        ImportError: wandb is not installed.
        TypeError: wandb.init takes no such option.
    """

    adds_to_logs = ()
    only_on_rank_0 = True

    def __init__(self, **options: Any) -> None:
        super().__init__()
        wandb = import_extra("wandb", "wandb", "WandbLogger")
        known = inspect.signature(wandb.init).parameters
        for name in options:
            if name not in known:
                raise TypeError(f"WandbLogger got {name}=..., which wandb.init does not take: {', '.join(known)}.")
        self.options = options
        self.run_id: str | None = None
        self._run: Any = None
        self._is_own = False

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_run": None}

    def on_train_begin(self, logs: Mapping[str, float] | None = None) -> None:
        """Forgets the fit before."""
        self.run_id = None

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Opens the run before the first epoch."""
        if self._run is not None:
            return
        wandb = import_extra("wandb", "wandb", "WandbLogger")
        self._is_own = wandb.run is None
        # A resumed fit knows the run that it began.
        resumed = {} if self.run_id is None else {"id": self.run_id, "resume": "allow"}
        self._run = wandb.init(**{**self.options, **resumed}) if self._is_own else wandb.run
        self.run_id = self._run.id

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Logs the epoch."""
        # Not as W&B's own step: that may only grow, and the user's own logging counts it up.
        self._run.log({"epoch": epoch, **measured_numbers(self, logs)})

    def on_train_end(self, logs: Mapping[str, float] | None = None) -> None:
        """Finishes the run that it started."""
        self._finish(0)

    def on_exception(self, error: BaseException) -> None:
        """Finishes the run that it started as one that failed."""
        self._finish(1)

    def _finish(self, exit_code: int) -> None:
        run, self._run = self._run, None
        if run is not None and self._is_own:
            run.finish(exit_code=exit_code)

    def state_dict(self) -> dict[str, Any]:
        """Which run it is."""
        return {"run_id": self.run_id}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on in that run; called after ``on_train_begin``.

        Args:
            state: what ``state_dict`` returned.
        """
        self.run_id = state["run_id"]
