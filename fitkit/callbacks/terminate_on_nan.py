"""Stopping a run whose training loss is NaN or infinite."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, final

from fitkit.callbacks.callback import Callback
from fitkit.callbacks.display import print_line
from fitkit.errors import check_integer
from fitkit.logs import BatchLogs

# Batches between two looks where a look waits for the device.
INTERVAL = 50


@final
class TerminateOnNaN(Callback):
    """Stops training when the training loss is NaN or infinite; ``stop_reason`` of the History is "nonfinite" then.

    On the CPU it looks at each batch, as Keras's does, and the run ends after the first bad one. On an accelerator a
    look waits for all work that the device has queued, so it looks every 50 batches and at the end of the epoch: no
    bad batch goes unseen, and at most 49 further ones are trained on. Either way the epoch that was cut short is
    validated and recorded, and what ``fit(on_nonfinite=...)`` says is not asked. A batch without any target has no
    loss and is not bad. Only the training loss is judged.

    With ``micro_batch_size``, a look at every batch sees the loss of the batch's last part, and those of the others
    at the end of the epoch.

    Args:
        every: batches between two looks; None is 1 on the CPU and 50 on any other device.

    Attributes:
        stopped_epoch: 0-based index of the epoch in which it stopped the run, None when it did not.
        stopped_batch: 0-based index of the first bad batch, None also when only the end of the epoch showed it.

    Raises:
        TypeError: every is no integer.
        ValueError: every is below 1.

    Example:
        >>> from types import SimpleNamespace
        >>> import torch, fitkit
        >>> terminating = TerminateOnNaN()
        >>> terminating.set_model(
        ...     SimpleNamespace(stop_training=False, history=fitkit.History(), device=torch.device("cpu"))
        ... )
        >>> terminating.on_train_begin()
        >>> terminating.on_epoch_begin(0)
        >>> terminating.on_train_batch_end(0, {"batch_loss": 0.5})
        >>> terminating.on_train_batch_end(1, {"batch_loss": float("nan")})
        >>> terminating.model.stop_training, terminating.stopped_batch
        (True, 1)
    """

    adds_to_logs = ()
    stops_on_nonfinite = True

    def __init__(self, every: int | None = None) -> None:
        super().__init__()
        self.every = None if every is None else check_integer("every", every, least=1)
        self._interval = self.every or 1
        self._epoch = 0
        self.stopped_epoch: int | None = None
        self.stopped_batch: int | None = None

    def on_train_begin(self, logs: Mapping[str, float] | None = None) -> None:
        """Forgets the fit before."""
        self.stopped_epoch = self.stopped_batch = None
        self._interval = self.every or (1 if self.model.device.type == "cpu" else INTERVAL)

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Notes the epoch."""
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Looks, when it is time."""
        if (batch + 1) % self._interval == 0 and logs is not None:
            bad = self._first_bad(batch, logs)
            if bad is not None:
                self._stop(self._epoch, bad)

    def _first_bad(self, batch: int, logs: Mapping[str, Any]) -> int | None:
        if not isinstance(logs, BatchLogs):
            return None if math.isfinite(logs.get("batch_loss", logs.get("loss", 0.0))) else batch
        # The one loss is cheaper to read than the index of the first bad one; where it is finite, it is enough.
        if self._interval == 1:
            loss = logs.get("batch_loss")
            if loss is None or math.isfinite(loss):
                return None
        return logs.first_nonfinite()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Notes what no look at a batch has shown."""
        if self.stopped_epoch is None and not math.isfinite((logs or {}).get("loss", 0.0)):
            self._stop(epoch, None)

    def _stop(self, epoch: int, batch: int | None) -> None:
        self.stopped_epoch, self.stopped_batch = epoch, batch
        self.model.stop_training = True
        self.model.history.stop_reason = "nonfinite"
        if self.params.get("verbose", 0):
            where = "its loss" if batch is None else f"the loss of batch {batch + 1} (index {batch})"
            print_line(f"Epoch {epoch + 1} (index {epoch}): training stops, as {where} is not finite.")
