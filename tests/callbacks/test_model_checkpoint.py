"""ModelCheckpoint: which files there are, what is in them, and that nothing is removed too early."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fitkit
from fitkit.callbacks import Callback, EarlyStopping, LambdaCallback, ModelCheckpoint
from fitkit.checkpoints import load_state, save_state
from fitkit.errors import CheckpointError

X, Y = torch.randn(12, 2), torch.randn(12, 1)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def files(folder: str = ".") -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


def compiled() -> fitkit.Model:
    torch.manual_seed(0)
    model = fitkit.Model(nn.Linear(2, 1), device="cpu")
    model.compile("adam", "mse")
    return model


def fit(*callbacks: Callback, **arguments: Any) -> fitkit.Model:
    model = compiled()
    model.fit(X, Y, callbacks=callbacks, **{"epochs": 3, "batch_size": 4, "verbose": 0, **arguments})
    return model


def marks(*values: float) -> LambdaCallback:
    """Logs these values, one an epoch, as "mark"."""

    def add(epoch: int, logs: dict[str, float]) -> None:
        logs["mark"] = values[epoch]

    return LambdaCallback(on_epoch_end=add)


def judged(*values: float, **arguments: Any) -> ModelCheckpoint:
    checkpoint = ModelCheckpoint("{epoch}", "mark", **arguments)
    fit(marks(*values), checkpoint, epochs=len(values))
    return checkpoint


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"filepath": 3}, TypeError, "Expected a path, received filepath=3"),
        ({"filepath": "{epoch"}, ValueError, "received filepath='{epoch'"),
        ({"filepath": "{}"}, ValueError, "Expected keys of the logs in braces"),
        ({"filepath": "{epoch.real}"}, ValueError, "Expected keys of the logs in braces"),
        ({"filepath": "{batch}"}, ValueError, "Expected no {batch} with save_freq"),
        ({"verbose": 2}, TypeError, "received verbose=2"),
        ({"save_best_only": 1}, TypeError, "received save_best_only=1"),
        ({"save_weights_only": "yes"}, TypeError, "received save_weights_only='yes'"),
        ({"mode": "best"}, ValueError, "received mode='best'"),
        ({"save_freq": 0}, ValueError, "received save_freq=0"),
        ({"save_freq": "batch"}, TypeError, "received save_freq='batch'"),
        ({"initial_value_threshold": math.nan}, ValueError, "received initial_value_threshold=nan"),
        ({"save_top_k": 0}, ValueError, "received save_top_k=0"),
        ({"save_top_k": 2, "filepath": "same"}, ValueError, "save_top_k=2 needs a name for each file"),
        ({"save_top_k": 2, "save_best_only": True}, ValueError, "exclude each other"),
        ({"filepath": "{epoch}.safetensors"}, ValueError, "Expected save_weights_only=True"),
    ],
)
def test_a_wrong_argument_is_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ModelCheckpoint(**{"filepath": "{epoch}", **arguments})


def test_without_best_only_each_epoch_is_saved_and_no_monitor_is_needed() -> None:
    fit(ModelCheckpoint("run/{epoch:02d}-{loss:.2f}.pt", monitor="nothing"))
    assert [name[:3] for name in files("run")] == ["01-", "02-", "03-"]


def test_batches_count_from_one_and_over_all_epochs() -> None:
    fit(ModelCheckpoint("{epoch}-{batch}", save_freq=4))
    assert files() == ["2-1", "3-2"]


def test_logs_of_a_batch_can_stand_in_the_name() -> None:
    fit(ModelCheckpoint("{batch}-{loss:.0f}", save_freq=1), epochs=1)
    assert [name[:2] for name in files()] == ["1-", "2-", "3-"]


def test_the_best_only_is_saved_when_it_is_better_than_ever() -> None:
    assert judged(3.0, 4.0, 2.0, 2.0, 1.0, save_best_only=True).best == 1.0
    assert files() == ["1", "3", "5"]


def test_more_is_better_where_mode_says_so() -> None:
    judged(3.0, 4.0, 2.0, 5.0, save_best_only=True, mode="max")
    assert files() == ["1", "2", "4"]


def test_nan_is_never_the_best() -> None:
    checkpoint = judged(math.nan, 2.0, math.nan, save_best_only=True)
    assert files() == ["2"]
    assert (checkpoint.best, checkpoint.best_path) == (2.0, "2")


def test_a_threshold_must_be_beaten_first() -> None:
    judged(3.0, 2.0, 1.0, save_best_only=True, initial_value_threshold=2.0)
    assert files() == ["3"]


def test_the_best_few_are_kept() -> None:
    checkpoint = judged(3.0, 5.0, 1.0, 4.0, 2.0, math.nan, save_top_k=2)
    assert files() == ["3", "5"]
    assert (checkpoint.best, checkpoint.best_path) == (1.0, "3")


@pytest.mark.parametrize("name", ["{epoch}", "same"])
def test_the_one_best_file_is_kept(name: str) -> None:
    fit(marks(3.0, 1.0, 2.0), ModelCheckpoint(name, "mark", save_top_k=1))
    assert files() == ["2" if name == "{epoch}" else "same"]
    assert load_state(files()[0])["run"]["epoch"] == 1


def test_values_that_give_one_name_have_files_of_their_own() -> None:
    fit(marks(1.01, 1.02, 1.03), ModelCheckpoint("{mark:.0f}.pt", "mark", save_top_k=2))
    assert files() == ["1-2.pt", "1.pt"]


def test_the_last_file_is_the_last_epochs() -> None:
    fit(marks(1.0, 2.0, 3.0), ModelCheckpoint("run/{epoch}/best.pt", "mark", save_best_only=True, save_last=True))
    assert files("run") == ["1", "last.pt"]
    assert load_state("run/last.pt")["run"]["epoch"] == 2


def test_epochs_without_a_validation_are_not_judged() -> None:
    checkpoint = ModelCheckpoint("{epoch}-{val_loss:.0f}", save_best_only=True)
    fit(checkpoint, validation_split=0.3, validation_freq=2, epochs=4)
    assert {name[0] for name in files()} <= {"2", "4"}


def test_an_epoch_without_a_validation_has_nan_in_its_name() -> None:
    fit(ModelCheckpoint("{epoch}-{val_loss:.0f}"), validation_split=0.3, validation_freq=2, epochs=2)
    assert files()[0] == "1-nan"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"filepath": "{accuracy}"},
            r"asks for \{accuracy\}, which this run never logs.*Known keys: epoch, batch, loss",
        ),
        ({"save_best_only": True}, "This run has no validation"),
        ({"save_top_k": 1, "monitor": "los"}, "Did you mean 'loss'"),
    ],
)
def test_a_key_that_can_never_appear_is_an_error_before_training(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(ModelCheckpoint(**{"filepath": "{epoch}", **arguments}))
    assert files() == []


def test_a_validation_is_not_judged_after_batches() -> None:
    with pytest.raises(ValueError, match="judges after batches, where there is no validation"):
        fit(ModelCheckpoint("{epoch}", save_best_only=True, save_freq=2), validation_split=0.3)


def test_a_file_is_what_save_writes_and_load_reads() -> None:
    model = fit(ModelCheckpoint("{epoch}"))
    fresh = compiled()
    fresh.load("3")
    assert fresh.history.history == model.history.history
    assert torch.equal(fresh.module.weight, model.module.weight)  # type: ignore[arg-type]


def test_weights_alone_are_what_load_weights_reads() -> None:
    model = fit(ModelCheckpoint("{epoch}.safetensors", save_weights_only=True))
    fresh = compiled()
    fresh.load_weights("3.safetensors")
    assert torch.equal(fresh.module.weight, model.module.weight)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"was not written by fitkit"):
        fresh.load("3.safetensors")


def test_the_best_value_and_the_files_are_kept_across_a_resume() -> None:
    values = (3.0, 1.0, 2.0, 4.0, 0.5)
    first = ModelCheckpoint("{epoch}", "mark", save_top_k=2, save_last=True)
    fit(marks(*values), first, epochs=3)
    assert files() == ["2", "3", "last"]
    second = ModelCheckpoint("{epoch}", "mark", save_top_k=2, save_last=True)
    fit(marks(*values), second, epochs=5, resume_from="last")
    assert files() == ["2", "5", "last"]
    assert second.best == 0.5


def test_a_second_fit_starts_clean() -> None:
    checkpoint = judged(1.0, save_best_only=True)
    Path("1").unlink()
    fit(marks(2.0), checkpoint, epochs=1)
    assert files() == ["1"]


def test_a_file_can_have_no_other_files_removed() -> None:
    Path("precious").touch()
    fit(marks(2.0), ModelCheckpoint("{epoch}.pt", "mark", save_top_k=1), epochs=1)
    state = load_state("1.pt")
    state["run"]["callbacks"]["ModelCheckpoint(mark, {epoch}.pt)"]["kept"] = [["precious", 3.0], ["../x.pt", 3.0]]
    save_state("1.pt", state)
    fit(marks(2.0, 1.0), ModelCheckpoint("{epoch}.pt", "mark", save_top_k=1), epochs=2, resume_from="1.pt")
    assert "precious" in files()


def test_an_older_file_is_there_until_the_newer_one_is_safe() -> None:
    found: list[list[str]] = []

    class Looking(fitkit.Model):
        def save(self, path: Any) -> None:
            super().save(path)
            found.append(files())

    model = Looking(nn.Linear(2, 1), device="cpu")
    model.compile("adam", "mse")
    checkpoint = ModelCheckpoint("{epoch}", "mark", save_top_k=1)
    model.fit(X, Y, epochs=2, verbose=0, callbacks=[marks(2.0, 1.0), checkpoint])
    assert found == [["1"], ["1", "2"]]
    assert files() == ["2"]


def test_a_file_that_cannot_be_written_warns_and_leaves_the_best_as_it_was() -> None:
    checkpoint = ModelCheckpoint("run/{epoch}", "mark", save_top_k=1)

    def block(epoch: int, logs: Any) -> None:
        if epoch == 1:
            Path("run").rename("moved")
            Path("run").touch()
        if epoch == 2:
            Path("run").unlink()
            Path("moved").rename("run")

    with pytest.warns(RuntimeWarning, match=r"could not write run/2.*the files before are intact"):
        fit(LambdaCallback(on_epoch_begin=block), marks(3.0, 1.0, 2.0), checkpoint)
    assert files("run") == ["3"]
    assert checkpoint.best == 2.0


def test_verbose_says_what_was_saved(capsys: pytest.CaptureFixture[str]) -> None:
    fit(ModelCheckpoint("{epoch}", verbose=1), epochs=1)
    assert capsys.readouterr().out == "Epoch 1 (index 0): saved 1.\n"


def test_a_resumed_run_is_the_undisturbed_one() -> None:
    whole = fit(EarlyStopping("loss", patience=2), ModelCheckpoint("{epoch}"), epochs=5)
    resumed = fit(ModelCheckpoint("{epoch}"), EarlyStopping("loss", patience=2), epochs=5, resume_from="2")
    assert resumed.history.history == whole.history.history
    assert torch.equal(resumed.module.weight, whole.module.weight)  # type: ignore[arg-type]


def test_states_are_found_again_when_another_checkpoint_comes_in_front() -> None:
    def best() -> ModelCheckpoint:
        return ModelCheckpoint("best.pt", "mark", save_best_only=True)

    fit(marks(2.0, 1.0, 3.0), best(), LambdaCallback(on_train_end=lambda logs: None)).save("saved")
    again = best()
    fit(marks(*[5.0] * 4), ModelCheckpoint("{epoch}.pt", "mark"), again, epochs=4, resume_from="saved")
    assert again.best == 1.0


def test_two_files_of_the_last_epoch_at_one_path_are_an_error_before_training() -> None:
    with pytest.raises(ValueError, match="would write the same file"):
        fit(ModelCheckpoint("a{epoch}.pt", save_last=True), ModelCheckpoint("b{epoch}.pt", save_last=True))
    assert files() == []


def test_left_overs_of_a_crash_are_cleared_away_when_they_are_old() -> None:
    Path("files").mkdir()
    for name, age in ((".fitkit-1.tmp", 7200), (".fitkit-2.tmp", 10)):
        Path("files", name).touch()
        os.utime(Path("files", name), (time.time() - age,) * 2)
    fit(ModelCheckpoint("files/{epoch}.pt"), epochs=1)
    assert files("files") == [".fitkit-2.tmp", "1.pt"]


def test_the_best_of_batches_is_saved_where_files_are_of_batches() -> None:
    fit(ModelCheckpoint("{batch}.pt", monitor="loss", save_best_only=True, save_freq=1), epochs=1)
    assert "1.pt" in files()


def test_a_key_of_the_name_that_no_log_has_is_an_error_that_lists_them() -> None:
    with pytest.raises(ValueError, match="mark"):
        fit(ModelCheckpoint("{epoch}-{mark:.2f}.pt"))


def test_a_file_that_somebody_took_away_is_not_missed() -> None:
    def take(epoch: int, logs: Any) -> None:
        if epoch == 1:
            os.remove("1.pt")

    fit(LambdaCallback(on_epoch_begin=take), marks(3, 2, 1), ModelCheckpoint("{epoch}.pt", "mark", save_top_k=1))
    assert files() == ["3.pt"]


def test_the_best_of_another_direction_is_forgotten() -> None:
    lowest, highest = (ModelCheckpoint("best.pt", "mark", save_best_only=True, mode=mode) for mode in ("min", "max"))
    fit(marks(3, 2, 1), lowest)
    fit(marks(5, 6, 4), highest)
    highest.load_state_dict(lowest.state_dict())
    assert (lowest.best, highest.best) == (1, 6)
