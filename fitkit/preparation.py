"""What a run is made of: arguments of `Model`'s methods checked together, and the parts gathered that the loop takes.

What one argument means by itself is checked in flags.py, how much of the data an epoch takes in epoch_plans.py, what
callbacks a fit has in run_callbacks.py. Nothing is trained here, and nothing drawn.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch

from fitkit._types import ModelProtocol
from fitkit.callbacks import BackupAndRestore, Callback, EarlyStopping, ProgressBar, SwapEMAWeights
from fitkit.callbacks.display import resolve_verbose
from fitkit.callbacks.hooks import HookTable, implemented_hooks
from fitkit.computation import ClassWeight, Compiled, UserStep
from fitkit.data import Batches, Batching, EpochPlan, as_batches, as_split_batches
from fitkit.data.inputs import check_columns, columns_of
from fitkit.device import module_dtype, room_for_data
from fitkit.distributed import Processes
from fitkit.epoch_plans import plan_for_training, plan_for_validation
from fitkit.errors import check_integer, check_number, show
from fitkit.flags import FitArguments, TrainingFlags
from fitkit.gradients import norm_names
from fitkit.history import History
from fitkit.loop import FitRun, TestRun
from fitkit.microbatches import FittingParts, split_by
from fitkit.progress import Progress
from fitkit.run_callbacks import callbacks_of_fit, check_monitors
from fitkit.shared_steps import Agreement, SharedStep, taking_shares
from fitkit.steps import TestStep, TrainStep, trained_parameters
from fitkit.training_state import read_training_state

# Keras's names of the steps that a subclass overrides, those here, and their attributes in OwnSteps.
KERAS_STEPS = {"train_step": ("training_step", "training"), "test_step": ("validation_step", "validation")}


@final
@dataclass(frozen=True)
class OwnSteps:
    """What a subclass of Model overrides.

    Attributes:
        training: its ``training_step``; None where it is that of Model.
        validation: its ``validation_step``, in the same way.
        prediction: its ``predict_step``, in the same way.
        is_subclass: whether the Model is of a class of the user's at all.
    """

    training: UserStep | None = None
    validation: UserStep | None = None
    prediction: UserStep | None = None
    is_subclass: bool = False

    @property
    def are_any(self) -> bool:
        """Whether there is one."""
        return any((self.training, self.validation, self.prediction))


@final
@dataclass(frozen=True)
class Preparation:
    """Makes the parts of the runs of one Model, as it is compiled now.

    Attributes:
        model: the Model.
        compiled: what its `compile` made.
        own: the steps that it overrides.
        processes: that share the work; None where one works alone.
    """

    model: ModelProtocol
    compiled: Compiled
    own: OwnSteps
    processes: Processes | None

    def fit_run(self, given: FitArguments, *, introduces: bool = True) -> FitRun:
        """A run with all of its arguments checked; what is trained, and what draws or reads data, is as it was.

        Args:
            given: the arguments of `fit`.
            introduces: whether callbacks are told of the model and the run; they need it before their first hook.
        """
        flags = given.flags()
        training, held_out = self._data(given)
        class_weight = self.class_weight(given.class_weight, given.sample_weight)
        step = self._train_step(flags, training, class_weight)
        batches = plan_for_training(training, flags, self.model.device, self.processes)
        level = self.verbose_level(given.verbose)
        validation_plan = self._validation_plan(held_out, flags, given.validation_batch_size)
        measured = held_out is not None and any(map(flags.validates, range(flags.initial_epoch, flags.last_epoch)))
        chosen = callbacks_of_fit(given.callbacks, given.early_stop_callback, flags, validates=measured)
        check_monitors(
            chosen,
            self._logged(flags, validates=measured),
            own_steps=self.own.training is not None or self.own.validation is not None,
        )
        self.check_steps(validates=held_out is not None)
        self.check_parts(training, "data", given.class_weight)
        self.check_parts(held_out, "validation_data")
        self._check_sharded(flags, chosen)
        history = History()
        history.params = _params(flags, batches, validation_plan, level)
        hooks = self.hooks(chosen, history.params, history, introduces=introduces)
        splitting = split_by(flags, step)
        facts = _facts(flags, batches, validation_plan, given.class_weight, self.compiled)
        facts["sample_weight"] = None if training.parts is None else training.parts == 3
        part_size = splitting if isinstance(splitting, FittingParts) else None
        noted = self.own.is_subclass or not all(isinstance(each, EarlyStopping) for each in chosen)
        progress = Progress(
            self.model, self.compiled, flags, facts, step, part_size, batches, validation_plan, chosen, hooks, noted
        )
        progress.saved = _saved_state(given.resume_from, chosen, progress)
        validation = validation_plan and self.test_run(validation_plan, hooks)
        take_batch = taking_shares(splitting, step)
        return FitRun(self.model, step, batches, hooks, flags, take_batch, validation, chosen, progress, history)

    def _check_sharded(self, flags: TrainingFlags, callbacks: Sequence[Callback]) -> None:
        """Refuses what a module cannot have of which each process keeps a part."""
        if self.processes is None or not self.processes.is_sharded:
            return
        if flags.micro_batch_size == "auto":
            raise ValueError(
                'strategy="fsdp" needs a number of samples, received micro_batch_size="auto": memory may run out in '
                "one process alone, and all have to pass through the module equally often."
            )
        for index, callback in enumerate(callbacks):
            if isinstance(callback, SwapEMAWeights):
                raise ValueError(
                    f'strategy="fsdp" does not go with callbacks[{index}]={show(callback)}, which keeps whole weights.'
                )

    # Data

    def batching(
        self,
        batch_size: int | None,
        shuffle: bool | None = None,
        *,
        training: bool = False,
        loader_options: Mapping[str, Any] | None = None,
    ) -> Batching:
        """How data is to become batches."""
        # Batches are made on the host, where their targets can be counted; steps take them to the device.
        host, dtype = torch.device("cpu"), module_dtype(self.model.module)
        return Batching(batch_size, shuffle, training, dtype, host, loader_options=loader_options)

    def _data(self, given: FitArguments) -> tuple[Batches, Batches | None]:
        """What is trained and what is validated on, on the device where there is room for it."""
        batching = self.batching(
            given.batch_size, given.shuffle, training=True, loader_options=given.dataloader_options
        )
        validating = replace(
            batching,
            batch_size=given.validation_batch_size,
            shuffle=None,
            training=False,
            argument="validation_data",
            batch_size_argument="validation_batch_size",
            default_size=batching.size,
        )
        training, held_out = as_split_batches(
            given.data, given.y, given.sample_weight, batching, given.validation_split, validating.batch_size
        )
        if given.validation_data is not None:
            if held_out is not None:
                raise ValueError(
                    f"validation_split={given.validation_split} and validation_data=... exclude each other. Pass one "
                    "of them."
                )
            held_out = as_batches(given.validation_data, None, None, validating)
        if held_out is not None:
            check_columns(held_out.inputs, columns_of(training.inputs))
        device = self.model.device
        room = room_for_data(device) // 2
        return training.kept_on(device, room), None if held_out is None else held_out.kept_on(device, room)

    def _validation_plan(
        self, batches: Batches | None, flags: TrainingFlags, batch_size: int | None
    ) -> EpochPlan | None:
        if batches is not None:
            return plan_for_validation(batches, flags, self.model.device, self.processes)
        for name, value in (("validation_steps", flags.validation_steps), ("validation_batch_size", batch_size)):
            if value is not None:
                raise ValueError(f"{name}={value} needs validation_data=... or validation_split=...")
        return None

    def check_parts(self, batches: Batches | None, argument: str, class_weight: Any = None) -> None:
        """Refuses what the data's parts (x, y, sample_weight) tell before the first batch."""
        if batches is None or batches.parts is None:
            return
        if batches.parts == 3 and class_weight is not None:
            raise _both_weights()
        name, own = "training_step", self.own.training
        if argument != "data":
            name, own = "validation_step", self.own.validation
        if batches.parts == 1 and self.compiled.losses is not None and own is None:
            raise ValueError(
                f"Expected targets since compile was given a loss, received {argument} of x alone. Pass y, or "
                f"compile(loss=None) for a module that returns its loss, or override {name}."
            )
        losses = None if own is not None else self.compiled.losses
        looking = [] if losses is None else [loss for loss in losses.losses if loss and loss.takes_probabilities]
        targets = batches.some_targets() if looking else None
        if losses is not None and targets is not None:
            for loss, target in zip(losses.losses, losses.select(targets, "y"), strict=True):
                if loss in looking:
                    loss.check_targets(target)

    @property
    def may_enlarge_tests(self) -> bool:
        """Whether an evaluation gives the same numbers in batches of another size."""
        losses, metrics = self.compiled.losses, self.compiled.metrics
        means = losses is not None and losses.are_means_over_data and metrics.are_means_over_data
        # In half precision the loss of a larger batch is rounded as a whole, and a sum may overflow.
        is_exact = module_dtype(self.compiled.module).itemsize >= torch.float32.itemsize
        return means and is_exact and self.own.validation is None

    # Steps

    def _train_step(self, flags: TrainingFlags, data: Batches, class_weight: ClassWeight | None) -> TrainStep:
        return TrainStep(
            self.compiled,
            self.own.training,
            class_weight,
            gradient_clip_val=flags.gradient_clip_val,
            norm_order=float(flags.track_grad_norm),
            owns_batches=data.owned,
            processes=self.processes,
        )

    def test_run(self, plan: EpochPlan, hooks: HookTable) -> TestRun:
        """An evaluation of what the plan takes."""
        is_shared = self.processes is not None
        step = TestStep(self.compiled, self.own.validation, owns_batches=plan.data.owned, is_shared=is_shared)
        return TestRun(self.model, step, plan, hooks, SharedStep(step, step) if is_shared else step)

    def check_steps(self, *, validates: bool) -> None:
        """Refuses a step that nothing calls, and a validation for which there is no loss."""
        for theirs, (ours, own) in KERAS_STEPS.items():
            if hasattr(type(self.model), theirs) and getattr(self.own, own) is None:
                raise ValueError(
                    f"{type(self.model).__name__}.{theirs} is never called: that is Keras's name. Here it is "
                    f"{ours}(self, batch, batch_idx)."
                )
        needs_loss = self.compiled.losses is None and self.own.training is not None
        if validates and needs_loss and self.own.validation is None:
            raise ValueError(
                "Expected a loss for validation, since training_step is overridden and compile was given loss=None. "
                "Override validation_step as well, or pass compile(loss=...)."
            )

    def class_weight(self, class_weight: Any, sample_weight: Any) -> ClassWeight | None:
        """The argument class_weight as what multiplies losses.

        Raises:
            ValueError: there is no loss to multiply, or there are sample weights as well.
            TypeError: class_weight is no dict of numbers.
        """
        if class_weight is None:
            return None
        if sample_weight is not None:
            raise _both_weights()
        if not isinstance(class_weight, Mapping) or not class_weight:
            raise TypeError(
                f"Expected {{class: weight}}, received class_weight={show(class_weight)}. Classes weigh alike with "
                "{c: len(y) / (classes * count of c)}."
            )
        losses = self.compiled.losses
        if self.own.training is not None or losses is None or losses.names:
            raise ValueError(
                "class_weight=... needs one compiled loss over one output. With several outputs, a training_step of "
                "your own or a loss that the module returns, pass sample weights with the data."
            )
        weights = {
            check_integer("class_weight's class", key, least=0): check_number(
                f"class_weight[{key!r}]", value, least=0.0
            )
            for key, value in class_weight.items()
        }
        if losses.meanings[0].scale == "values":
            raise ValueError(
                "class_weight=... needs a loss over classes, received one over values. Pass sample_weight."
            )
        return ClassWeight(weights, self.model.device, one_of_many=losses.meanings[0].classes)

    # Callbacks

    def hooks(
        self, callbacks: Sequence[Callback], params: dict[str, Any], *more: Any, introduces: bool = True
    ) -> HookTable:
        """Introduces the callbacks to the model, and lists who answers which hook.

        Args:
            callbacks: the user's, and early stopping.
            params: facts about the run.
            more: what hears the same, after them.
            introduces: whether they are told of the model and the run.
        """
        bars = []
        if params["verbose"] and not any(isinstance(callback, ProgressBar) for callback in callbacks):
            bars.append(ProgressBar())
        for callback in [*callbacks, *bars] if introduces else []:
            callback.set_model(self.model)
            callback.set_params(params)
        if self.processes is None:
            return HookTable([*callbacks, *more, *bars])
        agreement = Agreement(self.model, at_batches=self._may_stop_at_batches(callbacks))
        called = [each for each in callbacks if self.processes.rank == 0 or not each.only_on_rank_0]
        return HookTable([*called, *more, *bars, agreement])

    def _may_stop_at_batches(self, callbacks: Sequence[Callback]) -> bool:
        """Whether anything might set stop_training between two batches: a callback that hears of them, or a step."""
        hooks = {"on_train_batch_begin", "on_train_batch_end"}
        hear = any(hooks & set(implemented_hooks(each)) for each in callbacks if not each.only_on_rank_0)
        return hear or self.own.training is not None

    def _logged(self, flags: TrainingFlags, *, validates: bool) -> list[str]:
        """The keys of an epoch's logs that are there without a callback."""
        names = self.model.metrics_names
        validated = [f"val_{name}" for name in names] if validates else []
        norms: list[str] = []
        if flags.track_grad_norm != -1:
            norms = norm_names(self.model.module, trained_parameters(self.compiled), float(flags.track_grad_norm))
        return [*names, *validated, *norms]

    def verbose_level(self, verbose: int | str) -> int:
        """What verbose means here: of several processes only rank 0 shows something."""
        level = resolve_verbose(verbose)
        return level if self.processes is None or self.processes.rank == 0 else 0


def _both_weights() -> ValueError:
    return ValueError("class_weight=... and sample_weight=... exclude each other. Multiply them into one of them.")


def _saved_state(resume_from: Any, callbacks: Sequence[Callback], progress: Progress) -> Any:
    """The state to go on from and its path, checked; None for a run from the beginning."""
    path = resume_from
    for callback in callbacks:
        if isinstance(callback, BackupAndRestore):
            path = callback.find() or path
    if path is None:
        return None
    if isinstance(path, bool) or not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"Expected a path, received resume_from={show(path)}.")
    state = read_training_state(path, progress.compiled.module)
    progress.check(state, path)
    return state, path


def _params(flags: TrainingFlags, batches: EpochPlan, validation: EpochPlan | None, verbose: int) -> dict[str, Any]:
    """The facts about a fit that callbacks are told."""
    return {
        "epochs": flags.last_epoch,
        "initial_epoch": flags.initial_epoch,
        "steps": batches.length,
        "validation_steps": None if validation is None else validation.length,
        "min_nb_epochs": flags.min_nb_epochs,
        "verbose": verbose,
    }


def _facts(
    flags: TrainingFlags, batches: EpochPlan, validation: EpochPlan | None, class_weight: Any, compiled: Compiled
) -> dict[str, Any]:
    """What the numbers of a fit depend on, by the name that a user knows it by; a resumed run must have the same."""
    validating = {} if validation is None else validation.facts()
    return {
        **batches.facts(),
        **{f"validation data: {name}": value for name, value in validating.items()},
        "accumulate_grad_batches": flags.accumulate_grad_batches,
        "gradient_clip_val": float(flags.gradient_clip_val),
        "track_grad_norm": float(flags.track_grad_norm),
        "train_percent_check": float(flags.train_percent_check),
        "val_percent_check": float(flags.val_percent_check),
        "overfit_pct": float(flags.overfit_pct),
        "class_weight": class_weight and {int(key): float(value) for key, value in class_weight.items()},
        "precision": compiled.precision,
        "metrics": compiled.metrics.kinds,
        "loss": None if compiled.losses is None else compiled.losses.kinds,
        "loss_weights": None if compiled.losses is None else [float(weight) for weight in compiled.losses.weights],
        "validation_freq": None if validation is None else _plain_frequency(flags.validation_freq),
    }


def _plain_frequency(frequency: int | tuple[int, ...]) -> int | list[int]:
    return frequency if isinstance(frequency, int) else sorted(frequency)
