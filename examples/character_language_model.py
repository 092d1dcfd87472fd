"""A language model by characters learns from a text that every Python brings along: the source of argparse.

The text, some 80,000 characters, is cut into windows of 64; for each character the module says what the next one will
be, and the last windows are kept for validation. The loss is a mean over characters, in nats; divided by ln 2 it is
bits per character. At the end the model is compared with two that know less, and writes something that looks a little
like Python.
"""

from __future__ import annotations

import argparse
import inspect
import math
import zlib
from collections import Counter

import torch
from torch import Tensor, nn

import fitkit
from fitkit.callbacks import LRScheduler

WINDOW = 64


class CharacterModel(nn.Module):
    """Characters of shape (N, T) to logits of shape (N, characters, T), which is how cross entropy wants them."""

    def __init__(self, characters: int, width: int = 96) -> None:
        super().__init__()
        self.embed = nn.Embedding(characters, 32)
        self.read = nn.GRU(32, width, batch_first=True)
        self.score = nn.Linear(width, characters)

    def forward(self, text: Tensor) -> Tensor:
        return self.score(self.read(self.embed(text))[0]).transpose(1, 2)


torch.manual_seed(0)
torch.set_num_threads(1)  # For a module this small, more threads would mostly wait for each other.

lines = inspect.getsource(argparse).splitlines(keepends=True)
# Without rulers and empty lines, and with a tab for each level.
text = "".join(line.replace("    ", "\t") for line in lines if line.strip("#=- \n"))
alphabet = sorted(set(text))
number = {character: index for index, character in enumerate(alphabet)}

# Each window is read without its last character and asked for without its first.
codes = torch.tensor([number[character] for character in text])
windows = codes.unfold(0, WINDOW + 1, WINDOW)
x, y = windows[:, :-1], windows[:, 1:]
held_out = len(windows) // 10

module = CharacterModel(len(alphabet))
model = fitkit.Model(module, device="cpu")
model.compile("adam", "cross_entropy", metrics=["accuracy", "perplexity"])

epochs, batches = 8, math.ceil((len(windows) - held_out) / 32)
schedule = LRScheduler(
    lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=epochs * batches),
    interval="step",
)
history = model.fit(
    (x, y),
    epochs=epochs,
    validation_split=held_out / len(windows),
    gradient_clip_val=1.0,
    callbacks=[schedule],
    verbose=0,
)
print(history)

bits = history["val_loss"][-1] / math.log(2)
counts = Counter(text)
alone = -sum(count / len(text) * math.log2(count / len(text)) for count in counts.values())
packed = 8 * len(zlib.compress(text.encode(), 9)) / len(text)
print(f"\nbits per character of the last windows: {bits:.2f}")
print(f"for comparison, of the whole text: {alone:.2f} by frequencies alone, {packed:.2f} by zlib")

# One character after another, each drawn from what the model says of the 64 before it.
written = "\tdef add_"
for _ in range(240):
    recent = torch.tensor([[number[character] for character in written[-WINDOW:]]])
    chances = (model.predict_on_batch(recent)[0, :, -1] / 0.5).softmax(0)
    written += alphabet[int(torch.multinomial(chances, 1))]
print(f"\n{written.expandtabs(4)}")
