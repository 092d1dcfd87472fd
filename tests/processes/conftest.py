"""Starting a script as several processes, as torchrun does, or as one that no launcher started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.connection import Client
from pathlib import Path
from threading import Lock

import pytest

from fitkit.distributed import VARIABLES

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]


@dataclass
class Ended:
    """How a script ended."""

    code: int
    output: str


Launch = Callable[..., Ended]


def environment(**more: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return inherited | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **more}


class Starter:
    """Starts scripts of this folder, from a process that has imported what they need (forking.py) or by torchrun."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.outputs = 0
        self.lock = Lock()

    @cached_property
    def forking(self) -> subprocess.Popen[str]:
        """The process that forks those of scripts; it begins with the first of them."""
        command = [sys.executable, str(HERE / "forking.py")]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())

    @cached_property
    def address(self) -> str:
        assert self.forking.stdout is not None
        return self.forking.stdout.readline().strip()

    def __call__(
        self,
        script: str,
        *arguments: object,
        processes: int,
        options: tuple[str, ...] = (),
        seconds: float = 240,
        strategy: str = "auto",
        by_torchrun: bool = False,
    ) -> Ended:
        command = [str(HERE / script), *map(str, arguments)]
        variables = environment(STRATEGY=strategy)
        if not by_torchrun and sys.platform == "linux":
            return self.fork(command, processes, variables, seconds)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *options]
        command = [sys.executable, *(launcher if processes > 1 else []), *command]
        run = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=variables, check=False)
        return Ended(run.returncode, run.stdout + run.stderr)

    def fork(self, command: list[str], processes: int, variables: dict[str, str], seconds: float) -> Ended:
        with self.lock:
            self.outputs += 1
            output = self.folder / f"{self.outputs}.txt"
            output.touch()
            connection = Client(self.address)
        with connection:
            connection.send(
                {"command": command, "processes": processes, "environment": variables, "output": str(output)}
            )
            leader = connection.recv()
            if not connection.poll(seconds):
                os.killpg(leader, signal.SIGKILL)
                raise subprocess.TimeoutExpired(command, seconds, output.read_text())
            code = connection.recv()
        return Ended(code, output.read_text())

    def close(self) -> None:
        if "forking" in self.__dict__:
            with contextlib.suppress(OSError), Client(self.address) as connection:
                connection.send(None)
            with self.forking:
                self.forking.wait(60)


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    """Starts a script of this folder so many times together; with one process, alone."""
    starter = Starter(tmp_path_factory.mktemp("outputs"))
    yield starter
    starter.close()
