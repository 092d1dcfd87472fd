"""What the place where we write can show: a bar that is drawn over, or lines that stay; and lines above a bar."""

from __future__ import annotations

import importlib.util
import sys
import threading
from typing import Any, TextIO

from tqdm import tqdm

from fitkit.distributed import is_first
from fitkit.errors import show


class TextBar(tqdm):  # type: ignore[type-arg]  # the stubs' class takes a type, the real one does not
    """tqdm without its watching thread: the hooks refresh the bar themselves."""

    monitor_interval = 0


# tqdm's own lock fixes the start method of multiprocessing, which is the user's to choose.
_LOCK = threading.RLock()
TextBar.set_lock(_LOCK)


def print_line(text: str, stream: TextIO | None = None) -> None:
    """Prints a line above any bar that is being shown, without tearing it; of several processes only rank 0 does.

    Args:
        text: without a line break at its end.
        stream: where to; None is ``sys.stdout``.
    """
    if not is_first():
        return
    TextBar.write(text, file=stream)
    output = sys.stdout if stream is None else stream
    if output is not None:
        output.flush()


def resolve_verbose(verbose: Any) -> int:
    """What the argument verbose of fit, evaluate and predict means here.

    Args:
        verbose: 0 shows nothing, 1 a bar, 2 one line an epoch; "auto" is 1 in a terminal or notebook and 2 elsewhere.

    Returns:
        0, 1 or 2.

    Raises:
        ValueError: verbose is anything else; True is not 1.
    """
    if verbose == "auto":
        return 1 if shows_bars(sys.stdout) else 2
    if isinstance(verbose, bool) or not isinstance(verbose, int) or verbose not in (0, 1, 2):
        raise ValueError(
            f'Expected "auto", 0 (nothing), 1 (a bar) or 2 (one line an epoch), received verbose={show(verbose)}.'
        )
    return verbose


def shows_bars(stream: Any) -> bool:
    """Whether a line there can be drawn over; what is no terminal would keep every drawing."""
    if stream is sys.stdout and in_notebook():
        # Text would be drawn over in a browser, but a notebook that is run unattended keeps every drawing of it.
        return has_widgets()
    return hasattr(stream, "isatty") and stream.isatty()


def in_notebook() -> bool:
    """Whether this is a notebook's kernel; IPython in a terminal is a terminal."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


def has_widgets() -> bool:
    """Whether a notebook can show a bar that is no text."""
    return importlib.util.find_spec("ipywidgets") is not None


def notebook_bar() -> type[tqdm[Any]]:
    """The bar for notebooks; imported only in one."""
    from tqdm.notebook import tqdm as notebook_tqdm

    class NotebookBar(notebook_tqdm):  # type: ignore[type-arg]  # as above
        monitor_interval = 0

    NotebookBar.set_lock(_LOCK)
    return NotebookBar
