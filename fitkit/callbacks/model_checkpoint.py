"""Keeping files of the Model while it trains: every epoch's, the best one's, the best few, the last."""

from __future__ import annotations

import math
import os
import re
import string
import warnings
from collections.abc import Collection, Mapping
from typing import Any, final

from fitkit.callbacks.display import print_line
from fitkit.callbacks.monitor import MonitorCallback
from fitkit.checkpoints import clear_left_overs
from fitkit.distributed import is_first, of_first
from fitkit.errors import check_flag, check_integer, check_number, nearest, show
from fitkit.sharded_checkpoints import remove

# Seconds. Others may be writing in the same folder.
STALE = 3600.0


@final
class ModelCheckpoint(MonitorCallback):
    """Saves the Model at the end of epochs, or every so many batches.

    Files hold the whole training state, as those of `Model.save` do, for ``fit(resume_from=path)`` and `Model.load`; or
    the weights alone. A file that cannot be written only warns: training goes on and the files before stay. An older
    file is removed only when the newer one is safe on the disk. Every fit starts from a clean state, a resumed one from
    the best value so far.

    A file that is saved after a batch holds what the callbacks in front of this one have done then, and not what those
    after it still do: put it last in the list where ``fit(resume_from=path)`` is to go on from such files.

    Beside `SwapEMAWeights`, whose average is what a validation measures, files that are chosen or named by a number of
    the validation hold that average: ``[SwapEMAWeights(swap_on_epoch=True), ModelCheckpoint(...)]``, in this order.

    Args:
        filepath: where to; ``{epoch}`` and ``{batch}`` count from 1, and other keys of the logs may stand in it too, as
            in ``"run/{epoch:03d}-{val_loss:.3f}.pt"``. With save_weights_only, ``.safetensors`` uses safetensors.
        monitor: what the best is judged by; not looked at unless save_best_only or save_top_k is given.
        verbose: whether to print a line for each file.
        save_best_only: whether to save only when the monitor is better than ever before. NaN never is.
        save_weights_only: whether a file holds the module's state_dict only.
        mode: "min" when less is better, "max" when more is, "auto" to go by the monitor's name.
        save_freq: "epoch", or a number of batches, counted over all epochs; the logs are then those of the batch.
        initial_value_threshold: a value that must be beaten by the first file; None: no such value.
        save_top_k: keep the files of the best so many values, and remove the others.
        save_last: whether to save each time also to a file "last", with the ending of filepath and in its folder.

    Attributes:
        best: the best value so far, None before the first one.
        best_path: the file of the best value, None before the first one.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: an argument is out of range, arguments exclude each other, or filepath is no template.
    """

    counts_itself: Mapping[str, str] = dict.fromkeys(
        ("epoch", "batch"), "It counts itself: see its save_freq, a number of batches."
    )

    def __init__(
        self,
        filepath: str | os.PathLike[str],
        monitor: str = "val_loss",
        verbose: int = 0,
        save_best_only: bool = False,
        save_weights_only: bool = False,
        mode: str = "auto",
        save_freq: int | str = "epoch",
        initial_value_threshold: float | None = None,
        *,
        save_top_k: int | None = None,
        save_last: bool = False,
    ) -> None:
        super().__init__(monitor, mode)
        if not isinstance(filepath, (str, os.PathLike)):
            raise TypeError(f"Expected a path, received filepath={show(filepath)}.")
        self.filepath = os.fspath(filepath)
        if verbose not in (0, 1):
            raise TypeError(f"Expected 0 or 1, received verbose={show(verbose)}.")
        self.verbose = bool(verbose)
        self.save_best_only = check_flag("save_best_only", save_best_only)
        self.save_weights_only = check_flag("save_weights_only", save_weights_only)
        self.save_last = check_flag("save_last", save_last)
        self.save_freq = save_freq if save_freq == "epoch" else check_integer("save_freq", save_freq, least=1)
        self.save_top_k = None if save_top_k is None else check_integer("save_top_k", save_top_k, least=1)
        self.initial_value_threshold = (
            None
            if initial_value_threshold is None
            else check_number("initial_value_threshold", initial_value_threshold)
        )
        if self.save_best_only and self.save_top_k is not None:
            raise ValueError(
                f"save_best_only=True and save_top_k={save_top_k} exclude each other. save_top_k=1 keeps the best one."
            )
        self._fields = _fields(self.filepath)
        if self.save_freq == "epoch" and "batch" in self._fields:
            raise ValueError(
                f'Expected no {{batch}} with save_freq="epoch", which saves at epochs\' ends, received {filepath=}.'
            )
        if self.save_top_k is not None and self.save_top_k > 1 and not self._fields:
            raise ValueError(
                f"save_top_k={save_top_k} needs a name for each file, received filepath={self.filepath!r}. Put "
                "{epoch} into it."
            )
        if not self.save_weights_only and self.filepath.lower().endswith(".safetensors"):
            raise ValueError(
                f"Expected save_weights_only=True for filepath={self.filepath!r}: safetensors files hold only weights."
            )
        self._reset()

    @property
    def state_key(self) -> str:
        return f"{type(self).__name__}({self.monitor}, {os.path.basename(self.filepath)})"

    @property
    def validation_key(self) -> str | None:
        """The number of an epoch's validation that its files are chosen or named by; None where it is none."""
        keys = [self.monitor, *self._fields] if self._judges else self._fields
        of_epochs = keys if self.save_freq == "epoch" else []
        return next((key for key in of_epochs if key.startswith("val_")), None)

    @property
    def best_path(self) -> str | None:
        """The file of the best value; None before the first one."""
        return self._kept[0][0] if self._kept else None

    def check_monitor(self, known: Collection[str], may_be_added: bool) -> None:
        """Refuses a template, and where values decide also a monitor, whose key can never appear."""
        unknown = [field for field in self._fields if field not in ("epoch", "batch", *known)]
        if unknown and not may_be_added:
            raise ValueError(
                f"ModelCheckpoint(filepath={self.filepath!r}) asks for {{{unknown[0]}}}, which this run never logs."
                f"{nearest(unknown[0], known)} Known keys: epoch, batch, {', '.join(sorted(known))}."
            )
        if not self._judges:
            return
        super().check_monitor(known, may_be_added)
        if self.save_freq != "epoch" and self.monitor.startswith("val_"):
            raise ValueError(
                f"ModelCheckpoint(monitor={self.monitor!r}, save_freq={self.save_freq}) judges after batches, where "
                f'there is no validation. Use save_freq="epoch", or monitor {self.monitor.removeprefix("val_")!r}.'
            )

    @property
    def _judges(self) -> bool:
        """Whether a value decides what is saved."""
        return self.save_best_only or self.save_top_k is not None

    def _reset(self) -> None:
        self.best: float | None = self.initial_value_threshold
        # Files by value, the best first: all that save_top_k keeps, or the best one.
        self._kept: list[tuple[str, float]] = []
        self._batches = 0
        self._epoch = 0

    def on_train_begin(self, logs: Mapping[str, float] | None = None) -> None:
        """Forgets the fit before, and clears away what a crash left half-written."""
        self._reset()
        clear_left_overs(self._folder(), older_than=STALE)

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Notes the epoch for names."""
        self._epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Saves where so many batches have gone by."""
        if self.save_freq == "epoch":
            return
        self._batches += 1
        if self._batches % int(self.save_freq) == 0:
            self._save(self._epoch, batch, logs or {})

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Saves where files are of epochs."""
        if self.save_freq == "epoch":
            self._save(epoch, None, logs or {})

    def _save(self, epoch: int, batch: int | None, logs: Mapping[str, Any]) -> None:
        if not self._judges:
            self._write(self._name(epoch, batch, logs), epoch)
            return self._save_last(epoch)
        value = self.measured(logs)
        if batch is not None:  # until an epoch's end each process knows its own samples' numbers: rank 0 decides
            value = of_first(value)
        if value is not None and not math.isnan(value):
            self._judge(value, epoch, batch, logs)
        self._save_last(epoch)

    def _save_last(self, epoch: int) -> None:
        if self.last_path is not None:
            self._write(self.last_path, epoch)

    def _judge(self, value: float, epoch: int, batch: int | None, logs: Mapping[str, Any]) -> None:
        """Saves a value that is among the best, and then removes what is no longer."""
        before = (self.best, self._kept)
        best = self.is_improvement(value, self.best)
        most = 1 if self.save_top_k is None else self.save_top_k
        if self.save_top_k is None or not self._kept:
            wanted = best
        else:
            wanted = len(self._kept) < most or self.is_improvement(value, self._kept[-1][1])
        if not wanted:
            return
        staying = [] if self.save_top_k is None else self._kept[: most - 1] if len(self._kept) >= most else self._kept
        path = self._free_name(self._name(epoch, batch, logs), [kept for kept, _ in staying])
        place = sum(not self.is_improvement(value, kept) for _, kept in staying)
        # The file is to hold what is true once it is written.
        self._kept = [*staying[:place], (path, value), *staying[place:]]
        self.best = value if best else self.best
        if not self._write(path, epoch):
            self.best, self._kept = before
            return
        if self.save_top_k is not None:
            for kept, _ in before[1]:
                if is_first() and kept not in [name for name, _ in self._kept]:
                    _remove(kept)

    def _name(self, epoch: int, batch: int | None, logs: Mapping[str, Any]) -> str:
        values: dict[str, Any] = {}
        for field in self._fields:
            if field in ("epoch", "batch"):
                continue
            if field not in logs and not field.startswith("val_"):
                raise ValueError(
                    f"ModelCheckpoint(filepath={self.filepath!r}) found no {field!r} in the logs. Available keys: "
                    f"{', '.join(sorted(logs))}."
                )
            # An epoch without a validation has no number for it.
            values[field] = math.nan if logs.get(field) is None else logs[field]
        return self.filepath.format(epoch=epoch + 1, batch=0 if batch is None else batch + 1, **values)

    def _free_name(self, path: str, taken: Collection[str]) -> str:
        """The name, with a number where a kept file has it already."""
        stem, ending = os.path.splitext(path)
        free, count = path, 1
        while free in taken:
            count += 1
            free = f"{stem}-{count}{ending}"
        return free

    def _folder(self) -> str:
        """The innermost folder that is the same for all files."""
        folder = os.path.dirname(self.filepath)
        while _fields(folder):
            folder = os.path.dirname(folder)
        return folder

    @property
    def last_path(self) -> str | None:
        """The file of save_last; None without it."""
        ending = os.path.splitext(self.filepath)[1]
        return os.path.join(self._folder(), f"last{ending}") if self.save_last else None

    def _write(self, path: str, epoch: int) -> bool:
        """Whether the file could be written."""
        try:
            if self.save_weights_only:
                self.model.save_weights(path)
            else:
                self.model.save(path)
        except OSError as error:
            if is_first():
                warnings.warn(
                    f"ModelCheckpoint could not write {path}: {error}. Training goes on; the files before are intact.",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return False
        if self.verbose:
            print_line(f"Epoch {epoch + 1} (index {epoch}): saved {path}.")
        return True

    def state_dict(self) -> dict[str, Any]:
        """The best value, the files that are kept, and how many batches there were."""
        return {
            "best": self.best,
            "direction": self.direction,
            "kept": [list(each) for each in self._kept],
            "batches": self._batches,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state; called after ``on_train_begin``.

        Args:
            state: what ``state_dict`` returned.
        """
        self._batches = state["batches"]
        if state["direction"] != self.direction:
            return
        self.best = state["best"]
        # A file must not be able to have others removed: only names that this callback gives are taken from it.
        ours = _pattern(self.filepath)
        self._kept = [(path, value) for path, value in state["kept"] if ours.fullmatch(path) and os.path.exists(path)]


def _fields(template: str) -> list[str]:
    """The keys in a template.

    Raises:
        ValueError: it is no template, or asks for an attribute or a position.
    """
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise ValueError(
            f"Expected a path with {{keys}} in braces, received filepath={template!r}: {error}."
        ) from error
    for field in fields:
        if not field.isidentifier():
            raise ValueError(f"Expected keys of the logs in braces, received filepath={template!r} with {{{field}}}.")
    return fields


def _pattern(template: str) -> re.Pattern[str]:
    """What a name made from the template looks like."""
    stem, ending = os.path.splitext(template)
    parts = [
        re.escape(literal) + (r"[^/\\]+" if field is not None else "")
        for literal, field, _, _ in string.Formatter().parse(stem)
    ]
    return re.compile("".join(parts) + r"(-\d+)?" + re.escape(ending))


def _remove(path: str) -> None:
    try:
        remove(path)
    except FileNotFoundError:
        return
    except OSError as error:
        warnings.warn(f"ModelCheckpoint could not remove {path}: {error}.", RuntimeWarning, stacklevel=2)
