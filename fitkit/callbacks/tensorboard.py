"""The numbers of a run as TensorBoard's event files, written by torch's writer."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch

from fitkit.callbacks.callback import Callback
from fitkit.callbacks.extras import check_hyperparameters, import_extra, measured_numbers
from fitkit.callbacks.optimizer import LEARNING_RATE
from fitkit.device import kept_modes, kept_random_state
from fitkit.errors import check_flag, check_integer, show
from fitkit.log_keys import is_detail
from fitkit.optimization import learning_rates


@final
class TensorBoard(Callback):
    """Writes event files for TensorBoard; ``tensorboard --logdir logs`` shows them. It needs no TensorFlow.

    As with Keras's callback, training writes into the folder ``train`` and validation into ``validation``, so that
    "epoch_loss" of both is one chart, over 0-based epochs. What the epoch's logs have is written: loss, metrics,
    gradient norms, and what other callbacks have added before; and in any case the learning rate (of the first
    parameter group). Batches are counted over the whole run, and over a resumed one. The device is read only when
    something is written.

    Args:
        log_dir: the folder; it is made.
        histogram_freq: epochs between two histograms of each parameter; 0 is none.
        write_graph: whether to write the module's graph, by one more forward pass, in eval mode, over the inputs of
            the first batch. (Keras's default is True; here it is a pass through ``torch.jit.trace``, which not every
            module can take.)
        write_steps_per_second: whether to write "epoch_steps_per_second", batches of training over the time from the
            epoch's beginning to its end.
        update_freq: "epoch", "batch", or the number of batches between two writings of "batch_loss" (of that batch
            alone), ``batch_`` and the name of each metric (the epoch's mean so far), "batch_learning_rate" and the
            total gradient norm of the last step.
        hyperparameters: {name: value} for the page HPARAMS, with the last epoch's numbers as "hparam/loss" and so on;
            values are numbers, strings or booleans.

    Raises:
        ImportError: tensorboard is not installed.
        TypeError: an argument is of a wrong type.
        ValueError: an argument is out of range; in the first batch, a module whose graph cannot be traced.
    """

    adds_to_logs = ()
    counts_itself: Mapping[str, str] = {"batch": "It counts batches itself: see its update_freq."}
    only_on_rank_0 = True

    def __init__(
        self,
        log_dir: str | os.PathLike[str] = "logs",
        histogram_freq: int = 0,
        *,
        write_graph: bool = False,
        write_steps_per_second: bool = False,
        update_freq: int | str = "epoch",
        hyperparameters: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(log_dir, (str, os.PathLike)):
            raise TypeError(f"Expected a path, received log_dir={show(log_dir)}.")
        import_extra("torch.utils.tensorboard", "tensorboard", "TensorBoard")
        self.log_dir = os.fspath(log_dir)
        self.histogram_freq = check_integer("histogram_freq", histogram_freq, least=0)
        self.write_graph = check_flag("write_graph", write_graph)
        self.write_steps_per_second = check_flag("write_steps_per_second", write_steps_per_second)
        self.update_freq = update_freq
        self._interval = _interval(update_freq)
        self.hyperparameters = check_hyperparameters(hyperparameters)
        self._writers: dict[str, Any] = {}
        self._listening: Any = None
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_writers": {}, "_listening": None, "_inputs": None}

    def _forget(self) -> None:
        self._batches = 0
        self._batches_before = 0
        self._epoch_began = 0.0
        self._inputs: tuple[Any, Mapping[str, Any]] | None = None
        self._latest: dict[str, float] = {}

    def on_train_begin(self, logs: Mapping[str, float] | None = None) -> None:
        """Makes the folder of training."""
        self._forget()
        self._writer("train")
        if self.write_graph:
            module = self.model.module
            self._listening = module.register_forward_pre_hook(self._keep_inputs, with_kwargs=True)

    def _keep_inputs(self, module: Any, arguments: Any, keywords: Mapping[str, Any]) -> None:
        # Inside torch.compile there is nothing to keep; the graph is then that of a later, plain pass, if there is one.
        if self._inputs is None and not torch.compiler.is_compiling():
            self._inputs = (arguments, keywords)

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Notes the time."""
        self._epoch_began, self._batches_before = time.monotonic(), self._batches

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Counts the batch, and writes when it is time."""
        if self._inputs is not None:
            self._add_graph(*self._inputs)
        if self._interval and self._batches % self._interval == 0:
            self._add_batch(logs or {})
        self._batches += 1

    def _add_batch(self, logs: Mapping[str, Any]) -> None:
        writer = self._writer("train")
        for key in logs:
            # The mean so far has the name of this batch's loss in Keras; the batch's own says more.
            if key != "loss" and not is_detail(key):
                name = key if key.startswith("batch_") else f"batch_{key}"
                writer.add_scalar(name, float(logs[key]), self._batches)
        if self.model.optimizer is not None:
            writer.add_scalar(f"batch_{LEARNING_RATE}", learning_rates(self.model.optimizer)[0], self._batches)

    def _add_graph(self, arguments: Any, keywords: Mapping[str, Any]) -> None:
        self._stop_listening()
        module = self.model.module
        if keywords:
            raise ValueError(
                "write_graph=True needs a module that takes its inputs by position, received inputs by keyword: "
                f"{', '.join(keywords)}. Leave write_graph out."
            )
        try:
            with kept_modes(module), kept_random_state(self.model.device), torch.no_grad(), warnings.catch_warnings():
                # The writer's own use of it; the category differs between versions of torch.
                warnings.filterwarnings("ignore", ".torch.jit.*is deprecated")
                # It traces in eval mode, and gives all modules the root's mode afterwards.
                self._writer("train").add_graph(module, arguments, use_strict_trace=False)
        except Exception as error:
            raise ValueError(
                "write_graph=True needs a module that torch.jit.trace can follow, received one that it cannot. Leave "
                f"write_graph out. ({error})"
            ) from error

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Writes the epoch."""
        numbers = measured_numbers(self, logs)
        if self.write_steps_per_second:
            seconds = time.monotonic() - self._epoch_began
            numbers["steps_per_second"] = (self._batches - self._batches_before) / max(seconds, 1e-9)
        for key, number in numbers.items():
            folder = "validation" if key.startswith("val_") else "train"
            self._writer(folder).add_scalar(f"epoch_{key.removeprefix('val_')}", number, epoch)
        if self.histogram_freq and (epoch + 1) % self.histogram_freq == 0:
            for name, parameter in self.model.module.named_parameters():
                self._writer("train").add_histogram(name, parameter.detach(), epoch)
        for writer in self._writers.values():
            writer.flush()
        self._latest = numbers

    def on_train_end(self, logs: Mapping[str, float] | None = None) -> None:
        """Writes the hyperparameters and closes the files."""
        self._close()

    def on_exception(self, error: BaseException) -> None:
        """Writes the hyperparameters and closes the files after an error, too."""
        self._close()

    def _close(self) -> None:
        self._stop_listening()
        try:
            if self.hyperparameters and self._writers:
                shown = {f"hparam/{key}": number for key, number in self._latest.items() if not is_detail(key)}
                self._writer("train").add_hparams(self.hyperparameters, shown, run_name=".")
        finally:
            while self._writers:
                self._writers.popitem()[1].close()

    def _stop_listening(self) -> None:
        self._inputs = None
        if self._listening is not None:
            self._listening.remove()
            self._listening = None

    def _writer(self, folder: str) -> Any:
        if folder not in self._writers:
            tensorboard = import_extra("torch.utils.tensorboard", "tensorboard", "TensorBoard")
            self._writers[folder] = tensorboard.SummaryWriter(str(Path(self.log_dir) / folder))
        return self._writers[folder]

    def state_dict(self) -> dict[str, Any]:
        """How many batches were trained on."""
        return {"batches": self._batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on counting; called after ``on_train_begin``.

        Args:
            state: what ``state_dict`` returned.
        """
        self._batches = state["batches"]


def _interval(update_freq: int | str) -> int:
    """Batches between two writings; 0 is none."""
    if isinstance(update_freq, str):
        if update_freq not in ("batch", "epoch"):
            raise ValueError(f'Expected "epoch", "batch" or a number of batches, received update_freq={update_freq!r}.')
        return 1 if update_freq == "batch" else 0
    return check_integer("update_freq", update_freq, least=1)
