"""Transfer learning: a backbone that has learned the digits 0 to 4 helps to learn 5 to 9 from 15 images.

The backbone has BatchNorm. It is frozen as one freezes in torch: its parameters need no gradients, and it is in eval
mode, so that its running statistics stay those of the first task. fit keeps it in that mode, through training and
validation. For comparison, the statistics drift with the 15 images, as in a loop that calls module.train(); and a
module starts from scratch.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import fitkit
from fitkit.callbacks import EarlyStopping


def new_backbone() -> nn.Sequential:
    """Images of shape (N, 1, 8, 8) to features of shape (N, 256)."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(),
    )  # fmt: skip


def train(backbone: nn.Module, x: np.ndarray, y: np.ndarray, epochs: int, batch_size: int) -> fitkit.Model:
    """A model of the backbone and a new layer for five classes."""
    model = fitkit.Model(nn.Sequential(backbone, nn.Linear(256, 5)))
    model.compile("adam", "cross_entropy", metrics=["accuracy"], learning_rate=3e-3)
    stopping = EarlyStopping("loss", min_delta=1e-3, patience=5)
    model.fit(x, y, batch_size=batch_size, epochs=epochs, callbacks=[stopping], verbose=0)
    return model


torch.manual_seed(0)
torch.set_num_threads(1)  # On images this small, more threads would mostly wait for each other.

digits = load_digits()
images, labels = (digits.images[:, None] / 16).astype("float32"), digits.target
first, second = labels < 5, labels >= 5

backbone = new_backbone()
train(backbone, images[first], labels[first], epochs=15, batch_size=32)

# The second task: 15 images to learn from, all others to be tested on.
x, y = images[second], labels[second] - 5
x, y, x_test, y_test = x[:15], y[:15], x[15:], y[15:]

frozen = copy.deepcopy(backbone).requires_grad_(False).eval()
drifting = copy.deepcopy(backbone).requires_grad_(False).train()
for name, start in {
    "frozen backbone": frozen,
    "BatchNorm in training mode": drifting,
    "from scratch": new_backbone(),
}.items():
    model = train(start, x, y, epochs=100, batch_size=5)
    trained = sum(parameter.numel() for parameter in model.module.parameters() if parameter.requires_grad)
    accuracy = model.evaluate(x_test, y_test, verbose=0, return_dict=True)["accuracy"]
    print(f"{name:26} {trained:5} parameters trained, {accuracy:.1%} of {len(x_test)} other images right")

before, after = backbone.state_dict(), frozen.state_dict()
print(f"frozen backbone still in eval mode: {not frozen.training}")
print(f"its weights and running statistics unchanged: {all(torch.equal(before[name], after[name]) for name in before)}")
