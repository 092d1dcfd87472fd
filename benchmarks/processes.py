"""What fitkit adds to a step of a hand-written loop under DistributedDataParallel.

Started by torchrun::

    torchrun --standalone --nproc-per-node 2 benchmarks/processes.py --rounds 15

Both train the same module on the same parts of the same batches, in turns. The time of a step is that of an epoch over
its steps, without the first epoch of each turn; of every turn the two times make a ratio, and rank 0 prints the median.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fitkit
from fitkit.callbacks import Callback

STEPS, BATCH = 300, 64


def network(width: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def by_hand(module: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int) -> list[float]:
    """Seconds of each epoch of a plain loop, with a running loss as one would keep it."""
    rank, world = dist.get_rank(), dist.get_world_size()
    wrapped = DistributedDataParallel(module)
    optimizer = torch.optim.Adam(module.parameters(), fused=True)
    loss_of, seconds = nn.CrossEntropyLoss(), []
    for _ in range(epochs):
        began = time.perf_counter()
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        total, count = torch.zeros(()), 0
        for start in range(0, len(x), BATCH):
            mine = order[start : start + BATCH].tensor_split(world)[rank]
            inputs, targets = x[mine], y[mine]
            optimizer.zero_grad(set_to_none=True)
            loss = loss_of(wrapped(inputs), targets)
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(mine)
            count += len(mine)
        both = torch.tensor([float(total), count])
        dist.all_reduce(both)
        seconds.append(time.perf_counter() - began)
    return seconds


class Clock(Callback):
    """Notes when epochs begin and end. As it hears of no batch, no batch waits for an agreement."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self._began = 0.0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._began = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seconds.append(time.perf_counter() - self._began)


def by_fitkit(module: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int) -> list[float]:
    """Seconds of each epoch of fit."""
    model, clock = fitkit.Model(module, device="cpu"), Clock()
    model.compile("adam", "cross_entropy")
    model.fit(x, y, epochs=epochs, batch_size=BATCH, callbacks=[clock], verbose=0)
    return clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 512])
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    x, y = torch.randn(STEPS * BATCH, 64), torch.randint(0, 10, (STEPS * BATCH,))
    for width in arguments.widths:
        ratios, ours, theirs = [], [], []
        for _ in range(arguments.rounds):
            plain = statistics.median(by_hand(network(width), x, y, arguments.epochs)[1:]) / STEPS
            fitted = statistics.median(by_fitkit(network(width), x, y, arguments.epochs)[1:]) / STEPS
            ratios.append(fitted / plain)
            ours.append(fitted)
            theirs.append(plain)
        if dist.get_rank() == 0:
            parameters = sum(parameter.numel() for parameter in network(width).parameters())
            print(
                f"{parameters} parameters: by hand {1e6 * statistics.median(theirs):.0f} µs a step, fitkit "
                f"{1e6 * statistics.median(ours):.0f} µs, ratio {statistics.median(ratios):.3f} "
                f"(quartiles {', '.join(f'{each:.3f}' for each in statistics.quantiles(ratios, n=4))})",
                flush=True,
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
