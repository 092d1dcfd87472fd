"""A generative adversarial network: two optimizers in one training_step, on eight blobs of points around a circle.

The step trains by itself: it calls backward and both optimizers, and returns its loss without a gradient, which tells
fit to leave the rest to it. Its numbers are logged as any others. At the end the points that the generator makes are
held against the blobs: how many it has found, and how many of the points lie in one.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fitkit
from fitkit.callbacks import Callback

SPREAD = 0.05
CENTERS = torch.tensor([[math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)] for k in range(8)])


def network(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, 64), nn.LeakyReLU(0.2), nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, outputs)
    )


class Adversaries(nn.Module):
    """Noise of shape (N, 8) to points of shape (N, 2), and a judge of points."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.discriminator = network(8, 2), network(2, 1)

    def forward(self, noise: Tensor) -> Tensor:
        return self.generator(noise)


class AdversarialModel(fitkit.Model):
    def __init__(self, module: Adversaries) -> None:
        super().__init__(module, device="cpu")
        self.improve_generator = torch.optim.Adam(module.generator.parameters(), lr=1e-3, betas=(0.5, 0.9))
        self.improve_discriminator = torch.optim.Adam(module.discriminator.parameters(), lr=1e-3, betas=(0.5, 0.9))

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        generator, discriminator = self.module.generator, self.module.discriminator
        made = generator(torch.randn(len(batch), 8))

        real, fake = discriminator(batch), discriminator(made.detach())
        judging = F.softplus(-real).mean() + F.softplus(fake).mean()
        self.improve_discriminator.zero_grad()
        judging.backward()
        self.improve_discriminator.step()

        making = F.softplus(-discriminator(made)).mean()
        self.improve_generator.zero_grad()
        making.backward()
        self.improve_generator.step()
        return {"loss": (judging + making).detach(), "judging": judging.detach(), "making": making.detach()}


class Coverage(Callback):
    """Logs how many blobs have points of the generator, and which part of the points lies in a blob."""

    adds_to_logs = ("blobs", "in_blobs")

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        points = self.model.predict_on_batch(fixed_noise)
        distance, nearest = torch.cdist(points, CENTERS).min(1)
        inside = nearest[distance < 3 * SPREAD]
        logs["blobs"] = float((inside.bincount(minlength=8) >= 10).sum())
        logs["in_blobs"] = len(inside) / len(points)


torch.manual_seed(0)
torch.set_num_threads(1)  # For networks this small, more threads would mostly wait for each other.
points = CENTERS[torch.randint(8, (6400,))] + SPREAD * torch.randn(6400, 2)
fixed_noise = torch.randn(1000, 8)

model = AdversarialModel(Adversaries())
model.compile(model.improve_generator)  # Which one does not matter: the step trains by itself.
history = model.fit(points, batch_size=128, epochs=30, callbacks=[Coverage()], verbose=0)

for epoch in [*range(0, 30, 6), 29]:
    row = {key: history[key][epoch] for key in history}
    print(
        f"epoch {epoch + 1:2}: judging {row['judging']:.3f}, making {row['making']:.3f}, {row['blobs']:.0f} of 8 blobs "
        f"found, {row['in_blobs']:.0%} of the points in one"
    )
