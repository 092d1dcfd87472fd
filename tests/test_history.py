"""History: what it records, which row is the best, and that nothing is lost on the way to a file."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fitkit.history import History, as_number, direction_of, improves


def recorded(**columns: Sequence[float | None]) -> History:
    """A History of these columns, recorded epoch by epoch."""
    history = History()
    for epoch in range(max(map(len, columns.values()))):
        history.on_epoch_end(epoch, {key: column[epoch] for key, column in columns.items()})
    return history


def test_a_late_column_is_filled_with_none_at_its_front() -> None:
    history = History()
    history.on_epoch_end(0, {"loss": 2.0})
    history.on_epoch_end(1, {"loss": 1.0, "val_loss": 3.0})
    assert history.history == {"loss": [2.0, 1.0], "val_loss": [None, 3.0]}


def test_a_column_that_was_not_measured_has_none_in_that_epoch() -> None:
    history = History()
    history.on_epoch_end(0, {"loss": 2.0, "val_loss": 3.0})
    history.on_epoch_end(1, {"loss": 1.0})
    assert history["val_loss"] == [3.0, None]


@given(st.lists(st.dictionaries(st.sampled_from("abcd"), st.floats(width=32)), max_size=6))
def test_every_column_is_as_long_as_epoch(rows: list[dict[str, float]]) -> None:
    history = History()
    for epoch, logs in enumerate(rows):
        history.on_epoch_end(epoch, logs)
    assert all(len(column) == len(history.epoch) == len(rows) for column in history.history.values())


def test_an_epoch_recorded_again_replaces_its_row() -> None:
    history = recorded(loss=[3.0, 2.0])
    history.on_epoch_end(1, {"loss": 1.5})
    assert history.epoch == [0, 1]
    assert history["loss"] == [3.0, 1.5]


def test_an_earlier_epoch_recorded_again_drops_what_came_after_it() -> None:
    history = recorded(loss=[3.0, 2.0, 1.0])
    history.on_epoch_end(1, {"loss": 2.5})
    assert history.epoch == [0, 1]
    assert history["loss"] == [3.0, 2.5]


def test_a_run_that_starts_later_keeps_its_epoch_indices() -> None:
    history = History()
    history.on_epoch_end(5, {"loss": 1.0})
    assert history.epoch == [5]
    assert history.best("loss") == {"epoch": 5, "loss": 1.0}


@pytest.mark.parametrize("value", [2, 2.0, torch.tensor(2), torch.tensor(2.0, requires_grad=True), True + 1])
def test_numbers_and_0d_tensors_become_floats(value: object) -> None:
    number = as_number("loss", value)
    assert number == 2.0
    assert type(number) is float


@pytest.mark.parametrize("value", ["2.0", [2.0], torch.ones(2), 2j])
def test_what_is_no_single_number_is_refused(value: object) -> None:
    with pytest.raises(TypeError, match=r"a number or a 0-d tensor in the logs, received logs\['extra'\]="):
        History().on_epoch_end(0, {"extra": value})


def test_best_gives_the_row_with_its_epoch() -> None:
    history = recorded(loss=[3.0, 2.0, 1.0], val_loss=[3.0, 2.0, 2.5])
    assert history.best("val_loss") == {"epoch": 1, "loss": 2.0, "val_loss": 2.0}


def test_nan_and_none_are_never_the_best() -> None:
    history = recorded(val_loss=[math.nan, None, 2.0, math.inf])
    assert history.best("val_loss")["epoch"] == 2
    assert history.best("val_loss", mode="max")["epoch"] == 3


def test_the_first_of_equal_values_is_the_best() -> None:
    assert recorded(accuracy=[0.5, 0.75, 0.75]).best("accuracy")["epoch"] == 1


def test_best_of_an_unknown_monitor_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="Did you mean 'val_loss'"):
        recorded(loss=[1.0], val_loss=[1.0]).best("val_los")


def test_best_of_nothing_but_nan_is_an_error() -> None:
    with pytest.raises(ValueError, match="No epoch has a number for monitor='loss'"):
        recorded(loss=[math.nan, math.nan]).best("loss")


def test_indexing_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(KeyError, match="Did you mean 'loss'"):
        recorded(loss=[1.0])["los"]


def test_membership_and_length_are_of_keys_and_epochs() -> None:
    history = recorded(loss=[1.0, 0.5, 0.25])
    assert "loss" in history
    assert "val_loss" not in history
    assert list(history) == ["loss"]
    assert len(history) == 3


def test_the_table_counts_epochs_from_one_and_leaves_unmeasured_cells_empty() -> None:
    lines = str(recorded(loss=[0.123456, 0.5], val_loss=[None, 0.25])).splitlines()
    assert lines[0].split() == ["epoch", "loss", "val_loss"]
    assert lines[2].split() == ["1", "0.12346"]
    assert lines[3].split() == ["2", "0.5", "0.25"]


def test_the_table_leaves_out_the_norms_of_single_parameters() -> None:
    history = recorded(loss=[1.0], grad_2_norm_total=[0.5], **{"grad_2_norm_fc.weight": [0.25]})
    assert "grad_2_norm_total" in str(history)
    assert "fc.weight" not in str(history)
    assert "1 keys of .history" in str(history)


def test_the_table_of_an_empty_history_is_a_header() -> None:
    assert str(History()).split()[0] == "epoch"


def test_a_notebook_gets_an_html_table_and_why_the_run_ended() -> None:
    history = recorded(loss=[0.5])
    history.stop_reason = "epochs"
    html = history._repr_html_()
    assert html.startswith("<table>")
    assert html.endswith("<p>1 epoch, ended by epochs</p>")


def test_a_notebook_gets_the_first_and_the_last_of_many_epochs() -> None:
    html = recorded(loss=[float(epoch) for epoch in range(1000)])._repr_html_()
    shown = [int(number) for number in re.findall(r"<tr><td[^>]*>\s*(\d+)\s*</td>", html)]
    assert shown == [*range(1, 11), *range(991, 1001)]
    assert html.count("⋯") == 1


def test_text_has_every_epoch() -> None:
    assert len(str(recorded(loss=[1.0] * 50)).splitlines()) == 52


def test_the_repr_is_one_short_line() -> None:
    assert repr(recorded(loss=[0.5])) == "History(epochs=1, keys=['loss'], stop_reason=None)"


@given(st.lists(st.none() | st.floats(), min_size=1, max_size=8))
def test_a_saved_column_comes_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, column: list[float]) -> None:
    path = tmp_path_factory.mktemp("history") / "history.json"
    recorded(loss=column).save(path)
    assert list(map(repr, History.load(path)["loss"])) == list(map(repr, column))


def test_everything_else_comes_back_too(tmp_path: Path) -> None:
    history = recorded(loss=[2.0, 1.0])
    history.params, history.stop_reason = {"epochs": 2, "steps": None}, "epochs"
    history.save(str(tmp_path / "history.json"))
    assert History.load(str(tmp_path / "history.json")).state_dict() == history.state_dict()


def test_the_file_is_strict_json(tmp_path: Path) -> None:
    recorded(loss=[math.nan, math.inf, -math.inf]).save(tmp_path / "history.json")

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    content = json.loads((tmp_path / "history.json").read_text(), parse_constant=refuse)
    assert content["history"]["loss"] == ["nan", "inf", "-inf"]


def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "history.json"
    history = recorded(loss=[1.0])
    history.save(path)
    history.params["model"] = object()
    with pytest.raises(TypeError, match="not JSON serializable"):
        history.save(path)
    assert History.load(path)["loss"] == [1.0]
    assert os.listdir(tmp_path) == ["history.json"]


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "fitkit history", "version": 1}', '{"format": "other"}'])
def test_a_file_that_is_no_history_is_refused_by_its_path(tmp_path: Path, text: str) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match=r"other\.json' is"):
        History.load(tmp_path / "other.json")


def test_a_file_of_another_version_says_so(tmp_path: Path) -> None:
    (tmp_path / "new.json").write_text('{"format": "fitkit history", "version": 2}')
    with pytest.raises(ValueError, match="has version 2 of the format"):
        History.load(tmp_path / "new.json")


def test_a_state_with_columns_of_unequal_length_is_refused() -> None:
    state = {"history": {"loss": [1.0]}, "epoch": [0, 1], "params": {}, "stop_reason": None}
    with pytest.raises(ValueError, match="1 values of 'loss' in 2 epochs"):
        History().load_state_dict(state)


def test_a_state_shares_nothing_with_the_history() -> None:
    history = recorded(loss=[1.0])
    state = history.state_dict()
    history.on_epoch_end(1, {"loss": 0.5})
    assert state["history"] == {"loss": [1.0]}
    assert state["epoch"] == [0]


def test_it_pickles() -> None:
    history = recorded(loss=[1.0, 0.5])
    assert pickle.loads(pickle.dumps(history)).state_dict() == history.state_dict()


def test_the_frame_has_the_epoch_as_index_and_floats_only() -> None:
    pytest.importorskip("pandas")
    frame = recorded(loss=[1.0, 0.5], val_loss=[None, 0.75]).to_pandas()
    assert frame.index.name == "epoch"
    assert frame.index.tolist() == [0, 1]
    assert (frame.dtypes == "float64").all()
    assert math.isnan(frame["val_loss"][0])
    assert frame["val_loss"][1] == 0.75


def test_an_empty_history_makes_an_empty_frame() -> None:
    pytest.importorskip("pandas")
    assert History().to_pandas().shape == (0, 0)


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


MORE = (
    "accuracy acc f1 auroc r2_score BinaryF1Score MulticlassAUROC IoU explained_variance top1_acc head_precision acc1"
)
LESS = "loss mse mae mean_squared_error perplexity hamming_distance accuracy_loss brier_score lr accurate"


@pytest.mark.parametrize("prefix", ["", "val_"])
@pytest.mark.parametrize(("names", "direction"), [(MORE, "max"), (LESS, "min")])
def test_auto_goes_by_the_words_of_the_name(names: str, direction: str, prefix: str) -> None:
    assert [name for name in names.split() if direction_of(prefix + name) != direction] == []


def test_a_given_mode_wins_over_the_name() -> None:
    assert direction_of("accuracy", "min") == "min"
    assert direction_of("loss", "max") == "max"


def test_an_unknown_mode_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'auto', 'min', 'max', received mode='maximum'"):
        direction_of("loss", "maximum")


@pytest.mark.parametrize(("value", "improvement"), [(1.0, False), (0.75, False), (0.5, True), (math.nan, False)])
def test_an_improvement_exceeds_min_delta(value: float, improvement: bool) -> None:
    assert improves(value, 1.0, "min", min_delta=0.25) is improvement
    assert improves(-value, -1.0, "max", min_delta=0.25) is improvement


def test_any_number_but_nan_improves_on_none() -> None:
    assert improves(math.inf, None, "min")
    assert not improves(math.nan, None, "min")
