"""The one way in which fitkit keeps things in files: written whole or not at all, and checked when read.

A file is what ``torch.save`` writes, a zip archive, and ``torch.load(path, weights_only=True)`` reads it. Its archive
comment, which torch passes over, names the format, the content and the SHA-256 of every byte before it; a flipped bit
anywhere is an error. Nothing is ever loaded that could run code. Weights may also go to a safetensors file.

What a training state consists of is not known here.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import pathlib
import re
import secrets
import stat
import struct
import sys
import time
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fitkit.distributed import shard_like
from fitkit.errors import CheckpointError, needing, show

Path = str | os.PathLike[str]
Content = Literal["weights", "state"]

FORMAT = 1
CHUNK = 1 << 20
# An archive without a comment ends in this record, whose last two bytes are the comment's length, zero.
END_OF_ARCHIVE = re.compile(rb"PK\x05\x06.{16}\x00\x00\Z", re.DOTALL)
TRAILER = re.compile(rb"fitkit-checkpoint format=(\d+) content=(\w+) sha256=([0-9a-f]{64})\Z")
TRAILER_READS = 256
END_LENGTH = 22
METHODS = {"weights": "load_weights", "state": "load"}
SAFETENSORS_DIGEST = "fitkit.sha256"
NAMES_SHOWN = 20

CONTAINERS = (list, tuple, set)
MAPPINGS = (dict, OrderedDict, Counter)
PLAIN = (type(None), bool, int, float, complex, str, bytes)
LEAVES = (*PLAIN, Tensor, nn.Parameter, torch.dtype, torch.device, torch.Size)


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file so that at every moment the path holds the old content or the new one, whole.

    The content goes to a temporary file in the same folder, reaches the disk, and then takes the path's place. A
    symbolic link stays one, and its target is replaced. A new file has the permissions that ``open`` would give it; an
    existing one keeps its own. Missing folders are made. After an error the old content is there and nothing else.

    Args:
        path: where the file goes.
        write: puts the content into the open binary file it is given, which can be read and sought too.

    Raises:
        OSError: the path is a folder or a device, or cannot be written.
    """
    target = os.path.realpath(path)
    mode = _mode_of_existing(target)
    folder = os.path.dirname(target)
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".fitkit-{secrets.token_hex(8)}.tmp")
    try:
        # open() has the permissions; tempfile's 0o600 would hide the file from the group.
        with open(temporary, "x+b") as file:
            if mode is not None:
                os.chmod(temporary, mode)
            write(cast(BinaryIO, file))
            file.flush()
            os.fsync(file.fileno())
            opened = os.fstat(file.fileno())
        if not os.path.samestat(opened, os.stat(temporary)):
            # safetensors puts a file of its own, which its owner alone may read, in the place of this one.
            with open(temporary, "r+b") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, stat.S_IMODE(opened.st_mode))
        os.replace(temporary, target)
    except BaseException:
        # Where the folder itself has gone, so has the file.
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(folder)


def clear_left_overs(folder: Path, older_than: float = 0.0) -> None:
    """Removes what a crash in the midst of :func:`write_atomically` has left.

    Args:
        folder: where to look; it need not be there.
        older_than: seconds since it was written last.
    """
    for left_over in pathlib.Path(folder).glob(".fitkit-*.tmp"):
        with contextlib.suppress(OSError):  # another process was faster, or it is another's
            if time.time() - left_over.stat().st_mtime >= older_than:
                left_over.unlink()


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Keeps a nested structure of tensors and plain Python values in one file.

    Args:
        path: where the file goes; see :func:`write_atomically`.
        state: dicts, lists, tuples and sets of tensors, numbers, strings, bytes, None, and torch's dtypes, devices and
            sizes. NumPy's numbers become Python's; objects of any other class could not be loaded safely.

    Raises:
        TypeError: something in the state is of another class; the message says where.
    """
    loadable = _loadable(state, "state")
    write_atomically(path, lambda file: _write_archive(file, dict(loadable), "state"))


def load_state(path: Path) -> dict[str, Any]:
    """What :func:`save_state` kept, with all tensors on the CPU.

    Raises:
        CheckpointError: the file is damaged, no training state, or of a newer format.
        OSError: there is no such file, or it cannot be read.
    """
    return cast(dict[str, Any], _read_archive(path, "state"))


def save_weights(module: nn.Module, path: Path, values: Mapping[str, Any] | None = None) -> None:
    """Keeps the module's state_dict: its parameters and persistent buffers.

    ``torch.load(path, weights_only=True)`` reads the file too, and so does every reader of safetensors if the path
    ends in ``.safetensors``. There, tensors that several names share are kept once, under the first name.

    Args:
        module: any module whose lazy parameters, if it has such, have met their first batch.
        path: where the file goes; see :func:`write_atomically`.
        values: of the state_dict, where the module itself has only parts of them.

    Raises:
        ValueError: a lazy parameter has no values yet; or a safetensors file is to hold what is no tensor.
        ImportError: a ``.safetensors`` path without the package safetensors.
    """
    state = module.state_dict(keep_vars=True) if values is None else values
    lazy = [name for name, value in state.items() if is_lazy(value)]
    if lazy:
        raise ValueError(
            f"Expected a module with values, received lazy parameters before their first batch: {_some(lazy)}."
        )
    if _is_safetensors(path):
        save = _safetensors_saver(state)
        write_atomically(path, lambda file: save(file.name))
    else:
        kept = module.state_dict() if values is None else values
        write_atomically(path, lambda file: _write_archive(file, kept, "weights"))


def load_weights(module: nn.Module, path: Path) -> None:
    """Fills the module from a file of :func:`save_weights`, of a whole training state, or of a state_dict of torch's.

    Every name and shape has to fit, after the module's own hooks for older files had their say; otherwise the module
    is left as it was. Values take the dtype and device of the module's tensors. A name that the file lacks is filled
    from another name if both are one tensor of the module, as tied weights are.

    Args:
        module: the module to fill.
        path: a path that ends in ``.safetensors`` is read as such a file, any other as one of torch's.

    Raises:
        CheckpointError: the file is damaged, holds something else, or does not fit the module.
        OSError: there is no such file, or it cannot be read.
        ImportError: a ``.safetensors`` path without the package safetensors.
    """
    state = _from_safetensors(path) if _is_safetensors(path) else _read_archive(path, "weights", "state")
    if isinstance(state, Mapping) and isinstance(state.get("weights"), Mapping):
        state = state["weights"]
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"{os.fspath(path)} holds no state_dict but {show(state)}.")
    fill(module, state, path)


# Writing


def _mode_of_existing(target: str) -> int | None:
    """The permissions of the file that is to be replaced, None if there is none."""
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(mode):
        # To put a file in the place of /dev/null is in root's power, but never what was meant.
        raise OSError(f"Expected the path of a file, received path={target!r}, which is a folder or a device.")
    return stat.S_IMODE(mode)


def _sync_folder(folder: str) -> None:
    """Brings the new name itself to the disk, where the system can do that for folders."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_archive(file: BinaryIO, value: object, content: Content) -> None:
    torch.save(value, file)
    head = f"fitkit-checkpoint format={FORMAT} content={content} sha256=".encode()
    file.seek(-2, os.SEEK_END)
    file.write(struct.pack("<H", len(head) + 64))
    file.write(head)
    digest = _digest(file, file.tell())
    file.seek(0, os.SEEK_END)
    file.write(digest)


def _digest(file: BinaryIO, length: int) -> bytes:
    """The SHA-256 of the file's first bytes, in hexadecimal."""
    digest = hashlib.sha256()
    file.seek(0)
    while length and (chunk := file.read(min(CHUNK, length))):
        digest.update(chunk)
        length -= len(chunk)
    return digest.hexdigest().encode()


def _loadable(value: Any, where: str) -> Any:
    """The value with Python's numbers in place of NumPy's; itself where it has none.

    What torch.load(weights_only=True) would refuse is refused: found out now, and not when the state is needed.
    """
    kind = type(value)
    if kind in MAPPINGS:
        items = {
            _loadable(key, f"a key of {where}"): _loadable(item, f"{where}[{key!r}]") for key, item in value.items()
        }
        if all(key is other and value[key] is items[key] for key, other in zip(value, items, strict=True)):
            return value
        changed = copy.copy(value)  # with what an OrderedDict of a module has beside its items
        changed.clear()
        changed.update(items)
        return changed
    if kind in CONTAINERS:
        parts = [_loadable(item, f"{where}[{index}]") for index, item in enumerate(value)]
        return value if all(part is item for part, item in zip(parts, value, strict=True)) else kind(parts)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic):
        value = value.item()
    if type(value) not in LEAVES:
        raise TypeError(
            f"Expected tensors and plain Python values only, received {where}={show(value)} of class "
            f"{kind.__module__}.{kind.__qualname__}, which cannot be loaded safely. Make it a tensor, number or list."
        )
    return value


# Reading


def _read_archive(path: Path, content: Content, *or_else: Content) -> Any:
    with open(path, "rb") as file:
        _verify(file, os.fspath(path), content, *or_else)
        file.seek(0)
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            # What torch raises for a file that is not its own is of many classes.
            raise CheckpointError(
                f"{os.fspath(path)} is no file of tensors, or holds objects that cannot be loaded safely "
                "(torch.load with weights_only=True refuses it)."
            ) from error


def _verify(file: BinaryIO, path: str, content: Content, *or_else: Content) -> None:
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        raise CheckpointError(f"{path} is empty.")
    file.seek(max(0, size - TRAILER_READS))
    trailer = TRAILER.search(file.read())
    if trailer is None:
        _verify_without_trailer(file, path, content)
        return
    number, found, digest = int(trailer[1]), trailer[2].decode(), trailer[3]
    if _digest(file, size - len(digest)) != digest:
        raise CheckpointError(f"{path} is damaged: its content does not match its checksum.")
    if number > FORMAT:
        raise CheckpointError(
            f"{path} is of format {number}, written by a newer fitkit; this one reads up to format {FORMAT}."
        )
    if found not in (content, *or_else):
        method = METHODS.get(found, f"what wrote its {found}")
        raise CheckpointError(f"{path} holds no {content} but {found}. Use {method} for it.")


def _verify_without_trailer(file: BinaryIO, path: str, content: Content) -> None:
    """Checks what fitkit did not write: for weights it may be a file of torch's own."""
    if content == "state":
        raise CheckpointError(f"{path} was not written by fitkit, or is truncated or damaged.")
    file.seek(0)
    if file.read(4) != b"PK\x03\x04":
        # Before its zip archives torch wrote bare pickles. torch.load tells them from what is no file of its own.
        return
    file.seek(max(0, file.seek(0, os.SEEK_END) - END_LENGTH))
    if not END_OF_ARCHIVE.match(file.read()):
        raise CheckpointError(f"{path} is truncated or damaged: its end is missing.")
    if not _is_intact(file):
        raise CheckpointError(f"{path} is damaged: a part of it does not match its checksum.")


def _is_intact(file: BinaryIO) -> bool:
    """Whether every record of a zip archive matches its CRC-32, which torch itself does not look at."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except Exception:
        # A damaged directory makes zipfile raise whatever its fields happen to lead to.
        return False


# Filling a module


def fill(module: nn.Module, state: Mapping[str, Any], path: Path) -> None:
    """Gives the module a state_dict, or leaves it as it was.

    Args:
        module: the module to fill.
        state: names and values.
        path: the file that it came from, for the message.

    Raises:
        CheckpointError: a name or shape does not fit.
    """
    own = module.state_dict(keep_vars=True)
    state = _with_shared_names(state, own)
    problems = _problems(state, own)
    if not problems and all(isinstance(value, Tensor) for value in own.values()):
        module.load_state_dict({name: shard_like(value, own[name]) for name, value in state.items()})
        return
    message = f"{os.fspath(path)} does not fit the module, which is left as it was. {problems}".strip()
    if any(is_lazy(value) for value in own.values()):
        # A lazy parameter that was filled could not be emptied again.
        raise CheckpointError(message)
    # Hooks of the module may know the names of older files, and may refuse what they find: then a copy goes back.
    before = copy.deepcopy(module.state_dict())
    try:
        module.load_state_dict(state)
    except Exception as error:
        module.load_state_dict(before)
        raise CheckpointError(message) from error


def check_fits(module: nn.Module, state: Mapping[str, Any], path: Path) -> None:
    """Refuses a state_dict that does not fit the module by name and shape, and changes nothing.

    Raises:
        CheckpointError: a name or shape does not fit.
    """
    own = module.state_dict(keep_vars=True)
    problems = _problems(_with_shared_names(state, own), own)
    if problems:
        raise CheckpointError(f"{os.fspath(path)} does not fit the module, which is left as it was. {problems}")


def _with_shared_names(state: Mapping[str, Any], own: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state with the names that its file left out since another name of the module has the same tensor."""
    filled: dict[str, Any] = copy.copy(cast(dict[str, Any], state))
    present = {id(value): name for name, value in own.items() if name in state and isinstance(value, Tensor)}
    for name, value in own.items():
        if name not in state and id(value) in present:
            filled[name] = state[present[id(value)]]
    return filled


def _problems(state: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """What does not fit between a file and a module, in words; empty if all fits."""
    reshaped = [
        f"{name} ({_shape(state[name])} in the file, {_shape(value)} in the module)"
        for name, value in own.items()
        if name in state and isinstance(value, Tensor) and not is_lazy(value) and _shape(state[name]) != _shape(value)
    ]
    parts = {
        "Missing in the file": [name for name in own if name not in state],
        "Not in the module": [name for name in state if name not in own],
        "Of another shape": reshaped,
    }
    return " ".join(f"{title}: {_some(names)}." for title, names in parts.items() if names)


def _shape(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


# safetensors


def _is_safetensors(path: Path) -> bool:
    return os.fspath(path).lower().endswith(".safetensors")


def _safetensors_saver(state: Mapping[str, Any]) -> Callable[[str], object]:
    """What writes the state to a file that is there, tensor by tensor."""
    with needing("safetensors", "safetensors", "A .safetensors path"):
        from safetensors.torch import save_file
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    storages: set[int] = set()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"Expected tensors only, as a safetensors file holds nothing else, received {name}={show(value)}. "
                "Give a path with another ending."
            )
        if names.setdefault(id(value), name) != name:
            continue
        # The format has no views: a tensor that shares its memory with another, different one gets its own.
        pointer = value.untyped_storage().data_ptr()
        own = value.detach().clone() if pointer in storages else value.detach()
        tensors[name] = own.contiguous()
        storages.add(pointer)
    metadata = {"format": "pt", SAFETENSORS_DIGEST: _digest_of_tensors(tensors)}
    return lambda temporary: save_file(tensors, temporary, metadata=metadata)


def _from_safetensors(path: Path) -> dict[str, Tensor]:
    with needing("safetensors", "safetensors", "A .safetensors path"):
        from safetensors import SafetensorError, safe_open
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            digest = (file.metadata() or {}).get(SAFETENSORS_DIGEST)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise CheckpointError(f"{os.fspath(path)} is damaged or no safetensors file: {error}.") from error
    # Files of others have no digest; there the format's own checks have to do.
    if digest is not None and digest != _digest_of_tensors(tensors):
        raise CheckpointError(f"{os.fspath(path)} is damaged: its content does not match its checksum.")
    return tensors


def _digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
