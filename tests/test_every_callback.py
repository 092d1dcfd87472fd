"""What holds for every exported callback: it can be pickled, leaves nothing behind, and its state survives a file."""

from __future__ import annotations

import copy
import io
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

import fitkit
from fitkit import callbacks
from fitkit.callbacks import Callback
from fitkit.callbacks.hooks import check_callbacks

X = torch.linspace(-1, 1, 24).reshape(12, 2)
Y = X.sum(1, keepdim=True)


# One store of MLflow's for all tests here: making one takes a second.
STORE = Path(tempfile.gettempdir()) / f"fitkit-mlflow-{os.getpid()}"


@pytest.fixture(autouse=True, scope="module")
def store() -> Iterator[None]:
    """The folder of that store."""
    STORE.mkdir(exist_ok=True)
    yield
    shutil.rmtree(STORE)


def halving(optimizer: Any) -> StepLR:
    return StepLR(optimizer, 1, gamma=0.5)


def halved(epoch: int, rate: float) -> float:
    return rate / 2


def wandb_logger() -> Callback:
    sdk = pytest.importorskip("wandb.sdk")
    return callbacks.WandbLogger(mode="offline", dir=os.getcwd(), settings=sdk.Settings(silent=True))


def mlflow_logger() -> Callback:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    mlflow.set_tracking_uri(f"sqlite:///{STORE}/mlflow.db")
    mlflow.set_experiment("Default")
    return callbacks.MLflowLogger()


def tensorboard() -> Callback:
    pytest.importorskip("tensorboard")
    return callbacks.TensorBoard("logs", 1, write_graph=True, update_freq="batch", hyperparameters={"rate": 0.1})


# How each is made, at least once; a new callback is to be added here.
MAKERS: dict[str, list[Callable[[], Callback]]] = {
    "BackupAndRestore": [
        lambda: callbacks.BackupAndRestore("backup"),
        lambda: callbacks.BackupAndRestore("backup", save_freq=1),
    ],
    "CSVLogger": [lambda: callbacks.CSVLogger("log.csv"), lambda: callbacks.CSVLogger("log.csv", append=True)],
    "Callback": [Callback],
    "EarlyStopping": [lambda: callbacks.EarlyStopping("loss", restore_best_weights=True)],
    "Every": [lambda: callbacks.Every(2, callbacks.CSVLogger("log.csv"))],
    "LRScheduler": [
        lambda: callbacks.LRScheduler(halving),
        lambda: callbacks.LRScheduler(halving, interval="step"),
    ],
    "LambdaCallback": [lambda: callbacks.LambdaCallback(on_epoch_end=print)],
    "LearningRateScheduler": [lambda: callbacks.LearningRateScheduler(halved)],
    "MLflowLogger": [mlflow_logger],
    "ModelCheckpoint": [
        lambda: callbacks.ModelCheckpoint("{epoch}.pt"),
        lambda: callbacks.ModelCheckpoint("best.pt", "loss", save_best_only=True, save_last=True),
    ],
    "ProgressBar": [callbacks.ProgressBar],
    "ReduceLROnPlateau": [lambda: callbacks.ReduceLROnPlateau("loss", patience=1)],
    "SwapEMAWeights": [callbacks.SwapEMAWeights, lambda: callbacks.SwapEMAWeights(swap_on_epoch=True)],
    "TensorBoard": [tensorboard],
    "TerminateOnNaN": [callbacks.TerminateOnNaN],
    "Timer": [lambda: callbacks.Timer("1h")],
    "WandbLogger": [wandb_logger],
}
EVERY = [pytest.param(make, id=f"{name}-{index}") for name, makes in MAKERS.items() for index, make in enumerate(makes)]

# What MLflow and SQLAlchemy say of each other.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The ..noload:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:mlflow"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a callback writes is written into an empty folder."""
    monkeypatch.chdir(tmp_path)


def compiled() -> fitkit.Model:
    torch.manual_seed(0)
    model = fitkit.Model(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)), device="cpu")
    model.compile("sgd", "mse", learning_rate=0.1)
    return model


def fitted(model: fitkit.Model, *chosen: Callback, epochs: int = 2, **flags: Any) -> fitkit.History:
    flags = {"batch_size": 4, "validation_data": (X, Y), "verbose": 0, **flags}
    return model.fit(X, Y, epochs=epochs, callbacks=list(chosen), **flags)


class Failing(Callback):
    """Fails in the middle of the second epoch."""

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if len(self.model.history) == 1 and batch == 1:
            raise RuntimeError("in mid-run")


class Saving(Callback):
    """Writes the state of another callback to a file after the first epoch."""

    def __init__(self, other: Any) -> None:
        super().__init__()
        self.other = other

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        if epoch == 0:
            torch.save(self.other.state_dict(), "state.pt")


class Loading(Callback):
    """Gives a callback its saved state where a resumed run does."""

    def __init__(self, other: Any) -> None:
        super().__init__()
        self.other = other

    def on_train_begin(self, logs: Any = None) -> None:
        self.other.load_state_dict(torch.load("state.pt", weights_only=True))


def hooks_left(model: fitkit.Model) -> list[Any]:
    """Hooks on the optimizer and the modules."""
    optimizer = model.optimizer
    assert optimizer is not None
    left = [*optimizer._optimizer_step_post_hooks, *optimizer._optimizer_step_pre_hooks]
    for module in model.module.modules():
        left += [*module._forward_pre_hooks, *module._forward_hooks, *module._backward_hooks]
    return left


def open_files() -> set[str]:
    """The files below the working directory that this process has open."""
    here = os.path.realpath(".")
    links = Path("/proc/self/fd")
    if not links.exists():
        pytest.skip("this system does not tell which files are open")
    targets = set()
    for link in links.iterdir():
        try:
            targets.add(os.readlink(link))
        except OSError:  # the one by which the folder was listed
            continue
    return {target for target in targets if target.startswith(here)}


def test_every_exported_callback_is_tried_here() -> None:
    assert set(MAKERS) == set(callbacks.__all__)


@pytest.mark.parametrize("name", callbacks.__all__)
def test_each_says_what_it_adds_to_the_logs(name: str) -> None:
    free = {"Callback", "Every", "LambdaCallback"}
    assert (getattr(callbacks, name).adds_to_logs is None) == (name in free)


@pytest.mark.parametrize("make", EVERY)
def test_a_fit_with_it_ends_and_logs_what_it_says(make: Callable[[], Callback]) -> None:
    callback = make()
    history = fitted(compiled(), callback)
    assert history.stop_reason == "epochs"
    assert set(history) - {"loss", "val_loss"} == set(callback.adds_to_logs or ())


@pytest.mark.parametrize("make", EVERY)
def test_it_is_no_obstacle_to_evaluate_and_predict(make: Callable[[], Callback]) -> None:
    model, callback = compiled(), make()
    assert model.evaluate(X, Y, callbacks=[callback], verbose=0) == model.evaluate(X, Y, verbose=0)
    assert torch.equal(model.predict(X, callbacks=[callback], verbose=0), model.predict(X, verbose=0))


@pytest.mark.parametrize("make", EVERY)
def test_an_error_in_mid_run_comes_through_and_nothing_is_left(make: Callable[[], Callback]) -> None:
    model = compiled()
    with pytest.raises(RuntimeError, match="in mid-run"):
        fitted(model, make(), Failing())
    assert len(model.history) == 1
    assert not hooks_left(model)
    assert not open_files()


@pytest.mark.parametrize("make", EVERY)
def test_two_fits_in_a_row_work_and_nothing_is_left(make: Callable[[], Callback]) -> None:
    model, callback = compiled(), make()
    assert [len(fitted(model, callback)), len(fitted(model, callback))] == [2, 2]
    assert not hooks_left(model)
    assert not open_files()


@pytest.mark.parametrize("make", EVERY)
def test_after_an_error_it_serves_again(make: Callable[[], Callback]) -> None:
    callback = make()
    with pytest.raises(RuntimeError, match="in mid-run"):
        fitted(compiled(), callback, Failing())
    assert len(fitted(compiled(), callback)) == 2


@pytest.mark.parametrize("make", EVERY)
def test_it_pickles_before_a_fit_and_serves_afterwards(make: Callable[[], Callback]) -> None:
    again = pickle.loads(pickle.dumps(make()))
    assert check_callbacks([again]) == [again]
    assert len(fitted(compiled(), again)) == 2


class NoTensors(pickle.Pickler):
    """Refuses what belongs to a trained model."""

    def reducer_override(self, value: Any) -> Any:
        assert not isinstance(value, (torch.Tensor, torch.optim.Optimizer, nn.Module, fitkit.Model)), type(value)
        return NotImplemented


@pytest.mark.parametrize("make", EVERY)
def test_it_pickles_after_a_fit_without_the_model_and_serves_again(make: Callable[[], Callback]) -> None:
    callback, file = make(), io.BytesIO()
    fitted(compiled(), callback)
    NoTensors(file).dump(callback)
    again = pickle.loads(file.getvalue())
    assert not hasattr(again, "model")
    assert len(fitted(compiled(), again)) == 2


@pytest.mark.parametrize("make", EVERY)
def test_a_copy_made_in_mid_run_serves_in_a_run_of_its_own(make: Callable[[], Callback]) -> None:
    callback, copies = make(), []
    copying = callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: copies.append(copy.deepcopy(callback)))
    fitted(compiled(), callback, copying)
    shutil.rmtree("backup", ignore_errors=True)
    assert len(fitted(compiled(), copies[-1])) == 2


@pytest.mark.parametrize("make", EVERY)
def test_its_state_survives_a_file_that_has_only_weights(make: Callable[[], Callback]) -> None:
    saved: Any = make()
    if not hasattr(saved, "state_dict"):
        pytest.skip("it has no state")
    fitted(compiled(), saved, Saving(saved))
    loaded = make()
    history = fitted(compiled(), loaded, Loading(loaded), initial_epoch=1, epochs=3)
    assert history.epoch == [1, 2]


@pytest.mark.parametrize("make", EVERY)
def test_ctrl_c_in_mid_run_comes_through(make: Callable[[], Callback]) -> None:
    def interrupt(epoch: int, logs: Any) -> None:
        if epoch == 1:
            raise KeyboardInterrupt("in mid-run")

    model = compiled()
    with pytest.raises(KeyboardInterrupt, match="in mid-run"):
        fitted(model, make(), callbacks.LambdaCallback(on_epoch_begin=interrupt))
    assert (len(model.history), model.history.stop_reason) == (1, "interrupted")
    assert not hooks_left(model)
