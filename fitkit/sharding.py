"""A module of which each process keeps a part, by torch's fully_shard (FSDP2), and the gradients of its windows.

Parameters are put together for each pass and let go again; the backward pass leaves in each process the gradient of its
part, averaged over processes. What is wanted is the mean over what the window holds. So the processes tell each other
what a micro-batch weighs before its backward pass, and each seeds it by its own weight over that of all. A process
without a sample of a batch, or without a target in it, goes through both passes with nothing, since the others need its
part of the parameters.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn

from fitkit.batch import Share, tensors
from fitkit.distributed import Processes, begin_lasting_group, running_as, share_tensors, summed
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
    # By itself torch leaves the outermost parameters whole for a backward pass, which an evaluation has not.
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
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
    # A list is never called by itself; a parameter that two places share is put together by what has both in it.
    everywhere = _counted(module)
    return [
        child
        for child in found.values()
        if not isinstance(child, (kind, nn.ModuleList, nn.Sequential))
        and all(everywhere[key] == count for key, count in _counted(child).items())
    ]


def _counted(module: nn.Module) -> Counter[int]:
    return Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))


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
        # The processes have to go through the same parameters: all that any of them has something for.
        ends: dict[int, tuple[Tensor, Tensor]] = {}
        for index, (part, weight) in enumerate(zip(outcome.parts, weights, strict=True)):
            if weight:
                share = self._window.shares[index] * self._world
                seed = share if self._window.adds_up[index] else share * weight / self._expected[index]
                ends[id(part.value)] = part.value, torch.full_like(part.value, seed)
            elif totals[index] or not any(totals):
                # From the outputs: a mean over no targets gives NaN, whatever it is multiplied with.
                reached = _reached(part.value, [each for each in tensors(outcome.outputs) if each.requires_grad])
                ends.update({id(end): (end, torch.zeros_like(end)) for end in reached or [part.value]})
        torch.autograd.backward([end for end, _ in ends.values()], [seed for _, seed in ends.values()])

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


def _reached(value: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
    """Those of the outputs that the value was made from."""
    nodes = {id(output.grad_fn): output for output in outputs if output.grad_fn is not None}
    found, seen, waiting = [], set(), [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if id(node) in nodes:
            found.append(nodes[id(node)])
        else:
            waiting += [following for following, _ in node.next_functions]
    return found


def is_sharded(module: nn.Module) -> bool:
    """Whether each process keeps a part of the module's parameters, also while they are put together."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(part, fsdp.FSDPModule) for part in module.modules())


def let_go(module: nn.Module) -> None:
    """Lets parameters go that a pass without a backward pass has left together."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for part in () if fsdp is None else module.modules():
        if isinstance(part, fsdp.FSDPModule):  # type: ignore[union-attr]  # it is there
            part.reshard()
