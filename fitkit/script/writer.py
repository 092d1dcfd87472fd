"""A run as one plain PyTorch script: what it is made of is looked at here, and written down by the template.

The script does what fit does, so that it ends with the same weights; what it cannot say is an error before anything is
written.
"""

from __future__ import annotations

import math
import os
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from fitkit.checkpoints import write_atomically
from fitkit.computation import Compiled, transfer_of
from fitkit.errors import show
from fitkit.flags import FitArguments, TrainingFlags
from fitkit.loop import FitRun
from fitkit.script.expressions import WIDTH, fold, literal, own_name, unknown
from fitkit.script.listeners import Listeners, listeners_of, stopping_text
from fitkit.script.losses import LossText, class_weight_text, loss_text
from fitkit.script.making import conversion, evaluation_names, frozen_names, holds_all, module_line, optimizer_line
from fitkit.script.sources import source_of, tensors_saved
from fitkit.script.template import CLOSING, JUDGING, SCRIPT, STEP, render

IMPORTS = {
    "from copy import deepcopy": r"\bdeepcopy\(",
    "from itertools import islice": r"\bislice\(",
    "from math import isfinite, isnan": r"\bisfinite\(.*\bisnan\(",
    "from math import isfinite": r"\bisfinite\(",
    "from math import isnan": r"\bisnan\(",
    "from pathlib import Path": r"\bPath\(",
}
TORCH_IMPORTS = {
    "import torch": r"\btorch\.",
    "import torch.nn.functional as F": r"\bF\.",
    "from torch import nn": r"\bnn\.",
    "from torch.utils.data import DataLoader, TensorDataset": r"\bDataLoader\(",
}


def write_script(path: Any, run: FitRun, compiled: Compiled, given: FitArguments) -> None:
    """Writes the script, and beside it what it begins with.

    Args:
        path: where to; the name ends in ``.py``.
        run: the run, prepared and not begun.
        compiled: what `Model.compile` made.
        given: the arguments of fit.

    Raises:
        ValueError: something that a plain script cannot say; nothing is written.
        TypeError: path is no path.
        OSError: a file cannot be written.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"Expected the path of a script, received path={show(path)}.")
    target = Path(os.fspath(path))
    if target.suffix != ".py" or not target.stem:
        raise ValueError(f"Expected a name that ends in .py, received path={str(target)!r}.")
    _check(run, compiled)
    writer = _Writer(target.stem, run, compiled, given)
    text = writer.text()
    saved = tensors_saved(writer.sources)
    if saved:
        write_atomically(target.with_name(writer.data_file), lambda file: torch.save(saved, file))
    start = writer.start()
    write_atomically(target.with_name(writer.start_file), lambda file: torch.save(start, file))
    write_atomically(target, lambda file: file.write(text.encode()))


def _check(run: FitRun, compiled: Compiled) -> None:
    """Refuses what no script of this kind says, apart from what the parts refuse by themselves."""
    by_hand = "Write the loop by hand, from the script of a run without it."
    model = type(run.model)
    for name in ("training_step", "validation_step"):
        if getattr(model, name).__module__ != "fitkit.model" or name in vars(run.model):
            raise unknown(name, "one of your own", by_hand)
    if compiled.losses is None or compiled.losses.names is not None:
        raise unknown("compile(loss=...)", "none, or one for each output", by_hand)
    if compiled.precision == "16-mixed":
        raise unknown("compile(precision=...)", '"16-mixed"', 'Use "bf16-mixed".')
    if compiled.channels_last:
        raise unknown("compile(channels_last=...)", "True", by_hand)
    if run.flags.micro_batch_size is not None:
        raise unknown("micro_batch_size", repr(run.flags.micro_batch_size), "Leave it out: the step is the same.")
    if run.progress.saved is not None:
        raise unknown("resume_from", str(run.progress.saved[1]), "Load it with model.load(path) first.")
    assert compiled.optimizer is not None  # fit has refused to train nothing
    for parameter, kept in compiled.optimizer.state.items():
        for name, value in kept.items():
            # torch gives all but the step the parameter's dtype when it loads a state.
            floats = name != "step" and isinstance(value, torch.Tensor) and value.is_floating_point()
            if floats and value.dtype != parameter.dtype:
                what = f"one that keeps {name} as {value.dtype}, which torch does not load as it was"
                raise unknown("compile(optimizer=...)", what, "Compile anew, for a run from the beginning.")


class _Writer:
    """The words and values that the template is filled with, for one run."""

    def __init__(self, stem: str, run: FitRun, compiled: Compiled, given: FitArguments) -> None:
        assert compiled.losses is not None  # checked before
        assert compiled.optimizer is not None
        # First of all, as looking at a first batch may draw.
        self._seed, self._random = _random(compiled.device)
        self.start_file, self.data_file = f"{stem}_start.pt", f"{stem}_data.pt"
        self._stem, self._run, self._compiled, self._flags = stem, run, compiled, run.flags
        self._optimizer: Optimizer = compiled.optimizer
        self._module = compiled.module
        self._epochs = range(run.flags.initial_epoch, run.flags.last_epoch)
        self._windows = any(run.flags.window(epoch) > 1 for epoch in self._epochs)
        transfer = transfer_of(compiled)
        training = source_of(run.batches, transfer, given.data, "training", _limit(run.flags), self._windows)
        self.sources = [training]
        if run.validation is not None:
            limit = _validation_limit(run.flags)
            given_data = given.data if given.validation_data is None else given.validation_data
            of_validation = source_of(run.validation.batches, transfer, given_data, "validation", limit, False)
            self.sources.append(of_validation)
        loss = compiled.losses.losses[0]
        assert loss is not None  # the only one
        self._loss: LossText = loss_text(loss, self.sources, compiled, run.batches.data)
        self._class_weight = ""
        if given.class_weight is not None:
            weights = {int(key): float(value) for key, value in given.class_weight.items()}
            constant, self._class_weight = class_weight_text(weights, training, loss, compiled.device)
            self._loss.constants.append(fold(constant))
        self._heard: Listeners = listeners_of(run.callbacks, self._optimizer, self._epochs)
        self._module_text, of_module = module_line(self._module)
        self._optimizer_text, of_optimizer = optimizer_line(self._optimizer, self._module)
        self._imports = [*self._loss.imports, *self._heard.imports, *of_module, *of_optimizer]
        _check_names(self._imports)

    def start(self) -> dict[str, Any]:
        """What the script begins with: weights, and what else is not as it is anew."""
        start: dict[str, Any] = {"module": self._module.state_dict(), **self._random}
        if self._optimizer.state:
            start["optimizer"] = self._optimizer.state_dict()
        return start

    def text(self) -> str:
        """The script."""
        words, values = self._words(), self._values()
        values["closing"] = render(CLOSING, words, values)
        values["step"] = render(STEP, words, values)
        stopping = self._heard.stopping
        if stopping is not None:
            values["stopping"] = stopping_text(stopping, self._flags.min_nb_epochs)
        values["judging"] = render(JUDGING, words, values)
        values["imports"] = ""
        body = render(SCRIPT, words, values)
        return render(SCRIPT, words, {**values, "imports": self._import_lines(body)})

    def _words(self) -> dict[str, bool]:
        flags, heard, stopping = self._flags, self._heard, self._heard.stopping
        norms, clips = flags.track_grad_norm != -1, flags.gradient_clip_val > 0
        same_norm = norms and clips and flags.track_grad_norm == 2
        return {
            "saves_data": any(source.saved is not None for source in self.sources),
            "converts": bool(conversion(self._module, self._compiled.device)),
            "freezes": bool(frozen_names(self._module)),
            "jit": self._compiled.forward is not self._module,
            "some_parameters": not holds_all(self._optimizer, self._module) and (self._windows or norms or clips),
            "goes_on": bool(self._optimizer.state),
            "schedules": bool(heard.schedulers),
            "has_constants": bool(self._loss.constants or heard.constants),
            "validates": len(self.sources) > 1,
            "sometimes": flags.validation_freq != 1,
            "moves": bool(self._moved()),
            "bf16": self._compiled.precision == "bf16-mixed",
            "evals": bool(evaluation_names(self._module)),
            "stops": stopping is not None,
            "restores": stopping is not None and stopping.restore_best_weights,
            "changes_windows": self._windows and not isinstance(flags.accumulate_grad_batches, int),
            "sets_rates": heard.rate is not None,
            "norms": norms,
            "windows": self._windows,
            "ignores": bool(self._loss.most),
            "raises": flags.on_nonfinite == "raise",
            "breaks": flags.on_nonfinite == "stop",
            "schedules_epochs": bool(heard.by_epoch),
            "stops_on_loss": stopping is not None and stopping.monitor == "loss",
            "stops_on_val_loss": stopping is not None and stopping.monitor == "val_loss",
            "schedules_plateaus": bool(heard.plateau),
            "schedules_steps": bool(heard.by_step),
            "other_norms": norms and not same_norm,
            "clips": clips,
            "same_norm": same_norm,
        }

    def _values(self) -> dict[str, str]:
        flags, heard, loss, device = self._flags, self._heard, self._loss, self._compiled.device
        training, validation = self.sources[0], self.sources[-1]
        order = flags.track_grad_norm
        left_out = [*heard.left_out, *(["metrics"] if self._compiled.metrics.names else [])]
        left = f" Left out: {', '.join(left_out)}." if left_out else ""
        about = (
            "Weights and random numbers begin as they were when this file was written, so that it ends with the "
            f"weights that fit would have ended with.{left}"
        )
        return {
            "title": f"Trains a {type(self._module).__name__} in plain PyTorch, as fitkit's Model.fit does.",
            "about": textwrap.fill(about, WIDTH),
            "start_file": self.start_file,
            "data_file": self.data_file,
            "trained_file": f"{self._stem}_trained.pt",
            "module": self._module_text,
            "conversion": conversion(self._module, self._compiled.device),
            "frozen": fold(literal(frozen_names(self._module)) or "", room=13),
            "optimizer": self._optimizer_text,
            "schedulers": "\n".join(heard.schedulers),
            "constants": "\n".join([*loss.constants, *heard.constants]),
            "training": training.lines,
            "validation": validation.lines,
            "arguments": self._arguments(),
            "moving": self._moved(),
            "device": device.type,
            "computing": self._computing(),
            "weight": loss.weight,
            "evals": fold(literal(evaluation_names(self._module)) or "", 4, room=13),
            "fork": "devices=[]" if device.type == "cpu" else f'devices=["{device}"]',
            "validation_batch": validation.batch,
            "validation_batches": validation.batches,
            "validation_given": validation.batch,
            "seed": self._seed,
            "epochs": ", ".join(map(str, ([self._epochs.start] if self._epochs.start else []) + [self._epochs.stop])),
            "accumulate": _accumulation(flags),
            "rate": heard.rate or "",
            "batch": f"({training.batch})" if self._windows else training.batch,
            "training_batches": training.batches,
            "given": training.batch + (f", {self._class_weight}" if self._class_weight else ""),
            "first_weight": f"(weight or {loss.most})" if loss.most else "weight",
            "validates_now": _frequency(flags.validation_freq),
            "epoch_schedules": "\n".join(heard.by_epoch),
            "plateau_schedules": "\n".join(heard.plateau),
            "step_schedules": "\n".join(heard.by_step),
            "all_parameters": "module.parameters()" if holds_all(self._optimizer, self._module) else "parameters",
            "order": 'float("inf")' if order == math.inf else str(literal(order)),
            "clip": literal(flags.gradient_clip_val) or "",
            "stopping": "",
        }

    def _arguments(self) -> str:
        """The arguments of compute, whose last one is there in training or in validation only, or in both."""
        names = ", ".join([*self.sources[0].inputs, "y"])
        weighted = self._weighted()
        return names if not any(weighted) else f"{names}, w" if all(weighted) else f"{names}, w=None"

    def _weighted(self) -> list[bool]:
        return [source.weighted or (bool(self._class_weight) and source.name == "training") for source in self.sources]

    def _computing(self) -> str:
        source, weighted = self.sources[0], self._weighted()
        given = ", ".join(source.inputs)
        if source.keywords is not None:
            pairs = zip(source.keywords, source.inputs, strict=True)
            given = ", ".join(f"{keyword}={name}" for keyword, name in pairs)
        called = "module" if self._compiled.forward is self._module else "compiled"
        lines = [f"output = {called}({given})"]
        if not any(weighted):
            lines += self._loss.plain
        elif all(weighted):
            lines += self._loss.items
        else:
            lines.append("if w is None:")
            lines += [f"    {line}" for line in self._loss.plain]
            lines.append("else:")
            lines += [f"    {line}" for line in self._loss.items]
        return "\n".join(fold(line, room=8) for line in lines)

    def _moved(self) -> str:
        """The lines that take a batch to the device, and to another dtype where a loader does not give that of fit."""
        casts = {name: dtype for source in self.sources for name, dtype in source.casts.items()}
        places = [] if self._compiled.device.type == "cpu" else [f'"{self._compiled.device}"']
        lines = []
        for name in [*self.sources[0].inputs, "y"]:
            arguments = [*places, *([str(casts[name])] if name in casts else [])]
            lines += [f"{name} = {name}.to({', '.join(arguments)})"] if arguments else []
        return "\n".join(lines)

    def _import_lines(self, body: str) -> str:
        flat = body.replace("\n", " ")
        chosen = [line for line, pattern in IMPORTS.items() if re.search(pattern, flat)]
        if "from math import isfinite, isnan" in chosen:
            chosen = [line for line in chosen if line not in ("from math import isfinite", "from math import isnan")]
        torches = [line for line, pattern in TORCH_IMPORTS.items() if re.search(pattern, body)]
        if "TensorDataset(" not in body:
            torches = [line.replace("DataLoader, TensorDataset", "DataLoader") for line in torches]
        own: dict[str, set[str]] = {}
        for module, name in self._imports:
            own.setdefault(module, set()).add(name)
        lines = [f"from {module} import {', '.join(map(_imported, sorted(own[module])))}" for module in sorted(own)]
        return "\n\n".join("\n".join(group) for group in (chosen, torches, lines) if group)


def _imported(name: str) -> str:
    """A name of the user's as it is imported."""
    own = own_name(name)
    return name if own == name else f"{name} as {own}"


def _check_names(imports: Sequence[tuple[str, str]]) -> None:
    """Refuses two things of one name: a script would take one for the other."""
    homes: dict[str, tuple[str, str]] = {}
    for module, name in imports:
        first, first_name = homes.setdefault(own_name(name), (module, name))
        if (first, first_name) != (module, name):
            what = f"{first_name} of {first} and {name} of {module}"
            raise unknown("two things of one name", what, "Rename one of them.")


def _limit(flags: TrainingFlags) -> str | None:
    """How many batches an epoch takes, as an expression; None where it takes all of them."""
    return _part(flags, flags.steps_per_epoch, flags.train_percent_check, "train_percent_check", "training")


def _validation_limit(flags: TrainingFlags) -> str | None:
    """The same of a validation."""
    return _part(flags, flags.validation_steps, flags.val_percent_check, "val_percent_check", "validation")


def _part(flags: TrainingFlags, steps: int | None, fraction: float, name: str, loader: str) -> str | None:
    if steps is not None:
        return str(steps)
    if flags.overfit_pct:
        fraction, name = flags.overfit_pct, "overfit_pct"
    return None if fraction == 1.0 else f"max(1, int(len({loader}) * {fraction!r}))  # {name}"


def _accumulation(flags: TrainingFlags) -> str:
    given = flags.accumulate_grad_batches
    if isinstance(given, int):
        return str(given)
    text = str(given.get(0, 1))
    for epoch in sorted(each for each in given if each > 0):
        text = f"{given[epoch]} if epoch >= {epoch} else {text}"
    return text


def _frequency(frequency: int | tuple[int, ...]) -> str:
    if isinstance(frequency, int):
        return f"(epoch + 1) % {frequency} == 0"
    return f"epoch + 1 in {literal(sorted(frequency))}"


def _random(device: torch.device) -> tuple[str, dict[str, Any]]:
    """The line that gives random numbers where they are now, and what it needs for that."""
    state, seed = torch.get_rng_state(), torch.initial_seed()
    if device.type == "cpu" and torch.equal(torch.Generator().manual_seed(seed).get_state(), state):
        return f"torch.manual_seed({seed})", {}
    lines, kept = ['torch.set_rng_state(start["random"])'], {"random": state}
    if device.type != "cpu":
        kept["device_random"] = torch.get_device_module(device).get_rng_state(device)
        lines.append(f'torch.{device.type}.set_rng_state(start["device_random"])')
    return "\n".join(lines), kept
