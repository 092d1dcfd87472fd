"""Memory of one contestant at one workload, in a process of its own: prints a number on its last line.

    python benchmarks/memory.py peak NAME ENTRY SAMPLES
    python benchmarks/memory.py growth NAME ENTRY SAMPLES

The peak is that of the whole process, imports included, in bytes. The growth is how much the peak rises from a tenth of
an epoch to its last step, in bytes per step; the batches are one batch, again and again. speed.py calls this.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import contestants
import torch
from measures import silence
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from workloads import Task

STATUS = Path("/proc/self/status")


def peak() -> int:
    """The most memory that this process has held, in bytes."""
    if STATUS.exists():
        # What getrusage says on Linux begins with the memory of the process that started this one.
        line = next(line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


class Probe(IterableDataset[Any]):
    """The same batch again and again; notes the peak at a tenth of the epoch and at its last step."""

    def __init__(self, task: Task) -> None:
        self.steps = task.batch_count
        drawn = Task(task.batch_size)
        self.batch = (drawn.x, drawn.y)
        self.early = self.late = 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(self.steps):
            if step == self.steps // 10:
                self.early = peak()
            if step == self.steps - 1:
                self.late = peak()
            yield self.batch


class ProbedTask(Task):
    """A task whose loader is the probe."""

    def loader(self, *, shuffle: bool = True) -> DataLoader[Any]:
        self.probe = Probe(self)
        return DataLoader(self.probe, batch_size=None)


def peak_of(name: str, entry: str, samples: int) -> float:
    task = Task(samples, batch_size=1000)
    with silence():
        contestants.load(name).TIMED[entry](task)()
    return float(peak())


def growth_of(name: str, entry: str, samples: int) -> float:
    task = ProbedTask(samples)
    with silence():
        contestants.load(name).TIMED[entry](task)()
    probe = task.probe
    return (probe.late - probe.early) / (probe.steps - 1 - probe.steps // 10)


def main() -> None:
    torch.set_num_threads(1)
    kind, name, entry, samples = sys.argv[1:]
    measured = (peak_of if kind == "peak" else growth_of)(name, entry, int(samples))
    print(f"\n{measured}")


if __name__ == "__main__":
    main()
