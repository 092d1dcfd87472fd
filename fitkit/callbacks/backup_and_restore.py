"""Going on after a crash: the same script run again continues where the last backup was made."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from typing import Any, final

from fitkit.callbacks.callback import Callback
from fitkit.callbacks.display import print_line
from fitkit.checkpoints import clear_left_overs
from fitkit.distributed import any_of, by_first, is_first, running
from fitkit.durations import seconds_of
from fitkit.errors import CheckpointError, NotNowError, check_flag, check_integer, show
from fitkit.sharded_checkpoints import check_whole, remove, state_file


@final
class BackupAndRestore(Callback):
    """Backs the whole training state up, and goes on from it when the same fit is called again.

    After a crash, a power cut or ``kill -9`` run the same script again: the numbers are those of a run that was never
    disturbed. On SIGTERM (the usual notice of a cluster or a container) the step in progress is finished and backed up
    before the process ends as it would have without this callback.

    A backup that cannot be written, as on a full disk, only warns; it is tried again at the next occasion, and the one
    before stays. A backup that cannot be read is an error: nothing is ever started anew in silence.

    After a batch the backup is made when all other callbacks have had their turn, wherever this one stands among them.

    Args:
        backup_dir: a folder of this run's own; made if missing.
        save_freq: "epoch" for the end of each epoch; a number of batches, counted over all epochs; or a time such as
            "10min", after which the next batch is followed by a backup.
        double_checkpoint: whether to keep the backup before the latest, for the case that the latest is damaged.
        delete_checkpoint: whether to delete the backup when the run has ended without an error. If it is kept, the
            same fit called again has nothing left to do.

    Attributes:
        path: of the latest backup; ``fit(resume_from=path)`` and ``Model.load(path)`` read it too.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: save_freq is none of the three, or not above 0.
    """

    adds_to_logs = ()
    counts_itself: Mapping[str, str] = {"batch": "It counts batches itself: see its save_freq."}
    is_last_after_batches = True

    def __init__(
        self,
        backup_dir: str | os.PathLike[str],
        save_freq: int | str = "epoch",
        double_checkpoint: bool = False,
        delete_checkpoint: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(backup_dir, (str, os.PathLike)):
            raise TypeError(f"Expected the path of a folder, received backup_dir={show(backup_dir)}.")
        if not os.fspath(backup_dir):
            raise ValueError('Expected the path of a folder, received backup_dir="".')
        self.backup_dir = backup_dir
        self.double_checkpoint = check_flag("double_checkpoint", double_checkpoint)
        self.delete_checkpoint = check_flag("delete_checkpoint", delete_checkpoint)
        self.save_freq = save_freq
        self._every_batches: int | None = None
        self._every_seconds: float | None = None
        if isinstance(save_freq, str) and save_freq != "epoch":
            self._every_seconds = seconds_of("save_freq", save_freq)
        elif save_freq != "epoch":
            self._every_batches = check_integer("save_freq", save_freq, least=1)
        self.path = os.path.join(backup_dir, "training_state.fitkit")
        self._previous = os.path.join(backup_dir, "training_state.previous.fitkit")
        self._batches = 0
        self._latest = 0.0
        self._is_running = False
        self._is_terminated = False
        self._handler: Any = None
        self._process = 0

    def find(self) -> str | None:
        """The backup that a fit goes on from; None when there is none.

        Raises:
            ValueError: it is damaged, and so is the one before, if that was kept.
        """
        if not os.path.exists(state_file(self.path)):
            return self._previous if os.path.exists(state_file(self._previous)) else None
        if not os.path.exists(state_file(self._previous)):
            return self.path
        try:
            check_whole(self.path)
        except CheckpointError as error:
            warnings.warn(f"{error} Going on from the backup before it, {self._previous}.", stacklevel=2)
            return self._previous
        return self.path

    def on_train_begin(self, logs: Mapping[str, float] | None = None) -> None:
        """Makes the folder, clears away what a crash left half-written, and listens for SIGTERM."""
        if os.path.exists(self.backup_dir) and not os.path.isdir(self.backup_dir):
            raise NotADirectoryError(
                f"Expected the path of a folder, received backup_dir={os.fspath(self.backup_dir)!r}, which is a file."
            )
        os.makedirs(self.backup_dir, exist_ok=True)
        if is_first():
            clear_left_overs(self.backup_dir)
        self._batches = 0
        self._latest = time.monotonic()
        self._is_running, self._is_terminated = True, False
        self._listen()

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Backs up where it is time to."""
        self._batches += 1
        if self._every_batches is not None and self._batches % self._every_batches == 0:
            self._back_up()
        self._look_up()

    def on_test_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Backs up in a validation where it is time to; it would then begin anew."""
        if self._is_running:
            self._look_up()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Backs up where it is time to."""
        if self.save_freq == "epoch":
            self._back_up()
        self._look_up()

    def on_train_end(self, logs: Mapping[str, float] | None = None) -> None:
        """Deletes the backup of the run that is complete."""
        self._is_running = False
        if any_of(self._is_terminated):
            self._back_up()
        elif self.delete_checkpoint and is_first():
            for path in (self.path, self._previous):
                with contextlib.suppress(FileNotFoundError):
                    remove(path)
            with contextlib.suppress(OSError):  # somebody keeps other files there
                os.rmdir(self.backup_dir)
        self._stop_listening()

    def on_exception(self, error: BaseException) -> None:
        """Keeps the backup. On SIGTERM the error may be that of workers which the signal ended as well."""
        if not self._is_running:
            return
        self._is_running = False
        # Of several processes, not all may be here to save.
        if self._is_terminated and running() is None:
            with contextlib.suppress(ValueError):  # in the midst of a step only the latest backup is exact
                self._back_up()
        self._stop_listening()

    def state_dict(self) -> dict[str, Any]:
        """How many batches there were."""
        return {"batches": self._batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Counts on from there.

        Args:
            state: what ``state_dict`` returned.
        """
        self._batches = state["batches"]

    def _look_up(self) -> None:
        """What the clock and the system ask for."""
        is_due = self._every_seconds is not None and time.monotonic() - self._latest >= self._every_seconds
        if any_of(self._is_terminated or is_due):
            try:
                self._back_up()
            except NotNowError:
                return  # at the next occasion
        if self._is_terminated:
            self._stop_listening()
            self._listen()  # a handler of the user's let the process live

    def _back_up(self) -> None:
        try:
            if self.double_checkpoint:
                by_first(self._keep_previous)
            self.model.save(self.path)
        except OSError as error:
            if is_first():
                warnings.warn(
                    f"The backup could not be written to {self.path}: {error}. Training goes on, and it is tried again "
                    "at the next occasion.",
                    RuntimeWarning,
                    stacklevel=2,
                )
        self._latest = time.monotonic()

    def _keep_previous(self) -> None:
        if os.path.exists(state_file(self.path)):
            _keep_as(self.path, self._previous)

    def _listen(self) -> None:
        """Has SIGTERM noted. Only the main thread can; what is ignored, or set from outside of Python, stays so."""
        self._handler = None
        if threading.current_thread() is not threading.main_thread():
            return
        before = signal.getsignal(signal.SIGTERM)
        if before is None or before == signal.SIG_IGN:
            return
        self._handler, self._process = before, os.getpid()
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: object) -> None:
        if os.getpid() == self._process:
            self._is_terminated = True
        else:  # a process that was forked in the midst of the run: it has nothing to back up
            signal.signal(number, self._handler)
            signal.raise_signal(number)

    def _stop_listening(self) -> None:
        """Puts the handler back that was there before; what it would have done with a signal, it does now."""
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
            self._handler = None
        if self._is_terminated:
            self._is_terminated = False
            print_line(f"SIGTERM: the run can go on from {self.path}.")
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
            signal.raise_signal(signal.SIGTERM)


def _keep_as(path: str, copy: str) -> None:
    """Gives the file a second name, in place of what had that name; the first is there at every moment.

    A folder is renamed: until the next one is there, only the second name is.
    """
    if os.path.isdir(path):
        with contextlib.suppress(FileNotFoundError):
            remove(copy)
        os.replace(path, copy)
        return
    link = f"{copy}.tmp"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(link)
    try:
        os.link(path, link)
    except OSError:  # a file system without links: for a moment there is the second name alone
        os.replace(path, copy)
        return
    os.replace(link, copy)
    # Where both are names of one file already, as after a backup that failed, that has done nothing.
    with contextlib.suppress(FileNotFoundError):
        os.unlink(link)
