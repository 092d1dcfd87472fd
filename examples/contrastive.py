"""Features without labels: SimCLR on the digits that scikit-learn brings along.

Two views of each image are pulled together and all other images of the batch pushed away (NT-Xent, Chen et al. 2020,
https://arxiv.org/abs/2002.05709). predict_step gives the features in front of the projection, and a linear probe on
them, trained with 100 labels, says what they are worth.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fitkit
from fitkit.callbacks import Callback


def view(images: Tensor) -> Tensor:
    """The images, each turned, scaled and shifted a little, with another contrast and some noise."""
    count = len(images)
    turn, scale = 0.6 * (torch.rand(count) - 0.5), 1 + 0.3 * (torch.rand(count) - 0.5)
    cos, sin = scale * turn.cos(), scale * turn.sin()
    shift = 0.5 * (torch.rand(count, 2) - 0.5)
    maps = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)
    moved = F.grid_sample(images, F.affine_grid(maps, list(images.shape), align_corners=False), align_corners=False)
    return moved * (0.7 + 0.6 * torch.rand(count, 1, 1, 1)) + 0.1 * torch.randn_like(images)


class Encoder(nn.Module):
    """Images of shape (N, 1, 8, 8) to features (N, 256), and these to where views are compared, (N, 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        )  # fmt: skip
        self.projection = nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 32))

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.projection(self.features(images)), dim=1)


class SimCLR(fitkit.Model):
    def __init__(self, module: Encoder, temperature: float = 0.2) -> None:
        super().__init__(module, device="cpu")
        self.temperature = temperature

    def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        points = torch.cat([self.module(view(batch)), self.module(view(batch))])
        similarity = (points @ points.T / self.temperature).fill_diagonal_(float("-inf"))
        partner = torch.arange(len(points)).roll(len(batch))
        found = (similarity.argmax(1) == partner).float().mean()
        return {"loss": F.cross_entropy(similarity, partner), "partner_found": found}

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.module.features(batch)


class Probe(Callback):
    """Logs every fifth epoch how well a linear classifier does on the features."""

    adds_to_logs = ("probe",)

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        if epoch % 5 == 4:
            logs["probe"] = probe(self.model)


torch.manual_seed(0)
torch.set_num_threads(1)  # For a network this small, more threads would mostly wait for each other.
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
x, x_test, y, y_test = train_test_split(images, digits.target, test_size=0.25, random_state=0)


def probe(model: fitkit.Model, labels: int = 100) -> float:
    """The accuracy on the test images of a classifier that has seen so many labels."""
    classifier = LogisticRegression(C=0.1, max_iter=2000).fit(model.predict(x[:labels], verbose=0), y[:labels])
    return float(classifier.score(model.predict(x_test, verbose=0), y_test))


model = SimCLR(Encoder())
model.compile(lambda parameters: torch.optim.AdamW(parameters, lr=2e-3, weight_decay=1e-4))
history = model.fit(x, batch_size=256, epochs=20, callbacks=[Probe()], verbose=0)
print(history)
pixels = LogisticRegression(max_iter=2000).fit(x[:100].flatten(1), y[:100]).score(x_test.flatten(1), y_test)
print(f"100 labels on pixels: {pixels:.1%}")
print(f"100 labels on features: {probe(model):.1%}")
