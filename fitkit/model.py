"""`Model`: a module with Keras's compile, fit, evaluate and predict.

Here arguments are checked and the parts of a run gathered. Nothing loops here: the order of a run is in loop.py,
what happens to a batch in steps.py, and how data becomes batches in data/.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from fitkit import loop
from fitkit.batch import join, unpack
from fitkit.callbacks import Callback, EarlyStopping
from fitkit.callbacks.display import resolve_verbose
from fitkit.callbacks.hooks import HookTable, check_callbacks
from fitkit.checkpoints import fill, load_weights, save_state, save_weights
from fitkit.computation import Compiled, UserStep, total_loss
from fitkit.data import Batches, EpochPlan, as_batches, kept_generators
from fitkit.data.arrays import Layout
from fitkit.data.inputs import check_columns, check_is_batch, columns_of
from fitkit.device import kept_modes, kept_random_state, module_dtype, resolve_device
from fitkit.distributed import (
    Processes,
    by_first,
    check_strategy,
    own_device,
    processes_of,
    running,
    share_random_state,
    share_tensors,
    together,
)
from fitkit.epoch_plans import plan_for_pass
from fitkit.errors import check_choice, check_flag, check_integer, show
from fitkit.flags import MAX_NB_EPOCHS, FitArguments, refuse_unknown, refusing_unknown
from fitkit.gradients import kept_gradients
from fitkit.history import History
from fitkit.learning_rate_finder import LearningRateCurve, RangeTest, undone
from fitkit.metrics import CompiledMetrics
from fitkit.microbatches import report_size
from fitkit.optimization import OptimizerArgument, follow_parameters, left_out, make_optimizer
from fitkit.output_losses import OutputLosses
from fitkit.preparation import OwnSteps, Preparation
from fitkit.progress import Progress
from fitkit.sharded_checkpoints import save_sharded, whole_state
from fitkit.sharding import is_sharded, shard
from fitkit.shared_steps import SharedStep, joined_outputs
from fitkit.steps import PredictStep, TestStep, TrainStep, held_parameters
from fitkit.summary import check_is_no_shape, summarize, summarize_remembered
from fitkit.training_state import load_model, model_state, read_training_state, warned_of_untrained

if TYPE_CHECKING:
    from fitkit.plan import Plan

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true")


class Model:
    """A torch module that can be compiled, fitted, evaluated and asked for predictions.

    Subclass it to override `training_step`, `validation_step` or `predict_step`; nothing else needs a subclass.

    Args:
        module: any torch.nn.Module. It is moved to the device; its parameters stay the same objects, apart from those
            that strategy="fsdp" shards.
        device: "auto" takes the accelerator when there is one, else the CPU; or a name or torch.device. Of several
            processes on a machine each takes an accelerator of its own.
        strategy: "auto" shares the work with the other processes where torchrun or another launcher started this one,
            or where the user has made a process group; so does "ddp", which is an error where there are no others.
            "fsdp" does so too, and keeps in each process only a part of parameters, gradients and optimizer state: they
            are sharded here, so that an optimizer has to be made afterwards. "single" works alone. See
            docs/processes.md.

    Attributes:
        module: the module; another one needs another Model.
        optimizer: the torch optimizer; another one needs another `compile`.
        history: the `History` of the latest fit.
        stop_training: set it to True in any hook to end the run after the batch or epoch in progress.
        device: where the module is.

    Raises:
        TypeError: module is no torch.nn.Module.
        ValueError: there is no such device.

    Example:
        >>> import torch, fitkit
        >>> model = fitkit.Model(torch.nn.Linear(4, 1), device="cpu")
        >>> model.compile(optimizer="sgd", loss="mse")
        >>> history = model.fit(torch.randn(64, 4), torch.randn(64, 1), epochs=2, verbose=0)
        >>> len(history["loss"])
        2
    """

    def __init__(self, module: nn.Module, *, device: str | torch.device = "auto", strategy: str = "auto") -> None:
        if not isinstance(module, nn.Module):
            hint = f" It is a class: write {module.__name__}()." if isinstance(module, type) else ""
            raise TypeError(f"Expected a torch.nn.Module, received module={show(module)}.{hint}")
        self._strategy = check_strategy(strategy)
        self.device = resolve_device(own_device(device, self._strategy))
        self._module = module.to(self.device)
        processes = processes_of(self._strategy)
        if processes is not None and processes.is_sharded:
            shard(self._module, processes, self.device)
        self.history = History()
        self.stop_training = False
        self._compiled: Compiled | None = None
        # Where a fit is, while one runs; and what a file says of the latest one after it.
        self._progress: Progress | None = None
        self._ended: Callable[[], dict[str, Any] | None] = _nothing
        self._latest_input: Any = None
        self._columns: dict[str, tuple[str, ...]] = {}

    @property
    def module(self) -> nn.Module:
        """The module."""
        return self._module

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The torch optimizer that compile made or was given; None before, and when nothing can be trained."""
        return None if self._compiled is None else self._compiled.optimizer

    @refusing_unknown
    def compile(
        self,
        optimizer: OptimizerArgument = "adam",
        loss: Any = None,
        metrics: Any = None,
        *,
        learning_rate: float | None = None,
        loss_weights: Any = None,
        weighted_metrics: Any = None,
        precision: str = "32-true",
        jit_compile: bool = False,
        channels_last: bool = False,
        **_unknown: NoReturn,
    ) -> None:
        """Says how the module is trained and judged.

        Args:
            optimizer: the name of a torch.optim class in any case, an optimizer, or a callable that makes one from the
                list of trainable parameters. By name, the fastest implementation is chosen (fused, then foreach).
            loss: a name of torch.nn.functional's with or without ``_loss`` (also "mse", "mae", "bce",
                "bce_with_logits", "nll", "huber"), a module, or a callable ``loss(output, target)`` which returns a
                0-d tensor, item losses, or ``(value, weight)``. With several outputs a list or dict of these. None
                when the module's output carries ``.loss`` or ``["loss"]``, or `training_step` is overridden.
            metrics: list, tuple or dict of names ("accuracy", "f1", "auroc", "mae", "r2", ...), torchmetrics metrics
                or callables ``(output, target) -> tensor``; with several outputs nested by position or key.
            learning_rate: of an optimizer by name; None is torch's default for the class.
            loss_weights: factor of each output's loss in the total, in the structure of loss; None is 1.0 each.
            weighted_metrics: metrics to which sample and class weights apply; they are divided by the sum of weights.
            precision: "32-true" leaves parameters as they are, "64-true" converts module and inputs to float64,
                "bf16-mixed" and "16-mixed" run forward and loss under autocast (the latter with a GradScaler).
            jit_compile: whether to run the module through torch.compile.
            channels_last: whether the weights of 2-d convolutions, and floating tensors of four dimensions in each
                batch, get torch's channels-last memory format. The module's weights stay in it.

        Raises:
            ValueError: unknown names, an optimizer that cannot be used, arguments that exclude each other.
            TypeError: arguments of a wrong type.
        """
        refuse_unknown(Model.compile, _unknown)
        check_choice("precision", precision, PRECISIONS)
        check_flag("jit_compile", jit_compile)
        check_flag("channels_last", channels_last)
        if jit_compile and self._own_steps.are_any:
            raise ValueError(
                "jit_compile=True does not reach a step of your own, which calls self.module. Call "
                "model.module.compile() instead."
            )
        if self._strategy == "fsdp" and (jit_compile or precision in ("16-mixed", "64-true")):
            raise ValueError(
                f'strategy="fsdp" goes with precision="32-true" or "bf16-mixed" and without jit_compile, received '
                f"{precision=}, {jit_compile=}. For float64 call module.double() before fitkit.Model(...)."
            )
        losses = None if loss is None else OutputLosses(loss, loss_weights)
        if losses is None and loss_weights is not None:
            raise ValueError(f"loss_weights={show(loss_weights)} needs a loss for each output; received loss=None.")
        compiled_metrics = CompiledMetrics(
            metrics, weighted_metrics, output_names=None if losses is None else losses.names
        )
        made = make_optimizer(optimizer, self.module, learning_rate)
        if channels_last and any(tensor.dim() == 5 for tensor in (*self.module.parameters(), *self.module.buffers())):
            raise ValueError(
                "channels_last=True is for 2-d images, received a module with tensors of five dimensions (3-d "
                "convolutions). Leave it out, or call module.to(memory_format=torch.channels_last_3d) yourself."
            )
        if losses is not None:
            losses.to(self.device, torch.float64 if precision == "64-true" else None, module_dtype(self.module))
        if precision == "64-true":
            self.module.double()
            if made is not None:
                follow_parameters(made)
        if channels_last:
            self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in the stub
        self._compiled = Compiled(
            module=self.module,
            forward=torch.compile(self.module) if jit_compile else self.module,
            losses=losses,
            metrics=compiled_metrics,
            precision=precision,  # type: ignore[arg-type]
            device=self.device,
            optimizer=made,
            scaler=torch.amp.GradScaler(self.device.type) if precision == "16-mixed" else None,
            channels_last=channels_last,
            left_out=left_out(made, self.module),
        )

    @property
    def metrics_names(self) -> list[str]:
        """The loss, each output's loss and the metrics, in the order in which `evaluate` returns them."""
        compiled = self._require_compiled()
        names = [] if compiled.losses is None or compiled.losses.names is None else compiled.losses.names
        active = [] if compiled.losses is None else compiled.losses.active
        own_step = self._own_steps.validation is not None
        per_output = [f"{names[position]}_loss" for position in active] if names and not own_step else []
        return ["loss", *per_output, *compiled.metrics.names]

    @refusing_unknown
    def fit(
        self,
        data: Any,
        y: Any = None,
        *,
        batch_size: int | None = None,
        epochs: int | None = None,
        verbose: int | str = "auto",
        callbacks: Sequence[Callback] | Callback | None = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool | None = None,
        class_weight: Mapping[int, float] | None = None,
        sample_weight: Any = None,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        validation_freq: int | Sequence[int] = 1,
        min_nb_epochs: int = 1,
        max_nb_epochs: int = MAX_NB_EPOCHS,
        early_stop_callback: EarlyStopping | None = None,
        enable_early_stop: bool = True,
        accumulate_grad_batches: int | Mapping[int, int] = 1,
        gradient_clip_val: float = 0,
        track_grad_norm: float | str = -1,
        train_percent_check: float = 1.0,
        val_percent_check: float = 1.0,
        overfit_pct: float = 0.0,
        micro_batch_size: int | str | None = None,
        on_nonfinite: str = "raise",
        resume_from: str | os.PathLike[str] | None = None,
        dataloader_options: Mapping[str, Any] | None = None,
        **_unknown: NoReturn,
    ) -> History:
        """Trains the module.

        With ``epochs`` it trains that many, as Keras does. Without, at least min_nb_epochs and at most max_nb_epochs,
        with early stopping on "val_loss" (on "loss" without validation data).

        Args:
            data: x as tensors, NumPy arrays, pandas objects or nests of them, batch first; ``(x, y)`` or
                ``(x, y, sample_weight)``; a Dataset; a DataLoader or other iterable of batches; a generator.
            y: targets, when data is x alone.
            batch_size: samples in a batch, for arrays and Datasets; None is 32.
            epochs: index (exclusive) of the last epoch; excludes max_nb_epochs.
            verbose: 0 silent, 1 a progress bar, 2 a line an epoch; "auto" is 1 in a terminal or notebook, else 2.
            callbacks: called in this order; then early stopping, History and the progress bar.
            validation_split: the fraction of arrays or of a Dataset, at its end, that is kept for validation.
            validation_data: what is validated on, in any form that data takes.
            shuffle: whether batches that fitkit makes have a new order at each epoch; None is True for these. An
                error for data that comes in batches.
            class_weight: {class: weight} that multiplies the training losses of its samples; a missing class weighs
                1. The loss is sum(weight x loss) over the unweighted denominator, as in Keras.
            sample_weight: ``(N,)`` or the item losses' shape; as class_weight.
            initial_epoch: 0-based index of the first epoch.
            steps_per_epoch: batches in an epoch. Data of known length starts anew each epoch, other data goes on.
            validation_steps: batches in a validation.
            validation_batch_size: samples in a validation batch; None is batch_size.
            validation_freq: validate every so many epochs, or after the 1-based epochs in a list.
            min_nb_epochs: no early stopping before so many epochs.
            max_nb_epochs: the limit without ``epochs``.
            early_stop_callback: takes the place of the default early stopping.
            enable_early_stop: False switches off every early stopping.
            accumulate_grad_batches: batches that make one optimizer step, or {0-based epoch: batches} from that epoch
                on. The gradient is that of the one large batch; a short last window makes its step.
            gradient_clip_val: the largest 2-norm of all gradients together; 0 is off.
            track_grad_norm: p of the gradient norms to log, "inf" for the largest; -1 is off.
            train_percent_check: fraction of the training batches used in an epoch.
            val_percent_check: fraction of the validation batches used.
            overfit_pct: above 0, trains on this first part of the data, always the same batches unshuffled.
            micro_batch_size: samples that go through the module at a time; a larger batch is split, for the same step.
                "auto" halves the parts whenever memory runs out. None does not split.
            on_nonfinite: "raise" a NonFiniteLossError when an epoch's loss is NaN or infinite, "stop" or "ignore".
            resume_from: a file of `save`, `ModelCheckpoint` or `BackupAndRestore`; the run goes on from there to the
                last epoch asked for now, as if it had not stopped. The module and the optimizer are made and compiled
                as they were, the data is the same. What was passed to callbacks may differ; initial_epoch is not
                looked at.
            dataloader_options: for a Dataset, what its DataLoader is made with beside batch size and order, such as
                {"num_workers": 4, "collate_fn": join}; None is torch's defaults. Workers stay from epoch to
                epoch. Validation data that is a Dataset is loaded so too, all of it (``drop_last`` is for training).

        Returns:
            The History, which is also `history`; of a resumed run with the epochs before.

        Raises:
            ValueError: arguments out of range or in conflict, data that does not fit, a monitor that cannot appear.
            TypeError: arguments of a wrong type.
            NonFiniteLossError: a training loss was not finite (a FloatingPointError).
            CheckpointError: the file to resume from is damaged, or of a run with other numbers (a ValueError).
        """
        refuse_unknown(Model.fit, _unknown)
        if self._progress is not None:
            raise ValueError("fit(...) was called from within a fit of the same Model. Use train_on_batch there.")
        run = self._preparation().fit_run(
            FitArguments(
                data,
                y,
                batch_size=batch_size,
                epochs=epochs,
                verbose=verbose,
                callbacks=callbacks,
                validation_split=validation_split,
                validation_data=validation_data,
                shuffle=shuffle,
                class_weight=class_weight,
                sample_weight=sample_weight,
                initial_epoch=initial_epoch,
                steps_per_epoch=steps_per_epoch,
                validation_steps=validation_steps,
                validation_batch_size=validation_batch_size,
                validation_freq=validation_freq,
                min_nb_epochs=min_nb_epochs,
                max_nb_epochs=max_nb_epochs,
                early_stop_callback=early_stop_callback,
                enable_early_stop=enable_early_stop,
                accumulate_grad_batches=accumulate_grad_batches,
                gradient_clip_val=gradient_clip_val,
                track_grad_norm=track_grad_norm,
                train_percent_check=train_percent_check,
                val_percent_check=val_percent_check,
                overfit_pct=overfit_pct,
                micro_batch_size=micro_batch_size,
                on_nonfinite=on_nonfinite,
                resume_from=resume_from,
                dataloader_options=dataloader_options,
            )
        )
        processes = processes_of(self._strategy)
        watched = warned_of_untrained(self, self._require_compiled())
        with self._together(processes), self._fitting(run.progress, run.history), watched:
            loop.fit(run)
        return self.history

    def plan(self, data: Any, y: Any = None, **fit_arguments: Any) -> Plan:
        """What `fit` would do with these arguments, as a table: it trains nothing and changes nothing.

        Arguments that fit would refuse are refused with the same words. Learning rate schedules are run through on a
        copy; a callable that makes a scheduler is called once with an optimizer over nothing.

        Args:
            data: as in `fit`; no batch of it is read.
            y: as in `fit`.
            fit_arguments: as in `fit`.

        Returns:
            The `fitkit.plan.Plan`, which prints as a table: batches and optimizer steps, what a step holds, device and
            precision, trainable parameters, the learning rate at the first and last step, who answers which hook.

        Raises:
            ValueError: as `fit`.
            TypeError: as `fit`.
        """
        from fitkit.plan import make_plan  # few scripts plan, and each would import it

        given = FitArguments.of(Model.fit, data, y, fit_arguments)
        with kept_random_state(self.device), kept_generators(data, given.validation_data):
            return make_plan(self._preparation().fit_run(given, introduces=False), self._require_compiled())

    def to_script(self, path: str | os.PathLike[str], **fit_arguments: Any) -> None:
        """Writes the run that `fit` would be as one short plain PyTorch script, which needs no fitkit.

        The script begins with the weights, the optimizer's state and the random numbers of now, and ends with the
        weights that fit would end with, bit for bit. Arrays are saved beside it, as ``<name>_data.pt``, the weights
        as ``<name>_start.pt``; for Datasets and loaders it has a function to fill in. Metrics and callbacks that only
        watch are left out.

        Args:
            path: of the script; the name ends in ``.py``.
            fit_arguments: as in `fit`, data among them.

        Raises:
            ValueError: as `fit`; or an argument that a plain script cannot say, which is named. Nothing is written.
            TypeError: as `fit`.
            OSError: a file cannot be written.
        """
        from fitkit.script import write_script  # as above

        if "data" not in fit_arguments:
            raise TypeError("Expected what fit is given, received no data. Write to_script(path, data=..., ...).")
        rest = {name: value for name, value in fit_arguments.items() if name not in ("data", "y")}
        given = FitArguments.of(Model.fit, fit_arguments["data"], fit_arguments.get("y"), rest)
        state = torch.get_rng_state()
        with kept_random_state(self.device), kept_generators(given.data, given.validation_data):
            run = self._preparation().fit_run(given, introduces=False)
            torch.set_rng_state(state)
            write_script(path, run, self._require_compiled(), given)

    def evaluate(
        self,
        data: Any,
        y: Any = None,
        *,
        batch_size: int | None = None,
        sample_weight: Any = None,
        steps: int | None = None,
        verbose: int | str = "auto",
        callbacks: Sequence[Callback] | Callback | None = None,
        return_dict: bool = False,
        dataloader_options: Mapping[str, Any] | None = None,
    ) -> float | list[float] | dict[str, float]:
        """Loss and metrics over data, as exact means over all of it.

        Args:
            data: as in `fit`.
            y: as in `fit`.
            batch_size: as in `fit`; the numbers do not depend on it. None may take more than 32 small samples at once.
            sample_weight: as in `fit`.
            steps: batches to take; None is all.
            verbose: as in `fit`.
            callbacks: whose test hooks are called.
            return_dict: whether to return all numbers by name.
            dataloader_options: as in `fit`.

        Returns:
            The loss, or a list in the order of `metrics_names`, or a dict.

        Raises:
            ValueError: arguments out of range or in conflict, or data that does not fit.
            TypeError: arguments of a wrong type.
        """
        prepared = self._preparation()
        check_flag("return_dict", return_dict)
        prepared.check_steps(validates=True)
        batching = prepared.batching(batch_size, loader_options=dataloader_options)
        batches = as_batches(data, y, sample_weight, batching)
        self._check_inputs(batches)
        prepared.check_parts(batches, "data")
        if batch_size is None and steps is None and not callbacks and prepared.may_enlarge_tests:
            batches = batches.in_large_batches()
        plan = plan_for_pass(batches, steps, self.device, prepared.processes)
        with (
            self._together(prepared.processes),
            self._listeners(prepared, callbacks, verbose, plan) as hooks,
            self._undisturbed(),
            loop.reported_errors(hooks),
        ):
            logs = loop.evaluate(prepared.test_run(plan, hooks))
        return self._returned(logs, return_dict)

    def predict(
        self,
        data: Any,
        *,
        batch_size: int | None = None,
        steps: int | None = None,
        verbose: int | str = "auto",
        callbacks: Sequence[Callback] | Callback | None = None,
        dataloader_options: Mapping[str, Any] | None = None,
    ) -> Any:
        """The module's outputs for all samples.

        Args:
            data: as in `fit`; of ``(x, y)`` and ``(x, y, sample_weight)`` only x is used.
            batch_size: as in `fit`; None may take more than 32 small samples at once.
            steps: batches to take; None is all.
            verbose: as in `fit`.
            callbacks: whose predict hooks are called.
            dataloader_options: as in `fit`.

        Returns:
            CPU tensors in the structure of the module's output, joined along the batch dimension. 0-d tensors and
            what is no tensor are left out. Where several processes share the work, each gets the outputs for all
            samples.

        Raises:
            ValueError: arguments out of range or in conflict, or data that does not fit.
            TypeError: arguments of a wrong type.
        """
        prepared = self._preparation(for_prediction=True)
        batching = prepared.batching(batch_size, loader_options=dataloader_options)
        batches = as_batches(data, None, None, batching)
        self._check_inputs(batches)
        if batch_size is None and steps is None and not callbacks and prepared.own.prediction is None:
            batches = batches.in_large_batches()
        plan = plan_for_pass(batches, steps, self.device, prepared.processes)
        step = PredictStep(prepared.compiled, prepared.own.prediction)
        shared = None if prepared.processes is None else SharedStep(step, step)
        with (
            self._together(prepared.processes),
            self._listeners(prepared, callbacks, verbose, plan) as hooks,
            self._undisturbed(),
            loop.reported_errors(hooks),
        ):
            outputs = loop.predict(loop.PredictRun(self, step, plan, hooks, shared or step))
            if shared is not None:
                outputs = joined_outputs(step, shared.taken)
        return _joined(outputs)

    def find_learning_rate(
        self,
        data: Any,
        y: Any = None,
        *,
        batch_size: int | None = None,
        sample_weight: Any = None,
        class_weight: Mapping[int, float] | None = None,
        start: float = 1e-7,
        end: float = 10.0,
        steps: int = 100,
        gradient_clip_val: float = 0,
        micro_batch_size: int | str | None = None,
        verbose: int | str = "auto",
    ) -> LearningRateCurve:
        """Trains for a moment with a growing learning rate, puts everything back, and says which rate to take.

        The rate grows by the same factor at each optimizer step until the loss explodes: until it is NaN, infinite, or
        its running mean is above its lowest by three times the first loss. Afterwards weights, buffers, gradients,
        optimizer, random generators and history are bit for bit what they were, also after an error or Ctrl-C. A
        generator of batches is read, and stays read.

        Args:
            data: as in `fit`.
            y: as in `fit`.
            batch_size: as in `fit`; the best rate depends on it.
            sample_weight: as in `fit`.
            class_weight: as in `fit`.
            start: the first learning rate.
            end: the last learning rate, if the loss has not exploded before.
            steps: how many rates there are, one a batch; data with fewer batches is read again.
            gradient_clip_val: as in `fit`.
            micro_batch_size: as in `fit`.
            verbose: as in `fit`, but "auto" shows nothing where there is no terminal or notebook.

        Returns:
            The curve, with ``suggestion``, ``rates``, ``losses`` and ``plot()``.

        Raises:
            ValueError: arguments out of range or in conflict, or data that does not fit or gives too few batches.
            TypeError: arguments of a wrong type.
        """
        prepared = self._preparation()
        # A line for each of many short epochs would say nothing.
        level = 0 if verbose == "auto" and resolve_verbose(verbose) == 2 else verbose
        test = RangeTest(start, end, steps)
        processes = prepared.processes
        if processes is not None and processes.world > 1:
            raise ValueError(
                f"find_learning_rate(...) works in one process, received {processes.world}. Call it in a script that "
                "is started without torchrun; the rate holds for any number of processes, as batch_size does."
            )
        if self._progress is not None:
            raise ValueError("find_learning_rate(...) was called from within a fit of the same Model. Call it before.")
        batches = as_batches(data, y, sample_weight, prepared.batching(batch_size, training=True))
        # An epoch has one batch at least; the test ends the run by itself.
        epochs = -(-steps // (batches.length or 1)) if batches.again else 1
        history, stop_training, seen = self.history, self.stop_training, (self._latest_input, self._columns)
        try:
            with undone(prepared.compiled, data):
                self.fit(
                    data,
                    y,
                    batch_size=batch_size,
                    epochs=epochs,
                    verbose=level,
                    callbacks=[test],
                    sample_weight=sample_weight,
                    class_weight=class_weight,
                    gradient_clip_val=gradient_clip_val,
                    micro_batch_size=micro_batch_size,
                    on_nonfinite="ignore",
                )
        finally:
            self.history, self.stop_training, (self._latest_input, self._columns) = history, stop_training, seen
        if not test.is_finished:
            raise ValueError(
                f"Expected data of at least {steps=} batches, received a generator that gave {len(test.losses)}. Lower "
                "steps, or pass data that can be read again."
            )
        return LearningRateCurve(test.rates, test.losses)

    def train_on_batch(
        self,
        x: Any,
        y: Any = None,
        *,
        sample_weight: Any = None,
        class_weight: Mapping[int, float] | None = None,
        return_dict: bool = False,
    ) -> float | list[float] | dict[str, float]:
        """One optimizer step on one batch.

        Args:
            x: the inputs of the batch, or a whole batch.
            y: its targets.
            sample_weight: as in `fit`.
            class_weight: as in `fit`.
            return_dict: whether to return the numbers by name.

        Returns:
            Loss and metrics of this batch alone, before the step, as `evaluate` returns them.

        Raises:
            ValueError: arguments out of range or in conflict, or data that does not fit.
            TypeError: arguments of a wrong type.
        """
        check_flag("return_dict", return_dict)
        if self._strategy == "fsdp":
            raise ValueError('train_on_batch(...) trains whole batches in each process, which strategy="fsdp" cannot.')
        prepared = self._preparation()
        compiled = prepared.compiled
        step = TrainStep(compiled, prepared.own.training, prepared.class_weight(class_weight, sample_weight))
        batch = _one_batch(prepared, _whole(x, y, compiled), y, sample_weight)
        with self._alike(), kept_modes(self.module), kept_gradients(held_parameters(compiled)):
            if not self.module.training:
                self.module.train()
            step(batch, 0)
            logs, _ = step.epoch_logs()
        return self._returned(logs, return_dict)

    def test_on_batch(
        self, x: Any, y: Any = None, *, sample_weight: Any = None, return_dict: bool = False
    ) -> float | list[float] | dict[str, float]:
        """Loss and metrics of one batch, without training.

        Args:
            x: the inputs of the batch, or a whole batch.
            y: its targets.
            sample_weight: as in `fit`.
            return_dict: whether to return the numbers by name.

        Returns:
            Loss and metrics of this batch alone, as `evaluate` returns them.

        Raises:
            ValueError: arguments out of range or in conflict, or data that does not fit.
            TypeError: arguments of a wrong type.
        """
        check_flag("return_dict", return_dict)
        prepared = self._preparation()
        prepared.check_steps(validates=True)
        step = TestStep(prepared.compiled, prepared.own.validation)
        batch = _one_batch(prepared, _whole(x, y, prepared.compiled), y, sample_weight)
        with self._alike(), self._undisturbed(), kept_modes(self.module):
            self.module.eval()
            step(batch, 0)
            logs = step.epoch_logs()
        return self._returned(logs, return_dict)

    def predict_on_batch(self, x: Any) -> Any:
        """The module's output for one batch, on the CPU, in its own structure.

        Args:
            x: the inputs of the batch, or a whole batch.

        Raises:
            ValueError: data that does not fit.
            TypeError: data of a wrong type.
        """
        prepared = self._preparation(for_prediction=True)
        step = PredictStep(prepared.compiled, prepared.own.prediction)
        batch = _one_batch(prepared, x, None, None)
        with self._alike(), self._undisturbed(), kept_modes(self.module):
            self.module.eval()
            step(batch, 0)
        return _joined(step.outputs)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """The loss of a training batch; override it for a loss that compile cannot express.

        A step of your own is given the batch as the data gave it, on the device, under the precision of compile. When
        the loss that it returns has no gradient (``loss.detach()``), it is taken to have stepped by itself, as a GAN
        with two optimizers does: then there is no backward pass and no optimizer step.

        Args:
            batch: x, ``(x, y)`` or ``(x, y, sample_weight)``, or what a loader gives.
            batch_idx: 0-based index in the epoch.

        Returns:
            The loss as a tensor of one number, or a dict with "loss" and further numbers to log as means over the
            epoch. They are weighted by samples unless "weight" stands beside them. With "output" and "target" in the
            dict, the compiled metrics compare these.
        """
        return total_loss(self._require_compiled(), batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        """The loss of a validation batch; override it as `training_step`.

        Args:
            batch: as in `training_step`.
            batch_idx: as in `training_step`.

        Returns:
            As `training_step`.
        """
        return total_loss(self._require_compiled(), batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """The outputs for a batch; override it for outputs that are not simply the module's.

        Args:
            batch: as in `training_step`; what predict was given, targets included.
            batch_idx: as in `training_step`.

        Returns:
            Tensors, batch first, or nests of them.
        """
        step = PredictStep(self._preparation(for_prediction=True).compiled)
        step(batch, batch_idx)
        return step.outputs[0]

    def summary(self, input_data: Any = None, *, depth: int = 3, print_fn: Callable[[str], Any] = print) -> None:
        """Prints a table of the layers: name, output shape, parameters, trainable; with totals, sizes, multiply-adds.

        Args:
            input_data: a batch of inputs, for output shapes. None takes zeros of the shapes of the latest fit's last
                batch (of its last part, with micro_batch_size); before a fit, after one with a training_step of your
                own or with batch objects of another library, it leaves the shapes out.
            depth: how many levels of nested modules are shown.
            print_fn: what the text is given to; of several processes, print is called by rank 0 alone.

        Raises:
            ValueError: depth is below 1.
            TypeError: input_data is the shape of a batch instead of one.
        """
        check_integer("depth", depth, least=1)
        check_is_no_shape(input_data)
        if input_data is not None:
            batch = _one_batch(self._preparation(for_prediction=True), input_data, None, None)
            text = summarize(self.module, unpack(batch)[0], depth=depth)
        elif self._latest_input is None:
            text = summarize(self.module, depth=depth)
        else:
            text = summarize_remembered(self.module, self._latest_input, depth=depth)
        processes = processes_of(self._strategy)
        if print_fn is not print or processes is None or processes.rank == 0:
            print_fn(text)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the whole training state, as a whole or not at all.

        That is the module's state, the optimizer's, the history and the random state; in a callback of a fit also
        where the run is. `load` reads it, and ``fit(resume_from=path)`` goes on from it. Optimizers, schedulers,
        generators and modules that a subclass keeps as attributes, or in lists and dicts, are part of it; what a module
        keeps outside of its state_dict is not. After a batch a callback that saves keeps what those in front of it have
        done, not what those behind it do then.

        With strategy="fsdp" the path is that of a folder, in which torch's distributed checkpoint has what is sharded;
        any number of processes can read it, with any strategy.

        Args:
            path: where to.

        Raises:
            ValueError: not compiled; or called in a fit before a batch's step or in its midst.
            TypeError: a state holds something that no file can be trusted with; the message says where.
            OSError: the file cannot be written; what was there before is intact.
        """
        compiled = self._require_compiled()
        with self._together(processes_of(self._strategy)):
            if self._progress is not None:
                state = self._progress.state_dict()
            else:
                state = {**model_state(self, compiled), "run": self._ended()}
            if is_sharded(self.module):
                save_sharded(path, state)
            else:
                by_first(lambda: save_state(path, state))

    def load(self, path: str | os.PathLike[str]) -> None:
        """Reads weights, optimizer and history from a file of `save`; a fit after it trains all its epochs.

        Args:
            path: where from.

        Raises:
            ValueError: not compiled, or called in a fit; or the file is damaged, or of another module, optimizer or
                precision. The Model is unchanged then.
        """
        compiled = self._require_compiled()
        if self._progress is not None:
            raise ValueError("load(...) was called from within a fit of the same Model. Use fit(resume_from=...).")
        state = read_training_state(path, self.module)
        load_model(self, compiled, state, path)
        run = state["run"]
        self._ended = lambda: run

    def save_weights(self, path: str | os.PathLike[str]) -> None:
        """Writes the module's state_dict, as a whole or not at all; a ``.safetensors`` path uses safetensors.

        Args:
            path: where to.
        """
        with self._together(processes_of(self._strategy)):
            values = whole_state(self.module) if is_sharded(self.module) else None
            by_first(lambda: save_weights(self.module, path, values))

    def load_weights(self, path: str | os.PathLike[str]) -> None:
        """Reads weights that `save_weights` or ``torch.save(module.state_dict(), path)`` wrote.

        Of a file of `save`, `ModelCheckpoint` or `BackupAndRestore` it takes the weights alone: this needs no compile
        and no optimizer like the one before.

        Args:
            path: where from.

        Raises:
            ValueError: the file is damaged, no such file format, or of another module; the module is unchanged.
        """
        if os.path.isdir(path):
            fill(self.module, read_training_state(path, self.module)["weights"], path)
        else:
            load_weights(self.module, path)

    def _require_compiled(self) -> Compiled:
        if self._compiled is None:
            raise ValueError("Expected a compiled model. Call model.compile(optimizer=..., loss=...) first.")
        return self._compiled

    @property
    def _own_steps(self) -> OwnSteps:
        return OwnSteps(
            _overridden(self, "training_step"),
            _overridden(self, "validation_step"),
            _overridden(self, "predict_step"),
            is_subclass=type(self) is not Model,
        )

    def _preparation(self, *, for_prediction: bool = False) -> Preparation:
        """What makes runs of the Model as it is now; a prediction needs no compile and takes the module as it is."""
        compiled = self._compiled if for_prediction else self._require_compiled()
        if compiled is None:
            nothing = CompiledMetrics(None, None, output_names=None)
            compiled = Compiled(self.module, self.module, None, nothing, "32-true", self.device)
        return Preparation(self, compiled, self._own_steps, processes_of(self._strategy))

    @contextmanager
    def _fitting(self, progress: Progress, history: History) -> Iterator[None]:
        """While the fit runs, a save is one of its state; afterwards of how it ended. Says what the run has found."""
        before, self.history = self.history, history
        self.stop_training = False
        self._progress = progress
        error: BaseException | None = None
        try:
            yield
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._progress = None
            if progress.undo():
                self.history = before
            else:
                self._ended = progress.ended(error)
            self._latest_input = progress.step.latest_input
            self._columns = columns_of(progress.batches.data.inputs)
            report_size(progress.flags, progress.part_size, self.history.params)

    @contextmanager
    def _listeners(
        self, prepared: Preparation, callbacks: Any, verbose: int | str, plan: EpochPlan
    ) -> Iterator[HookTable]:
        """The hooks of an evaluation or a prediction; callbacks of a fit around it keep the parameters of the fit."""
        chosen = check_callbacks(callbacks)
        before = [(callback, callback.params) for callback in chosen]
        try:
            yield prepared.hooks(chosen, {"steps": plan.length, "verbose": prepared.verbose_level(verbose)})
        finally:
            for callback, params in before:
                callback.set_params(params)

    @contextmanager
    def _together(self, processes: Processes | None) -> Iterator[None]:
        """While a run lasts, the processes have a group; they begin with the weights and random state of rank 0."""
        if processes is None or running() is not None:
            yield
            return
        with together(processes, self.device):
            held = self.module.parameters() if self._compiled is None else held_parameters(self._compiled)
            share_tensors([*held, *self.module.buffers()])
            share_random_state(self.device)
            yield
            share_random_state(self.device)

    @contextmanager
    def _alike(self) -> Iterator[None]:
        """For one batch, which each process takes whole: all of them draw the same, and so stay the same."""
        processes, is_within = processes_of(self._strategy), running() is not None
        if processes is None:
            yield
            return
        with self._together(processes), kept_random_state(self.device) if is_within else nullcontext():
            share_random_state(self.device)
            yield

    def _check_inputs(self, batches: Batches) -> None:
        """Refuses what the names of columns, or the dimensions, tell to be no batch of what was trained on."""
        check_columns(batches.inputs, self._columns)
        if self._latest_input is not None:
            check_is_batch(batches.inputs, dict(Layout(self._latest_input, "").leaves))

    def _undisturbed(self) -> AbstractContextManager[None]:
        """Inside a fit, what a callback evaluates or predicts changes nothing that the fit draws."""
        if self._progress is not None:
            return self._progress.beside()
        return kept_random_state(self.device) if loop.is_fitting() else nullcontext()

    def _returned(self, logs: dict[str, float], return_dict: bool) -> float | list[float] | dict[str, float]:
        if return_dict:
            return logs
        numbers = [logs[name] for name in self.metrics_names if name in logs]
        return numbers[0] if len(numbers) == 1 else numbers


def _overridden(model: Model, name: str) -> UserStep | None:
    """A step of the user's own; None where it is the one of Model."""
    step: UserStep = getattr(model, name)
    return None if getattr(step, "__func__", None) is getattr(Model, name) else step


def _one_batch(prepared: Preparation, x: Any, y: Any, sample_weight: Any) -> Any:
    """Arrays as one batch of tensors; any other batch object as it is."""
    if y is None and not isinstance(x, (Tensor, tuple, list, Mapping)) and not hasattr(x, "__array__"):
        return x
    iterator: Iterator[Any] = iter(as_batches(x, y, sample_weight, replace(prepared.batching(None), whole=True)))
    return next(iterator)


def _whole(x: Any, y: Any, compiled: Compiled) -> Any:
    """A list without targets beside it, where a loss needs some, is a loader's whole batch."""
    return tuple(x) if isinstance(x, list) and y is None and compiled.losses is not None else x


def _joined(outputs: list[Any]) -> Any:
    joined = join(outputs)
    if joined is None:
        raise ValueError(
            "Expected outputs with a batch dimension, tensors or nests of them, received others. Override predict_step "
            "to return what is to be joined."
        )
    return joined


def _nothing() -> None:
    """There was no fit yet."""
