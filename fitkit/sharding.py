"""A module of which each process keeps a part, by torch's fully_shard (FSDP2), and the gradients of its windows.

Parameters are put together for each pass and let go again; the backward pass leaves in each process the gradient of its
part, averaged over processes. What is wanted is the mean over what the window holds. So the processes tell each other
what a micro-batch weighs before its backward pass, and each seeds it by its own weight over that of all. A process
without a sample of a batch, or without a target in it, goes through both passes with nothing, since the others need its
part of the parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from fitkit.batch import Share, tensors
from fitkit.distributed import Processes, begin_lasting_group, is_shard, running_as, share_tensors, summed
from fitkit.windows import Window, multiply

if TYPE_CHECKING:
    from fitkit.computation import Outcome

# Factors of two outputs that differ by more than rounding.
ALIKE = 1e-9


def shard(module: nn.Module, processes: Processes, device: torch.device) -> None:
    """Leaves in each process its part of the module's parameters, with the values that rank 0 had.

    Blocks, which are what a ModuleList or Sequential lists, are put together one at a time; what the user has sharded
    already stays as it is.

    Args:
        module: on the device.
        processes: that share it.
        device: where the module is.

    Raises:
        ValueError: this torch cannot.
    """
    fully_shard, kind = _of_torch()
    begin_lasting_group(processes, device)
    with running_as(processes):
        share_tensors([*module.parameters(), *module.buffers()])
    if isinstance(module, kind):
        return
    mesh = torch.distributed.device_mesh.init_device_mesh(device.type, (processes.world,))
    for block in _blocks(module, kind):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    if device.type == "cpu":  # gloo sums, and has no means
        for part in module.modules():
            if isinstance(part, kind):
                part.set_force_sum_reduction_for_comms(True)


def _of_torch() -> tuple[Any, Any]:
    """Torch's function, and the class of what it has sharded."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise ValueError(f'strategy="fsdp" needs torch 2.8 or newer, received torch {torch.__version__}. Use "ddp".')
    return fully_shard, FSDPModule


def _blocks(module: nn.Module, kind: Any) -> list[nn.Module]:
    """What lists of modules list, the inner ones first, where it has parameters of its own."""
    lists = [each for each in module.modules() if isinstance(each, (nn.ModuleList, nn.Sequential))]
    listed = [child for each in reversed(lists) for child in each.children()]
    found = {id(child): child for child in listed if any(True for _ in child.parameters())}
    # A list is never called by itself, and one block has its parameters in it.
    return [child for child in found.values() if not isinstance(child, (kind, nn.ModuleList, nn.Sequential))]


@final
class Sharding:
    """The gradients of one fit of a sharded module; used as `Synchronisation` is.

    Args:
        processes: that share the work.
        window: whose micro-batches are counted.
    """

    def __init__(self, processes: Processes, window: Window) -> None:
        self._world = processes.world
        self._window = window
        self._expected: list[float] = []
        self._totals: list[float] = []

    def begin_epoch(self, held: Sequence[nn.Parameter]) -> None:
        """Nothing differs from epoch to epoch."""

    def release(self) -> None:
        """Nothing is kept."""

    def begin_batch(self, share: Share) -> None:
        """Samples are not needed: weights are told."""

    def open(self) -> None:
        """Begins a window, with the present batch."""
        self._expected, self._totals = [], []

    def end_batch(self) -> None:
        """Samples are not needed: weights are told."""

    def run(self, compute: Any, batch: Any, index: int, *, is_last: bool) -> Any:
        """Forward and loss."""
        return compute(batch, index)

    def backward(self, outcome: Outcome, scaler: Any, held: Sequence[nn.Parameter]) -> None:
        """The backward pass of what `run` gave."""
        self._backward(outcome, [float(part.weight) for part in outcome.parts])

    def pass_nothing(self, outcome: Outcome) -> None:
        """The backward pass of a sample that does not count."""
        self._backward(outcome, [0.0] * len(outcome.parts))

    def _backward(self, outcome: Outcome, weights: list[float]) -> None:
        totals = summed(weights)
        if not self._expected:
            self._expected = [self._window.size * (total or 1.0) for total in totals]
            self._totals = [0.0] * len(totals)
        self._totals = [before + total for before, total in zip(self._totals, totals, strict=True)]
        loss: Tensor | None = None
        for index, (part, weight) in enumerate(zip(outcome.parts, weights, strict=True)):
            if weight:
                share = self._window.shares[index] * self._world
                seed = share if self._window.adds_up[index] else share * weight / self._expected[index]
                loss = part.value * seed if loss is None else loss + part.value * seed
        if loss is not None:
            loss.backward()
            return
        # From the outputs: a mean over no targets would give NaN for whatever it is multiplied with.
        ends = [each for each in tensors(outcome.outputs) if each.requires_grad]
        ends = ends or [part.value for part in outcome.parts if part.value.requires_grad]
        torch.autograd.backward(ends, [torch.zeros_like(end) for end in ends])

    def close(self, held: Sequence[nn.Parameter]) -> None:
        """Leaves in the parameters the gradient of the window, each process its part.

        Raises:
            ValueError: outputs of which a window holds different parts than it was expected to.
        """
        self._window.holds_something = any(self._totals)
        if not self._window.holds_something:
            return
        factors = [
            1.0 if adds_up else expected / (total or expected)
            for adds_up, expected, total in zip(self._window.adds_up, self._expected, self._totals, strict=True)
        ]
        if max(factors) - min(factors) > ALIKE:
            raise ValueError(
                'Expected outputs whose sizes grow alike from batch to batch under strategy="fsdp", received windows '
                f"that hold {self._totals} where {self._expected} was expected. Accumulate no gradients, or use "
                'strategy="ddp".'
            )
        multiply([parameter.grad for parameter in held], factors[0])


def is_sharded(module: nn.Module) -> bool:
    """Whether each process keeps a part of the module's parameters."""
    return any(map(is_shard, module.parameters()))
