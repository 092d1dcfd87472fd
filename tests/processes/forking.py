"""Starts scripts as torchrun does, from one process that has imported what they import: it forks theirs.

`python forking.py` writes the address at which it takes jobs, and ends when None comes instead of one. A worker has the
variables and the store of one that torchrun starts; when one of them fails, the others are terminated. What it lacks
is an order of its own in sets of strings, which forks share: tests where that may matter start torchrun itself.
"""

from __future__ import annotations

import gc
import importlib
import os
import random
import runpy
import signal
import sys
from multiprocessing.connection import Connection, Listener
from pathlib import Path

# What takes time to import, in all that the scripts use; torch's optimizers import torch._dynamo.
IMPORTED = (
    *("numpy", "torch", "torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp"),
    *("torchmetrics.classification", "fitkit", "fitkit.callbacks"),
)


def main() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # or each fork would look through all of it, and copy it
    listener = Listener(backlog=8)
    print(listener.address, flush=True)
    while True:
        connection = listener.accept()
        job = connection.recv()
        if job is None:
            break
        if os.fork() == 0:
            listener.close()
            return run(connection, **job)
        connection.close()
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return


def run(connection: Connection, command: list[str], processes: int, environment: dict[str, str], output: str) -> None:
    """In a fork, which forks the workers: says its own id, and how they have ended. A worker returns from here too.

    Args:
        connection: to who waits for the job.
        command: the script and its arguments.
        processes: how many run it together; one runs it alone.
        environment: all variables, less those that tell a process which one it is.
        output: the file for what they write.
    """
    os.setsid()  # who waits in vain can end all of them together
    connection.send(os.getpid())
    opened = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(opened, stream)
    os.environ.clear()
    os.environ.update(environment)
    told, tell = os.pipe()
    workers = set()
    for rank in range(processes):
        worker = os.fork()
        if worker == 0:
            connection.close()
            if processes > 1:
                os.environ.update(variables(rank, processes, port=os.read(told, 5).decode()))
            return run_script(command)
        workers.add(worker)
    # The store has threads, so that it begins after the forks.
    store = sys.modules["torch"].distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    os.write(tell, b"%05d" % store.port * processes)
    connection.send(wait(workers))


def variables(rank: int, world: int, port: str) -> dict[str, str]:
    """What torchrun tells a worker."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def run_script(command: list[str]) -> None:
    # Forks share the state of these generators; processes of their own begin with any.
    random.seed()
    sys.modules["numpy"].random.seed()
    sys.argv = command
    sys.path[0] = str(Path(command[0]).parent)
    runpy.run_path(command[0], run_name="__main__")


def wait(workers: set[int]) -> int:
    """The exit code of the first that failed, or 0, when all have ended; the others are terminated then."""
    code = 0
    while workers:
        worker, status = os.wait()
        workers.discard(worker)
        ended = os.waitstatus_to_exitcode(status)
        if ended != 0 and code == 0:
            code = ended
            for other in workers:
                os.kill(other, signal.SIGTERM)
    return code


if __name__ == "__main__":
    main()
