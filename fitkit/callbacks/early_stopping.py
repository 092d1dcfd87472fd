"""Stopping a run whose monitor no longer improves, and bringing its best weights back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, final

from torch import Tensor, nn

from fitkit.callbacks.display import print_line
from fitkit.callbacks.monitor import MonitorCallback
from fitkit.errors import check_flag, check_integer, check_number, show
from fitkit.history import as_number


@final
class EarlyStopping(MonitorCallback):
    """Stops training when a monitored number has stopped improving.

    Only epochs in which the monitor was measured count. An equal value is no improvement, and NaN never is. The
    verdict is judged afresh at each measured epoch and never falls before ``min_nb_epochs`` of ``fit``. Every fit
    starts from a clean state.

    Args:
        monitor: a key of the epoch's logs; "loss" when there is no validation.
        min_delta: an improvement is a change of more than this, in the monitor's own unit.
        patience: measured epochs without improvement after which training stops; 0 acts as 1.
        verbose: whether to print a line when it stops and when weights come back.
        mode: "min" when less is better, "max" when more is, "auto" to go by the monitor's name.
        baseline: a value that must be beaten: while it is not, even improving epochs use up the patience. None: no
            such value.
        restore_best_weights: whether the module gets the weights of the best epoch back when the run ends, however
            it ends: stopped by this callback or not, by an error or Ctrl-C. Without a best epoch nothing changes.
        start_from_epoch: epochs before this 0-based index are not looked at.

    Attributes:
        stopped_epoch: 0-based index of the epoch at whose end it stopped the run, None when it did not.
        best: the best value so far, None before the first one.
        best_epoch: 0-based index of the best value's epoch, None before the first one.
        wait: measured epochs since the last improvement (that beats the baseline, when there is one).

    Raises:
        TypeError: an argument is of a wrong type; True and 2.0 are no counts.
        ValueError: a negative patience, min_delta or start_from_epoch, an unknown mode, a number that is not finite.

    Example:
        >>> from types import SimpleNamespace
        >>> stopping = EarlyStopping("loss", patience=2)
        >>> stopping.set_model(SimpleNamespace(stop_training=False))
        >>> stopping.on_train_begin()
        >>> for epoch, loss in enumerate([10.0, 9.0, 9.5, 9.0]):
        ...     stopping.on_epoch_end(epoch, {"loss": loss})
        >>> stopping.stopped_epoch, stopping.best, stopping.best_epoch
        (3, 9.0, 1)
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        min_delta: float = 0.0,
        patience: int = 3,
        verbose: bool = False,
        mode: str = "auto",
        *,
        baseline: float | None = None,
        restore_best_weights: bool = False,
        start_from_epoch: int = 0,
    ) -> None:
        super().__init__(monitor, mode, min_delta)
        self.patience = check_integer("patience", patience, least=0)
        self.verbose = _check_verbose(verbose)
        self.baseline = None if baseline is None else check_number("baseline", baseline)
        self.restore_best_weights = check_flag("restore_best_weights", restore_best_weights)
        self.start_from_epoch = check_integer("start_from_epoch", start_from_epoch, least=0)
        self._reset()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_best_weights": None}

    def _reset(self) -> None:
        self.stopped_epoch: int | None = None
        self.has_stopped = False
        self.best: float | None = None
        self.best_epoch: int | None = None
        self.wait = 0
        self._best_weights: dict[str, Any] | None = None

    def on_train_begin(self, logs: Mapping[str, float] | None = None) -> None:
        """Forgets the fit before."""
        self._reset()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Judges the epoch."""
        value = self.measured(logs or {})
        if value is None or epoch < self.start_from_epoch:
            return
        self.wait += 1
        if self.is_improvement(value, self.best):
            self.best, self.best_epoch = value, epoch
            if self.restore_best_weights:
                self._best_weights = _copy_weights(self.model.module)
            if self.baseline is None or self.is_improvement(value, self.baseline):
                self.wait = 0
        if self._is_over(epoch):
            self._stop(epoch)

    def _is_over(self, epoch: int) -> bool:
        return self.wait >= max(self.patience, 1) and epoch + 1 >= self.params.get("min_nb_epochs", 1)

    def _stop(self, epoch: int) -> None:
        self.stopped_epoch, self.has_stopped = epoch, True
        self.model.stop_training = True
        if self.verbose:
            goal = self.best if self.baseline is None else self.baseline
            margin = f" by more than {self.min_delta:g}" if self.min_delta else ""
            print_line(
                f"Epoch {epoch + 1} (index {epoch}): early stopping, as {self.monitor} did not improve on "
                f"{'NaN' if goal is None else f'{goal:.5g}'}{margin} in {self.wait} measured epoch"
                f"{'' if self.wait == 1 else 's'}."
            )

    def on_train_end(self, logs: Mapping[str, float] | None = None) -> None:
        """Brings the best weights back."""
        self._restore()

    def on_exception(self, error: BaseException) -> None:
        """Brings the best weights back after an error, too."""
        self._restore()

    def _restore(self) -> None:
        if self._best_weights is None or self.best_epoch is None:
            return
        self.model.module.load_state_dict(self._best_weights)
        self._best_weights = None  # a later run is not to get the weights of this one
        if self.verbose:
            print_line(f"Weights are those of epoch {self.best_epoch + 1} (index {self.best_epoch}), the best one.")

    def state_dict(self) -> dict[str, Any]:
        """The state in the middle of a fit: the best value, its epoch and weights, and how long it has waited.

        Arguments of the constructor are not part of it: on resume, new ones win.
        """
        return {
            "best": self.best,
            "best_epoch": self.best_epoch,
            "wait": self.wait,
            "best_weights": self._best_weights,
            "stopped_epoch": self.stopped_epoch,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state; called after ``on_train_begin``.

        Where it had stopped the run, it judges again: with a larger patience than then, the run goes on.

        Args:
            state: what ``state_dict`` returned.

        Raises:
            ValueError: the best weights are of another module.
        """
        weights = state["best_weights"] if self.restore_best_weights else None
        if weights is not None and _shapes(weights) != _shapes(self.model.module.state_dict()):
            raise ValueError(f"Expected the best weights of this module, received {_shapes(weights)}.")
        self._best_weights = weights
        self.best = as_number("best", state["best"])
        self.best_epoch = state["best_epoch"]
        self.wait = state["wait"]
        stopped = state["stopped_epoch"]
        if stopped is not None and self._is_over(stopped):
            self.stopped_epoch, self.has_stopped = stopped, True
            self.model.stop_training = True


def _check_verbose(verbose: Any) -> bool:
    # Keras's habit is 0 and 1.
    if not isinstance(verbose, int) or verbose not in (0, 1):
        raise TypeError(f"Expected True or False, received verbose={show(verbose)}.")
    return bool(verbose)


def _shapes(weights: Mapping[str, Any]) -> dict[str, Any]:
    return {name: getattr(value, "shape", None) for name, value in weights.items()}


def _copy_weights(module: nn.Module) -> dict[str, Any]:
    """A copy of the module's state on its own device; training goes on without touching it."""
    # A copy of the mapping itself keeps the version numbers that modules leave beside their weights.
    weights: dict[str, Any] = copy.copy(module.state_dict())
    for name, value in weights.items():
        weights[name] = value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
    return weights
