"""MLflowLogger, against MLflow itself with a SQLite store."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fitkit
from fitkit.callbacks import LambdaCallback, LRScheduler, MLflowLogger

mlflow = pytest.importorskip("mlflow")
pytest.importorskip("sqlalchemy")
# What MLflow and SQLAlchemy say of each other.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(autouse=True, scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A store and an experiment for the tests here; making one takes a second."""
    before, folder = mlflow.get_tracking_uri(), tmp_path_factory.mktemp("mlflow")
    with warnings.catch_warnings():  # as below, which does not reach a fixture of a module
        warnings.simplefilter("ignore")
        mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
        mlflow.set_experiment("test")
    yield
    mlflow.set_tracking_uri(before)


def fitted(*callbacks: Any, **flags: Any) -> fitkit.History:
    model = fitkit.Model(nn.Linear(1, 1), device="cpu")
    model.compile("sgd", "mse", learning_rate=0.1)
    return model.fit(
        torch.ones(4, 1), torch.ones(4, 1), **{"epochs": 3, "verbose": 0, "callbacks": list(callbacks), **flags}
    )


def column(run_id: str | None, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in mlflow.MlflowClient().get_metric_history(run_id, key)]


def test_each_epoch_is_a_step_of_the_run() -> None:
    logger = MLflowLogger("first", hyperparameters={"rate": 0.1})
    history = fitted(logger, validation_data=(torch.ones(2, 1), torch.ones(2, 1)))
    run = mlflow.get_run(logger.run_id)
    assert column(logger.run_id, "loss") == list(enumerate(history["loss"]))
    assert column(logger.run_id, "val_loss") == list(enumerate(history["val_loss"]))
    assert (run.info.run_name, run.info.status, run.data.params) == ("first", "FINISHED", {"rate": "0.1"})
    assert mlflow.active_run() is None


def test_the_learning_rate_is_among_the_numbers() -> None:
    scheduling = LRScheduler(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5))
    logger = MLflowLogger()
    fitted(scheduling, logger)
    assert column(logger.run_id, "learning_rate") == [(0, 0.1), (1, 0.05), (2, 0.025)]


def test_a_run_of_the_users_is_used_and_left_open() -> None:
    logger = MLflowLogger()
    with mlflow.start_run() as run:
        fitted(logger)
        assert mlflow.active_run().info.run_id == run.info.run_id == logger.run_id
    assert len(column(run.info.run_id, "loss")) == 3


@pytest.mark.parametrize(("error", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_an_error_ends_the_run_as_what_it_is(error: type[BaseException], status: str) -> None:
    def fail(epoch: int, logs: Any) -> None:
        if epoch == 1:
            raise error("in mid-run")

    logger = MLflowLogger()
    with pytest.raises(error, match="in mid-run"):
        fitted(logger, LambdaCallback(on_epoch_begin=fail))
    assert mlflow.get_run(logger.run_id).info.status == status
    assert len(column(logger.run_id, "loss")) == 1
    assert mlflow.active_run() is None


def test_a_resumed_fit_goes_on_in_its_run() -> None:
    logger = MLflowLogger(hyperparameters={"epochs": 1})
    fitted(logger, epochs=1)
    state, again = logger.state_dict(), MLflowLogger(hyperparameters={"epochs": 3})
    resuming = LambdaCallback(on_train_begin=lambda logs: again.load_state_dict(state))
    fitted(again, resuming, initial_epoch=1)
    assert [step for step, _ in column(state["run_id"], "loss")] == [0, 1, 2]
    assert mlflow.get_run(state["run_id"]).info.status == "FINISHED"


def test_each_fit_has_its_own_run() -> None:
    logger = MLflowLogger()
    fitted(logger)
    first = logger.run_id
    fitted(logger)
    assert first != logger.run_id
