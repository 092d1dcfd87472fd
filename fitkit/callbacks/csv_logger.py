"""The numbers of each epoch as a row of a CSV file."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, final

from fitkit.callbacks.callback import Callback
from fitkit.checkpoints import write_atomically
from fitkit.errors import check_flag, show
from fitkit.history import as_number

Row = dict[str, str]
MISSING = "NA"


@final
class CSVLogger(Callback):
    """Writes the logs of each epoch to a CSV file, one row an epoch: "epoch", which counts from 0, then the keys.

    A row is on its way to the disk when the epoch ends, and the file is never left open. Columns stay where they are:
    a key that appears later, such as "val_loss" with ``validation_freq=5``, gets a column at the right end, for which
    the file is rewritten once, whole or not at all. "NA" stands where a number was not measured, and pandas reads it
    as such. Place the callback after those that add to the logs.

    A run that is resumed goes on in its file, also with ``append=False``; rows of epochs that it trains anew are
    replaced.

    Args:
        filename: the file; folders that are missing are made.
        separator: one character between the values of a row.
        append: whether a fit adds its rows to those that are in the file; otherwise it starts anew.

    Raises:
        TypeError: an argument is of a wrong type.
        ValueError: separator is not one character.

    Example:
        >>> from pathlib import Path
        >>> logger = CSVLogger("log.csv")
        >>> logger.on_train_begin()
        >>> logger.on_epoch_begin(0)
        >>> logger.on_epoch_end(0, {"loss": 0.5})
        >>> Path("log.csv").read_text().split()
        ['epoch,loss', '0,0.5']
    """

    adds_to_logs = ()
    only_on_rank_0 = True

    def __init__(self, filename: str | os.PathLike[str], separator: str = ",", append: bool = False) -> None:
        super().__init__()
        if not isinstance(filename, (str, os.PathLike)):
            raise TypeError(f"Expected a path, received filename={show(filename)}.")
        self.filename = os.fspath(filename)
        if not isinstance(separator, str) or len(separator) != 1:
            raise ValueError(f"Expected one character, received separator={show(separator)}.")
        self.separator = separator
        self.append = check_flag("append", append)
        self._keys: list[str] = []
        # How many rows of the file are those of earlier runs; and whether this run has written or is to go on.
        self._earlier = 0
        self._goes_on = False
        self._has_begun = False
        # Whether some of what was read is no whole row.
        self._is_damaged = False

    @property
    def state_key(self) -> str:
        return f"{type(self).__name__}({os.path.basename(self.filename)})"

    def on_train_begin(self, logs: Mapping[str, float] | None = None) -> None:
        """Sees that the file can be written."""
        path = Path(self.filename)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8"):
            pass
        self._goes_on = self.append
        self._has_begun = False
        self._earlier = len(self._read()[1]) if self.append else 0

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Before the first epoch of a run, leaves in the file what stays there."""
        self._begin(epoch)

    def _begin(self, epoch: int) -> None:
        if self._has_begun:
            return
        self._has_begun = True
        keys, rows = self._read() if self._goes_on else ([], [])
        damaged = self._is_damaged
        kept = rows[: self._earlier] + [row for row in rows[self._earlier :] if int(row["epoch"]) < epoch]
        self._keys = keys
        if not self._goes_on or damaged or len(kept) < len(rows):
            self._rewrite(kept)

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        """Writes the row."""
        self._begin(epoch)  # a run may go on from a file that was saved at this epoch's end
        row = {"epoch": str(epoch)}
        for key, value in (logs or {}).items():
            if key == "epoch":  # the row's own
                continue
            number = as_number(key, value)
            row[key] = MISSING if number is None else repr(number)
        new = [key for key in row if key not in self._keys]
        if new:
            rows = self._read()[1]
            self._keys += new
            self._rewrite([*rows, row])
        else:
            with open(self.filename, "a", encoding="utf-8", newline="") as file:
                self._write(file, [row])

    def _read(self) -> tuple[list[str], list[Row]]:
        """The columns and the rows that are whole: every row was written with its end of line, a crash may cut it."""
        text = Path(self.filename).read_bytes().decode("utf-8", "replace")
        lines = [f"{line}\n" for line in text.split("\n")[:-1] if "\0" not in line]
        reader = csv.DictReader(lines, delimiter=self.separator)
        keys = list(reader.fieldnames or ())
        found = list(reader)
        if keys and keys[0] != "epoch":
            raise ValueError(
                f"Expected a file that CSVLogger wrote with separator={self.separator!r}, received {self.filename!r}, "
                f"whose first column is {show(keys[0])}. Give another filename or separator, or append=False."
            )
        rows = [row for row in found if row["epoch"].isdecimal() and None not in row and None not in row.values()]
        self._is_damaged = "".join(lines) != text or len(rows) < len(found)
        return keys, rows

    def _rewrite(self, rows: Sequence[Row]) -> None:
        text = io.StringIO(newline="")
        if self._keys:
            self._write(text, [{key: key for key in self._keys}, *rows])
        write_atomically(self.filename, lambda file: file.write(text.getvalue().encode()))

    def _write(self, file: Any, rows: Iterable[Row]) -> None:
        writer = csv.DictWriter(file, self._keys, restval=MISSING, delimiter=self.separator, lineterminator="\n")
        writer.writerows(rows)

    def state_dict(self) -> dict[str, Any]:
        """Which rows of the file are those of earlier runs."""
        return {"earlier": self._earlier}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on in the file of the run that is resumed; called after ``on_train_begin``.

        Args:
            state: what ``state_dict`` returned.
        """
        self._earlier = state["earlier"]
        self._goes_on = True
