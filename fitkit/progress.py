"""Where a fit is: the loop moves it on from stage to stage, a save reads it, and a resumed fit begins with it.

Each class that holds a part of the state gives it by itself; what outlives the fit is in training_state.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, final, get_args

from torch import Tensor

from fitkit._types import ModelProtocol
from fitkit.batch import mapped
from fitkit.callbacks import Callback
from fitkit.callbacks.hooks import Hook, HookTable
from fitkit.checkpoints import Path
from fitkit.computation import Compiled
from fitkit.data import EpochPlan
from fitkit.device import (
    get_modes,
    plain_random_state,
    random_state,
    random_state_of,
    restore_random_state,
    set_modes,
)
from fitkit.distributed import Processes, gather, running
from fitkit.errors import CheckpointError
from fitkit.flags import TrainingFlags
from fitkit.history import History, as_number
from fitkit.kinds import check_kinds
from fitkit.steps import TrainStep
from fitkit.training_state import check_model, copied_state, model_state, named_errors, restore_model

# Where in an epoch a run is: before its first batch, among its batches, before or in its validation, at its end.
Stage = Literal["begin", "train", "validate", "end"]
# Of which kinds the parts are that every run has.
_KINDS = {"epoch": 0, "stage": "", "logs": {}, "stop": False, "called": [], "data": {}}


@final
@dataclass
class Progress:
    """Where a fit is, and who holds a part of its state.

    Attributes:
        model: the Model.
        compiled: what its `compile` made.
        flags: the checked arguments.
        arguments: what the numbers depend on, by the name that messages use; a resumed run must have the same.
        step: the training step.
        part_size: what finds the size of micro-batches; None where nothing does.
        batches: the training data.
        validation: the validation data.
        callbacks: the user's, and early stopping.
        hooks: of these, of History and of the bar.
        noted: whether anybody could save in the midst of the run; otherwise nothing is noted for it.
        saved: the state that the fit goes on from, and its path; None once it is put back.
        epoch: 0-based index.
        stage: where in the epoch the run is.
        logs: of the epoch, from the end of its batches on.
    """

    model: ModelProtocol
    compiled: Compiled
    flags: TrainingFlags
    arguments: dict[str, Any]
    step: TrainStep
    part_size: Any
    batches: EpochPlan
    validation: EpochPlan | None
    callbacks: Sequence[Callback]
    hooks: HookTable
    noted: bool = True
    saved: tuple[dict[str, Any], Path] | None = None
    epoch: int = field(init=False)
    stage: Stage = "begin"
    logs: dict[str, float] = field(default_factory=dict)
    # Whose hooks of the stage have been called, the present one's included; None in front of History.
    _called: list[object] = field(default_factory=list)
    # Before the validation: the random state, the modes, and where the validation data was.
    _before: tuple[Any, Any, Any] | None = None
    # Before an evaluation or prediction that a callback makes: the random state and the modes.
    _beside: tuple[Any, Any] | None = None
    # The model before a restore, until that has come to its end.
    _undo: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.epoch = self.flags.initial_epoch
        self.batches.noted = self.noted
        if self.validation is not None:
            self.validation.noted = False  # it begins anew, except where it goes on from epoch to epoch

    @property
    def processes(self) -> Processes | None:
        """Those that share the run."""
        return self.step.processes

    # What the loop tells and asks

    def begin_hooks(self, hooks: Sequence[Hook]) -> Iterator[Hook]:
        """The hooks that begin an epoch, each noted as it is called."""
        return self._noted(hooks, self.hooks.owners("on_epoch_begin"))

    def end_hooks(self, hooks: Sequence[Hook]) -> Iterator[Hook]:
        """The hooks that end an epoch, without those that were called before the state was saved."""
        return self._noted(hooks, self.hooks.owners("on_epoch_end"))

    def _noted(self, hooks: Sequence[Hook], owners: Sequence[object]) -> Iterator[Hook]:
        before = list(self._called)
        for hook, owner in zip(hooks, owners, strict=True):
            if not any(owner is each for each in before):
                self._called.append(owner)
                yield hook
        self._called = []

    def begin_validation(self) -> None:
        """Notes what a validation changes for a while: a save in its midst lets it begin anew."""
        if not self.noted:
            return
        data = None if self.validation is None else self.validation.state_dict(in_epoch=False)
        self._before = (random_state(self.compiled.device), get_modes(self.compiled.module), data)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Around an evaluation or prediction that a callback makes: it changes nothing that the fit draws.

        A save in its midst is one of the fit around it.
        """
        before, state = self._beside, random_state(self.compiled.device)
        self._beside = before or (state, get_modes(self.compiled.module))
        try:
            yield
        finally:
            self._beside = before
            restore_random_state(state, self.compiled.device)

    def move_on(self, stage: Stage, logs: dict[str, float] | None = None) -> None:
        """Enters the next stage, or with "begin" the next epoch."""
        self.stage, self._before = stage, None
        if logs is not None:
            self.logs = logs
        if stage == "begin":
            self.epoch += 1

    # What goes to a file

    def state_dict(self) -> dict[str, Any]:
        """The whole training state.

        Raises:
            ValueError: the run is in the midst of a step, or has noted nothing for a file.
        """
        if not self.noted:
            raise ValueError(
                "Expected save(...) in a hook of a callback of this fit, received it from elsewhere in it."
            )
        if self.saved is not None:
            return self.saved[0]  # the run has not gone on from there yet
        given, trained = self.batches.given, self.step.index + 1
        if self.stage == "train" and (given != trained or not given):
            raise ValueError(
                "Expected save(...) between two training steps, received it before a batch's step or in its midst. "
                "Call it in on_train_batch_end, which is after the step."
            )
        state = model_state(self.model, self.compiled)
        before = self._before or self._beside
        if before is not None:
            state |= {"random": plain_random_state(before[0]), "modes": before[1]}
        if self.stage == "end":
            state["history"] = self._history()
        return {**state, "run": self._run()}

    def _history(self) -> dict[str, Any]:
        """History with the row of the epoch that is ending, whether or not its own hook has had its turn."""
        history = History()
        history.load_state_dict(self.model.history.state_dict())
        history.on_epoch_end(self.epoch, self.logs)
        return history.state_dict()

    def _run(self) -> dict[str, Any]:
        in_epoch = self.stage == "train"
        validation = None
        if self.validation is not None:
            validation = self.validation.state_dict(in_epoch=False) if self._before is None else self._before[2]
        keys = {id(callback): key for key, callback in keyed(self.callbacks).items()}
        stopped = any(each.has_stopped for each in self.callbacks)
        return {
            "outcome": None,
            "arguments": self.arguments,
            "epoch": self.epoch,
            "stage": self.stage,
            "logs": {name: as_number(name, value) for name, value in self.logs.items()},
            # A callback that stopped the run judges again.
            "stop": self.model.stop_training and not stopped,
            "called": [keys[id(owner)] for owner in self._called if id(owner) in keys],
            "step": self.step.state_dict() if in_epoch else None,
            "processes": self._of_processes(in_epoch=in_epoch),
            "part_size": None if self.part_size is None else self.part_size.state_dict(),
            "data": _plain(self.batches.state_dict(in_epoch=in_epoch)),
            "validation_data": None if validation is None else _plain(validation),
            "callbacks": callback_states(self.callbacks),
        }

    def _of_processes(self, *, in_epoch: bool) -> dict[str, Any] | None:
        """What each process has of its own: its samples' numbers and gradients, and its random state."""
        if self.processes is None or running() is None:
            return None
        before = None if self._before is None else self._before[0]
        random = plain_random_state(random_state(self.compiled.device) if before is None else before)
        step = mapped(Tensor.cpu, self.step.state_dict()) if in_epoch else None
        everywhere = gather((step, random))
        return {"step": [each[0] for each in everywhere], "random": [each[1] for each in everywhere]}

    def ended(self, error: BaseException | None) -> Callable[[], dict[str, Any]]:
        """What makes the run's part of a state after its end. It keeps the callbacks, but neither data nor batches.

        Args:
            error: what ended the run; from there nothing goes on exactly.
        """
        if error is not None:
            run = {"outcome": "interrupted", "epoch": self.epoch}
            return lambda: run
        run = self._run() | {"outcome": "finished", "stop": False, "callbacks": None}
        callbacks = self.callbacks
        return lambda: {**run, "callbacks": callback_states(callbacks)}

    # What comes from a file

    def check(self, state: Mapping[str, Any], path: Path) -> None:
        """Refuses a state that this run cannot go on from, before anything is changed.

        Raises:
            CheckpointError: it is of another module or optimizer, of other arguments, or of a run that an error ended.
        """
        with named_errors(path):
            self._check(state, path)

    def _check(self, state: Mapping[str, Any], path: Path) -> None:
        check_model(self.model, self.compiled, state, path)
        run = state["run"]
        if run is None:
            raise CheckpointError(
                f"{path!s} was saved before any fit: there is nothing to resume. Use model.load({str(path)!r}) and fit."
            )
        if run["outcome"] == "interrupted":
            raise CheckpointError(
                f"{path!s} was saved after an error or Ctrl-C had ended the run somewhere in epoch {run['epoch'] + 1}: "
                f"there is no exact place to resume at. Use model.load({str(path)!r}) and fit(initial_epoch="
                f"{run['epoch']}), or save with BackupAndRestore during the run."
            )
        check_kinds(run, _KINDS, "what it says of the run")
        place = (run["epoch"], run["data"]["given"], run["data"]["taken"])
        if {type(each) for each in place} != {int} or run["stage"] not in get_args(Stage):
            raise ValueError(f"it says no place in a run: {place}, {run['stage']!r}.")
        if (run["stage"] == "train") != (run["step"] is not None):
            raise ValueError("it has the state of a step without its epoch, or the other way round.")
        worked = len((run.get("processes") or {}).get("step", [None]))
        works = 1 if self.processes is None else self.processes.world
        if run["step"] is not None and worked != works:
            raise CheckpointError(
                f"{path!s} was saved in the midst of an epoch by {worked} process(es), each of which has its own part "
                f"of it; received {works}. Resume with as many, or from a file that was saved at the end of an epoch."
            )
        then, now = run["arguments"], self.arguments
        differing = [
            f"{name}={now.get(name)!r} now and {then.get(name)!r} in the file"
            for name in {**then, **now}
            if then.get(name) != now.get(name)
        ]
        if differing:
            raise CheckpointError(
                f"Expected the arguments of the run that {path!s} was saved in, since the numbers depend on them; "
                f"received {', '.join(differing)}. Pass what the file has, or start anew."
            )

    def restore(self) -> None:
        """Puts back the state that the run goes on from, over what the hooks before have done.

        Raises:
            CheckpointError: the state does not fit, `undo` is then to be called at the end of the run; or not all
                processes of the run have found the same one.
        """
        if self.processes is not None:
            places = gather(None if self.saved is None else self.saved[0]["run"]["data"]["taken"])
            if len(set(places)) > 1:
                ranks = [rank for rank, place in enumerate(places) if place is not None]
                raise CheckpointError(
                    f"Expected all processes to find the same file to go on from, received one in {ranks} of "
                    f"{len(places)}, or different ones. Keep it in a folder that all hosts see."
                )
        if self.saved is None:
            return
        state, path = self.saved
        self._undo = copied_state(model_state(self.model, self.compiled))
        with named_errors(path):
            self._restore(state, path)
        self.saved = self._undo = None

    def undo(self) -> bool:
        """Puts the model back to what it was before a restore that failed; whether there was one."""
        if self._undo is None:
            return False
        before, self._undo = self._undo, None
        restore_model(self.model, self.compiled, before, "the state before")
        set_modes(self.compiled.module, before["modes"], also_training=False)
        restore_random_state(random_state_of(before["random"]), self.compiled.device)
        return True

    def _restore(self, state: Mapping[str, Any], path: Path) -> None:
        run = state["run"]
        self.epoch, self.stage, self.logs = run["epoch"], run["stage"], dict(run["logs"])
        check_kinds(self.logs, dict.fromkeys(self.logs, 0.0), "the logs of the epoch")
        params = self.model.history.params
        self._replay_beginning(run)
        restore_model(self.model, self.compiled, state, path)
        # Outside of a fit the modes are the user's; what is trained there is for the fit to say.
        set_modes(self.compiled.module, state["modes"], also_training=run["outcome"] is None)
        self.model.stop_training = run["stop"]
        history = self.model.history
        history.params = params
        # A run with nothing left to do says how it ended.
        is_over = run["outcome"] is not None and self.epoch >= self.flags.last_epoch
        history.stop_reason = history.stop_reason if is_over or run["stop"] else None
        for key, callback in keyed(self.callbacks).items():
            if has_state(callback) and run["callbacks"].get(key) is not None:
                kept = run["callbacks"][key]
                # What one of the user's keeps may change its kind while it runs.
                if type(callback).__module__.startswith("fitkit.") and not callback.calls:
                    check_kinds(kept, callback.state_dict(), f"the state of {key}")  # type: ignore[attr-defined]
                callback.load_state_dict(kept)  # type: ignore[attr-defined]
        if self.part_size is not None and run["part_size"] is not None:
            self.part_size.load_state_dict(run["part_size"])
        of_processes: dict[str, Any] | None = run.get("processes")
        own, world = (0, 1) if self.processes is None else (self.processes.rank, self.processes.world)
        if run["step"] is not None:
            step = run["step"] if of_processes is None else of_processes["step"][own]
            check_kinds(step, self.step.state_dict(), "the state of the step")
            self.step.load_state_dict(step)
            # What cannot be saved again, or read, was no such state.
            self.step.state_dict()
            self.step.numbers.metrics.check_loaded()
        in_epoch = self.stage == "train"
        self.batches.load_state_dict(
            _raw(run["data"]), in_epoch=in_epoch, ends_here=in_epoch and self.model.stop_training
        )
        if self.validation is not None and run["validation_data"] is not None:
            self.validation.load_state_dict(_raw(run["validation_data"]), in_epoch=False)
        random = state["random"]
        if of_processes is not None and len(of_processes["random"]) == world:
            random = of_processes["random"][own]
        restore_random_state(random_state_of(random), self.compiled.device)

    def _replay_beginning(self, run: Mapping[str, Any]) -> None:
        """Lets callbacks begin the epoch again, for what they keep outside of any state: an open file, a bar."""
        called = set(run["called"])
        known = {id(callback): key for key, callback in keyed(self.callbacks).items()}
        for hook, owner in zip(self.hooks.on_epoch_begin, self.hooks.owners("on_epoch_begin"), strict=True):
            key = known.get(id(owner))
            if self.stage in ("train", "validate") or (self.stage == "begin" and key in called):
                hook(self.epoch, {})
        if self.stage in ("train", "validate"):
            self.step.begin_epoch(self.flags.window(self.epoch), self.batches.length)
        elif self.stage == "end":
            # Bars, and callbacks that are new, have no part in the end of an epoch that they did not see.
            due = {key for key in run["callbacks"] if key not in called}
            self._called = [
                each
                for each in self.hooks.listeners
                if known.get(id(each)) not in due and each is not self.model.history
            ]
        else:
            self._called = [each for each in self.callbacks if known[id(each)] in called]


def keyed(callbacks: Sequence[Callback]) -> dict[str, Callback]:
    """The callbacks by the keys of their states: equal ones are counted, in their order."""
    found: dict[str, Callback] = {}
    counts: Counter[str] = Counter()
    for callback in callbacks:
        own = key = callback.state_key
        while key in found:
            counts[own] += 1
            key = f"{own} {counts[own] + 1}"
        found[key] = callback
    return found


def callback_states(callbacks: Sequence[Callback]) -> dict[str, Any]:
    """The states by the callbacks' keys; None for a callback that has none."""
    return {
        key: callback.state_dict() if has_state(callback) else None  # type: ignore[attr-defined]
        for key, callback in keyed(callbacks).items()
    }


def has_state(callback: Any) -> bool:
    """Whether the callback keeps something that a resumed run needs."""
    return callable(getattr(callback, "state_dict", None)) and callable(getattr(callback, "load_state_dict", None))


def _plain(data: dict[str, Any]) -> dict[str, Any]:
    if data["start"] is None:
        return data
    return {**data, "start": {"own": data["start"]["own"], "random": plain_random_state(data["start"])}}


def _raw(data: dict[str, Any]) -> dict[str, Any]:
    if data["start"] is None:
        return data
    return {**data, "start": {**random_state_of(data["start"]["random"]), "own": data["start"]["own"]}}
