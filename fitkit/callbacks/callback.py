"""The base of all callbacks: the hooks, their order and their arguments.

The order of the hooks in a fit (`loop.py` is what calls them)::

    on_train_begin
    for each epoch:
        on_epoch_begin
        for each batch:
            on_train_batch_begin, on_train_batch_end
        when there is a validation:
            on_test_begin; on_test_batch_begin and on_test_batch_end for each batch; on_test_end
        on_epoch_end
    on_train_end, or on_exception when an error ended the run

`evaluate` calls the test hooks alone, `predict` the predict hooks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fitkit._types import ModelProtocol

if TYPE_CHECKING:
    from typing_extensions import Self


class Callback:
    """Subclass it and write the hooks you need; a hook that nobody writes is never called.

    All indices count from 0. The logs of a batch are lazy: a mapping that reads the device only for the key that is
    read. The logs of an epoch are plain floats in one dict, which all callbacks share: what one adds, those after
    it and History see.

    A callback whose state outlives a run also has ``state_dict()`` and ``load_state_dict(state)``. The latter is
    called after ``on_train_begin`` of a run that is resumed.

    Attributes:
        adds_to_logs: the keys that it adds to the logs of every epoch; a monitor of a later callback may be one of
            them. None, the default: whatever it likes, so that a monitor is judged only when it is missing.
        stops_on_nonfinite: whether a run with this callback is stopped when the training loss of an epoch is not
            finite, whatever ``on_nonfinite`` says.
        counts_itself: the units, "epoch" or "batch", in which `Every` must not call it less often since it counts them
            itself, each with what to do instead.
        calls: the callbacks whose hooks it calls; none of them may be in the list as well.
        only_on_rank_0: whether, where several processes share a run, its hooks are called in rank 0 alone, as for what
            writes files or shows something. Its hooks may then neither evaluate, predict or save, which all processes
            do together, nor stop the run.
        is_last_after_batches: whether ``on_train_batch_end`` and ``on_test_batch_end`` are called after those of all
            other callbacks, wherever it stands among them: for one that saves the run there.
        model: the Model that runs; set before the first hook.
        params: facts about the run; set before the first hook, empty until then. In a fit: "epochs" (the index
            before which training ends), "initial_epoch", "steps" and "validation_steps" (batches an epoch, None
            when unknown), "min_nb_epochs", "verbose" (0, 1 or 2). In evaluate and predict: "steps", "verbose".
        has_stopped: whether it ended the latest run by a verdict of its own, which it gives anew when the run goes on
            from a file.

    Example:
        >>> class PrintLoss(Callback):
        ...     def on_epoch_end(self, epoch, logs=None):
        ...         print(f"{epoch}: {logs['loss']}")
        >>> PrintLoss().on_epoch_end(0, {"loss": 0.5})
        0: 0.5
    """

    adds_to_logs: Sequence[str] | None = None
    stops_on_nonfinite: bool = False
    counts_itself: Mapping[str, str] = {}
    calls: Sequence[Callback] = ()
    only_on_rank_0: bool = False
    is_last_after_batches: bool = False

    model: ModelProtocol
    params: dict[str, Any]
    has_stopped: bool = False

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        """A callback that works without a call of ``super().__init__()``, which is easily forgotten."""
        callback = super().__new__(cls)
        callback.params = {}
        return callback

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle or a copy has: the settings and what the latest run left, but not its Model."""
        return {name: value for name, value in vars(self).items() if name != "model"} | {"params": {}}

    @property
    def state_key(self) -> str:
        """Under which the state is kept in a file; found again when callbacks are added, left out or reordered."""
        return type(self).__name__

    def set_model(self, model: ModelProtocol) -> None:
        """Called with the Model before a run's first hook."""
        self.model = model

    def set_params(self, params: dict[str, Any]) -> None:
        """Called with the facts about the run before its first hook."""
        self.params = params

    def on_train_begin(self, logs: Mapping[str, float] | None = None) -> None:
        """Called once before the first epoch of a fit."""

    def on_train_end(self, logs: Mapping[str, float] | None = None) -> None:
        """Called once after the last epoch of a fit that no error ended, with the last epoch's logs."""

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Called before the first batch of an epoch."""

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Called after an epoch's last batch and its validation; logs has its numbers, validation's as ``val_``."""

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Called before a batch is trained on."""

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Called after a batch; lazy logs: "loss" and metrics so far in the epoch, "batch_loss" of this batch."""

    def on_test_begin(self, logs: Mapping[str, float] | None = None) -> None:
        """Called before the first batch of a validation or an evaluate."""

    def on_test_end(self, logs: Mapping[str, float] | None = None) -> None:
        """Called after a validation or an evaluate with its numbers, without the prefix ``val_``."""

    def on_test_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Called before a batch is evaluated."""

    def on_test_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Called after a batch is evaluated; lazy logs, without the prefix ``val_``."""

    def on_predict_begin(self, logs: Mapping[str, float] | None = None) -> None:
        """Called before the first batch of a predict."""

    def on_predict_end(self, logs: Mapping[str, float] | None = None) -> None:
        """Called after the last batch of a predict."""

    def on_predict_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Called before a batch is predicted."""

    def on_predict_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Called after a batch is predicted; logs["outputs"] is what the module returned."""

    def on_exception(self, error: BaseException) -> None:
        """Called instead of the run's end hook when an error, Ctrl-C among them, ends it; then the error is raised."""
