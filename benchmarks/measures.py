"""The ways in which a workload is measured; every result is a dict of one number for each contestant.

What cannot be measured has the error as a text in the place of its number. Only ratios leave this file, apart from
counts, so that the machine does not show.
"""

from __future__ import annotations

import contextlib
import gc
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import contestants
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from workloads import Task, Workload

Run = Callable[[], Any]
# What is imported to use a contestant; all of them import torch.
IMPORTED = {
    "raw": "torch",
    "fitkit": "fitkit",
    "ignite": "ignite.engine, ignite.metrics, ignite.handlers",
    "skorch": "skorch",
    "poutyne": "poutyne",
    "accelerate": "accelerate",
    "lightning": "lightning",
    "keras": "keras",
}
CHILD = Path(__file__).with_name("memory.py")
CHILD_TIMEOUT = 1800


@dataclass(frozen=True)
class Ratio:
    """A median of ratios, with the quartiles around it."""

    median: float
    low: float
    high: float


Result = Ratio | float | str


def measure(workload: Workload, names: Sequence[str], repeats: int) -> dict[str, Result]:
    """The row of a workload."""
    if workload.measure == "time":
        return time_ratios(workload, names, repeats)
    if workload.measure == "import":
        return import_ratios(names, repeats)
    able = [name for name in names if workload.entry in contestants.load(name).TIMED]
    if workload.measure == "host reads":
        return {name: attempted(lambda name=name: host_reads(workload, name)) for name in able}
    if workload.measure == "memory growth":
        return {name: attempted(lambda name=name: in_child("growth", workload, name)) for name in able}
    raw = in_child("peak", workload, "raw")
    others = [name for name in able if name != "raw"]
    peaks = {name: attempted(lambda name=name: in_child("peak", workload, name) / raw) for name in others}
    return {"raw": 1.0, **peaks}


def attempted(act: Callable[[], Any]) -> Any:
    """What the act gives, or the error as a text."""
    try:
        return act()
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"


def time_ratios(workload: Workload, names: Sequence[str], repeats: int) -> dict[str, Result]:
    """Times of a round against the reference's round in the same repeat, all contestants taking turns."""
    reference, entry = workload.reference or ("raw", workload.name)
    makers = {"reference": contestants.load(reference).TIMED[entry]}
    # A row that compares a contestant with itself is about nobody else.
    for name in names if workload.reference is None else [reference]:
        timed = contestants.load(name).TIMED
        if workload.entry in timed and (name, workload.entry) != (reference, entry):
            makers[name] = timed[workload.entry]
    failures: dict[str, Result] = {}
    # One round that does not count: it imports what is imported late.
    for name in list(makers):
        warmed = attempted(lambda make=makers[name]: seconds(make, workload.task))
        if isinstance(warmed, str):
            failures[name] = warmed
            del makers[name]
    if "reference" in failures:
        raise RuntimeError(f"The reference of {workload.name} did not run: {failures['reference']}")
    # A full collection of all that was imported would be charged to whoever's round it falls into.
    gc.collect()
    gc.freeze()

    ratios: dict[str, list[float]] = {name: [] for name in makers if name != "reference"}
    for repeat in range(repeats):
        # Nobody always comes first, or always after the same one.
        order = list(makers)[repeat % len(makers) :] + list(makers)[: repeat % len(makers)]
        times = {}
        for name in order:
            gc.collect()
            times[name] = seconds(makers[name], workload.task)
        for name, values in ratios.items():
            values.append(times[name] / times["reference"])
    itself: dict[str, Result] = {"raw": 1.0} if workload.reference is None else {}
    return {**itself, **{name: middle(values) for name, values in ratios.items()}, **failures}


def seconds(make: Callable[[Task], Run], task: Task) -> float:
    """How long a round takes; what it prepares before does not count."""
    with silence():
        run = make(task)
        began = time.perf_counter()
        run()
        return time.perf_counter() - began


def middle(values: Sequence[float]) -> Ratio:
    if len(values) == 1:
        return Ratio(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Ratio(median, low, high)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Nothing that a contestant prints is seen; the errors that it raises are."""
    with (
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def import_ratios(names: Sequence[str], repeats: int) -> dict[str, Result]:
    """Times of an import in a fresh process against that of torch, taking turns."""
    times: dict[str, list[float]] = {name: [] for name in IMPORTED if name in names}
    failures: dict[str, Result] = {}
    for _ in range(repeats + 1):  # the first round fills the caches of the disk
        for name in list(times):
            taken = attempted(lambda name=name: import_seconds(IMPORTED[name]))
            if isinstance(taken, str):
                failures[name] = taken
                del times[name]
            else:
                times[name].append(taken)
    raw = times.pop("raw")[1:]
    ratios = {name: middle([a / b for a, b in zip(taken[1:], raw, strict=True)]) for name, taken in times.items()}
    return {"raw": 1.0, **ratios, **failures}


def import_seconds(modules: str) -> float:
    code = f"import time; began = time.perf_counter(); import {modules}; print(time.perf_counter() - began)"
    return float(last_line([sys.executable, "-c", code]))


def in_child(kind: str, workload: Workload, name: str) -> float:
    """What memory.py says of a contestant, in a process that does nothing else."""
    return float(last_line([sys.executable, str(CHILD), kind, name, workload.entry, str(workload.task.samples)]))


def last_line(command: Sequence[str]) -> str:
    environment = {**os.environ, "KERAS_BACKEND": "torch"}
    # Nobody else compiles what is imported at each start anew.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    run = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_TIMEOUT, check=False, env=environment)
    if run.returncode != 0:
        raise RuntimeError(run.stderr.strip().splitlines()[-1] if run.stderr.strip() else "no message")
    return run.stdout.splitlines()[-1]


class CountingReads(TorchDispatchMode):
    """Counts the reads of a number from the device: ``item``, ``float``, ``bool`` of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self.reads += 1
        return func(*args, **(kwargs or {}))


def host_reads(workload: Workload, name: str) -> float:
    """Reads per step: those of a longer epoch less those of a shorter one, so that reads per epoch do not count."""
    longer = replace(workload.task, samples=2 * workload.task.samples)
    more = reads(workload, name, longer) - reads(workload, name, workload.task)
    return more / (longer.batch_count - workload.task.batch_count)


def reads(workload: Workload, name: str, task: Task) -> int:
    with silence():
        run = contestants.load(name).TIMED[workload.entry](task)
        with CountingReads() as counting:
            run()
    return counting.reads
