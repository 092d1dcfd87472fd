"""A run of several processes of which some are killed: `python elastic.py FOLDER KILLS`, by torchrun --max-restarts."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fitkit
from fitkit.callbacks import BackupAndRestore, Callback

RANK, ATTEMPT = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
FOLDER, KILLS = Path(sys.argv[1]), int(sys.argv[2])


class Killed(Callback):
    """In each attempt another process dies, further on."""

    def __init__(self) -> None:
        super().__init__()
        self.epoch = 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if KILLS > ATTEMPT == self.epoch - 1 and batch == 4 + ATTEMPT and RANK == (ATTEMPT + 1) % 2:
            os.kill(os.getpid(), signal.SIGKILL)


torch.manual_seed(RANK)
generator = torch.Generator().manual_seed(3)
x, y = torch.randn(100, 4, generator=generator), torch.randint(0, 3, (100,), generator=generator)
module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 3))
model = fitkit.Model(module, device="cpu", strategy="ddp")
model.compile("adam", "cross_entropy", ["accuracy"])
model.fit(
    *(x, y),
    epochs=4,
    batch_size=8,
    accumulate_grad_batches=2,
    validation_split=0.2,
    callbacks=[BackupAndRestore(FOLDER / "backup", save_freq=3), Killed()],
    verbose=2,
)
weights = {name: value.tolist() for name, value in module.state_dict().items()}
(FOLDER / f"{RANK}.json").write_text(json.dumps({"history": model.history.history, "weights": weights}))
sys.stdout.write(f"[{RANK}] attempt {ATTEMPT}\n")
sys.stdout.flush()
