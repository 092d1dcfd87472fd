"""The way of a batch to the device: from pinned memory, beside the work on the batch before, without waiting for it.

On the CPU there is no way to go. What a batch is made of stands in batch.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from fitkit.batch import Placed, mapped
from fitkit.device import move

# A copy from memory that is not pinned makes the host wait, apart from copies of up to 64 KB, which CUDA takes over.
SMALL_BYTES = 2**16


@final
class Transfer:
    """Takes batches to a device.

    Args:
        device: where the module is.
        dtype: what floating tensors become; None leaves them as they are.
        channels_last: whether images get that memory format.

    Attributes:
        is_needed: whether there is anything to do.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype | None = None, *, channels_last: bool = False) -> None:
        self.is_needed = device.type != "cpu" or dtype is not None or channels_last
        self._move = partial(move, device=device, dtype=dtype, channels_last=channels_last)
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Any) -> Placed:
        """The batch on the device, beside itself; one that is placed already as it is."""
        if isinstance(batch, Placed):
            return batch
        if self._stream is None or not _is_on_host(batch):
            return Placed(self._move(batch), batch)
        # The host is ahead of the device: on a stream of its own this copy goes on while the device still computes.
        with torch.cuda.stream(self._stream):
            moved = self._move(mapped(_pinned, batch))
        computing = torch.cuda.current_stream(self._device)
        computing.wait_stream(self._stream)
        mapped(lambda tensor: tensor.record_stream(computing), moved)
        return Placed(moved, batch)


def _is_on_host(batch: Any) -> bool:
    """Whether the batch is nothing but tensors on the host: other objects move themselves, on the usual stream."""
    if isinstance(batch, Tensor):
        return batch.is_cpu
    if isinstance(batch, dict):
        return all(map(_is_on_host, batch.values()))
    return type(batch) in (tuple, list) and all(map(_is_on_host, batch))


def _pinned(tensor: Tensor) -> Tensor:
    return tensor if tensor.nbytes <= SMALL_BYTES or tensor.is_pinned() else tensor.pin_memory()
