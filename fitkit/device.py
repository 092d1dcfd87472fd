"""Where the work is done: the device, its number types, and its random state.

Nothing here knows about models, losses or batches as such; a batch is any structure of tensors.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from fitkit._types import Precision
from fitkit.errors import show

Function = TypeVar("Function", bound=Callable[..., Any])

AUTOCAST_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def resolve_device(device: Any) -> torch.device:
    """The torch device that "auto", a name or a device means.

    Raises:
        ValueError: device is no device of this machine's torch.
    """
    if isinstance(device, str) and device == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
        return found
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f'Expected "auto", a name such as "cpu" or "cuda:0", or a torch.device that this torch can use, received '
            f"device={show(device)}: {error}"
        ) from error


def sum_dtype(device: torch.device) -> torch.dtype:
    """The type in which running sums are kept: float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


# The part of a device's free memory that data may take.
SHARE_FOR_DATA = 0.1


def room_for_data(device: torch.device) -> int:
    """Bytes that data may take on an accelerator: a tenth of what is free; 0 on the CPU and where nobody tells."""
    if device.type == "cpu":
        return 0
    ask = getattr(torch.get_device_module(device), "mem_get_info", None)
    return 0 if ask is None else int(SHARE_FOR_DATA * ask(device)[0])


def module_dtype(module: nn.Module) -> torch.dtype:
    """The dtype that floating arrays are given: that of the module's first floating parameter or buffer."""
    floating = (tensor.dtype for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point())
    return next(floating, torch.get_default_dtype())


def autocasting(function: Function, precision: Precision, device: torch.device) -> Function:
    """The function with its operations in the user's precision; itself where that is each tensor's own."""
    dtype = AUTOCAST_DTYPES.get(precision)
    return function if dtype is None else torch.autocast(device.type, dtype=dtype)(function)


def move(batch: Any, device: torch.device, dtype: torch.dtype | None = None, *, channels_last: bool = False) -> Any:
    """The batch with every tensor in it on the device, floating ones as dtype when one is given.

    With channels_last, floating tensors of four dimensions get that memory format. Objects of other libraries that
    have a ``to`` method (graph batches, Hugging Face encodings) move themselves.
    """
    if isinstance(batch, torch.Tensor):
        wanted = dtype if batch.is_floating_point() else None
        images = channels_last and batch.dim() == 4 and batch.is_floating_point()
        memory_format = torch.channels_last if images else torch.preserve_format
        return batch.to(device=device, dtype=wanted, non_blocking=True, memory_format=memory_format)
    if isinstance(batch, (str, bytes, int, float)) or batch is None:
        return batch
    if callable(getattr(batch, "to", None)):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: move(value, device, dtype, channels_last=channels_last) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move(value, device, dtype, channels_last=channels_last) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(move(value, device, dtype, channels_last=channels_last) for value in batch)
    return batch


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every generator that training may draw from: Python's, NumPy's, torch's, the device's."""
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        state["numpy"] = numpy.random.get_state()
    return state


def restore_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Puts back what `random_state` gave."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "device" in state and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state["device"], device)
    if "numpy" in state:
        sys.modules["numpy"].random.set_state(state["numpy"])


def plain_random_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """What `random_state` gave as tensors and plain values, for a file that can run no code."""
    version, internal, gauss = state["python"]
    plain = {"python": [version, torch.tensor(internal), gauss], "torch": state["torch"], "device": state.get("device")}
    if "numpy" in state:
        name, keys, *rest = state["numpy"]
        plain["numpy"] = [str(name), torch.tensor(keys.tolist()), *rest]
    return plain


def random_state_of(plain: Mapping[str, Any]) -> dict[str, Any]:
    """What `random_state` gave, from what `plain_random_state` made of it."""
    version, internal, gauss = plain["python"]
    state = {"python": (version, tuple(internal.tolist()), gauss), "torch": plain["torch"]}
    if plain["device"] is not None:
        state["device"] = plain["device"]
    if "numpy" in plain:
        import numpy as np

        name, keys, *rest = plain["numpy"]
        state["numpy"] = (name, np.array(keys.tolist(), dtype=np.uint32), *rest)
    return state


@contextmanager
def kept_random_state(device: torch.device) -> Iterator[None]:
    """Leaves every generator as it was: what runs inside does not change what training draws next."""
    state = random_state(device)
    try:
        yield
    finally:
        restore_random_state(state, device)


def copy_back(tensors: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Gives each tensor the value beside it; one that is expanded cannot have changed in place."""
    with torch.no_grad():
        for tensor, value in tensors:
            if not any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)):
                tensor.copy_(value)


def get_modes(module: nn.Module) -> dict[str, list[bool]]:
    """Which submodules are in train mode and which parameters are trainable, in the module's order."""
    return {
        "training": [child.training for child in module.modules()],
        "trainable": [parameter.requires_grad for parameter in module.parameters()],
    }


def set_modes(module: nn.Module, modes: Mapping[str, Sequence[bool]], *, also_training: bool) -> None:
    """Puts back what `get_modes` gave; without also_training only which parameters are trainable."""
    for child, training in zip(module.modules(), modes["training"], strict=True):
        child.training = training if also_training else child.training
    for parameter, trainable in zip(module.parameters(), modes["trainable"], strict=True):
        parameter.requires_grad_(trainable)


@contextmanager
def kept_modes(module: nn.Module) -> Iterator[None]:
    """Leaves every submodule in the train or eval mode in which it was."""
    modes = [(child, child.training) for child in module.modules()]
    try:
        yield
    finally:
        for child, training in modes:
            child.training = training
