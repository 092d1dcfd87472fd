"""The training state of a sharded module as a folder: torch's distributed checkpoint of all shards, and one file.

Each process writes its shards. The file has everything else, names where the shards are and what their checksums are,
and is put in its place last: until then the folder is what it was before. The folder can be read by any number of
processes, also by one that knows nothing of the others.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import pickle
import secrets
import shutil
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fitkit.checkpoints import Path, load_state, save_state
from fitkit.distributed import among_all, any_of, by_first, is_shard, of_first, whole
from fitkit.errors import CheckpointError

STATE = "state.fitkit"
SHARDS = "shards-"
# What stands in the file in the place of a sharded tensor, beside its key.
MARK = "a sharded tensor"
# Where torch keeps the plan of a checkpoint; the module of the classes that it is made of, and others that occur in it.
METADATA = ".metadata"
PLAN_MODULE = "torch.distributed.checkpoint.metadata"
OTHER_CLASSES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("collections", "OrderedDict"),
}
CHUNK = 2**24


def save_sharded(path: Path, state: Mapping[str, Any]) -> None:
    """Writes a state with sharded tensors into a folder; to be called by all processes.

    Args:
        path: of the folder; what it holds of an earlier state is replaced as a whole.
        state: as `save_state` takes it, with DTensors among its tensors.

    Raises:
        OSError: a file of that name is there, or the folder cannot be written.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    folder = pathlib.Path(path)
    found: dict[str, Tensor] = {}
    plain = _replaced(state, found)
    name = of_first(SHARDS + secrets.token_hex(8))
    by_first(lambda: _make(folder))
    try:
        save(found, storage_writer=FileSystemWriter(folder / name))
        by_first(lambda: _write_state(folder, name, plain))
    except (CheckpointException, OSError) as error:
        by_first(lambda: shutil.rmtree(folder / name, ignore_errors=True))
        failure = OSError(f"{folder} could not be written: {error}")
        failure.is_of_all = True  # type: ignore[attr-defined]  # torch tells all processes
        raise failure from error
    by_first(lambda: _clear(folder, name))


def load_sharded(path: Path, like: Callable[..., Tensor] | None) -> dict[str, Any]:
    """The state in a folder of `save_sharded`.

    Args:
        path: of the folder.
        like: makes a sharded tensor of a size and dtype, into which all processes read together; None reads each whole,
            in this process alone.

    Raises:
        CheckpointError: it is no such folder, or is damaged.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    folder = pathlib.Path(path)
    with contextlib.nullcontext() if like is None else among_all():
        failure = _damage(folder)
        if like is not None and any_of(failure is not None):
            failure = failure or f"{folder} is damaged, as another process says."
    if failure is not None:
        raise CheckpointError(failure)
    kept = load_state(folder / STATE)
    try:
        reader = _reader(folder / kept["shards"])
        make = torch.empty if like is None else like
        entries: dict[str, Any] = reader.read_metadata().state_dict_metadata
        found = {key: make(entry.size, dtype=entry.properties.dtype) for key, entry in entries.items()}
        with warnings.catch_warnings():
            # Torch warns of what it is asked for: to read in this process alone.
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            load(found, storage_reader=reader, no_dist=like is None)
    except (CheckpointException, Exception) as error:
        raise CheckpointError(f"{folder} is damaged, or cannot be read: {error}") from error
    state: dict[str, Any] = _put_back(kept["state"], found)
    return state


def check_whole(path: Path) -> None:
    """Refuses a file or folder that is damaged.

    Raises:
        CheckpointError: it is.
    """
    if not os.path.isdir(path):
        load_state(path)
    elif (damage := _damage(pathlib.Path(path))) is not None:
        raise CheckpointError(damage)


def _damage(folder: pathlib.Path) -> str | None:
    """What is wrong with a folder, in words; None where nothing is."""
    if not (folder / STATE).is_file():
        return f"{folder} holds no whole state: it is no folder of Model.save, or not written to its end."
    try:
        kept = load_state(folder / STATE)
    except CheckpointError as error:
        return str(error)
    if not {"shards", "digests", "state"} <= set(kept):
        return f"{folder} is no folder of Model.save."
    shards = folder / pathlib.Path(str(kept["shards"])).name
    damaged = [name for name, digest in kept["digests"].items() if not _is_whole(shards / name, digest)]
    return f"{folder} is damaged: {', '.join(damaged)} does not match its checksum." if damaged else None


def _reader(shards: pathlib.Path) -> Any:
    """Torch's reader, which reads its plan as pickle; here nothing is read by which a file could run code."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import StorageMeta

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            with open(shards / METADATA, "rb") as file:
                metadata = _PlainUnpickler(file).load()
            metadata.storage_meta = getattr(metadata, "storage_meta", None) or StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    return Reader(shards)


class _PlainUnpickler(pickle.Unpickler):
    """Knows the classes that torch's plan of a checkpoint is made of, and no other."""

    def find_class(self, module: str, name: str) -> Any:
        known = (module, name) in OTHER_CLASSES or module.split(".")[0] == "pathlib"
        if module == "torch":  # a dtype or layout
            known = known or isinstance(getattr(torch, name, None), (torch.dtype, torch.layout))
        if module == PLAN_MODULE:  # one of its own classes, nothing that it has imported
            known = getattr(getattr(sys.modules.get(PLAN_MODULE), name, None), "__module__", None) == PLAN_MODULE
        if known and "." not in name:
            return super().find_class(module, name)
        raise CheckpointError(f"It holds {module}.{name}, which no plan of a checkpoint has.")


def _write_state(folder: pathlib.Path, name: str, plain: Any) -> None:
    digests = {file.name: _digest(file) for file in sorted((folder / name).iterdir())}
    save_state(folder / STATE, {"shards": name, "digests": digests, "state": plain})


def sharded_like(module: nn.Module) -> Callable[..., Tensor] | None:
    """What makes tensors that are sharded as the module's are; None for a module that is not."""
    sharded = next((parameter for parameter in module.parameters() if is_shard(parameter)), None)
    if sharded is None:
        return None
    from torch.distributed.tensor import Shard, zeros

    mesh = sharded.device_mesh  # type: ignore[attr-defined]
    return partial(zeros, device_mesh=mesh, placements=[Shard(0)])


def whole_state(module: nn.Module) -> dict[str, Any]:
    """The module's state_dict with whole tensors, on the CPU; to be called by all processes."""
    return {
        name: whole(value).cpu() if isinstance(value, Tensor) and is_shard(value) else value
        for name, value in module.state_dict().items()
    }


def state_file(path: Path) -> str:
    """The file that tells whether a state is there: the path itself, or the one in a folder of `save_sharded`."""
    return os.path.join(path, STATE) if os.path.isdir(path) else os.fspath(path)


def remove(path: Path) -> None:
    """Removes the file, or the folder of `save_sharded`, at the path.

    Raises:
        OSError: there is none, or it cannot be removed.
    """
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def _replaced(value: Any, found: dict[str, Tensor]) -> Any:
    """The value with a mark in the place of each sharded tensor, which goes to found."""
    if isinstance(value, Tensor):
        if not is_shard(value):
            return value
        key = str(len(found))
        found[key] = value.detach()
        return {MARK: key}
    if isinstance(value, dict):
        return {key: _replaced(item, found) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_replaced(item, found) for item in value)
    return value


def _put_back(value: Any, found: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {MARK}:
            return found[value[MARK]]
        return {key: _put_back(item, found) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_put_back(item, found) for item in value)
    return value


def _make(folder: pathlib.Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f'strategy="fsdp" saves a folder, and {folder} is a file.')
    folder.mkdir(parents=True, exist_ok=True)


def _clear(folder: pathlib.Path, name: str) -> None:
    for old in folder.glob(f"{SHARDS}*"):
        if old.name != name:
            with contextlib.suppress(OSError):
                shutil.rmtree(old)


def _digest(file: pathlib.Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while chunk := opened.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _is_whole(file: pathlib.Path, digest: str) -> bool:
    try:
        return _digest(file) == digest
    except OSError:
        return False
