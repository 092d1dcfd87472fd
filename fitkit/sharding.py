"""A module of which each process keeps a part, by torch's fully_shard (FSDP2), and the gradients of its windows.

Parameters are put together for each pass and let go again. The backward passes of a window leave whole gradients in
each process; the last one leaves in each the gradient of its part, averaged over processes. What is wanted is the mean
over what the window holds. So each process seeds its passes by their weight over what the window is expected to hold in
all, and gradients are corrected once where it holds something else. A process without a sample of a batch, or without a
target in it, goes through both passes with nothing, since the others need its part of the parameters.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, final
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fitkit.batch import Share, tensors
from fitkit.device import sum_dtype
from fitkit.distributed import (
    Processes,
    begin_lasting_group,
    is_shard,
    running_as,
    scattered_like,
    share_tensors,
    summed,
    summed_weight,
)
from fitkit.losses import Weight
from fitkit.windows import Window, correction, multiply

if TYPE_CHECKING:
    from fitkit.computation import Outcome

# Factors of two outputs that differ by more than rounding.
ALIKE = 1e-9

# The modules that were sharded here. Those of the user's own scatter their gradients as the user has set them.
_sharded_here: WeakSet[nn.Module] = WeakSet()


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
        _check_all_sharded(module)
        return
    mesh = torch.distributed.device_mesh.init_device_mesh(device.type, (processes.world,))
    blocks = _blocks(module, kind)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    # By itself torch leaves the outermost parameters whole for a backward pass, which an evaluation has not.
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    _sharded_here.update([*blocks, module])
    if device.type == "cpu":  # gloo sums, and has no means
        for part in module.modules():
            if isinstance(part, kind):
                part.set_force_sum_reduction_for_comms(True)


def _check_all_sharded(module: nn.Module) -> None:
    """Refuses a module of the user's sharding of which a part is whole in each process: nothing would keep it equal."""
    left = [name for name, each in module.named_parameters() if each.requires_grad and not is_shard(each)]
    if left:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise ValueError(
            f'strategy="fsdp" needs every trainable parameter sharded, received a module whose fully_shard left out '
            f"{left[0]!r}{more}. Freeze them, or leave out ignored_params."
        )


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
        module: the sharded one.
        window: whose micro-batches are counted.
    """

    def __init__(self, processes: Processes, module: nn.Module, window: Window) -> None:
        self._world = processes.world
        self._window = window
        self._gradients = WholeGradients(module)
        # What a sample weighs, as the first pass of the fit shows.
        self._weight_of_sample: float | None = None
        self._of = 0
        self._expected: list[float] = []
        self._weights: list[Weight] = []

    def begin_epoch(self, held: Sequence[nn.Parameter]) -> None:
        """Nothing differs from epoch to epoch."""

    def release(self) -> None:
        """Leaves no gradient behind, and the module as torch made it."""
        self._gradients.release()

    def begin_batch(self, share: Share) -> None:
        """Notes how many samples the batch has in all processes."""
        self._of = share.of

    def parts(self, size: int) -> int:
        """In how many parts of at most that many samples the processes take the present batch: all in as many."""
        largest = -(-self._of // self._world)
        return max(1, -(-largest // size))

    def open(self) -> None:
        """Begins a window, with the present batch."""
        self._weights = [0.0] * self._window.outputs
        self._expected = []

    def end_batch(self) -> None:
        """Nothing is counted."""

    def run(self, compute: Callable[..., Any], batch: Any, index: int, *, is_last: bool) -> Any:
        """Forward and loss, of which the backward pass scatters the gradients if it is the window's last.

        Args:
            compute: what to call on batch and index.
            batch: this process's part of a batch, or a part of that, or a sample that does not count.
            index: of the batch.
            is_last: whether it is the last part of this process's part.
        """
        self._gradients.scatter(is_last and self._window.is_at_last_batch)
        return compute(batch, index)

    def backward(self, outcome: Outcome, scaler: Any, held: Sequence[nn.Parameter]) -> None:
        """The backward pass of what `run` gave."""
        self._backward(outcome, [_summable(part.weight) for part in outcome.parts])

    def pass_nothing(self, outcome: Outcome) -> None:
        """The backward pass of a sample that does not count."""
        self._backward(outcome, [_summable(part.weight) * 0 for part in outcome.parts], counts=False)

    def _backward(self, outcome: Outcome, weights: list[Weight], *, counts: bool = True) -> None:
        window = self._window
        totals = self._told(weights) if window.has_several else weights
        if not self._expected:
            self._expected = [self._expected_of_one(weights[0])]
        self._weights = [before + total for before, total in zip(self._weights, totals, strict=True)]
        # The processes have to go through the same parameters: all that any of them has something for.
        ends: dict[int, tuple[Tensor, Tensor]] = {}
        for index, (part, weight) in enumerate(zip(outcome.parts, weights, strict=True)):
            if counts and (isinstance(weight, Tensor) or weight):
                share = window.shares[index] * self._world
                ratio = share if window.adds_up[index] else share * weight / self._expected[index]
                ends[id(part.value)] = part.value, window.seed(ratio, part.value)
            elif not window.has_several or totals[index] or not any(totals):
                # From the outputs: a mean over no targets gives NaN, whatever it is multiplied with.
                reached = _reached(part.value, [each for each in tensors(outcome.outputs) if each.requires_grad])
                ends.update({id(end): (end, torch.zeros_like(end)) for end in reached or [part.value]})
        torch.autograd.backward([end for end, _ in ends.values()], [seed for _, seed in ends.values()])

    def _expected_of_one(self, weight: Weight) -> float:
        """What a window of the one output is expected to weigh, the same in all processes."""
        if self._weight_of_sample is None:
            total = 0.0 if isinstance(weight, Tensor) else summed([weight])[0]
            self._weight_of_sample = total / self._of or 1.0
        return self._window.size * self._of * self._weight_of_sample

    def _told(self, weights: list[Weight]) -> list[Weight]:
        """What a batch weighs in all processes: not all outputs may have targets in it."""
        totals = summed([float(weight) for weight in weights])
        self._expected = self._expected or [self._window.size * (total or 1.0) for total in totals]
        return [*totals]

    def close(self, held: Sequence[nn.Parameter]) -> None:
        """Leaves in the parameters the gradient of the window, each process its part.

        Raises:
            ValueError: outputs of which a window holds different parts than it was expected to.
        """
        window = self._window
        self._gradients.settle(self._world)
        weights = self._weights if window.has_several else [summed_weight(self._weights[0])]
        window.holds_something = any(isinstance(weight, Tensor) or weight > 0 for weight in weights)
        if not window.holds_something:
            return
        factors = [
            1.0 if adds_up else correction(expected, weight)
            for adds_up, expected, weight in zip(window.adds_up, self._expected, weights, strict=True)
            if isinstance(weight, Tensor) or weight
        ]
        if len(factors) > 1 and max(factors) - min(factors) > ALIKE:
            raise ValueError(
                'Expected outputs whose sizes grow alike from batch to batch under strategy="fsdp", received windows '
                f"that hold {weights} where {self._expected} was expected. Accumulate no gradients, or use "
                'strategy="ddp".'
            )
        multiply([parameter.grad for parameter in held], factors[0])


@final
class WholeGradients:
    """The gradients of whole parameters, which torch keeps from one backward pass to the next until one scatters them.

    They stand in the parameters that a module has while they are put together, which are not those that it has
    otherwise.

    Args:
        module: the sharded one.
    """

    def __init__(self, module: nn.Module) -> None:
        self._sharded = _sharded(module)
        self._parts = [part for part in self._sharded if part in _sharded_here]
        self._scatters = True
        # What this process keeps of a parameter, and the whole one.
        self._parameters: dict[int, tuple[Tensor, Tensor]] = {}
        self._hooks: dict[nn.Module, list[RemovableHandle]] = {}
        self._listens = False

    def _listen(self) -> None:
        """Awaits the first call in each part; one by a forward method of torch's shows in the modules of the part."""
        self._listens = True
        elsewhere: set[int] = set()
        for part in reversed(self._sharded):  # the inner ones first
            kept = {
                name: each for name, each in part.named_parameters() if is_shard(each) and id(each) not in elsewhere
            }
            elsewhere.update(map(id, kept.values()))
            if kept and part in self._parts:
                note = partial(self._note, part, kept)
                self._hooks[part] = [each.register_forward_pre_hook(note) for each in part.modules()]

    def _note(self, part: nn.Module, kept: dict[str, Tensor], *_: Any) -> None:
        """Notes the whole parameters of a part, if they are put together now."""
        wholes = {name: each for name, each in part.named_parameters() if name in kept and not is_shard(each)}
        for name, whole in wholes.items():
            self._parameters[id(whole)] = kept[name], whole
        if wholes:
            for hook in self._hooks.pop(part, ()):
                hook.remove()

    def scatter(self, scatters: bool) -> None:
        """Says whether the next backward pass scatters the gradients, with those that are there already."""
        if scatters != self._scatters:
            if not self._listens:
                self._listen()
            self._scatters = scatters
            for part in self._parts:
                part.set_requires_gradient_sync(scatters, recurse=False)

    def settle(self, world: int) -> None:
        """Scatters what is there of a window that ended before its last batch, as a mean over so many processes."""
        if not self._scatters:
            for kept, whole in self._parameters.values():
                if whole.grad is not None:
                    scattered = scattered_like(whole.grad, kept) / world
                    kept.grad = scattered if kept.grad is None else kept.grad + scattered
                    whole.grad = None

    def release(self) -> None:
        """Lets all gradients go, and leaves the module as it was."""
        for hooks in self._hooks.values():
            for hook in hooks:
                hook.remove()
        for _, whole in self._parameters.values():
            whole.grad = None
        self.scatter(True)


def _summable(weight: Weight) -> Weight:
    """A weight whose sums do not overflow, nor round."""
    return weight.to(sum_dtype(weight.device)) if isinstance(weight, Tensor) else weight


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
    return bool(_sharded(module))


def let_go(module: nn.Module) -> None:
    """Lets parameters go that a pass without a backward pass has left together."""
    for part in _sharded(module):
        part.reshard()


def _sharded(module: nn.Module) -> list[Any]:
    """What is put together at once in it, the outer ones first."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [part for part in module.modules() if isinstance(part, fsdp.FSDPModule)]
