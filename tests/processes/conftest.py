"""Starting a script as several processes, as torchrun does, or as one that no launcher started."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from fitkit.distributed import VARIABLES

REPOSITORY = Path(__file__).parents[2]


@dataclass
class Ended:
    """How a script ended."""

    code: int
    output: str


Launch = Callable[..., Ended]


def start(
    script: str,
    *arguments: object,
    processes: int,
    options: tuple[str, ...] = (),
    seconds: float = 240,
    strategy: str = "auto",
) -> Ended:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *options]
    command += [str(Path(__file__).with_name(script)), *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment |= {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "STRATEGY": strategy}
    run = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment, check=False)
    return Ended(run.returncode, run.stdout + run.stderr)


@pytest.fixture(scope="session")
def launch() -> Launch:
    """Starts a script of this folder so many times together; with one process, alone."""
    return start
