"""Lowering the learning rate when a monitored number has stopped improving."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

from fitkit.callbacks.display import print_line
from fitkit.callbacks.monitor import MonitorCallback
from fitkit.callbacks.optimizer import LEARNING_RATE, log_learning_rate, optimizer_of
from fitkit.errors import check_choice, check_integer, check_number
from fitkit.history import as_number
from fitkit.optimization import learning_rates, set_learning_rates


@final
class ReduceLROnPlateau(MonitorCallback):
    """Multiplies the learning rate by a factor when a monitored number has stopped improving, as Keras's does.

    Only epochs in which the monitor was measured count. Every parameter group's rate is lowered. The rate that an
    epoch used is in its logs as "learning_rate"; with several parameter groups that is the first one's.

    Args:
        monitor: a key of the epoch's logs; "loss" when there is no validation.
        factor: what the rate is multiplied by; above 0 and below 1.
        patience: measured epochs without improvement after which the rate is lowered; 0 acts as 1.
        verbose: 1 prints a line when the rate is lowered.
        mode: "min" when less is better, "max" when more is, "auto" to go by the monitor's name.
        min_delta: an improvement is a change of more than this, in the monitor's own unit.
        cooldown: measured epochs after a lowering in which nothing is counted, the last of which counts again.
        min_lr: no rate is lowered below this.

    Attributes:
        best: the best value so far, None before the first one.
        wait: measured epochs since the last improvement or lowering.
        cooldown_counter: epochs of the cooldown that are left.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: an argument is out of range.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        >>> reducing = ReduceLROnPlateau("loss", factor=0.5, patience=2)
        >>> reducing.set_model(SimpleNamespace(optimizer=optimizer))
        >>> reducing.on_train_begin()
        >>> for epoch, loss in enumerate([1.0, 2.0, 2.0]):
        ...     reducing.on_epoch_end(epoch, {"loss": loss})
        >>> optimizer.param_groups[0]["lr"]
        0.05
    """

    adds_to_logs = (LEARNING_RATE,)

    def __init__(
        self,
        monitor: str = "val_loss",
        factor: float = 0.1,
        patience: int = 10,
        verbose: int = 0,
        mode: str = "auto",
        min_delta: float = 1e-4,
        cooldown: int = 0,
        min_lr: float = 0.0,
    ) -> None:
        super().__init__(monitor, mode, min_delta)
        self.factor = check_number("factor", factor, least=0.0, most=1.0)
        if self.factor in (0.0, 1.0):
            raise ValueError(f"Expected a number above 0 and below 1, received factor={factor!r}.")
        self.patience = check_integer("patience", patience, least=0)
        check_choice("verbose", int(verbose) if isinstance(verbose, bool) else verbose, (0, 1))
        self.verbose = bool(verbose)
        self.cooldown = check_integer("cooldown", cooldown, least=0)
        self.min_lr = check_number("min_lr", min_lr, least=0.0)
        self._reset()

    def _reset(self) -> None:
        self.best: float | None = None
        self.wait = 0
        self.cooldown_counter = 0

    def on_train_begin(self, logs: Mapping[str, float] | None = None) -> None:
        """Forgets the fit before."""
        optimizer_of(self)
        self._reset()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Judges the epoch."""
        log_learning_rate(self, logs)
        value = self.measured(logs or {})
        if value is None:
            return
        if self.cooldown_counter > 0:
            self.cooldown_counter -= 1
            self.wait = 0
        if self.is_improvement(value, self.best):
            self.best = value
            self.wait = 0
        elif self.cooldown_counter == 0:
            self.wait += 1
            if self.wait >= self.patience:
                self._reduce(epoch)

    def _reduce(self, epoch: int) -> None:
        optimizer = optimizer_of(self)
        before = learning_rates(optimizer)
        if all(rate <= self.min_lr for rate in before):
            return
        # A group that is below the limit already stays as it is.
        after = [min(rate, max(rate * self.factor, self.min_lr)) for rate in before]
        set_learning_rates(optimizer, after)
        self.cooldown_counter = self.cooldown
        self.wait = 0
        if self.verbose:
            print_line(f"Epoch {epoch + 1} (index {epoch}): the learning rate goes from {before[0]:g} to {after[0]:g}.")

    def state_dict(self) -> dict[str, Any]:
        """The state in the middle of a fit; the rate itself is in the optimizer's."""
        return {"best": self.best, "wait": self.wait, "cooldown_counter": self.cooldown_counter}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state; called after ``on_train_begin``.

        Args:
            state: what ``state_dict`` returned.
        """
        self.best = as_number("best", state["best"])
        self.wait = state["wait"]
        self.cooldown_counter = state["cooldown_counter"]
