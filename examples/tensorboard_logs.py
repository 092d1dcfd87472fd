"""A run for TensorBoard: losses, learning rate, gradient norms, histograms, the graph and hyperparameters.

Two runs are written below the folder logs, to be compared in `tensorboard --logdir logs`; no TensorFlow is needed. Then
the files are read back, and what is in them is printed.
"""

from __future__ import annotations

import importlib.util
import sys
import time

import torch
from sklearn.datasets import load_digits
from torch import nn

import fitkit
from fitkit.callbacks import LRScheduler, TensorBoard

if importlib.util.find_spec("tensorboard") is None:
    print("skipped: this example needs tensorboard, pip install 'fitkit[tensorboard]'")
    sys.exit()

torch.set_num_threads(1)  # For a module this small, more threads would mostly wait for each other.
folder = f"logs/{time.strftime('%Y-%m-%d_%H-%M-%S')}"
digits = load_digits()
x, y = (digits.data / 16).astype("float32"), digits.target

for rate in (0.01, 0.1):
    torch.manual_seed(0)
    model = fitkit.Model(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)))
    model.compile("sgd", "cross_entropy", metrics=["accuracy"], learning_rate=rate)
    board = TensorBoard(
        f"{folder}/rate_{rate}",
        histogram_freq=2,
        write_graph=True,
        update_freq=10,
        hyperparameters={"rate": rate, "optimizer": "sgd"},
    )
    halving = LRScheduler(lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5))
    history = model.fit(x, y, epochs=6, validation_split=0.2, track_grad_norm=2, callbacks=[halving, board], verbose=0)
    print(f"rate {rate}: val_accuracy {history['val_accuracy'][-1]:.3f}")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

for part in ("train", "validation"):
    events = EventAccumulator(f"{folder}/rate_0.1/{part}").Reload()
    tags = events.Tags()
    print(f"\n{folder}/rate_0.1/{part}: {len(tags['histograms'])} histograms, {'a' if tags['graph'] else 'no'} graph")
    for name in tags["scalars"]:
        values = events.Scalars(name)
        print(f"  {name}: {len(values)} values, {values[0].value:.4g} to {values[-1].value:.4g}")
print("\nnow: tensorboard --logdir logs")
