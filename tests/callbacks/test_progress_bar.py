"""ProgressBar: what it writes into a terminal, a notebook and a file, and what it costs between two drawings."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, TextIO

import pytest

from fitkit.callbacks import EarlyStopping, ProgressBar
from fitkit.callbacks.display import print_line, resolve_verbose

# Longer than any pause that drawing makes the bar take.
PAUSE = 0.3


class Terminal:
    """A real pseudo terminal, 120 columns wide, that collects what is written into it."""

    def __init__(self) -> None:
        fcntl, pty, struct, termios = map(pytest.importorskip, ("fcntl", "pty", "struct", "termios"))
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
        self.stream: TextIO = open(slave, "w", encoding="utf-8")  # noqa: SIM115
        self._parts: list[bytes] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        try:
            while part := os.read(self._master, 65536):
                self._parts.append(part)
        except OSError:  # How Linux says that the other end is closed.
            pass

    def text(self) -> str:
        """Closes the terminal; all that was written into it."""
        if not self.stream.closed:
            self.stream.close()
            self._reader.join()
            os.close(self._master)
        return b"".join(self._parts).decode().replace("\r\n", "\n")

    def screen(self) -> list[str]:
        """The lines that are left to see."""
        lines, row, column = [""], 0, 0
        for part in re.findall(r"\r|\n|\x1b\[A|[^\r\n\x1b]+", self.text()):
            if part == "\r":
                column = 0
            elif part == "\n":
                row, column = row + 1, 0
                lines.extend([""] * (row + 1 - len(lines)))
            elif part == "\x1b[A":
                row -= 1
            else:
                lines[row] = lines[row].ljust(column)[:column] + part + lines[row][column + len(part) :]
                column += len(part)
        return [line.rstrip() for line in lines]


class Lazy(Mapping[str, Any]):
    """Logs that are computed when they are read."""

    def __init__(self, **sources: Callable[[], Any]) -> None:
        self.sources = sources

    def __getitem__(self, key: str) -> Any:
        return self.sources[key]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.sources)

    def __len__(self) -> int:
        return len(self.sources)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    made = Terminal()
    yield made
    made.text()


def started(bar: ProgressBar, verbose: int = 1, steps: int | None = 2) -> ProgressBar:
    """The bar at the beginning of a fit of three epochs."""
    bar.set_params({"epochs": 3, "initial_epoch": 0, "steps": steps, "validation_steps": steps, "verbose": verbose})
    bar.on_train_begin({})
    return bar


def run_epoch(bar: ProgressBar, pause: float = 0.0) -> None:
    """An epoch of two batches and a validation of two, the last of each after a pause."""
    bar.on_epoch_begin(0, {})
    for batch in range(2):
        time.sleep(pause * batch)
        bar.on_train_batch_end(batch, {"loss": 0.75, "batch_loss": 9.0, "grad_2_norm_fc.weight": 1.0})
    bar.on_test_begin({})
    for batch in range(2):
        time.sleep(pause * batch)
        bar.on_test_batch_end(batch, {"loss": 0.5})
    bar.on_test_end({"loss": 0.5})
    bar.on_epoch_end(0, {"loss": 0.75, "val_loss": 0.5, "learning_rate": 1e-5, "grad_2_norm_fc.weight": 1.0})


LINE = r"Epoch 1/3 - \d+\.\ds - 2 batches - loss: 0\.7500 - val_loss: 0\.5000 - learning_rate: 1\.000e-05"


@pytest.mark.parametrize("verbose", [1, 2])
def test_a_file_gets_one_line_an_epoch_and_no_carriage_return(verbose: int) -> None:
    stream = io.StringIO()
    run_epoch(started(ProgressBar(stream=stream), verbose))
    assert re.fullmatch(LINE + "\n", stream.getvalue())


def test_verbose_2_in_a_terminal_is_one_line_an_epoch(terminal: Terminal) -> None:
    run_epoch(started(ProgressBar(stream=terminal.stream), verbose=2))
    assert "\r" not in terminal.text()
    assert terminal.text().count("\n") == 1


def test_stdout_is_looked_up_when_the_run_begins(capsys: pytest.CaptureFixture[str]) -> None:
    run_epoch(started(ProgressBar()))
    assert capsys.readouterr().out.startswith("Epoch 1/3 - ")


def test_a_terminal_shows_counts_rate_and_running_numbers(terminal: Terminal) -> None:
    run_epoch(started(ProgressBar(0.0, terminal.stream)), PAUSE)
    drawn = terminal.text()
    assert "Epoch 1/3:   0%|" in drawn
    assert "Epoch 1/3: 100%|" in drawn
    assert "| 2/2 [00:00<00:00, " in drawn
    assert "it/s, loss: 0.7500]" in drawn
    assert "9.0" not in drawn
    assert "fc.weight" not in drawn


def test_a_terminal_shows_that_validation_is_in_progress(terminal: Terminal) -> None:
    run_epoch(started(ProgressBar(0.0, terminal.stream)), PAUSE)
    assert "Epoch 1/3 validating: 100%|" in terminal.text()
    assert "it/s, loss: 0.5000]" in terminal.text()


def test_a_finished_epoch_leaves_one_line_in_the_terminal(terminal: Terminal) -> None:
    run_epoch(started(ProgressBar(0.0, terminal.stream)), PAUSE)
    assert len(terminal.screen()) == 2
    assert re.fullmatch(LINE, terminal.screen()[0])


def test_an_unknown_total_is_the_count_of_the_epoch_before(terminal: Terminal) -> None:
    bar = started(ProgressBar(0.0, terminal.stream), steps=None)
    run_epoch(bar, PAUSE)
    run_epoch(bar, PAUSE)
    assert "Epoch 1/3: 2it [00:00, " in terminal.text()
    assert "| 2/2 [" in terminal.text()


def test_an_error_leaves_the_bar_and_a_fresh_line(terminal: Terminal) -> None:
    bar = started(ProgressBar(stream=terminal.stream))
    bar.on_epoch_begin(0, {})
    bar.on_train_batch_end(0, {"loss": 0.75})
    bar.on_exception(KeyboardInterrupt())
    assert "Epoch 1/3:  50%|" in terminal.text()
    assert terminal.text().endswith("]\n")


def test_an_error_in_a_file_writes_nothing() -> None:
    stream = io.StringIO()
    bar = started(ProgressBar(stream=stream))
    bar.on_epoch_begin(0, {})
    bar.on_exception(ValueError())
    assert stream.getvalue() == ""


def test_evaluate_has_its_own_bar_and_line(terminal: Terminal) -> None:
    bar = ProgressBar(0.0, terminal.stream)
    bar.set_params({"steps": 1, "verbose": 1})
    bar.on_test_begin({})
    bar.on_test_batch_end(0, {"loss": 0.5})
    bar.on_test_end({"loss": 0.5})
    assert "Evaluating:   0%|" in terminal.text()
    assert terminal.screen()[0].endswith("s - 1 batch - loss: 0.5000")


def test_predict_never_reads_its_outputs() -> None:
    stream = io.StringIO()
    bar = ProgressBar(0.0, stream)
    bar.set_params({"steps": None, "verbose": 1})
    bar.on_predict_begin({})
    bar.on_predict_batch_end(0, Lazy(outputs=lambda: pytest.fail("read")))
    bar.on_predict_end({})
    assert stream.getvalue() == "Predicting - 0.0s - 1 batch\n"


def test_no_number_is_read_between_two_drawings(terminal: Terminal) -> None:
    bar = started(ProgressBar(60.0, terminal.stream), steps=1000)
    bar.on_epoch_begin(0, {})
    for batch in range(1000):
        bar.on_train_batch_end(batch, Lazy(loss=lambda: pytest.fail("read")))


def test_a_file_never_makes_it_read_the_numbers_of_a_batch() -> None:
    bar = started(ProgressBar(0.0, io.StringIO()))
    bar.on_epoch_begin(0, {})
    bar.on_train_batch_end(0, Lazy(loss=lambda: pytest.fail("read")))
    bar.on_test_begin({})
    bar.on_test_batch_end(0, Lazy(loss=lambda: pytest.fail("read")))


def test_slow_metrics_are_read_less_often(terminal: Terminal) -> None:
    reads: list[int] = []

    def slow() -> float:
        time.sleep(PAUSE)
        reads.append(1)
        return 0.5

    bar = started(ProgressBar(0.0, terminal.stream), steps=20)
    bar.on_epoch_begin(0, {})
    time.sleep(PAUSE)
    for batch in range(20):
        bar.on_train_batch_end(batch, Lazy(loss=lambda: 0.5, auroc=slow))
    assert len(reads) == 1


def test_short_epochs_are_drawn_at_most_once_an_interval(terminal: Terminal) -> None:
    bar = started(ProgressBar(60.0, terminal.stream))
    for _ in range(5):
        run_epoch(bar)
    assert terminal.text().count("%|") == 1
    assert terminal.text().count("\n") == 5


def test_an_evaluate_inside_a_fit_tears_nothing(terminal: Terminal) -> None:
    bar = started(ProgressBar(0.0, terminal.stream))
    bar.on_epoch_begin(0, {})
    inner = ProgressBar(0.0, terminal.stream)
    inner.set_params({"steps": 1, "verbose": 1})
    inner.on_test_begin({})
    inner.on_test_end({"loss": 0.5})
    bar.on_epoch_end(0, {"loss": 0.25})
    whole = [line.split(" - ")[0] for line in terminal.screen() if " - " in line]
    assert whole == ["Evaluating", "Epoch 1/3"]


def test_a_printed_line_stands_above_the_bar(terminal: Terminal) -> None:
    bar = started(ProgressBar(0.0, terminal.stream))
    bar.on_epoch_begin(0, {})
    print_line("stopped", terminal.stream)
    bar.on_exception(ValueError())
    assert [line[:9] for line in terminal.screen()] == ["stopped", "Epoch 1/3", ""]


def test_it_starts_no_thread(terminal: Terminal) -> None:
    before = set(threading.enumerate())
    started(ProgressBar(0.0, terminal.stream)).on_epoch_begin(0, {})
    assert set(threading.enumerate()) == before


def test_it_leaves_the_start_method_of_processes_open() -> None:
    code = (
        "import io, multiprocessing as m; from fitkit.callbacks.display import TextBar, print_line;"
        "TextBar(total=2, file=io.StringIO()).close(); print_line('x'); m.set_start_method('spawn')"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, stdout=subprocess.DEVNULL)


NOTEBOOK = """
from traitlets.config import Config
from IPython.core.interactiveshell import InteractiveShell
InteractiveShell.instance(config=Config({"IPKernelApp": {"name": "kernel"}}))
from fitkit.callbacks import ProgressBar
from fitkit.callbacks.display import resolve_verbose
assert resolve_verbose("auto") == 1
bar = ProgressBar()
bar.set_params({"epochs": 1, "steps": 2, "verbose": 1})
bar.on_train_begin()
bar.on_epoch_begin(0)
widget = bar._bar.container
bar.on_train_batch_end(0, {"loss": 0.5})
bar.on_epoch_end(0, {"loss": 0.5})
assert widget.layout.visibility == "hidden"
"""


def test_a_notebook_gets_a_widget_and_then_the_line() -> None:
    pytest.importorskip("IPython")
    pytest.importorskip("ipywidgets")
    done = subprocess.run([sys.executable, "-c", NOTEBOOK], check=True, capture_output=True, text=True)
    assert "Epoch 1/1 - " in done.stdout.splitlines()[-1]


def test_auto_is_one_line_an_epoch_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert resolve_verbose("auto") == 2
    monkeypatch.setattr(sys, "stdout", None)
    assert resolve_verbose("auto") == 2


def test_auto_is_a_bar_in_a_terminal(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", terminal.stream)
    assert resolve_verbose("auto") == 1


@pytest.mark.parametrize("verbose", [0, 1, 2])
def test_a_number_is_taken_as_it_is(verbose: int) -> None:
    assert resolve_verbose(verbose) == verbose


@pytest.mark.parametrize("verbose", [True, False, 3, -1, 1.0, "1", None])
def test_anything_else_is_refused(verbose: object) -> None:
    with pytest.raises(ValueError, match='Expected "auto", 0 .* received verbose='):
        resolve_verbose(verbose)


def test_a_negative_interval_is_refused() -> None:
    with pytest.raises(ValueError, match="received refresh_interval=-1"):
        ProgressBar(-1.0)


def test_an_early_stopping_line_stands_above_the_bar(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", terminal.stream)
    bar = started(ProgressBar(0.0))
    bar.on_epoch_begin(0, {})
    stopping = EarlyStopping("loss", patience=1, verbose=True)
    stopping.set_model(SimpleNamespace(stop_training=False))
    stopping.on_epoch_end(0, {"loss": float("nan")})
    bar.on_epoch_end(0, {"loss": float("nan")})
    assert terminal.screen()[0].startswith("Epoch 1 (index 0): early stopping")
    assert terminal.screen()[1].endswith("loss: nan")
