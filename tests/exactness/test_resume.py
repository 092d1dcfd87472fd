"""A run that goes on from a file is the run that never stopped: whatever it trains on, wherever it stopped."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import fitkit
from fitkit import progress
from fitkit.callbacks import BackupAndRestore, Callback, EarlyStopping, LambdaCallback
from fitkit.data import batches
from fitkit.device import random_state
from fitkit.errors import CheckpointError


def killed_runs() -> ModuleType:
    """The runs of the script beside this file."""
    spec = importlib.util.spec_from_file_location("killed_runs", Path(__file__).with_name("killed_runs.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["killed_runs"] = module
    spec.loader.exec_module(module)
    return module


KILLED = killed_runs()
X, Y = KILLED.arrays()


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Linear(3, 1))


class Crash(Exception):
    pass


class Crashing(Callback):
    """Raises at the so-manieth call of a hook, after a backup that is made there."""

    is_last_after_batches = True

    def __init__(self, hook: str, count: int) -> None:
        super().__init__()
        self.count = count
        setattr(self, hook, self._crash)

    def _crash(self, *arguments: Any) -> None:
        self.count -= 1
        if self.count < 0:
            raise Crash


class Saving(Callback):
    """Saves at the so-manieth call of a hook."""

    def __init__(self, hook: str, count: int) -> None:
        super().__init__()
        self.count = count
        setattr(self, hook, self._save)

    def _save(self, *arguments: Any) -> None:
        self.count -= 1
        if self.count == -1:
            self.model.save("saved")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def crashed_and_resumed(name: str, count: int) -> bytes:
    """The run's result after a crash at that batch."""
    model, fit = KILLED.build(KILLED.RUNS[name])
    with pytest.raises(Crash):
        fit(BackupAndRestore("backup", save_freq=1), Crashing("on_train_batch_end", count))
    model, fit = KILLED.build(KILLED.RUNS[name])
    torch.rand(3)
    result: bytes = KILLED.result(model, fit(BackupAndRestore("backup")))
    return result


@pytest.mark.parametrize("name", [name for name in KILLED.RUNS if "worker" not in name])
@pytest.mark.parametrize("count", [2, 7])
def test_a_run_of_any_kind_goes_on_where_it_crashed(name: str, count: int) -> None:
    assert crashed_and_resumed(name, count) == KILLED.undisturbed(name)


@pytest.mark.parametrize("name", ["workers", "stream of a worker"])
def test_a_loader_with_workers_goes_on_where_it_crashed(name: str) -> None:
    assert crashed_and_resumed(name, 14) == KILLED.undisturbed(name)


@pytest.mark.long
@pytest.mark.parametrize("name", KILLED.RUNS)
def test_a_run_goes_on_from_every_batch(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, count = KILLED.undisturbed(name), 0
    for count in range(12):
        (tmp_path / str(count)).mkdir()
        monkeypatch.chdir(tmp_path / str(count))
        assert crashed_and_resumed(name, count) == expected, count


@given(
    batch_size=st.integers(1, 40),
    window=st.integers(1, 5),
    crash=st.integers(0, 30),
    part=st.none() | st.integers(2, 9),
    fraction=st.sampled_from([1.0, 0.5, 0.3]),
    clip=st.sampled_from([0, 0.1]),
    norm=st.sampled_from([-1, 2, "inf"]),
    optimizer=st.sampled_from(["sgd", "adam", "rmsprop"]),
)
def test_a_run_goes_on_for_all_flags(
    tmp_path_factory: pytest.TempPathFactory,
    batch_size: int,
    window: int,
    crash: int,
    part: int | None,
    fraction: float,
    clip: float,
    norm: Any,
    optimizer: str,
) -> None:
    folder = tmp_path_factory.mktemp("run")
    arguments = {
        "epochs": 3,
        "batch_size": batch_size,
        "accumulate_grad_batches": window,
        "micro_batch_size": part,
        "train_percent_check": fraction,
        "gradient_clip_val": clip,
        "track_grad_norm": norm,
        "validation_split": 0.25,
    }

    def run(*callbacks: Callback) -> tuple[fitkit.Model, Any]:
        compiled = {"optimizer": optimizer, "metrics": ["mae"]}
        model, fit = KILLED.build(KILLED.Run(arguments=arguments, compiled=compiled, network=small))
        return model, fit(*callbacks)

    expected = KILLED.result(*run())
    try:
        found = KILLED.result(*run(BackupAndRestore(folder, save_freq=1), Crashing("on_train_batch_end", crash)))
    except Crash:
        found = KILLED.result(*run(BackupAndRestore(folder)))
    assert found == expected


# ---------------------------------------------------------------------------------------------------------------------
# Where a file is saved.
# ---------------------------------------------------------------------------------------------------------------------

AFTER_STEPS = ["on_train_batch_end", "on_epoch_end", "on_epoch_begin", "on_test_begin", "on_test_batch_begin"]
AFTER_STEPS += ["on_test_batch_end", "on_test_end"]


@pytest.mark.parametrize("hook", AFTER_STEPS)
@pytest.mark.parametrize("first", [True, False], ids=["first of the callbacks", "last"])
def test_a_file_saved_in_any_hook_after_a_step_is_complete(hook: str, first: bool) -> None:
    class Adding(Callback):
        """Changes logs, weights and learning rate at an epoch's end, and counts."""

        count = 0

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            assert self.model.optimizer is not None
            self.model.optimizer.param_groups[0]["lr"] *= 0.9

        def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
            assert logs is not None
            self.count += 1
            logs["count"] = self.count + float(torch.rand(()))
            with torch.no_grad():
                self.model.module[0].weight.mul_(0.9)  # type: ignore[index,operator]

        def state_dict(self) -> dict[str, Any]:
            return {"count": self.count}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.count = state["count"]

    def run(*callbacks: Callback, **more: Any) -> bytes:
        model, fit = KILLED.build(KILLED.Run(arguments={"validation_split": 0.3}))
        result: bytes = KILLED.result(model, fit(*callbacks, **more))
        return result

    expected = run(Adding(), LambdaCallback())
    saving = Saving(hook, 2)
    assert run(*([saving, Adding()] if first else [Adding(), saving])) == expected
    torch.rand(5)
    assert run(*([LambdaCallback(), Adding()] if first else [Adding()]), resume_from="saved") == expected


@pytest.mark.parametrize("hook", ["on_train_begin", "on_train_end"])
def test_a_file_saved_before_or_after_all_epochs_is_complete(hook: str) -> None:
    model, fit = KILLED.build(KILLED.RUNS["arrays"])
    fit(Saving(hook, 0))
    model, fit = KILLED.build(KILLED.RUNS["arrays"])
    torch.rand(5)
    assert KILLED.result(model, fit(resume_from="saved")) == KILLED.undisturbed("arrays")


def shuffled(workers: int) -> DataLoader[Any]:
    data = torch.utils.data.TensorDataset(X[:24], Y[:24])
    return DataLoader(data, batch_size=8, shuffle=True, num_workers=workers, persistent_workers=workers > 0)


@pytest.mark.parametrize(
    ("data", "arguments"),
    [
        (lambda: shuffled(1), {}),
        (lambda: shuffled(1).dataset, {"batch_size": 8, "dataloader_options": {"num_workers": 1}}),
    ],
    ids=["of the user's loader", "of a Dataset"],
)
@pytest.mark.parametrize("count", [4, 5])
def test_a_run_with_workers_that_stay_goes_on_with_new_ones(data: Any, arguments: dict[str, Any], count: int) -> None:
    run = KILLED.Run(data, {"epochs": 3, **arguments})
    model, fit = KILLED.build(run)
    expected = KILLED.result(model, fit(Saving("on_train_batch_end", count)))
    model, fit = KILLED.build(run)
    torch.rand(5)
    assert KILLED.result(model, fit(resume_from="saved")) == expected


def test_samples_that_a_sampler_chose_once_are_those_of_the_run_that_goes_on() -> None:
    def run() -> tuple[fitkit.Model, Any]:
        data = torch.utils.data.TensorDataset(X, Y)
        sampler = torch.utils.data.RandomSampler(data, num_samples=30)
        return KILLED.build(KILLED.Run(lambda: DataLoader(data, batch_size=5, sampler=sampler), {"overfit_pct": 0.5}))

    model, fit = run()
    expected = KILLED.result(model, fit(Saving("on_train_batch_end", 4)))
    model, fit = run()
    torch.rand(5)
    assert KILLED.result(model, fit(resume_from="saved")) == expected


def test_a_save_before_a_batchs_step_is_refused() -> None:
    _, fit = KILLED.build(KILLED.RUNS["arrays"])
    with pytest.raises(ValueError, match="Call it in on_train_batch_end, which is after the step"):
        fit(Saving("on_train_batch_begin", 1))


def test_a_save_in_a_step_is_refused() -> None:
    class Stepping(fitkit.Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.save("saved")
            return super().training_step(batch, batch_idx)

    _, fit = KILLED.build(KILLED.Run(kind=Stepping))
    with pytest.raises(ValueError, match="Expected save"):
        fit()


def test_a_save_from_the_data_is_refused_where_no_callback_could_save() -> None:
    def data() -> Any:
        yield X, Y
        model.save("saved")
        yield X, Y

    model = fitkit.Model(nn.Linear(4, 1), device="cpu")
    model.compile("adam", "mse")
    with pytest.raises(ValueError, match="Expected save.* in a hook of a callback of this fit"):
        model.fit(data(), epochs=1, verbose=0)


def test_a_run_that_nobody_can_save_notes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[int] = []
    seen = random_state

    def noting(device: torch.device) -> Any:
        noted.append(1)
        return seen(device)

    monkeypatch.setattr(batches, "random_state", noting)
    monkeypatch.setattr(progress, "random_state", noting)
    _, fit = KILLED.build(KILLED.RUNS["arrays"])
    fit()
    assert noted == []


def test_a_save_changes_nothing_that_is_counted() -> None:
    model, fit = KILLED.build(KILLED.RUNS["arrays"])
    history = fit(LambdaCallback(on_train_batch_end=lambda batch, logs: model.save("saved")))
    assert KILLED.result(model, history) == KILLED.undisturbed("arrays")


def test_a_run_that_ended_goes_on_to_more_epochs() -> None:
    model, fit = KILLED.build(KILLED.RUNS["arrays"])
    fit(epochs=2)
    model.save("saved")
    model, fit = KILLED.build(KILLED.RUNS["arrays"])
    assert KILLED.result(model, fit(resume_from="saved")) == KILLED.undisturbed("arrays")


def test_a_run_with_nothing_left_to_do_returns_the_saved_history() -> None:
    model, fit = KILLED.build(KILLED.RUNS["arrays"])
    before = fit().state_dict()
    model.save("saved")
    model, fit = KILLED.build(KILLED.RUNS["arrays"])
    assert fit(resume_from="saved").state_dict() == before


def test_an_order_to_stop_is_carried_out_after_a_crash() -> None:
    def stop(batch: int, logs: Any) -> None:
        model.stop_training = batch == 3

    run = KILLED.Run(arguments={"validation_split": 0.3, "batch_size": 8})
    model, fit = KILLED.build(run)
    expected = KILLED.result(model, fit(LambdaCallback(on_train_batch_end=stop)))
    model, fit = KILLED.build(run)
    with pytest.raises(Crash):
        fit(LambdaCallback(on_train_batch_end=stop), Saving("on_train_batch_end", 3), Crashing("on_test_begin", 0))
    model, fit = KILLED.build(run)
    assert KILLED.result(model, fit(LambdaCallback(on_train_batch_end=stop), resume_from="saved")) == expected


def test_a_new_patience_wins_over_the_saved_verdict() -> None:
    run = KILLED.Run(arguments={"epochs": 6})
    model, fit = KILLED.build(run)
    worse = LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(mark=float(epoch)))
    assert fit(worse, EarlyStopping("mark", patience=2)).epoch == [0, 1, 2]
    model.save("saved")
    model, fit = KILLED.build(run)
    assert fit(worse, EarlyStopping("mark", patience=2), resume_from="saved").epoch == [0, 1, 2]
    model, fit = KILLED.build(run)
    assert fit(worse, EarlyStopping("mark", patience=4), resume_from="saved").epoch == [0, 1, 2, 3, 4]


def test_states_are_found_again_when_callbacks_change_places() -> None:
    def stoppings() -> list[Callback]:
        return [EarlyStopping("loss", patience=9), EarlyStopping("val_loss", patience=9)]

    model, fit = KILLED.build(KILLED.Run(arguments={"validation_split": 0.3}))
    first = stoppings()
    fit(*first)
    model.save("saved")
    model, fit = KILLED.build(KILLED.Run(arguments={"validation_split": 0.3}))
    second = stoppings()[::-1]
    fit(LambdaCallback(), *second, resume_from="saved")
    assert [each.state_dict() for each in second[::-1]] == [each.state_dict() for each in first]


# ---------------------------------------------------------------------------------------------------------------------
# Skipping is arithmetic where the source allows it.
# ---------------------------------------------------------------------------------------------------------------------


class Noting(Dataset[Any]):
    def __init__(self) -> None:
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> Any:
        self.loaded.append(index)
        return X[index], Y[index]


@pytest.mark.parametrize("with_loader", [True, False])
def test_batches_that_were_consumed_are_not_loaded_again(with_loader: bool) -> None:
    def data(samples: Noting) -> Any:
        return DataLoader(samples, batch_size=10, shuffle=True) if with_loader else samples

    size = {} if with_loader else {"batch_size": 10}
    whole, rest = Noting(), Noting()
    _, fit = KILLED.build(KILLED.Run(lambda: data(whole), {"epochs": 1, **size}))
    fit(Saving("on_train_batch_end", 5))
    _, fit = KILLED.build(KILLED.Run(lambda: data(rest), {"epochs": 1, **size}))
    fit(resume_from="saved")
    assert rest.loaded == whole.loaded[60:]


def test_a_source_with_a_state_is_put_where_it_was() -> None:
    whole, rest = KILLED.Counting(), KILLED.Counting()
    _, fit = KILLED.build(KILLED.Run(lambda: whole, {"epochs": 1}))
    fit(Saving("on_train_batch_end", 3))
    _, fit = KILLED.build(KILLED.Run(lambda: rest, {"epochs": 1}))
    fit(resume_from="saved")
    assert rest.loaded == 2


@pytest.mark.filterwarnings("ignore:.set_vital. is deprecated:UserWarning")
def test_a_stateful_data_loader_of_torchdata_goes_on() -> None:
    loaders = pytest.importorskip("torchdata.stateful_dataloader")

    class Stream(IterableDataset[Any]):
        """Counts by itself, and tells where it is."""

        def __init__(self) -> None:
            self.place = 0
            self.loaded = 0

        def __iter__(self) -> Any:
            while self.place < len(X):
                self.place += 1
                self.loaded += 1
                yield X[self.place - 1], Y[self.place - 1]
            self.place = 0

        def state_dict(self) -> dict[str, Any]:
            return {"place": self.place}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.place = state["place"]

    for kind in ("stream", "map"):
        samples: list[Any] = []

        def data(kind: str = kind, samples: list[Any] = samples) -> Any:
            samples.append(Stream() if kind == "stream" else Noting())
            return loaders.StatefulDataLoader(samples[-1], batch_size=8, shuffle=kind == "map")

        run = KILLED.Run(data, {"epochs": 3})
        model, fit = KILLED.build(run)
        expected = KILLED.result(model, fit())
        model, fit = KILLED.build(run)
        with pytest.raises(Crash):
            fit(BackupAndRestore("backup", 1), Crashing("on_train_batch_end", 17))
        model, fit = KILLED.build(run)
        assert KILLED.result(model, fit(BackupAndRestore("backup"))) == expected


# ---------------------------------------------------------------------------------------------------------------------
# What a resumed run refuses, before anything is changed.
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved() -> str:
    _, fit = KILLED.build(KILLED.Run(arguments={"batch_size": 8, "accumulate_grad_batches": 2}))
    fit(Saving("on_train_batch_end", 3))
    return "saved"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 9}, "batch_size=9 now and 8 in the file"),
        ({"accumulate_grad_batches": 3}, "accumulate_grad_batches=3 now and 2 in the file"),
        ({"gradient_clip_val": 1.0}, r"gradient_clip_val=1\.0 now and 0\.0 in the file"),
        ({"train_percent_check": 0.5}, r"steps_per_epoch=6 now and None in the file"),
        ({"shuffle": False}, "shuffle=False now and True in the file"),
        ({"validation_split": 0.5}, "the number of samples=45 now and 90 in the file"),
        ({"validation_data": (X, Y)}, "validation_freq=1 now and None in the file"),
        ({"track_grad_norm": 2}, r"track_grad_norm=2\.0 now and -1\.0"),
    ],
)
def test_arguments_that_change_the_numbers_are_refused(saved: str, arguments: dict[str, Any], message: str) -> None:
    _, fit = KILLED.build(KILLED.Run(arguments={"batch_size": 8, "accumulate_grad_batches": 2, **arguments}))
    with pytest.raises(CheckpointError, match=message):
        fit(resume_from=saved)


@pytest.mark.parametrize(
    ("compiled", "message"),
    [
        ({"loss": "l1_loss"}, "loss=.*L1Loss.* now and .*MSELoss"),
        ({"loss": nn.MSELoss(reduction="sum")}, "reduction='sum'.* now and .*reduction='mean'"),
        ({"metrics": {"m": "mae"}}, "metrics="),
    ],
)
def test_what_changes_the_numbers_in_compile_is_refused(saved: str, compiled: dict[str, Any], message: str) -> None:
    run = KILLED.Run(arguments={"batch_size": 8, "accumulate_grad_batches": 2}, compiled=compiled)
    _, fit = KILLED.build(run)
    with pytest.raises(CheckpointError, match=message):
        fit(resume_from=saved)


def test_sample_weights_that_were_not_there_are_refused(saved: str) -> None:
    run = KILLED.Run(lambda: (X, Y, torch.ones(90)), {"batch_size": 8, "accumulate_grad_batches": 2})
    _, fit = KILLED.build(run)
    with pytest.raises(CheckpointError, match="sample_weight=True now and False in the file"):
        fit(resume_from=saved)


def test_a_refused_file_changes_nothing(saved: str) -> None:
    model, fit = KILLED.build(KILLED.Run())
    before = KILLED._without_sharing(model.module.state_dict())
    history = model.history
    with pytest.raises(CheckpointError, match="batch_size=32 now and 8 in the file"):
        fit(resume_from=saved)
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    assert model.history is history


def test_another_module_is_refused(saved: str) -> None:
    model = fitkit.Model(nn.Linear(4, 1), device="cpu")
    model.compile("adam", "mse")
    with pytest.raises(CheckpointError, match=r"saved does not fit the module.*Missing in the file: weight"):
        model.fit(X, Y, batch_size=8, accumulate_grad_batches=2, epochs=4, resume_from=saved)


def test_another_optimizer_is_refused(saved: str) -> None:
    run = KILLED.Run(arguments={"batch_size": 8, "accumulate_grad_batches": 2}, compiled={"optimizer": "sgd"})
    _, fit = KILLED.build(run)
    with pytest.raises(CheckpointError, match=r"saved has Adam for compile.*where there is now SGD"):
        fit(resume_from=saved)


def test_a_file_of_an_interrupted_run_says_what_to_do() -> None:
    model, fit = KILLED.build(KILLED.RUNS["arrays"])
    with pytest.raises(Crash):
        fit(Crashing("on_train_batch_begin", 12))
    model.save("saved")
    model, fit = KILLED.build(KILLED.RUNS["arrays"])
    with pytest.raises(CheckpointError, match=r"somewhere in epoch 2.*fit\(initial_epoch=1\)"):
        fit(resume_from="saved")


def test_a_file_from_before_any_fit_says_what_to_do() -> None:
    model, fit = KILLED.build(KILLED.RUNS["arrays"])
    model.save("saved")
    with pytest.raises(CheckpointError, match="saved before any fit"):
        fit(resume_from="saved")


@pytest.mark.parametrize("path", [True, 3])
def test_what_is_no_path_is_refused(path: Any) -> None:
    _, fit = KILLED.build(KILLED.RUNS["arrays"])
    with pytest.raises(TypeError, match="Expected a path, received resume_from="):
        fit(resume_from=path)


def test_a_missing_file_is_an_error() -> None:
    _, fit = KILLED.build(KILLED.RUNS["arrays"])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fit(resume_from="nowhere")
