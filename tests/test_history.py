"""History: what it records, which row is the best, and that nothing is lost on the way to a file."""

from __future__ import annotations

import json
import math
import os
import pickle
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fitkit.history import History, as_number


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
