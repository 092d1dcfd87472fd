"""A forecast of the next day from the week before: the hourly load of a small town's electricity, made up here.

A Dataset cuts the series into windows as they are asked for, so that no hour is stored more than once. A window's input
is a dict, which reaches the module as keywords: the past with its calendar, and the calendar of the hours to come. What
validates and what tests are the two ends of the series; shuffled windows would tell the training of hours that it is
judged on. At the end the forecast is compared with the load of a week ago.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import fitkit
from fitkit.callbacks import EarlyStopping, ReduceLROnPlateau

WEEK, DAY = 168, 24


def made_up_load(hours: int, seed: int = 0) -> pd.Series:
    """A daily shape that is flatter and lower at weekends, and weather that lasts for some hours."""
    index = pd.date_range("2024-01-01", periods=hours, freq="h")
    phase, weekend = 2 * np.pi * index.hour / 24, index.day_of_week >= 5
    weather = np.random.default_rng(seed).normal(0, 1.2, hours)
    for hour in range(1, hours):
        weather[hour] += 0.9 * weather[hour - 1]
    shape = 6 * np.sin(2 * phase) - 15 * np.cos(phase)
    return pd.Series(100 + np.where(weekend, 0.5 * shape - 12, shape) + weather, index)


def calendar_of(index: pd.DatetimeIndex) -> np.ndarray:
    phase = 2 * np.pi * index.hour / 24
    return np.stack([np.sin(phase), np.cos(phase), np.sin(2 * phase), np.cos(2 * phase), index.day_of_week >= 5], 1)


class Windows(Dataset):
    """A week and the day after it, at every hour of a stretch of the series."""

    def __init__(self, load: Tensor, calendar: Tensor) -> None:
        self.load, self.calendar = load, calendar

    def __len__(self) -> int:
        return len(self.load) - WEEK - DAY + 1

    def __getitem__(self, start: int) -> tuple[dict[str, Tensor], Tensor]:
        now, end = start + WEEK, start + WEEK + DAY
        past = torch.cat([self.load[start:now, None], self.calendar[start:now]], dim=1)
        return {"past": past, "future": self.calendar[now:end]}, self.load[now:end]


class Forecaster(nn.Module):
    """One LSTM reads the past, another goes on from its state through the hours to come."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.read = nn.LSTM(6, width, batch_first=True)
        self.go_on = nn.LSTM(5, width, batch_first=True)
        self.value = nn.Linear(width, 1)

    def forward(self, past: Tensor, future: Tensor) -> Tensor:
        state = self.read(past)[1]
        return self.value(self.go_on(future, state)[0]).squeeze(-1)


torch.manual_seed(0)
torch.set_num_threads(1)  # For a module this small, more threads would mostly wait for each other.

series = made_up_load(24 * 250)
first, second = int(0.7 * len(series)), int(0.85 * len(series))
mean, spread = series[:first].mean(), series[:first].std()
load = torch.tensor(((series - mean) / spread).to_numpy(), dtype=torch.float32)
calendar = torch.tensor(calendar_of(series.index), dtype=torch.float32)
# The first window of a stretch reads the week before it, and forecasts no hour of another stretch.
stretches = [(0, first), (first - WEEK, second), (second - WEEK, len(series))]
training, validation, test = (Windows(load[start:stop], calendar[start:stop]) for start, stop in stretches)

model = fitkit.Model(Forecaster(), device="cpu")
model.compile("adam", "mse", metrics=["mae"], learning_rate=0.01)
history = model.fit(
    training,
    validation_data=validation,
    batch_size=64,
    epochs=7,
    gradient_clip_val=1.0,
    callbacks=[
        ReduceLROnPlateau("val_mae", factor=0.3, patience=1),
        EarlyStopping("val_mae", patience=3, restore_best_weights=True),
    ],
    verbose=0,
)
print(history)

loss, error = model.evaluate(test, verbose=0)
forecast = model.predict(test, verbose=0)  # one row a window, 24 hours each
truth = load.unfold(0, DAY, 1)[second : second + len(test)]
week_ago = load.unfold(0, DAY, 1)[second - WEEK : second - WEEK + len(test)]
naive = spread * (week_ago - truth).abs().mean()
by_hour = spread * (forecast - truth).abs().mean(0)
print(f"\nmean absolute error of the test: {spread * error:.2f}; of a week ago: {naive:.2f}")
print(f"of the next hour {by_hour[0]:.2f}, of the one in a day {by_hour[-1]:.2f}")
