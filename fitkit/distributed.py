"""The processes that run one script together: which of them this is, their group, and what they tell each other.

The group is torch.distributed's: made for the time of a run where there is none, used and left alone where the user has
made one. Nothing here knows about models or batches; how gradients come together is in synchronisation.py.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fitkit.device import random_state, restore_random_state
from fitkit.errors import check_choice

Strategy = Literal["auto", "ddp", "fsdp", "single"]
STRATEGIES = ("auto", "ddp", "fsdp", "single")
Value = TypeVar("Value")

# What torchrun, or another launcher, tells each process.
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# How torch's backends begin to say that another process has gone or does not answer.
LOST = ("Connection closed", "Connection reset", "Broken pipe", "Timed out", "timed out", "NCCL", "gloo")

# torch 2.6 waits at a group's end for its threads and keeps Python's lock: a thread that is about to let a tensor go,
# for which it needs the lock, gets it in so many seconds before, also on a machine that is busy.
PARTING = 0.3 if torch.__version__.startswith("2.6.") else 0.02

# The store of a process lives as long as it does; each group made from it has keys of its own.
_store: Any = None
_groups = itertools.count()
_excepthook: Any = None
_running: Processes | None = None
# Where the group met that lasts as long as the process, since the parameters of a sharded module need it.
_lasting: Any = None


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    Attributes:
        rank: which of them this is, from 0.
        world: how many there are.
        is_sharded: whether each keeps only its part of the module, so that no pass works without all of them.
    """

    rank: int
    world: int
    is_sharded: bool = False

    def part(self, samples: int) -> tuple[int, int]:
        """The first and the last (exclusive) of so many samples that this process takes; the first ranks get more.

        Where the module is sharded, a process without any takes the first one, which it does not count.
        """
        each, more = divmod(samples, self.world)
        start = self.rank * each + min(self.rank, more)
        stop = start + each + (self.rank < more)
        return (0, 1) if stop == start and samples and self.is_sharded else (start, stop)

    def count(self, samples: int) -> int:
        """How many of so many samples this process counts."""
        return samples // self.world + (self.rank < samples % self.world)


def check_strategy(strategy: str) -> Strategy:
    """The strategy, checked.

    Raises:
        ValueError: it is unknown, or asks for several processes where there is one.
    """
    check_choice("strategy", strategy, STRATEGIES)
    if strategy in ("ddp", "fsdp") and not is_launched():
        raise ValueError(
            f'strategy="{strategy}" needs several processes, received one that no launcher has started. Start the '
            "script with torchrun --nproc-per-node N, or make a group with torch.distributed.init_process_group, or "
            'use "auto".'
        )
    return strategy  # type: ignore[return-value]  # checked


def is_launched() -> bool:
    """Whether a launcher has started this process as one of several, or the user has made a group of several."""
    if not dist.is_available():
        return False
    if dist.is_initialized():
        return dist.get_world_size() > 1 or all(name in os.environ for name in VARIABLES)
    return all(name in os.environ for name in VARIABLES)


def processes_of(strategy: Strategy) -> Processes | None:
    """The processes that share the work; None where each works alone."""
    if strategy == "single" or not is_launched():
        return None
    sharded = strategy == "fsdp"
    if dist.is_initialized():
        return Processes(dist.get_rank(), dist.get_world_size(), sharded)
    return Processes(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), sharded)


def own_device(device: Any, strategy: Strategy) -> Any:
    """What "auto" means for a process that has others beside it on its machine: an accelerator of its own."""
    if device == "auto" and processes_of(strategy) is not None and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return device


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return _running is None or _running.rank == 0


def running() -> Processes | None:
    """The processes whose group a run is using now; None where each works alone."""
    return _running


@contextlib.contextmanager
def together(processes: Processes | None, device: torch.device) -> Iterator[None]:
    """While a run lasts there is a group: that of the user, or one that is made and destroyed.

    An error of one process reaches the others as a lost connection; where this group was made here, they say whose
    error it was.

    Args:
        processes: None for a process that works alone.
        device: of the module.
    """
    global _running
    if processes is None or _running is not None:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = None if dist.is_initialized() else _make_group(processes, device)
    _running = processes
    try:
        yield
        if store is not None:
            _settle()
    except BaseException as error:
        if store is not None or _lasting is not None:
            _tell(store or _lasting, processes, error)
        if not getattr(error, "is_of_all", False):
            end_lasting_group()  # or the others would wait for this process
        raise
    finally:
        _running = None
        if store is not None:
            time.sleep(PARTING)
            dist.destroy_process_group()


@contextlib.contextmanager
def running_as(processes: Processes) -> Iterator[None]:
    """While what follows lasts, the processes talk in the group that is there."""
    global _running
    before, _running = _running, processes
    try:
        yield
    finally:
        _running = before


def among_all() -> contextlib.AbstractContextManager[None]:
    """While what follows lasts, all processes of the group that is there talk with each other."""
    return running_as(Processes(dist.get_rank(), dist.get_world_size(), is_sharded=True))


def begin_lasting_group(processes: Processes, device: torch.device) -> None:
    """Makes the group that lasts until the process ends or an error ends a run; does nothing where there is a group."""
    global _lasting
    if dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _lasting = _make_group(processes, device)
    atexit.register(end_lasting_group)


def end_lasting_group() -> None:
    """Ends the group of `begin_lasting_group`, if there is one."""
    global _lasting
    if _lasting is not None:
        _lasting = None
        atexit.unregister(end_lasting_group)
        if dist.is_initialized():
            time.sleep(PARTING)
            dist.destroy_process_group()


def is_shard(tensor: Tensor) -> bool:
    """Whether the tensor is one of which each process has a part (torch's DTensor)."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """The part of this process; a plain tensor is its own."""
    return tensor.to_local() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


def shard_like(value: Any, like: Any) -> Any:
    """The value, as a tensor that is sharded as another one of its shape is; itself where that is none."""
    if not (isinstance(like, Tensor) and isinstance(value, Tensor)) or is_shard(value) or not is_shard(like):
        return value
    if value.shape != like.shape:
        return value
    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return torch.distributed.tensor.distribute_tensor(value.to(like.device, like.dtype), mesh, placements)


def scattered_like(tensor: Tensor, like: Any) -> Tensor:
    """The sum of the processes' tensors, of which each keeps the part that it keeps of another; to be called by all."""
    partial = [torch.distributed.tensor.Partial()] * like.device_mesh.ndim
    given = torch.distributed.tensor.DTensor.from_local(tensor, like.device_mesh, partial)
    return given.redistribute(placements=like.placements)


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, from the parts of all processes; to be called by all of them."""
    return tensor.full_tensor() if is_shard(tensor) else tensor  # type: ignore[attr-defined]


def _make_group(processes: Processes, device: torch.device) -> Any:
    """The default group of all processes, and the store that it met in."""
    global _store, _excepthook
    if _store is None:
        _store, _, _ = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]  # public, by its documentation
    # Workers that were started anew, and later groups of the same ones, must not find the addresses of those before.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"fitkit/{attempt}/{next(_groups)}", _store)  # type: ignore[attr-defined]  # as above
    # torch has each new group put one more "[rank0]: " in front of what an error prints.
    _excepthook = sys.excepthook = _excepthook or sys.excepthook
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=processes.rank, world_size=processes.world)
    return store


def _settle() -> None:
    """Waits for the other processes, and for the group's threads to have let go what was exchanged last."""
    for _ in range(4):  # more than the threads that gloo has, which take turns
        last = torch.zeros(1)
        dist.all_reduce(last) if _talking_device().type == "cpu" else None
        deadline = time.monotonic() + 1.0
        while last._use_count() > 1 and time.monotonic() < deadline:  # type: ignore[attr-defined]
            time.sleep(0.0005)


def _tell(store: Any, processes: Processes, error: BaseException) -> None:
    """Leaves the first error for the others to find; in a process that only lost another one, raises that one's."""
    own = f"process {processes.rank} of {processes.world} failed: {type(error).__name__}: {error}"
    with contextlib.suppress(Exception):  # the store may have gone with the process that kept it
        if not is_lost_connection(error):
            store.set("error", own)
            return
        if not store.check(["error"]):
            return
        first = store.get("error").decode()
        if hasattr(error, "add_note"):
            error.add_note(f"The connection was lost because {first}")
        else:
            error.args = (f"{error} (The connection was lost because {first})",)


def is_lost_connection(error: BaseException) -> bool:
    """Whether torch says that another process has gone, or does not answer."""
    if not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or any(word in str(error) for word in LOST)


def gather(value: Value) -> list[Value]:
    """The value of every process, by rank; to be called by all of them."""
    if _running is None:
        return [value]
    everywhere: list[Any] = [None] * _running.world
    dist.all_gather_object(everywhere, value)
    return everywhere


def of_first(value: Value) -> Value:
    """The value of rank 0; to be called by all."""
    if _running is None:
        return value
    held: list[Any] = [value if _running.rank == 0 else None]
    dist.broadcast_object_list(held, src=0)
    return held[0]  # type: ignore[no-any-return]


def any_of(flag: bool) -> bool:
    """Whether any process says so; to be called by all.

    It asks no accelerator, unless the user's group has no other way.
    """
    if _running is None:
        return flag
    said = torch.tensor([float(flag)], device=_talking_device())
    dist.all_reduce(said, op=dist.ReduceOp.MAX)
    return bool(said.item())


def by_first(write: Callable[[], object]) -> None:
    """Has rank 0 alone write; to be called by all. They wait for it, and an error of it is one of all.

    Args:
        write: puts something into a file.
    """
    failure: Exception | None = None
    if is_first():
        try:
            write()
        except (OSError, TypeError, ValueError, ImportError) as error:
            failure = error
    failed = of_first(None if failure is None else (type(failure), str(failure)))
    if failure is None and failed is not None:
        failure = failed[0](failed[1])
    if failure is not None:
        failure.is_of_all = True  # type: ignore[attr-defined]  # who catches it goes on in all processes
        raise failure


def summed(numbers: list[float]) -> list[float]:
    """The sums over all processes, in float64; to be called by all."""
    total = torch.tensor(numbers, dtype=torch.float64, device=_talking_device())
    dist.all_reduce(total)
    return total.tolist()


def summed_weight(weight: float | Tensor) -> float | Tensor:
    """The sum of a number over all processes, on the device where only that knows it; to be called by all."""
    if not isinstance(weight, Tensor):
        return summed([weight])[0]
    total = weight.clone()
    dist.all_reduce(total)
    return total


def _talking_device() -> torch.device:
    """Where small numbers are exchanged: on the CPU if the group has a backend for it."""
    backends = dist.get_backend_config()
    return torch.device("cpu") if "cpu" in backends and "cpu:nccl" not in backends else torch.device("cuda")


def share_random_state(device: torch.device) -> None:
    """Gives every process the random state of rank 0."""
    if _running is not None:
        state = of_first(random_state(device))
        if _running.rank != 0:
            restore_random_state(state, device)


def part_ways() -> None:
    """Lets the processes draw different numbers from here on, each for its own samples; rank 0 goes on as it was."""
    if _running is not None and _running.rank != 0:
        torch.manual_seed((int(torch.randint(2**62, (), device="cpu")) + _running.rank) % 2**63)


def share_tensors(tensors: Iterable[Tensor]) -> None:
    """Gives every process the values that the tensors have in rank 0."""
    if _running is None:
        return
    with torch.no_grad():
        for tensor in tensors:
            if is_shard(tensor):
                continue
            plain = tensor.detach().contiguous()
            dist.broadcast(plain.view(torch.uint8) if plain.dtype == torch.bool else plain, src=0)
            if plain.data_ptr() != tensor.data_ptr():
                tensor.copy_(plain)
