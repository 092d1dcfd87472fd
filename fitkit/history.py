"""What a run recorded, one row an epoch, and what it can be turned into: a table, a plot, a frame, a file.

Plots are drawn in history_plots.py.
"""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch

from fitkit.checkpoints import write_atomically
from fitkit.errors import nearest, needing, show, unknown_name
from fitkit.log_keys import best_index, direction_of, is_detail

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

# Epochs that a notebook shows of a longer run: the first and the last ones.
NOTEBOOK_ROWS = 20
_FORMAT = "fitkit history"
_FORMAT_VERSION = 1


def as_number(key: str, value: Any) -> float | None:
    """The value of a log as a float; None stays None.

    Args:
        key: the log's name, for the message.
        value: a number, or a 0-d tensor or array.

    Raises:
        TypeError: value is no single number.
    """
    if value is None:
        return None
    if isinstance(value, str) or not hasattr(type(value), "__float__") or getattr(value, "shape", ()) != ():
        raise TypeError(f"Expected a number or a 0-d tensor in the logs, received logs[{key!r}]={show(value)}.")
    return float(value.detach() if isinstance(value, torch.Tensor) else value)


@final
class History:
    """What a fit recorded. It fills itself at the end of each epoch, in the way of a callback.

    Attributes:
        history: for each key of the epochs' logs a list of floats, as long as ``epoch``; None where the key was not
            measured.
        epoch: 0-based indices of the recorded epochs.
        params: facts about the run, as callbacks see them.
        stop_reason: why the run ended: "epochs", "early_stopping", "stop_training", "nonfinite", "interrupted" or
            "error"; None while it runs.

    Example:
        >>> history = History()
        >>> history.on_epoch_end(0, {"loss": 0.5})
        >>> history.on_epoch_end(1, {"loss": 0.25, "val_loss": 0.75})
        >>> history["val_loss"]
        [None, 0.75]
        >>> print(history)
          epoch    loss    val_loss
        -------  ------  ----------
              1    0.5
              2    0.25        0.75
        >>> history.best("loss")
        {'epoch': 1, 'loss': 0.25, 'val_loss': 0.75}
    """

    def __init__(self) -> None:
        self.history: dict[str, list[float | None]] = {}
        self.epoch: list[int] = []
        self.params: dict[str, Any] = {}
        self.stop_reason: str | None = None

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Records an epoch's logs.

        Rows of the same and of later epochs are replaced: a resumed run trains these epochs anew.

        Args:
            epoch: 0-based index.
            logs: numbers or 0-d tensors, or None where one was not measured.

        Raises:
            TypeError: a log is no number.
        """
        row = {key: as_number(key, value) for key, value in (logs or {}).items()}
        kept = sum(earlier < epoch for earlier in self.epoch)
        del self.epoch[kept:]
        for column in self.history.values():
            del column[kept:]
        for key in row:
            self.history.setdefault(key, [None] * kept)
        for key, column in self.history.items():
            column.append(row.get(key))
        self.epoch.append(epoch)

    def best(self, monitor: str, mode: str = "auto") -> dict[str, float | None]:
        """The row of the epoch with the best value; the first one of equals. NaN and None are never the best.

        Args:
            monitor: one of the recorded keys.
            mode: "min" when less is better, "max" when more is, "auto" to go by the monitor's name.

        Returns:
            "epoch" (the 0-based index) and that epoch's value of each key.

        Raises:
            ValueError: monitor or mode is unknown, or monitor has no number in any epoch.
        """
        if monitor not in self.history:
            raise unknown_name("monitor", monitor, self.history)
        index = best_index(self.history[monitor], direction_of(monitor, mode))
        if index is None:
            raise ValueError(f"No epoch has a number for monitor={monitor!r}: {show(self.history[monitor])}.")
        return {"epoch": self.epoch[index], **{key: column[index] for key, column in self.history.items()}}

    def to_pandas(self) -> pandas.DataFrame:
        """A DataFrame of floats: one row an epoch, the 0-based epoch as index, NaN where not measured.

        Raises:
            ImportError: pandas is not installed.
        """
        with needing("pandas", "plot", "History.to_pandas"):
            import pandas
        index = pandas.Index(self.epoch, name="epoch", dtype="int64")
        frame: pandas.DataFrame = pandas.DataFrame(self.history, index=index, dtype="float64")
        return frame

    def plot(self, metrics: str | Sequence[str] | None = None) -> Figure:
        """Draws training against validation, one axis a metric, with the best epoch marked. Epochs count from 1.

        Args:
            metrics: keys without ``val_``, such as "loss"; None draws all but the gradient norms of single parameters.

        Returns:
            A figure of its own, unknown to pyplot; ``figure.savefig(path)`` writes it.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: a key is unknown, or there is nothing to draw.
        """
        with needing("matplotlib", "plot", "History.plot"):
            from fitkit.history_plots import plot_run
        return plot_run(self, metrics)

    @staticmethod
    def compare(histories: Mapping[str, History], metrics: str | Sequence[str] | None = None) -> Figure:
        """Draws several runs together: one axis a metric, one color a run, the best epoch of each as a dot.

        Validation is the solid line and training the dashed one; where a run has only one of them, it is solid.

        Args:
            histories: the runs by the labels that they get, such as {"adam": history, "sgd": other}.
            metrics: as in `plot`, None for all that any of the runs has.

        Returns:
            A figure of its own, as `plot` does.

        Raises:
            ImportError: matplotlib is not installed.
            TypeError: histories is no dict of them.
            ValueError: no run has a key of that name, or there is nothing to draw.

        Example:
            >>> figure = History.compare({"adam": History(), "sgd": History()})
            Traceback (most recent call last):
            ValueError: There is nothing to plot: no numbers are recorded.
        """
        if not isinstance(histories, Mapping) or not all(isinstance(each, History) for each in histories.values()):
            raise TypeError(
                f"Expected {{label: History}}, received histories={show(histories)}. Give each run a label: "
                'History.compare({"adam": first, "sgd": second}).'
            )
        with needing("matplotlib", "plot", "History.compare"):
            from fitkit.history_plots import plot_comparison
        return plot_comparison(histories, metrics)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a JSON file, whole or not at all; NaN and infinities are strings in it.

        Args:
            path: where; a file that is there is replaced, folders that are missing are made.
        """
        content = {
            "format": _FORMAT,
            "version": _FORMAT_VERSION,
            **self.state_dict(),
            "history": {key: [_to_json(number) for number in column] for key, column in self.history.items()},
        }
        text = json.dumps(content, allow_nan=False, indent=1)
        write_atomically(path, lambda file: file.write(text.encode()))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> History:
        """Reads what ``save`` wrote.

        Args:
            path: the file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no History, damaged, or of another version of the format.
        """
        name = os.fspath(path)
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"The file {name!r} is no History, or damaged: {error}.") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"The file {name!r} is no History that fitkit saved.")
        if content.get("version") != _FORMAT_VERSION:
            raise ValueError(
                f"The file {name!r} has version {content.get('version')} of the format, this fitkit reads version "
                f"{_FORMAT_VERSION}: use the fitkit that wrote it, or a newer one."
            )
        history = History()
        try:
            history.load_state_dict(content)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"The file {name!r} is a damaged History: {error!r}.") from error
        return history

    def state_dict(self) -> dict[str, Any]:
        """A copy of all there is, as plain lists, dicts, numbers and strings."""
        return {
            "history": {key: list(column) for key, column in self.history.items()},
            "epoch": list(self.epoch),
            "params": dict(self.params),
            "stop_reason": self.stop_reason,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Becomes what ``state_dict`` returned.

        Args:
            state: numbers may be strings in it, as in a saved file.

        Raises:
            ValueError: a column is not as long as the list of epochs.
        """
        columns = {key: [None if y is None else float(y) for y in column] for key, column in state["history"].items()}
        for key, column in columns.items():
            if len(column) != len(state["epoch"]):
                raise ValueError(f"Damaged History: {len(column)} values of {key!r} in {len(state['epoch'])} epochs.")
        self.history = columns
        self.epoch = list(map(operator.index, state["epoch"]))
        self.params = dict(state["params"])
        self.stop_reason = state["stop_reason"]

    def __getitem__(self, key: str) -> list[float | None]:
        if key not in self.history:
            raise KeyError(
                f"{key!r} was not recorded.{nearest(key, self.history)} Known keys: {', '.join(self.history)}."
            )
        return self.history[key]

    def __contains__(self, key: object) -> bool:
        return key in self.history

    def __iter__(self) -> Iterator[str]:
        return iter(self.history)

    def __len__(self) -> int:
        """The number of recorded epochs."""
        return len(self.epoch)

    def __repr__(self) -> str:
        return f"History(epochs={len(self)}, keys={list(self.history)}, stop_reason={self.stop_reason!r})"

    def __str__(self) -> str:
        left_out = sum(map(is_detail, self.history))
        note = f"\nNot shown: the gradient norm of each parameter ({left_out} keys of .history)." if left_out else ""
        return self._table("simple") + note

    def _repr_html_(self) -> str:
        """The table, for notebooks: at most 20 epochs of it, and below it why the run ended."""
        count = f"{len(self)} epoch{'' if len(self) == 1 else 's'}"
        ended = "not ended" if self.stop_reason is None else f"ended by {self.stop_reason}"
        return f"{self._table('html', most=NOTEBOOK_ROWS)}<p>{count}, {ended}</p>"

    def _table(self, style: str, most: int | None = None) -> str:
        # Here, since importing it takes longer than the rest of this file's work.
        from tabulate import tabulate

        shown = {key: column for key, column in self.history.items() if not is_detail(key)}
        rows: list[list[Any]]
        rows = [[epoch + 1, *(column[i] for column in shown.values())] for i, epoch in enumerate(self.epoch)]
        if most is not None and len(rows) > most:
            rows[most // 2 : -(most // 2)] = [["⋯"]]
        return str(tabulate(rows, headers=["epoch", *shown], tablefmt=style, floatfmt=".5g", missingval=""))


def _to_json(number: float | None) -> float | str | None:
    return number if number is None or math.isfinite(number) else str(number)
