"""What callbacks share that hand numbers to another package."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fitkit.callbacks import Callback
from fitkit.callbacks.extras import import_extra, measured_numbers


def test_a_package_that_is_missing_is_an_error_that_says_what_to_install() -> None:
    with pytest.raises(ImportError, match=r"Logger needs board: pip install 'fitkit\[board\]'. .No module named"):
        import_extra("no_such_package", "board", "Logger")


def test_a_folder_of_that_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "board_files").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="Logger needs board: .*board_files is a folder here"):
        import_extra("board_files", "board", "Logger")


def test_an_epochs_numbers_have_the_present_rate_unless_the_logs_have_one() -> None:
    callback = Callback()
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    callback.set_model(SimpleNamespace(optimizer=optimizer))  # type: ignore[arg-type]
    assert measured_numbers(callback, {"loss": torch.tensor(1.0), "mae": None}) == {"loss": 1.0, "learning_rate": 0.5}
    assert measured_numbers(callback, {"learning_rate": 2.0}) == {"learning_rate": 2.0}
