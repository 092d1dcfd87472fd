"""Small scripts for several processes, by name: `python endings.py NAME,NAME,... FOLDER`."""

from __future__ import annotations

import datetime
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import fitkit
from fitkit.callbacks import BackupAndRestore, Callback, CSVLogger, EarlyStopping, ModelCheckpoint
from fitkit.distributed import PARTING

RANK = int(os.environ["RANK"])
FOLDER = Path(sys.argv[2])


def say(text: str) -> None:
    sys.stdout.write(f"[{RANK}] {text}\n")  # at once: print writes the end of the line by itself
    sys.stdout.flush()


def made(**options: Any) -> fitkit.Model:
    torch.manual_seed(RANK)
    model = fitkit.Model(nn.Linear(4, 1), device="cpu", **options)
    model.compile("sgd", "mse")
    return model


def data(samples: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(samples, 4, generator=generator), torch.randn(samples, 1, generator=generator)


class At(Callback):
    """Does something in one process, in the fourth batch."""

    def __init__(self, rank: int, action: Any) -> None:
        super().__init__()
        self.rank, self.action = rank, action

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if batch == 3 and self.rank == RANK:
            self.action()


def fail() -> None:
    raise ValueError("a bad sample")


def an_error() -> None:
    made().fit(*data(), batch_size=8, epochs=2, callbacks=[At(int(sys.argv[3]), fail)], verbose=0)


def an_error_that_is_caught() -> None:
    began = time.monotonic()
    try:
        an_error()
    except Exception as error:
        say(f"caught {type(error).__name__}: {error} {getattr(error, '__notes__', '')}")
    say("prompt" if time.monotonic() - began < 20 else "late")
    dist.destroy_process_group() if dist.is_initialized() else say("no group is left")
    time.sleep(2)  # the store of the first process is there for the others


def a_process_that_hangs() -> None:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=4))
    began = time.monotonic()
    try:
        made().fit(*data(), batch_size=8, epochs=2, callbacks=[At(1, lambda: time.sleep(300))], verbose=0)
    except RuntimeError as error:
        say(f"ended {'promptly' if time.monotonic() - began < 30 else 'late'}: {error}")
        os._exit(3)


def a_group_of_the_users() -> None:
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    model = made()
    model.fit(*data(), epochs=1, verbose=0)
    model.evaluate(*data(), verbose=0)
    total = torch.ones(1)
    dist.all_reduce(total)
    say(f"kept {dist.group.WORLD is group} {total.item():.0f}")
    time.sleep(PARTING)  # as a user of torch 2.6 has to: see there
    dist.destroy_process_group()


def no_group_of_the_users() -> None:
    model = made()
    model.fit(*data(), epochs=1, verbose=0)
    say(f"left {dist.is_initialized()}")
    model.evaluate(*data(), verbose=0)
    say(f"left {dist.is_initialized()}")


def writing() -> None:
    model = made()
    seen: list[dict[str, Any]] = []

    class Noting(Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            seen.append(dict(logs))

    callbacks = [
        CSVLogger(FOLDER / "log.csv"),
        ModelCheckpoint(FOLDER / "epoch-{epoch}.fitkit", monitor="loss", verbose=1),
        BackupAndRestore(FOLDER / "backup"),
        EarlyStopping("val_loss", patience=50, verbose=True),
        Noting(),
    ]
    model.fit(*data(), epochs=2, verbose=2, validation_split=0.25, callbacks=callbacks)
    model.evaluate(*data(), verbose=2)
    model.summary()
    model.save_weights(FOLDER / "weights.pt")
    model.load_weights(FOLDER / "weights.pt")
    say(f"logs {seen}".replace("\n", " "))


def a_backup_that_one_process_finds() -> None:
    backup = BackupAndRestore(FOLDER / "seen", delete_checkpoint=False)
    made().fit(*data(), epochs=1, verbose=0, callbacks=[backup])
    unseen = BackupAndRestore(FOLDER / ("seen" if RANK == 0 else "unseen"))
    try:
        made().fit(*data(), epochs=2, verbose=0, callbacks=[unseen])
    except ValueError as error:
        say(f"refused {error}")


def single() -> None:
    torch.manual_seed(RANK)
    model = fitkit.Model(nn.Linear(4, 1), device="cpu", strategy="single")
    model.compile("sgd", "mse")
    model.fit(*data(), epochs=1, verbose=0)
    say(f"loss {model.history['loss'][0]:.6f}")


def refused() -> None:
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

    class Alone(fitkit.Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx).detach()

    alone = Alone(nn.Linear(4, 1), device="cpu")
    alone.compile("sgd", "mse")
    dataset = TensorDataset(*data())
    loader = DataLoader(dataset, 8, sampler=DistributedSampler(dataset, 2, RANK), pin_memory=False, num_workers=1)
    for call in (
        lambda: alone.fit(*data(), epochs=1, verbose=0),
        lambda: made().fit(loader, epochs=1, verbose=0),
        lambda: made().find_learning_rate(*data(), verbose=0),
        lambda: made().fit(*data(64 - 8 * RANK), epochs=1, verbose=0),
        lambda: made().evaluate([data(8)] * (2 + RANK), verbose=0),
    ):
        try:
            call()
        except ValueError as error:
            say(f"refused {error}")


if __name__ == "__main__":
    for name in sys.argv[1].split(","):
        globals()[name]()
