"""Regression on a pandas DataFrame: how far diabetes has progressed after a year, from ten measurements.

The table (442 patients) comes with scikit-learn. Columns and targets go into fit as they are; what is shown at the end
is R2 and the mean absolute error on patients that training has not seen, in the target's own unit.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_diabetes
from torch import nn

import fitkit

torch.manual_seed(0)

frame = load_diabetes(as_frame=True, scaled=False).frame.sample(frac=1, random_state=0)
test, train = frame[:88], frame[88:]
columns = frame.columns.drop("target")

# Measurements in units of their spread in the training part; the target as it is.
mean, spread = train[columns].mean(), train[columns].std()
x, x_test = (train[columns] - mean) / spread, (test[columns] - mean) / spread
y, y_test = train["target"], test["target"]

module = nn.Sequential(nn.Linear(len(columns), 32), nn.ReLU(), nn.Linear(32, 1))
model = fitkit.Model(module)
with torch.no_grad():
    module[-1].bias.fill_(y.mean())  # Start from the mean instead of learning it.
model.compile("adam", "mse", metrics=["r2", "mae"], learning_rate=0.01)

# Without epochs, fit stops when val_loss has not improved for 3 epochs.
history = model.fit(x, y, validation_split=0.2, verbose=0)
print(history.to_pandas().round(3).tail())

scores = model.evaluate(x_test, y_test, verbose=0, return_dict=True)
print(f"\nR2 {scores['r2']:.3f}, mean absolute error {scores['mae']:.1f} on {len(x_test)} patients")

predicted = model.predict(x_test, verbose=0).squeeze(1).tolist()
print(test.assign(predicted=predicted)[["age", "bmi", "bp", "target", "predicted"]].head().round(1))
