"""A training that is killed twice, and ends with the weights of one that nothing disturbed, bit for bit.

The script starts itself as a process of its own and kills that one in the middle of an epoch, as a power cut would. The
same command again goes on where the latest backup was made: `BackupAndRestore` is all it takes. At the end weights and
History are compared with those of a run in one piece.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import fitkit
from fitkit.callbacks import BackupAndRestore, Callback, LRScheduler

EPOCHS = 4
TRAIN = "train"


class Announce(Callback):
    """Says which batch is done, so that the other process knows when to kill this one."""

    def on_train_batch_end(self, batch: int, logs: object = None) -> None:
        print(f"epoch {len(self.model.history) + 1}, batch {batch + 1}", flush=True)


def train(callbacks: list[Callback]) -> fitkit.Model:
    """What an ordinary training script does: dropout, momentum, a schedule by steps and windows of two batches."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    digits = load_digits()
    x, y = (digits.data / 16).astype("float32"), digits.target
    module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))
    model = fitkit.Model(module, device="cpu")
    model.compile(torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9), "cross_entropy", metrics=["accuracy"])
    schedule = LRScheduler(lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99), interval="step")
    model.fit(
        x,
        y,
        epochs=EPOCHS,
        validation_split=0.2,
        accumulate_grad_batches=2,
        callbacks=[schedule, *callbacks],
        verbose=0,
    )
    return model


def run_until(folder: Path, deaths: list[str]) -> None:
    """Runs the training as often as it takes; kills it when it announces the next of the deaths."""
    while True:
        death = deaths.pop(0) if deaths else None
        command = [sys.executable, __file__, TRAIN, str(folder)]
        first = ""
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout or []:
                first = first or line.strip()
                if line.strip() == death:
                    process.kill()
                    break
        print(f"started at {first}; {'killed at ' + death if death else 'ended by itself'}")
        if death is None:
            return


if sys.argv[1:2] == [TRAIN]:
    folder = Path(sys.argv[2])
    trained = train([BackupAndRestore(folder / "backup", save_freq=5), Announce()])
    trained.save_weights(folder / "weights.pt")
    trained.history.save(folder / "history.json")
else:
    with tempfile.TemporaryDirectory() as name:
        run_until(Path(name), ["epoch 2, batch 18", "epoch 3, batch 31"])
        weights = torch.load(Path(name) / "weights.pt", weights_only=True)
        history = fitkit.History.load(Path(name) / "history.json")
    print(history)

    undisturbed = train([])
    same = all(torch.equal(weights[key], value) for key, value in undisturbed.module.state_dict().items())
    print(f"\nweights equal to those of a run in one piece: {same}")
    print(f"History equal: {history.history == undisturbed.history.history}")
    assert same
    assert history.history == undisturbed.history.history
