"""Every training flag of fit, a few at a time, on a small regression: 192 training samples are 6 batches of 32."""

from __future__ import annotations

import torch
from torch import nn

import fitkit
from fitkit.callbacks import EarlyStopping

torch.manual_seed(0)
x = torch.randn(256, 5)
y = x @ torch.randn(5, 1) + 0.1 * torch.randn(256, 1)


def fit(description: str, learning_rate: float = 0.05, **flags: object) -> fitkit.History:
    """Fits a fresh model and prints what came of it."""
    torch.manual_seed(0)
    model = fitkit.Model(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)))
    model.compile("sgd", "mse", learning_rate=learning_rate)
    steps = []
    model.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    history = model.fit((x, y), validation_split=0.25, verbose=0, **flags)
    print(f"{description}: {len(history)} epochs, {len(steps)} steps, ended by {history.stop_reason}")
    return history


print("How long: a fixed number of epochs, or as many as early stopping allows.")
fit("  epochs=20", epochs=20)
fit("  max_nb_epochs=200, with the default early stopping", max_nb_epochs=200)
early = EarlyStopping("val_loss", min_delta=0.05, patience=2)
fit("  early_stop_callback=EarlyStopping(...)", early_stop_callback=early)
fit("  the same with min_nb_epochs=30", early_stop_callback=early, min_nb_epochs=30)
fit("  the same with enable_early_stop=False", early_stop_callback=early, enable_early_stop=False, max_nb_epochs=40)

print("What a step is made of: 6 batches are 3 windows of 2, or a window of 4 and one of 2.")
fit("  accumulate_grad_batches=2", epochs=20, accumulate_grad_batches=2)
fit("  accumulate_grad_batches={0: 1, 10: 4}", epochs=20, accumulate_grad_batches={0: 1, 10: 4})
history = fit("  gradient_clip_val=1.0, track_grad_norm=2", epochs=20, gradient_clip_val=1.0, track_grad_norm=2)
first, *_, last = history["grad_2_norm_total"]
print(f"    mean gradient norm before clipping: {first:.2f} in the first epoch, {last:.2f} in the last")

print("How much of the data an epoch takes.")
fit("  train_percent_check=0.5, val_percent_check=0.5", epochs=20, train_percent_check=0.5, val_percent_check=0.5)
fit("  overfit_pct=0.4, the same 2 batches in each epoch", epochs=20, overfit_pct=0.4)
fit("  steps_per_epoch=3", epochs=20, steps_per_epoch=3)

print("What a loss of NaN or infinity does.")
try:
    fit("", epochs=20, learning_rate=1e6)
except fitkit.NonFiniteLossError as error:
    print(f'  on_nonfinite="raise": NonFiniteLossError in epoch {error.epoch + 1}, from batch {error.batch + 1} on')
fit('  on_nonfinite="stop"', epochs=20, learning_rate=1e6, on_nonfinite="stop")
fit('  on_nonfinite="ignore"', epochs=20, learning_rate=1e6, on_nonfinite="ignore")
