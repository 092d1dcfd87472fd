"""What a fit leaves in a notebook: run in a real kernel, where nbclient and ipykernel are installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

# Each epoch takes as long as a few drawings of the bar.
FIT = """
import time
import torch
from torch import nn
import fitkit
from fitkit.callbacks import EarlyStopping, LambdaCallback

torch.manual_seed(0)
x = torch.randn(640, 20)
y = (x[:, 0] > x[:, 1]).long()
model = fitkit.Model(nn.Linear(20, 2), device="cpu")
model.compile("adam", "cross_entropy", metrics=["accuracy"])
slow = LambdaCallback(on_train_batch_end=lambda batch, logs: time.sleep(0.03))
history = model.fit(x, y, epochs=3, validation_split=0.2, callbacks=[slow])
"""
NO_WIDGETS = "import sys; sys.modules['ipywidgets'] = None"
EPOCHS = [f"Epoch {epoch}/3 - " for epoch in (1, 2, 3)]


def outputs(path: Path, *cells: str) -> list[list[Any]]:
    """What each cell leaves behind, all run in one kernel."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(path)}}).execute()
    return [cell.outputs for cell in notebook.cells]


def printed(cell: list[Any], name: str = "stdout") -> str:
    return "".join(output.text for output in cell if output.output_type == "stream" and output.name == name)


@pytest.mark.long
def test_a_fit_leaves_a_line_an_epoch_and_the_bars_that_were_drawn_over(tmp_path: Path) -> None:
    pytest.importorskip("ipywidgets")
    (fit,) = outputs(tmp_path, FIT)
    lines = printed(fit).splitlines()
    assert [line[: len(EPOCHS[0])] for line in lines] == EPOCHS
    assert all("val_accuracy: " in line for line in lines)
    assert printed(fit, "stderr") == ""
    bars = [output for output in fit if output.output_type != "stream"]
    assert 3 <= len(bars) <= 6  # of each epoch the training's, and the validation's if it took long enough
    assert all("application/vnd.jupyter.widget-view+json" in bar.data for bar in bars)


@pytest.mark.long
def test_without_widgets_there_is_a_line_an_epoch_and_nothing_that_was_drawn_over(tmp_path: Path) -> None:
    _, fit = outputs(tmp_path, NO_WIDGETS, FIT)
    assert "\r" not in printed(fit)
    assert [line[: len(EPOCHS[0])] for line in printed(fit).splitlines()] == EPOCHS
    assert printed(fit, "stderr") == ""
    assert {output.output_type for output in fit} == {"stream"}


@pytest.mark.long
def test_a_history_is_a_table_and_an_error_of_fit_its_message(tmp_path: Path) -> None:
    wrong = (
        "try:\n    model.fit(x, y, epochs=1, accumulate_grad_batches=0)\nexcept ValueError as error:\n    print(error)"
    )
    _, shown, failed = outputs(tmp_path, FIT, "history", wrong)
    (table,) = shown
    assert table.output_type == "execute_result"
    assert table.data["text/html"].count("<tr>") == 1 + 3
    assert "3 epochs, ended by epochs" in table.data["text/html"]
    assert printed(failed) == "Expected an integer of at least 1, received accumulate_grad_batches=0.\n"


@pytest.mark.long
@pytest.mark.parametrize("before", ["", "%matplotlib inline"], ids=["no backend", "inline"])
def test_a_plot_as_the_last_value_of_a_cell_is_a_picture(tmp_path: Path, before: str) -> None:
    pytest.importorskip("matplotlib")
    if before:
        pytest.importorskip("matplotlib_inline")
    *_, plot = outputs(tmp_path, before, FIT, "history.plot()")
    (shown,) = plot
    assert shown.output_type == "execute_result"
    assert shown.data["image/png"].startswith("iVBORw0KGgo")  # the beginning of every PNG, in base64
