"""Two inputs and two outputs: of two handwritten digits, what is the sum, and is the left one larger?

Inputs are a dict whose keys are the arguments of the module's forward; outputs and targets are dicts whose keys are the
names in the logs. Each output has a loss and metrics of its own, and the total is their weighted sum. A tenth of the
sums in training is unknown (-100): such targets count neither in the loss nor in the metrics, exactly.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fitkit
from fitkit.callbacks import EarlyStopping


class Calculator(nn.Module):
    """Images of shape (N, 64) twice, to logits of 19 sums, and one logit for "the left one is larger"."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32), nn.ReLU())
        self.combine = nn.Sequential(nn.Linear(64, 128), nn.ReLU())
        self.sum, self.larger = nn.Linear(128, 19), nn.Linear(128, 1)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        both = self.combine(torch.cat([self.read(left), self.read(right)], dim=1))
        return {"sum": self.sum(both), "larger": self.larger(both).squeeze(1)}


torch.manual_seed(0)
torch.set_num_threads(1)  # For a module this small, more threads would mostly wait for each other.

digits = load_digits()
images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)


def pairs(first: int, last: int, count: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Random pairs of the images from first to last, and what is asked about them."""
    left, right = torch.randint(first, last, (2, count))
    inputs = {"left": images[left], "right": images[right]}
    return inputs, {"sum": labels[left] + labels[right], "larger": (labels[left] > labels[right]).float()}


x, y = pairs(0, 1400, 8000)
y["sum"][torch.rand(8000) < 0.1] = -100
x_test, y_test = pairs(1600, 1797, 2000)

model = fitkit.Model(Calculator())
model.compile(
    "adam",
    loss={"sum": "cross_entropy", "larger": "bce_with_logits"},
    loss_weights={"larger": 0.5},
    metrics={"sum": ["accuracy", "top_2"], "larger": ["accuracy"]},
    learning_rate=2e-3,
)
stopping = EarlyStopping("val_sum_accuracy", patience=3, restore_best_weights=True)
history = model.fit(x, y, epochs=12, validation_data=pairs(1400, 1600, 1000), callbacks=[stopping], verbose=0)
print(history.to_pandas().filter(like="val_").round(3).to_string())

print("\non images that training has not seen:")
for name, value in model.evaluate(x_test, y_test, verbose=0, return_dict=True).items():
    print(f"  {name}: {value:.3f}")

predicted = model.predict(x_test, verbose=0)
for index in range(4):
    total, larger = int(predicted["sum"][index].argmax()), float(predicted["larger"][index].sigmoid())
    print(f"sum {total:2} (right: {int(y_test['sum'][index]):2}), left one larger: {larger:.0%}")
