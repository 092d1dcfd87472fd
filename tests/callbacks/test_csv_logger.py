"""CSVLogger: a row an epoch that is there at once, stable columns, and nothing lost or doubled."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fitkit
from fitkit.callbacks import CSVLogger, LambdaCallback


def driven(logger: CSVLogger, rows: list[dict[str, float | None]], first: int = 0) -> list[str]:
    """The file's lines after a run over these epochs' logs."""
    logger.on_train_begin({})
    written(logger, rows, first)
    return Path(logger.filename).read_text(encoding="utf-8").splitlines()


def written(logger: CSVLogger, rows: list[dict[str, float | None]], first: int = 0) -> None:
    for epoch, row in enumerate(rows, start=first):
        logger.on_epoch_begin(epoch, {})
        logger.on_epoch_end(epoch, row)  # type: ignore[arg-type]


def test_a_row_is_in_the_file_when_the_epoch_ends(tmp_path: Path) -> None:
    path, seen = tmp_path / "log.csv", []
    model = fitkit.Model(nn.Linear(1, 1), device="cpu")
    model.compile("sgd", "mse")
    looking = LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(path.read_text()))
    history = model.fit(torch.ones(4, 1), torch.ones(4, 1), epochs=2, callbacks=[CSVLogger(path), looking], verbose=0)
    first, second = history["loss"]
    assert seen == [f"epoch,loss\n0,{first}\n", f"epoch,loss\n0,{first}\n1,{second}\n"]


def test_numbers_come_back_as_they_were(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    values = [0.1 + 0.2, 1e-30, math.inf, math.nan]
    driven(CSVLogger(tmp_path / "log.csv"), [{"loss": value} for value in values])
    # As text: before version 3 pandas read floats faster than it read them exactly.
    assert str([float(value) for value in pandas.read_csv(tmp_path / "log.csv", dtype=str)["loss"]]) == str(values)


def test_a_late_key_gets_a_column_and_no_row_is_lost(tmp_path: Path) -> None:
    rows: list[dict[str, float | None]] = [{"loss": 1.0}, {"loss": 2.0, "val_loss": 3.0}, {"loss": 4.0}]
    lines = driven(CSVLogger(tmp_path / "log.csv"), rows)
    assert lines == ["epoch,loss,val_loss", "0,1.0,NA", "1,2.0,3.0", "2,4.0,NA"]


def test_columns_stay_in_their_order(tmp_path: Path) -> None:
    rows: list[dict[str, float | None]] = [{"loss": 1.0, "mae": 2.0}, {"mae": 3.0, "loss": 4.0}]
    assert driven(CSVLogger(tmp_path / "log.csv"), rows)[-1] == "1,4.0,3.0"


def test_what_was_not_measured_is_na(tmp_path: Path) -> None:
    assert driven(CSVLogger(tmp_path / "log.csv"), [{"loss": None}])[-1] == "0,NA"


def test_without_append_a_fit_starts_the_file_anew(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "log.csv")
    driven(logger, [{"loss": 1.0}, {"loss": 2.0}])
    assert driven(logger, [{"mae": 3.0}]) == ["epoch,mae", "0,3.0"]


def test_with_append_a_fit_adds_its_rows(tmp_path: Path) -> None:
    driven(CSVLogger(tmp_path / "log.csv"), [{"loss": 1.0}, {"loss": 2.0}])
    lines = driven(CSVLogger(tmp_path / "log.csv", append=True), [{"loss": 3.0, "mae": 4.0}])
    assert lines == ["epoch,loss,mae", "0,1.0,NA", "1,2.0,NA", "0,3.0,4.0"]


@pytest.mark.parametrize("append", [False, True])
def test_a_resumed_run_replaces_the_rows_that_it_trains_anew(append: bool, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "log.csv", append=append)
    driven(logger, [{"loss": 1.0}, {"loss": 2.0}, {"loss": 3.0}])
    resumed = CSVLogger(tmp_path / "log.csv", append=append)
    resumed.on_train_begin({})
    resumed.load_state_dict(logger.state_dict())
    written(resumed, [{"loss": 4.0}, {"loss": 5.0}], first=1)
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert lines == ["epoch,loss", "0,1.0", "1,4.0", "2,5.0"]


def test_a_run_that_goes_on_at_an_epochs_end_has_the_row_of_that_epoch_once(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "log.csv")
    driven(logger, [{"loss": 1.0}, {"loss": 2.0}])
    resumed = CSVLogger(tmp_path / "log.csv")
    resumed.on_train_begin({})
    resumed.load_state_dict(logger.state_dict())
    # The backup was made by a callback in front of this one, at the end of the epoch with index 1.
    resumed.on_epoch_end(1, {"loss": 2.0})
    written(resumed, [{"loss": 3.0}], first=2)
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert lines == ["epoch,loss", "0,1.0", "1,2.0", "2,3.0"]


def test_a_resumed_run_leaves_the_rows_of_earlier_runs_alone(tmp_path: Path) -> None:
    driven(CSVLogger(tmp_path / "log.csv"), [{"loss": 7.0}, {"loss": 8.0}])
    logger = CSVLogger(tmp_path / "log.csv", append=True)
    driven(logger, [{"loss": 1.0}, {"loss": 2.0}])
    logger.on_train_begin({})
    logger.load_state_dict({"earlier": 2})
    written(logger, [{"loss": 3.0}], first=1)
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert lines == ["epoch,loss", "0,7.0", "1,8.0", "0,1.0", "1,3.0"]


def test_the_separator_is_used_for_all_of_it(tmp_path: Path) -> None:
    assert driven(CSVLogger(tmp_path / "log.csv", ";"), [{"loss": 1.0}]) == ["epoch;loss", "0;1.0"]


def test_missing_folders_are_made(tmp_path: Path) -> None:
    driven(CSVLogger(tmp_path / "a" / "b" / "log.csv"), [{"loss": 1.0}])
    assert (tmp_path / "a" / "b" / "log.csv").exists()


def test_nothing_but_the_file_is_left(tmp_path: Path) -> None:
    driven(CSVLogger(tmp_path / "log.csv"), [{"loss": 1.0}, {"mae": 2.0}])
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


def test_a_path_that_cannot_be_written_is_an_error_before_the_first_batch(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=str(tmp_path)):
        CSVLogger(tmp_path).on_train_begin({})


def test_appending_to_a_foreign_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("name,age\nAda,36\n")
    with pytest.raises(ValueError, match="whose first column is 'name'"):
        CSVLogger(tmp_path / "log.csv", append=True).on_train_begin({})


@pytest.mark.parametrize("separator", ["", ", ", 1, None])
def test_a_separator_is_one_character(separator: Any) -> None:
    with pytest.raises(ValueError, match="Expected one character, received separator="):
        CSVLogger("log.csv", separator)


def test_a_filename_is_a_path() -> None:
    with pytest.raises(TypeError, match="Expected a path, received filename=3"):
        CSVLogger(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("cut", ["1", "1,0.", "x,0.5\n", "\0\0", "1\n", "1,2,3\n"])
def test_a_row_that_a_crash_has_cut_is_left_out(cut: str, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(f"epoch,loss\n0,0.5\n{cut}")
    assert driven(CSVLogger(path, append=True), [{"loss": 0.25}], first=1) == ["epoch,loss", "0,0.5", "1,0.25"]


def test_a_key_named_epoch_leaves_the_rows_epoch_alone(tmp_path: Path) -> None:
    assert driven(CSVLogger(tmp_path / "log.csv"), [{"epoch": 7.0, "loss": 0.5}]) == ["epoch,loss", "0,0.5"]
