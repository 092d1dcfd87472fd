"""Runs that are killed at random moments and started again, for test_killed_runs.py; also a script.

    python tests/exactness/killed_runs.py [--kills 60] [--seed 0] [NAME ...]

Each run is a process of its own: it builds module, data and callbacks anew, as a script that is run again does. It is
killed (SIGKILL) after a random time, in the midst of whatever it does, and started again until it ends. Then weights,
optimizer and History must be, bit for bit, those of a run that nobody disturbed and that made no backups.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, TensorDataset

import fitkit
from fitkit.callbacks import BackupAndRestore, Callback, EarlyStopping, ModelCheckpoint

SAMPLES = 90
MEMORY = "/dev/shm"


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))


def arrays() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(SAMPLES, 4, generator=generator)
    return x, x.sum(1, keepdim=True) + 0.1 * torch.randn(SAMPLES, 1, generator=generator)


class Noisy(Dataset[Any]):
    """Samples with noise of all three generators, drawn when they are loaded."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = arrays()
        return x[index] + 0.1 * torch.randn(4) + 0.1 * random.random() + 0.1 * float(np.random.rand()), y[index]


class Whole(Dataset[Any]):
    """Ready batches by index."""

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        x, y = arrays()
        return x[index::11] + torch.rand(()), y[index::11]


class Drawing(Sampler[int]):
    """Draws index by index from the global generator."""

    def __len__(self) -> int:
        return SAMPLES

    def __iter__(self) -> Iterator[int]:
        for _ in range(SAMPLES):
            yield int(torch.randint(SAMPLES, ()))


class Stream(IterableDataset[Any]):
    """Samples in order, noisy, without a length."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(*arrays(), strict=True)


class Counting:
    """Batches that know by themselves where they are."""

    def __init__(self) -> None:
        self.place = 0
        self.loaded = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        x, y = arrays()
        while self.place < 6:
            self.place += 1
            self.loaded += 1
            yield x[self.place :: 7], y[self.place :: 7]
        self.place = 0

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


def endless() -> Iterator[tuple[Tensor, Tensor]]:
    x, y = arrays()
    start = 0
    while True:
        rows = [(start + offset) % SAMPLES for offset in range(10)]
        start += 7
        yield x[rows], y[rows]


class Scheduling(Callback):
    """A torch scheduler, stepped after each batch."""

    def on_train_begin(self, logs: Any = None) -> None:
        assert self.model.optimizer is not None
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.model.optimizer, T_max=20)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a window's first batches make no optimizer step
            self.scheduler.step()

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        assert logs is not None
        logs["learning_rate"] = self.scheduler.get_last_lr()[0]

    def state_dict(self) -> dict[str, Any]:
        return self.scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scheduler.load_state_dict(state)


class Freezing(Callback):
    """Freezes the first layer and the normalisation at the second epoch."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch == 1:
            self.model.module[1].eval()  # type: ignore[index]
            self.model.module[0].requires_grad_(False)  # type: ignore[index]


class Adversarial(fitkit.Model):
    """Two optimizers of its own, random numbers of its own, and no loss for fit to go backward from."""

    def prepare(self) -> None:
        self.first = torch.optim.Adam(self.module[0].parameters(), lr=0.01)  # type: ignore[index]
        self.second = torch.optim.SGD(self.module[-1].parameters(), lr=0.01, momentum=0.9)  # type: ignore[index]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        for optimizer in (self.first, self.second):
            optimizer.zero_grad()
            loss = (self.module(x + 0.1 * torch.randn_like(x)) - y).square().mean()
            loss.backward()
            optimizer.step()
        return {"loss": loss.detach(), "noise": torch.rand(())}


@dataclass
class Run:
    """One configuration; everything is made when it is asked for, as a script makes it."""

    data: Callable[[], Any] = arrays
    arguments: dict[str, Any] = field(default_factory=dict)
    lazily: Callable[[], dict[str, Any]] = dict
    compiled: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], list[Callback]] = list
    save_freq: int | str = 1
    double: bool = False
    kind: type[fitkit.Model] = fitkit.Model
    network: Callable[[], nn.Module] = network


RUNS = {
    "arrays": Run(arguments={"validation_split": 0.2, "batch_size": 8}, compiled={"metrics": ["mae", "r2"]}),
    "dataset": Run(Noisy, {"batch_size": 8, "validation_split": 0.3}),
    "loader": Run(lambda: DataLoader(Noisy(), batch_size=8, shuffle=True)),
    "workers": Run(lambda: DataLoader(Noisy(), batch_size=8, shuffle=True, num_workers=2), save_freq=2),
    "tensor loader": Run(lambda: DataLoader(TensorDataset(*arrays()), batch_size=8, shuffle=True)),
    "own generator": Run(
        lambda: DataLoader(Noisy(), batch_size=8, shuffle=True, generator=torch.Generator().manual_seed(3))
    ),
    "stream": Run(lambda: DataLoader(Stream(), batch_size=8)),
    "stream that goes on": Run(lambda: DataLoader(Stream(), batch_size=8), {"steps_per_epoch": 5}),
    "stream of a worker": Run(lambda: DataLoader(Stream(), batch_size=8, num_workers=1), {"steps_per_epoch": 5}),
    "own state": Run(Counting),
    "list": Run(lambda: [tuple(part[start : start + 9] for part in arrays()) for start in range(0, SAMPLES, 9)]),
    "whole batches": Run(lambda: DataLoader(Whole(), batch_size=None, shuffle=True)),
    "own sampler": Run(lambda: DataLoader(Noisy(), batch_size=8, sampler=Drawing())),
    "overfitting a loader": Run(lambda: DataLoader(Noisy(), batch_size=8, shuffle=True), {"overfit_pct": 0.4}),
    "validation loader": Run(
        arguments={"batch_size": 30},
        lazily=lambda: {
            "validation_data": DataLoader(
                Noisy(), batch_size=20, shuffle=True, generator=torch.Generator().manual_seed(5)
            )
        },
    ),
    "generator": Run(
        endless,
        {"steps_per_epoch": 7, "validation_steps": 3},
        lambda: {"validation_data": endless()},
    ),
    "scheduler": Run(arguments={"batch_size": 8}, callbacks=lambda: [Scheduling()], save_freq=3),
    "windows": Run(
        arguments={
            "batch_size": 7,
            "accumulate_grad_batches": {0: 3, 2: 4},
            "gradient_clip_val": 0.5,
            "track_grad_norm": 2,
        },
        callbacks=lambda: [Scheduling()],
    ),
    "early stopping": Run(
        arguments={"batch_size": 16, "validation_split": 0.3, "epochs": None, "max_nb_epochs": 40},
        compiled={"learning_rate": 0.3},
        callbacks=lambda: [EarlyStopping("val_loss", patience=2, restore_best_weights=True)],
        save_freq=5,
    ),
    "validation": Run(
        arguments={"batch_size": 30, "validation_batch_size": 1},
        lazily=lambda: {"validation_data": arrays()},
        save_freq="0.005s",
    ),
    "percents": Run(arguments={"batch_size": 4, "train_percent_check": 0.4, "validation_split": 0.5}),
    "overfitting": Run(arguments={"batch_size": 8, "overfit_pct": 0.3}, save_freq="epoch"),
    "16-mixed": Run(arguments={"batch_size": 8, "accumulate_grad_batches": 2}, compiled={"precision": "16-mixed"}),
    "freezing": Run(arguments={"batch_size": 8}, callbacks=lambda: [Freezing()], save_freq="epoch", double=True),
    "checkpoints": Run(
        arguments={"batch_size": 8},
        callbacks=lambda: [ModelCheckpoint("files/{epoch}-{loss:.4f}.pt", "loss", save_top_k=2, save_last=True)],
        save_freq="epoch",
    ),
    "own step": Run(arguments={"batch_size": 8}, kind=Adversarial),
    "fitting parts": Run(arguments={"batch_size": 16, "micro_batch_size": "auto", "accumulate_grad_batches": 2}),
    "parts": Run(arguments={"batch_size": 16, "micro_batch_size": 6}, compiled={"optimizer": "sgd"}),
}


def build(run: Run) -> tuple[fitkit.Model, Callable[..., fitkit.History]]:
    """The model, and what fits it: with further callbacks, and what else fit is to be given."""
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    model = run.kind(run.network(), device="cpu")
    model.compile(**{"optimizer": "adam", "loss": "mse", **run.compiled})
    if isinstance(model, Adversarial):
        model.prepare()
    data, own = run.data(), run.callbacks()
    arguments = {"epochs": 4, "verbose": 0, **run.arguments, **run.lazily()}

    def fit(*callbacks: Callback, first: bool = False, **more: Any) -> fitkit.History:
        ordered = [*callbacks, *own] if first else [*own, *callbacks]
        return model.fit(data, callbacks=ordered, **{**arguments, **more})

    return model, fit


def result(model: fitkit.Model, history: fitkit.History) -> bytes:
    """All that is compared, as bytes: equal only if every bit is."""
    assert model.optimizer is not None
    state = {
        "weights": dict(model.module.state_dict()),
        "optimizer": model.optimizer.state_dict(),
        "own": [value.state_dict() for value in vars(model).values() if isinstance(value, torch.optim.Optimizer)],
        "random": [torch.rand(2), random.random(), float(np.random.rand())],
    }
    file = io.BytesIO()
    torch.save(_without_sharing(state), file)
    written = {"history": history.history, "epoch": history.epoch, "reason": history.stop_reason}
    return file.getvalue() + json.dumps(written).encode()


def _without_sharing(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone().contiguous()
    if isinstance(value, dict):
        return {key: _without_sharing(item) for key, item in value.items()}
    return [_without_sharing(item) for item in value] if isinstance(value, (list, tuple)) else value


def undisturbed(name: str) -> bytes:
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # callbacks may write files
        try:
            model, fit = build(RUNS[name])
            return result(model, fit())
        finally:
            os.chdir(before)


def _start(name: str, folder: Path, first: bool) -> int:
    """A process that goes on with the run, from the backup if there is one; its id. First is where backups are made."""
    process = os.fork()
    if process:
        return process
    try:
        os.setpgid(0, 0)  # a group with the workers that it starts
        os.chdir(folder)
        run = RUNS[name]
        model, fit = build(run)
        if (folder / "backup" / "training_state.fitkit").exists():
            torch.rand(3)  # what is drawn before a run goes on must not matter
        history = fit(BackupAndRestore("backup", run.save_freq, run.double, delete_checkpoint=False), first=first)
        (folder / "result.tmp").write_bytes(result(model, history))
        os.replace(folder / "result.tmp", folder / "result")
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def killed(name: str, kills: int, dice: random.Random) -> tuple[int, int, bytes]:
    """Kills the run so many times, unless it ends before, and lets it end.

    Returns:
        How often it was killed; how often a killed run had left a backup; the result.
    """
    # To wait for a disk would be most of the time, and a process that is killed loses nothing of what it has written.
    folder = Path(tempfile.mkdtemp(dir=MEMORY if os.path.isdir(MEMORY) else None))
    done = resumes = 0
    try:
        while True:
            resumes += (folder / "backup" / "training_state.fitkit").exists()
            process = _start(name, folder, dice.random() < 0.5)
            if done < kills:
                time.sleep(dice.uniform(0.0, 0.2))
                os.kill(process, signal.SIGKILL)
            _, status = os.waitpid(process, 0)
            # A worker looks whether its parent is alive, but one that has begun as an orphan sees no change: it stays
            # for ever, and keeps the output open for those who read it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
            if os.WIFSIGNALED(status):
                done += 1
                continue
            if os.WEXITSTATUS(status):
                raise RuntimeError(f"The run {name!r} failed after {done} kills.")
            return done, resumes, (folder / "result").read_bytes()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def torture(names: list[str], kills: int, seed: int) -> dict[str, Any]:
    """Kills, resumes and mismatches, spread over the runs."""
    dice = random.Random(seed)
    figures: dict[str, Any] = {"kills": 0, "resumes": 0, "runs": 0, "mismatches": []}
    expected: dict[str, bytes] = {}
    while figures["kills"] < kills:
        for name in names:
            expected.setdefault(name, undisturbed(name))
            done, resumes, found = killed(name, 2, dice)
            figures["kills"] += done
            figures["resumes"] += resumes
            figures["runs"] += 1
            if found != expected[name]:
                figures["mismatches"].append(name)
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(RUNS), help=", ".join(RUNS))
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    found = torture(chosen.names, chosen.kills, chosen.seed)
    print(json.dumps(found))
    sys.exit(bool(found["mismatches"]))
