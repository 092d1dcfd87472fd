"""WandbLogger, against wandb itself, offline."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fitkit
from fitkit.callbacks import LambdaCallback, WandbLogger

# Not of "wandb": a folder of that name, where W&B keeps its files, could be imported.
pytest.importorskip("wandb.sdk")
wandb: Any = importlib.import_module("wandb")


@pytest.fixture(autouse=True)
def no_run_is_left() -> Iterator[None]:
    yield
    if wandb.run is not None:
        wandb.finish()


def offline(folder: Path) -> dict[str, Any]:
    """Options by which nothing leaves this machine, and nothing is kept outside the folder."""
    return {"mode": "offline", "dir": str(folder), "settings": wandb.Settings(silent=True)}


def fitted(*callbacks: Any, **flags: Any) -> fitkit.History:
    model = fitkit.Model(nn.Linear(1, 1), device="cpu")
    model.compile("sgd", "mse", learning_rate=0.1)
    return model.fit(
        torch.ones(4, 1), torch.ones(4, 1), **{"epochs": 3, "verbose": 0, "callbacks": list(callbacks), **flags}
    )


def files(tmp_path: Path) -> list[bytes]:
    """What the runs have written."""
    # A finished run is written out by another process, which says nothing when it is done; it ends here.
    wandb.teardown()
    return [path.read_bytes() for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))]


def test_each_epoch_is_in_the_file_of_the_run(tmp_path: Path) -> None:
    logger = WandbLogger(project="digits", name="first", config={"rate": 0.1}, **offline(tmp_path))
    history = fitted(logger)
    [content] = files(tmp_path)
    assert logger.run_id is not None
    assert logger.run_id.encode() in content
    for loss in history["loss"]:
        assert repr(loss)[:12].encode() in content
    assert wandb.run is None


def test_a_run_of_the_users_is_used_and_left_open(tmp_path: Path) -> None:
    logger = WandbLogger()
    with wandb.init(project="digits", **offline(tmp_path)) as run:
        history = fitted(logger)
        assert wandb.run is run
        assert (run.id, run.summary["loss"], run.summary["epoch"]) == (logger.run_id, history["loss"][-1], 2)
        assert run.summary["learning_rate"] == 0.1


def test_an_error_finishes_the_run(tmp_path: Path) -> None:
    def fail(epoch: int, logs: Any) -> None:
        if epoch == 1:
            raise RuntimeError("in mid-run")

    with pytest.raises(RuntimeError, match="in mid-run"):
        fitted(WandbLogger(**offline(tmp_path)), LambdaCallback(on_epoch_begin=fail))
    assert wandb.run is None


def test_a_resumed_fit_goes_on_in_its_run(tmp_path: Path) -> None:
    logger = WandbLogger(**offline(tmp_path))
    fitted(logger, epochs=1)
    state, again = logger.state_dict(), WandbLogger(**offline(tmp_path))
    fitted(again, LambdaCallback(on_train_begin=lambda logs: again.load_state_dict(state)), initial_epoch=1)
    # Offline, each part of a run has a file of its own; wandb sync joins them by the id.
    assert again.run_id == logger.run_id == state["run_id"]
    assert {path.name for path in tmp_path.glob("wandb/offline-run-*/*.wandb")} == {f"run-{logger.run_id}.wandb"}


def test_an_option_that_wandb_does_not_know_is_refused() -> None:
    with pytest.raises(TypeError, match=r"WandbLogger got projekt=..., which wandb.init does not take: .*project"):
        WandbLogger(projekt="digits")
