"""The plots of one History and of several: what is drawn, and that no window or pyplot is needed."""

from __future__ import annotations

import math
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fitkit.history import History


def recorded(**columns: Sequence[float | None]) -> History:
    """A History of these columns, recorded epoch by epoch."""
    history = History()
    for epoch in range(max(map(len, columns.values()))):
        history.on_epoch_end(epoch, {key: column[epoch] for key, column in columns.items()})
    return history


def test_a_plot_has_one_axis_for_training_and_validation_of_a_metric() -> None:
    pytest.importorskip("matplotlib")
    figure = recorded(loss=[2.0, 1.0], val_loss=[None, 3.0], accuracy=[0.5, 0.6]).plot()
    assert [axes.get_title() for axes in figure.axes] == ["loss", "accuracy"]
    assert [line.get_label() for line in figure.axes[0].lines] == ["training", "validation", "best: epoch 2 (3)"]
    measured: Any = figure.axes[0].lines[1].get_xydata()
    assert measured.tolist() == [[2.0, 3.0]]


def test_a_figure_shows_itself_as_a_picture_and_pickles() -> None:
    pytest.importorskip("matplotlib")
    figure: Any = pickle.loads(pickle.dumps(recorded(loss=[2.0, 1.0]).plot()))
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_a_plot_can_be_written_and_leaves_pyplot_alone(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    recorded(loss=[2.0, math.nan, math.inf, 1.0]).plot().savefig(tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 0
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()


def test_a_plot_marks_no_best_learning_rate() -> None:
    pytest.importorskip("matplotlib")
    figure = recorded(learning_rate=[0.1, 0.01], grad_2_norm_total=[1.0, 2.0]).plot()
    assert [len(axes.lines) for axes in figure.axes] == [1, 1]


@pytest.mark.parametrize("metrics", ["loss", "val_loss", ["loss"]])
def test_a_plot_of_chosen_metrics_has_only_these(metrics: str | list[str]) -> None:
    pytest.importorskip("matplotlib")
    figure = recorded(loss=[2.0], val_loss=[3.0], accuracy=[0.5]).plot(metrics)
    assert [axes.get_title() for axes in figure.axes] == ["loss"]


def test_a_plot_of_an_unknown_metric_names_the_nearest() -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="Did you mean 'accuracy'"):
        recorded(accuracy=[0.5]).plot("acuracy")


def test_a_comparison_has_a_solid_line_a_run_in_its_color_and_its_best_epoch() -> None:
    pytest.importorskip("matplotlib")
    first = recorded(loss=[3.0, 2.0], val_loss=[3.0, 4.0])
    second = recorded(loss=[5.0, 4.0, 3.0])
    [axes] = History.compare({"first": first, "second": second}).axes
    assert axes.get_legend_handles_labels()[1] == ["first", "second", "training"]
    drawn = [
        (line.get_color(), line.get_linestyle(), line.get_marker(), list(map(float, line.get_ydata())))
        for line in axes.lines
        if len(line.get_ydata())
    ]
    assert drawn == [
        ("C0", "--", "None", [3.0, 2.0]),
        ("C0", "-", "None", [3.0, 4.0]),
        ("C0", "-", "o", [3.0]),
        ("C1", "-", "None", [5.0, 4.0, 3.0]),
        ("C1", "-", "o", [3.0]),
    ]


def test_a_comparison_has_the_metrics_of_any_run() -> None:
    pytest.importorskip("matplotlib")
    runs = {"a": recorded(loss=[1.0], learning_rate=[0.1]), "b": recorded(loss=[1.0], accuracy=[0.5])}
    assert [axes.get_title() for axes in History.compare(runs).axes] == ["loss", "learning_rate", "accuracy"]
    assert [axes.get_title() for axes in History.compare(runs, "accuracy").axes] == ["accuracy"]


def test_a_comparison_can_be_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    History.compare({"a": recorded(loss=[1.0, math.nan]), "b": recorded(loss=[math.inf])}).savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_comparison_without_labels_shows_how() -> None:
    with pytest.raises(TypeError, match=r'Give each run a label: History.compare\({"adam": first'):
        History.compare([History()])  # type: ignore[arg-type]


def test_a_plot_of_nothing_is_an_error() -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="nothing to plot"):
        History().plot()
