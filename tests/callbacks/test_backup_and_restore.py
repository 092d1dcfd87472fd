"""BackupAndRestore: when it backs up, what it does with a backup, and what a signal or a full disk does to a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fitkit
from fitkit.callbacks import BackupAndRestore, Callback, EarlyStopping, LambdaCallback
from fitkit.errors import CheckpointError

ROOT = Path(__file__).parents[2]
X, Y = torch.randn(12, 2), torch.randn(12, 1)
NAME = "training_state.fitkit"


class Crash(Exception):
    pass


def crash(*arguments: Any) -> None:
    raise Crash


def fit(*callbacks: Callback, **arguments: Any) -> fitkit.Model:
    torch.manual_seed(0)
    model = fitkit.Model(nn.Linear(2, 1), device="cpu")
    model.compile("adam", "mse")
    model.fit(X, Y, callbacks=callbacks, **{"epochs": 3, "batch_size": 4, "verbose": 0, **arguments})
    return model


def crash_at(epoch: int) -> LambdaCallback:
    return LambdaCallback(on_epoch_begin=lambda index, logs: crash() if index == epoch else None)


def leave_a_backup(folder: Path, epoch: int = 2, **arguments: Any) -> None:
    with pytest.raises(Crash):
        fit(BackupAndRestore(folder, **arguments), crash_at(epoch))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backup_dir": 3}, TypeError, "Expected the path of a folder, received backup_dir=3"),
        ({"backup_dir": ""}, ValueError, "received backup_dir=''|received backup_dir=\"\""),
        ({"save_freq": 0}, ValueError, "at least 1, received save_freq=0"),
        ({"save_freq": True}, TypeError, "received save_freq=True"),
        ({"save_freq": 1.5}, TypeError, "received save_freq=1.5"),
        ({"save_freq": "often"}, ValueError, "length of time such as .* received save_freq='often'"),
        ({"save_freq": "0min"}, ValueError, "above 0, received save_freq='0min'|above 0"),
        ({"double_checkpoint": 1}, TypeError, "received double_checkpoint=1"),
        ({"delete_checkpoint": None}, TypeError, "received delete_checkpoint=None"),
    ],
)
def test_a_wrong_argument_is_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        BackupAndRestore(**{"backup_dir": "folder", **arguments})


def times_saved(folder: Path, **arguments: Any) -> list[tuple[int, int]]:
    """After which epochs and batches there is a new backup."""
    found: list[tuple[int, int]] = []
    seen: list[int] = []
    place = [0, 0]

    def look(*_: Any) -> None:
        path = folder / NAME
        written = path.stat().st_mtime_ns if path.exists() else 0
        if seen and written != seen[-1]:
            found.append((place[0], place[1]))
        seen.append(written)

    def note(batch: int, logs: Any) -> None:
        look()
        place[1] = batch

    watching = LambdaCallback(
        on_epoch_begin=lambda epoch, logs: (look(), place.__setitem__(slice(None), [epoch, 0])),
        on_train_batch_begin=note,
    )
    fit(BackupAndRestore(folder, delete_checkpoint=False, **arguments), watching)
    look()
    return found


def test_epoch_backs_up_at_the_end_of_each_epoch(tmp_path: Path) -> None:
    assert times_saved(tmp_path) == [(0, 2), (1, 2), (2, 2)]


def test_a_number_counts_batches_over_all_epochs(tmp_path: Path) -> None:
    assert times_saved(tmp_path, save_freq=4) == [(1, 0), (2, 1)]


def test_a_time_backs_up_after_the_next_batch(tmp_path: Path) -> None:
    assert len(times_saved(tmp_path, save_freq="0.0000001s")) >= 9
    assert times_saved(tmp_path / "never", save_freq="1h") == []


def test_the_number_of_batches_is_counted_on_after_a_crash(tmp_path: Path) -> None:
    leave_a_backup(tmp_path, epoch=2, save_freq=4)  # after the fourth batch of nine
    counted = BackupAndRestore(tmp_path, save_freq=4)
    fit(counted)
    assert counted.state_dict() == {"batches": 9}


def test_a_finished_run_leaves_nothing(tmp_path: Path) -> None:
    fit(BackupAndRestore(tmp_path / "backup", double_checkpoint=True))
    assert list(tmp_path.iterdir()) == []


def test_files_of_others_stay_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    fit(BackupAndRestore(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_later_plain_fit_runs_all_its_epochs(tmp_path: Path) -> None:
    leave_a_backup(tmp_path)
    model = fit(BackupAndRestore(tmp_path))
    assert model.fit(X, Y, epochs=2, verbose=0).epoch == [0, 1]
    assert model.fit(X, Y, epochs=2, verbose=0, callbacks=[BackupAndRestore(tmp_path)]).epoch == [0, 1]


def test_a_kept_backup_leaves_the_same_fit_nothing_to_do(tmp_path: Path) -> None:
    weights = fit(BackupAndRestore(tmp_path, delete_checkpoint=False)).module.state_dict()
    again = fit(BackupAndRestore(tmp_path), LambdaCallback(on_train_batch_begin=crash))
    assert again.history.epoch == [0, 1, 2]
    assert all(torch.equal(value, weights[name]) for name, value in again.module.state_dict().items())


def test_left_overs_of_a_crash_are_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".fitkit-0123.tmp").touch()
    fit(BackupAndRestore(tmp_path))
    assert not tmp_path.exists()


@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_a_damaged_backup_is_an_error_that_names_it(tmp_path: Path, content: bytes | None) -> None:
    leave_a_backup(tmp_path)
    path = tmp_path / NAME
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(CheckpointError, match=f"{NAME} (is|was)"):
        fit(BackupAndRestore(tmp_path))


def test_a_damaged_backup_with_one_before_goes_on_from_that_and_says_so(tmp_path: Path) -> None:
    leave_a_backup(tmp_path, double_checkpoint=True)
    (tmp_path / NAME).write_bytes(b"nonsense")
    begun: list[int] = []
    noting = LambdaCallback(on_epoch_begin=lambda epoch, logs: begun.append(epoch))
    with pytest.warns(UserWarning, match="Going on from the backup before it"):
        model = fit(BackupAndRestore(tmp_path, double_checkpoint=True), noting)
    assert begun == [1, 2]
    assert model.history.history == fit().history.history


def test_two_damaged_backups_are_an_error(tmp_path: Path) -> None:
    leave_a_backup(tmp_path, double_checkpoint=True)
    for path in tmp_path.iterdir():
        path.write_bytes(b"nonsense")
    with (
        pytest.warns(UserWarning, match="Going on from"),
        pytest.raises(CheckpointError, match=r"previous\.fitkit was not written by fitkit"),
    ):
        fit(BackupAndRestore(tmp_path, double_checkpoint=True))


def test_a_backup_of_another_run_is_refused(tmp_path: Path) -> None:
    leave_a_backup(tmp_path)
    with pytest.raises(CheckpointError, match="batch_size=3 now and 4 in the file"):
        fit(BackupAndRestore(tmp_path), batch_size=3)


# ---------------------------------------------------------------------------------------------------------------------
# Folders that go away, disks that are full.
# ---------------------------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_made_is_an_error_before_the_first_batch(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        fit(BackupAndRestore(tmp_path / "file" / "backup"), LambdaCallback(on_train_batch_begin=crash))


def test_a_folder_that_was_removed_is_made_anew(tmp_path: Path) -> None:
    folder = tmp_path / "backup"

    def remove(epoch: int, logs: Any) -> None:
        if epoch == 1:
            (folder / NAME).unlink()
            folder.rmdir()

    fit(BackupAndRestore(folder, delete_checkpoint=False), LambdaCallback(on_epoch_begin=remove))
    assert (folder / NAME).exists()


def test_a_backup_that_fails_warns_and_is_tried_again(tmp_path: Path) -> None:
    folder = tmp_path / "backup"

    def block(epoch: int, logs: Any) -> None:
        if epoch == 1:  # a file in the folder's place: nobody, not even root, can write there
            (folder / NAME).unlink()
            folder.rmdir()
            folder.touch()
        if epoch == 2:
            folder.unlink()

    with pytest.warns(RuntimeWarning, match="could not be written to .*Training goes on") as warned:
        model = fit(BackupAndRestore(folder, delete_checkpoint=False), LambdaCallback(on_epoch_begin=block))
    assert len(warned) == 1
    assert (folder / NAME).exists()
    assert model.history.history == fit().history.history


def run_script(text: str, folder: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    path = folder / "script.py"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(path)], cwd=folder, env=environment, capture_output=True, text=True, timeout=120, **options
    )


@pytest.mark.skipif(sys.platform == "win32", reason="file sizes cannot be limited there")
def test_a_full_disk_leaves_the_backup_before_intact_and_the_run_healthy(tmp_path: Path) -> None:
    ended = run_script(
        """
        import os, resource, torch, fitkit
        from fitkit.callbacks import BackupAndRestore, LambdaCallback
        from fitkit.checkpoints import load_state

        def fill(epoch, logs):
            if epoch == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
                assert load_state("backup/training_state.fitkit")["run"]["epoch"] == 0
            if epoch == 2:
                # What a full disk refused left the file of the epoch before, and nothing half-written.
                assert load_state("backup/training_state.fitkit")["run"]["epoch"] == 0
                assert os.listdir("backup") == ["training_state.fitkit"]
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

        model = fitkit.Model(torch.nn.Linear(2, 1), device="cpu")
        model.compile("adam", "mse")
        backing = BackupAndRestore("backup", delete_checkpoint=False)
        model.fit(torch.ones(8, 2), torch.ones(8, 1), epochs=3, verbose=0,
                  callbacks=[LambdaCallback(on_epoch_begin=fill), backing])
        print("epochs:", model.history.epoch, load_state("backup/training_state.fitkit")["run"]["epoch"])
        """,
        tmp_path,
    )
    assert ended.stdout.splitlines() == ["epochs: [0, 1, 2] 2"], ended.stderr
    assert "RuntimeWarning: The backup could not be written to" in ended.stderr


# ---------------------------------------------------------------------------------------------------------------------
# SIGTERM.
# ---------------------------------------------------------------------------------------------------------------------


TERMINATED = """
import os, signal, torch, fitkit
from fitkit.callbacks import BackupAndRestore, LambdaCallback

torch.manual_seed(0)
x = torch.randn(12, 2)
module = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))
model = fitkit.Model(module, device="cpu")
model.compile("adam", "mse")

def end(index, logs):
    if index == 1 and len(model.history) == 1 and os.path.exists("armed"):
        os.unlink("armed")
        os.kill(os.getpid(), signal.SIGTERM)

model.fit((x, x[:, :1]), epochs=3, batch_size=4, verbose=0, validation_data=(x, x[:, :1]),
          validation_batch_size=4, callbacks=[
              LambdaCallback(HOOK=end), BackupAndRestore("backup", save_freq="1h")])
print(model.history.history, [p.tolist() for p in module.parameters()])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send itself SIGTERM there")
@pytest.mark.parametrize(
    "hook",
    [
        "on_train_batch_begin",
        pytest.param("on_train_batch_end", marks=pytest.mark.long),
        pytest.param("on_test_batch_begin", marks=pytest.mark.long),
        pytest.param("on_epoch_end", marks=pytest.mark.long),
    ],
)
def test_sigterm_finishes_the_step_backs_up_and_ends_the_process_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hook: str
) -> None:
    script = TERMINATED.replace("HOOK", hook)
    (tmp_path / "armed").touch()
    ended = run_script(script, tmp_path)
    assert ended.returncode == -signal.SIGTERM, ended.stderr
    assert "SIGTERM: the run can go on from" in ended.stdout
    outputs = []
    for folder in (tmp_path, tmp_path / "plain"):  # the first goes on, the other one is undisturbed
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        exec(script, {})
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != ""


def test_the_handlers_from_before_come_back(tmp_path: Path) -> None:
    def mine(number: int, frame: Any) -> None:
        raise AssertionError("nobody sent a signal")

    before = signal.signal(signal.SIGTERM, mine)
    try:
        fit(BackupAndRestore(tmp_path))
        assert signal.getsignal(signal.SIGTERM) is mine
        leave_a_backup(tmp_path)
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_handler_of_the_users_is_called_after_the_backup_and_the_run_goes_on(tmp_path: Path) -> None:
    called: list[bool] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: called.append((tmp_path / NAME).exists()))

    def send(batch: int, logs: Any) -> None:
        if batch == 1:
            signal.raise_signal(signal.SIGTERM)

    try:
        model = fit(BackupAndRestore(tmp_path, save_freq="1h"), LambdaCallback(on_train_batch_begin=send))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert called == [True, True, True]
    assert model.history.epoch == [0, 1, 2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_process_that_was_forked_in_the_run_can_be_terminated(tmp_path: Path) -> None:
    statuses: list[int] = []

    def fork(epoch: int, logs: Any) -> None:
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
        time.sleep(0.3)  # what comes while the process is being made, Python forgets
        os.kill(child, signal.SIGTERM)
        statuses.append(os.waitpid(child, 0)[1])

    fit(BackupAndRestore(tmp_path), LambdaCallback(on_epoch_begin=fork), epochs=1)
    assert os.WTERMSIG(statuses[0]) == signal.SIGTERM


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        sending = LambdaCallback(on_train_batch_begin=lambda batch, logs: signal.raise_signal(signal.SIGTERM))
        assert fit(BackupAndRestore(tmp_path), sending).history.epoch == [0, 1, 2]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_another_thread_than_the_main_one_trains_without_a_handler(tmp_path: Path) -> None:
    handlers: list[Any] = []
    looking = LambdaCallback(on_epoch_end=lambda epoch, logs: handlers.append(signal.getsignal(signal.SIGTERM)))
    results: list[fitkit.Model] = []
    thread = threading.Thread(target=lambda: results.append(fit(BackupAndRestore(tmp_path), looking)))
    before = signal.getsignal(signal.SIGTERM)
    thread.start()
    thread.join()
    assert results[0].history.epoch == [0, 1, 2]
    assert handlers == [before] * 3


def test_evaluating_with_the_callback_outside_of_a_fit_does_nothing(tmp_path: Path) -> None:
    model = fit()
    model.evaluate(X, Y, verbose=0, callbacks=[BackupAndRestore(tmp_path / "backup")])
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_keeps_the_backup(tmp_path: Path) -> None:
    def interrupt(epoch: int, logs: Any) -> None:
        if epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(BackupAndRestore(tmp_path), LambdaCallback(on_epoch_begin=interrupt))
    begun: list[int] = []
    fit(BackupAndRestore(tmp_path), LambdaCallback(on_epoch_begin=lambda epoch, logs: begun.append(epoch)))
    assert begun == [1, 2]


def test_a_larger_patience_than_the_saved_one_wins(tmp_path: Path) -> None:
    rising = LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(mark=float(epoch)))
    keeping = {"delete_checkpoint": False}
    first = fit(rising, EarlyStopping("mark", patience=1), BackupAndRestore(tmp_path, **keeping), epochs=6)
    again = fit(rising, EarlyStopping("mark", patience=1), BackupAndRestore(tmp_path, **keeping), epochs=6)
    later = fit(rising, EarlyStopping("mark", patience=3), BackupAndRestore(tmp_path, **keeping), epochs=6)
    assert [len(model.history) for model in (first, again, later)] == [2, 2, 4]
    assert again.history.stop_reason == "early_stopping"


def test_a_backup_costs_no_time_between_its_occasions(tmp_path: Path) -> None:
    backing = BackupAndRestore(tmp_path, save_freq="1h")
    backing.set_model(fit())
    backing.on_train_begin()
    began = time.perf_counter()
    for batch in range(1000):
        backing.on_train_batch_end(batch)
    backing.on_exception(Crash())
    assert time.perf_counter() - began < 0.1


def test_what_callbacks_behind_it_do_after_a_batch_is_in_the_backup(tmp_path: Path) -> None:
    class Counting(Callback):
        count = 0

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.count += 1

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.count = state["count"]

    arguments: dict[str, Any] = {"save_freq": 1, "delete_checkpoint": False}
    with pytest.raises(Crash):
        fit(BackupAndRestore(tmp_path, **arguments), Counting(), crash_at(1))
    counting = Counting()
    fit(BackupAndRestore(tmp_path, **arguments), counting)
    assert counting.count == 9


def test_a_link_that_was_left_by_a_failed_backup_does_not_stay(tmp_path: Path) -> None:
    leave_a_backup(tmp_path)
    path = tmp_path / "training_state.fitkit"
    os.link(path, tmp_path / "training_state.previous.fitkit")
    fit(BackupAndRestore(tmp_path, double_checkpoint=True, delete_checkpoint=False), epochs=4)
    assert sorted(os.listdir(tmp_path)) == ["training_state.fitkit", "training_state.previous.fitkit"]


def test_a_file_in_place_of_the_folder_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Expected the path of a folder, received backup_dir=.*which is a file"):
        fit(BackupAndRestore(tmp_path / "file"))
