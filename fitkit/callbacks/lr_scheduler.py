"""torch's learning rate schedulers, advanced by epochs or by optimizer steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

from torch import Tensor
from torch.optim import Optimizer, lr_scheduler

from fitkit.callbacks.monitor import MonitorCallback
from fitkit.callbacks.optimizer import LEARNING_RATE, StepListener, log_learning_rate, optimizer_of
from fitkit.errors import check_choice, show

Scheduler = lr_scheduler.LRScheduler


@final
class LRScheduler(MonitorCallback):
    """Advances a torch scheduler at the end of each epoch, or after each optimizer step.

    With ``accumulate_grad_batches`` a step is one window of batches, as the optimizer counts. The rate that an epoch
    used, with interval="step" that of its last step, is in its logs as "learning_rate"; with several parameter groups
    that is the first one's.

    Args:
        scheduler: a callable that makes a torch scheduler from the optimizer, anew for each fit and from the rates
            that the optimizer has then; or a scheduler over the optimizer that ``compile`` was given, which goes on
            where it is at each further fit.
        interval: "epoch" or "step".
        monitor: the key of the epoch's logs that torch's ReduceLROnPlateau is given, in epochs in which it was
            measured; None for every other scheduler.

    Attributes:
        has_monitor: whether the scheduler is given a number.

    Raises:
        TypeError: scheduler is neither a torch scheduler nor a callable, or the callable makes none.
        ValueError: interval is unknown; a ReduceLROnPlateau comes without a monitor or with interval="step", another
            scheduler with a monitor; the scheduler is of another optimizer; or a schedule as long as
            all batches is advanced by epochs.

    Example:
        >>> import torch, fitkit
        >>> model = fitkit.Model(torch.nn.Linear(1, 1), device="cpu")
        >>> model.compile("sgd", "mse", learning_rate=0.1)
        >>> halving = LRScheduler(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5))
        >>> history = model.fit(torch.ones(4, 1), torch.ones(4, 1), epochs=3, callbacks=[halving], verbose=0)
        >>> history["learning_rate"]
        [0.1, 0.05, 0.025]
    """

    adds_to_logs = (LEARNING_RATE,)
    counts_itself: Mapping[str, str] = dict.fromkeys(
        ("epoch", "batch"), "Its scheduler counts itself: give that a longer period, such as StepLR(optimizer, 10)."
    )

    def __init__(
        self,
        scheduler: Scheduler | Callable[[Optimizer], Scheduler],
        *,
        interval: str = "epoch",
        monitor: str | None = None,
    ) -> None:
        # Without a monitor it watches what every run has, and does not look.
        super().__init__("loss" if monitor is None else monitor)
        check_choice("interval", interval, ("epoch", "step"))
        self.interval = interval
        self.has_monitor = monitor is not None
        if not isinstance(scheduler, Scheduler) and not callable(scheduler):
            raise TypeError(
                "Expected a scheduler of torch.optim.lr_scheduler or a callable that makes one from the optimizer, "
                f"received scheduler={show(scheduler)}."
            )
        self.scheduler = scheduler
        if isinstance(scheduler, Scheduler):
            self._check_kind(scheduler)
        self._running: Scheduler | None = None
        self._listener: StepListener | None = None
        self._rate: float | Tensor | None = None
        # By index, as a file brings groups of its own: the parameter groups that had no initial rate before.
        self._fresh: list[int] = []

    @property
    def state_key(self) -> str:
        return f"{type(self).__name__}({self.monitor}, {self.interval})"

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_running": None, "_listener": None, "_rate": None, "_fresh": []}

    def _check_kind(self, scheduler: Scheduler) -> None:
        name = type(scheduler).__name__
        judges = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
        if judges and not self.has_monitor:
            raise ValueError(f'{name} judges a number: pass LRScheduler(..., monitor="val_loss").')
        if judges and self.interval == "step":
            raise ValueError(f'{name} judges the numbers of an epoch; received interval="step". Leave it out.')
        if not judges and self.has_monitor:
            raise ValueError(f"{name} looks at no number; received monitor={self.monitor!r}. Leave it out.")

    def on_train_begin(self, logs: Mapping[str, float] | None = None) -> None:
        """Makes the scheduler, where it is a callable that makes it."""
        optimizer = optimizer_of(self)
        self._release()
        self._rate = None
        if isinstance(self.scheduler, Scheduler):
            self._running = self.scheduler
        else:
            groups = enumerate(optimizer.param_groups)
            self._fresh = [index for index, group in groups if "initial_lr" not in group]
            self._running = self._made(optimizer)
        if self._running.optimizer is not optimizer:
            raise ValueError(
                f"Expected a scheduler over the model's optimizer, received a {type(self._running).__name__} over "
                "another one. Pass compile the optimizer that it was made for, or pass a callable that makes the "
                "scheduler: LRScheduler(lambda optimizer: ...)."
            )
        self._check_length(self._running)
        if self.interval == "step":
            self._listener = StepListener(optimizer, self._advance)

    def _check_length(self, scheduler: Scheduler) -> None:
        """Refuses a schedule in steps that is advanced by epochs: it would never end, and nothing would fail."""
        total = getattr(scheduler, "total_steps", None)
        epochs, batches = self.params.get("epochs"), self.params.get("steps")
        if self.interval == "epoch" and total and epochs and batches and total == epochs * batches > epochs:
            raise ValueError(
                f"{type(scheduler).__name__}(total_steps={total}) has as many steps as there are batches, {epochs} x "
                f'{batches}, but would be advanced once an epoch. Pass LRScheduler(..., interval="step"), or '
                f"total_steps={epochs}."
            )

    def _made(self, optimizer: Optimizer) -> Scheduler:
        made = self.scheduler(optimizer)  # type: ignore[operator]  # it is no scheduler here
        if not isinstance(made, Scheduler):
            raise TypeError(f"Expected scheduler(optimizer) to return a torch scheduler, received {show(made)}.")
        self._check_kind(made)
        return made

    def _advance(self) -> None:
        assert self._running is not None  # steps are listened to in a fit only
        rate = self._running.optimizer.param_groups[0]["lr"]
        self._rate = rate.clone() if isinstance(rate, Tensor) else rate
        self._running.step()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Logs the rate, then advances by an epoch."""
        log_learning_rate(self, logs, None if self._rate is None else float(self._rate))
        if self.interval == "step" or self._running is None:
            return
        if not self.has_monitor:
            self._running.step()
        elif (value := self.measured(logs or {})) is not None:
            self._running.step(value)  # type: ignore[arg-type]  # a ReduceLROnPlateau, which takes a number

    def on_train_end(self, logs: Mapping[str, float] | None = None) -> None:
        """Leaves nothing on the optimizer."""
        self._release()

    def on_exception(self, error: BaseException) -> None:
        """Leaves nothing on the optimizer, either."""
        self._release()

    def _release(self) -> None:
        if self._listener is not None:
            self._listener.remove()
            self._listener = None
        # The scheduler of a later fit would take the entry that this one has made for the rate to start from.
        if self._running is not None:
            for index in self._fresh:
                self._running.optimizer.param_groups[index].pop("initial_lr", None)
        self._fresh = []

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's state in the middle of a fit, and the optimizer's settings that it works on."""
        if self._running is None:
            return {}
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in self._running.optimizer.param_groups
        ]
        return {
            "class": type(self._running).__name__,
            "scheduler": self._running.state_dict(),
            "groups": groups,
            "has_stepped": getattr(self._running.optimizer, "_opt_called", False),
            "rate": None if self._rate is None else float(self._rate),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state, with its rates and the scheduler's settings; called after ``on_train_begin``.

        Args:
            state: what ``state_dict`` returned.

        Raises:
            ValueError: it is of a scheduler of another class.
        """
        if self._running is None or not state:
            return
        if state["class"] != type(self._running).__name__:
            raise ValueError(
                f"Expected a {state['class']} as in the run that is resumed, received LRScheduler of a "
                f"{type(self._running).__name__}. Pass the scheduler of that run, or start anew."
            )
        if state["has_stepped"]:
            # torch warns of a scheduler that is ahead of its optimizer, which by this attribute it takes to be new.
            self._running.optimizer._opt_called = True  # type: ignore[attr-defined]
        # An epoch may have no step left that would tell its rate.
        self._rate = state.get("rate")
        self._running.load_state_dict(dict(state["scheduler"]))
        # Making a scheduler has set the rates to those of a beginning.
        for group, settings in zip(self._running.optimizer.param_groups, state["groups"], strict=True):
            for key, value in settings.items():
                if isinstance(group.get(key), Tensor):
                    group[key].fill_(value)
                else:
                    group[key] = value
