"""A training step of one's own: a variational autoencoder on the digits that scikit-learn brings along.

The loss needs more than an output and a target, so training_step and validation_step compute it. What they return
beside "loss" is logged as means over the epoch, in validation with val_ before its name. predict_step gives the codes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fitkit


class Autoencoder(nn.Module):
    """Images of shape (N, 64) to reconstructions, and the mean and log-variance of their two-dimensional codes."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
        self.decoder = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        codes = mean + torch.randn_like(mean) * (log_variance / 2).exp() if self.training else mean
        return self.decoder(codes), mean, log_variance


class VariationalModel(fitkit.Model):
    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        logits, mean, log_variance = self.module(batch)
        reconstruction = F.binary_cross_entropy_with_logits(logits, batch, reduction="sum") / len(batch)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
        return {"loss": reconstruction + divergence, "reconstruction": reconstruction, "divergence": divergence}

    validation_step = training_step

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.module(batch)[1]


torch.manual_seed(0)
images = torch.tensor(load_digits().data / 16, dtype=torch.float32)

model = VariationalModel(Autoencoder())
model.compile("adam", learning_rate=3e-3)
history = model.fit(images, epochs=20, validation_split=0.2, verbose=0)
print(history)

codes = model.predict(images, verbose=0)
print(f"\ncodes: {tuple(codes.shape)}, standard deviations {[round(spread, 2) for spread in codes.std(0).tolist()]}")
