"""A small convolutional network learns handwritten digits: 8x8 images that scikit-learn brings along.

One fifth of the images is kept for the test and never seen in training. Of the rest, fit keeps a tenth for validation
and stops when the validation loss no longer improves. Takes some seconds on two cores and prints the test accuracy,
about 99 %.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import fitkit
from fitkit.callbacks import EarlyStopping

torch.manual_seed(1)
torch.set_num_threads(1)  # On images this small, more threads would mostly wait for each other.

# Float images of shape (N, 1, 8, 8) from 0 to 1, and integer labels of shape (N,): NumPy arrays, as they are.
digits = load_digits()
images = digits.images[:, None] / 16
x, x_test, y, y_test = train_test_split(images, digits.target, test_size=0.2, stratify=digits.target, random_state=0)

module = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
    nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
    nn.Flatten(), nn.Dropout(0.5), nn.Linear(64 * 4 * 4, 10),
)  # fmt: skip

model = fitkit.Model(module)
model.compile(optimizer="adam", loss="cross_entropy", metrics=["accuracy"])
history = model.fit(
    x,
    y,
    epochs=50,
    validation_split=0.1,
    verbose=0,
    callbacks=[EarlyStopping("val_loss", patience=5, restore_best_weights=True)],
)

print(history)
print(f"\nended by {history.stop_reason}; the weights are those of epoch {history.best('val_loss')['epoch'] + 1}")

test = model.evaluate(x_test, y_test, verbose=0, return_dict=True)
print(f"test accuracy on {len(x_test)} images: {test['accuracy']:.2%}, loss {test['loss']:.4f}")
