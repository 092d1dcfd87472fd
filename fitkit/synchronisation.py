"""How the gradients of several processes become that of the batch which they share, by torch's DistributedDataParallel.

Forward and loss run inside the wrapper, and the last backward pass of a window starts its reduction. DDP averages over
processes; what is wanted is the mean over what the window holds. So each process seeds its backward pass by its own
weight over what the window is expected to hold, the real weight travels as the gradient of one more parameter, and the
gradients are corrected once where it differs. Where that cannot be (a part without samples, several outputs, a window
that ended early), the gradients are corrected first and then handed to the wrapper, in a pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fitkit.batch import Share
from fitkit.distributed import Processes, any_of, summed
from fitkit.windows import Window

if TYPE_CHECKING:
    from fitkit.computation import Outcome


@final
class _Carrying(nn.Module):
    """What the wrapper wraps: all that is trained, and a parameter whose gradient is the weight of the window."""

    def __init__(self, module: nn.Module, parameters: Sequence[nn.Parameter], device: torch.device) -> None:
        super().__init__()
        self.module = module
        own = {id(parameter) for parameter in module.parameters()}
        self.beside = nn.ParameterList([parameter for parameter in parameters if id(parameter) not in own])
        # Of float64 only where the module is: it travels with the gradients of its own kind.
        doubles = any(parameter.dtype == torch.float64 for parameter in parameters)
        self.weight = nn.Parameter(torch.zeros(1, device=device, dtype=torch.float64 if doubles else torch.float32))

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


@final
class Synchronisation:
    """The gradients of one fit, brought together once in each optimizer step.

    Args:
        processes: that share the work.
        module: the user's.
        window: whose micro-batches are counted.
        device: where the module is.

    Attributes:
        in_one_pass: whether a window's last backward pass may start the reduction; not where a part may have to be
            taken again, in smaller ones.
    """

    def __init__(self, processes: Processes, module: nn.Module, window: Window, device: torch.device) -> None:
        self._processes = processes
        self._module = module
        self._window = window
        self._device = device
        self.in_one_pass = not window.has_several
        self._wrapper: Any = None
        self._trained: list[nn.Parameter] = []
        # What a sample weighs, known after the first step; until then nobody knows which parameters take part either.
        self._weight_of_sample: float | None = None
        self._of = 0
        self._samples = 0
        self._is_reduced = False
        self._usual: tuple[float, Tensor] | None = None

    def begin_epoch(self, held: Sequence[nn.Parameter]) -> None:
        """Looks which parameters are trained in the epoch."""
        trained = [parameter for parameter in held if parameter.requires_grad]
        if [id(each) for each in trained] != [id(each) for each in self._trained]:
            self.release()
            self._trained, self._weight_of_sample = trained, None

    def release(self) -> None:
        """Leaves nothing of the group behind, which is about to be destroyed.

        What still holds it then would end its threads while it holds Python's lock, for which these may be waiting.
        """
        wrapper, self._wrapper = self._wrapper, None
        if wrapper is not None:
            del wrapper.reducer, wrapper.logger, wrapper.process_group

    def begin_batch(self, share: Share) -> None:
        """Notes how many samples the batch has in all processes."""
        self._of = share.of

    def open(self) -> None:
        """Begins a window, with the present batch."""
        self._samples = 0
        self._is_reduced = False
        if self.in_one_pass and self._weight_of_sample is not None:
            self._window.expect(self._weight_of_sample * self._of / self._processes.world)

    def end_batch(self) -> None:
        """Counts the batch's samples."""
        self._samples += self._of

    def run(self, compute: Callable[..., Any], batch: Any, index: int, *, is_last: bool) -> Any:
        """Forward and loss, where the backward pass will reduce the gradients if it is the window's last.

        Args:
            compute: what to call on batch and index.
            batch: this process's part of a batch, or a part of that.
            index: of the batch.
            is_last: whether it is the last part of this process's part.
        """
        ends = is_last and self._window.is_at_last_batch
        self._is_reduced = ends and self._may_reduce and self._of >= self._processes.world
        return self._wrapper(compute, batch, index) if self._is_reduced else compute(batch, index)

    @property
    def _may_reduce(self) -> bool:
        """Whether a backward pass may reduce: all parameters take part in it, and what a sample weighs is known."""
        is_ready = self._weight_of_sample is not None and self._wrapper is not None
        return self.in_one_pass and is_ready and not self._wrapper.find_unused_parameters

    def backward(self, outcome: Outcome, scaler: Any, held: Sequence[nn.Parameter]) -> None:
        """The backward pass of what `run` gave."""
        window, parts = self._window, outcome.parts
        loss, seed = window.take(parts)
        if window.is_separate:
            window.backward_each(parts, scaler, held)
            return
        if loss is not None and scaler is not None:
            loss = scaler.scale(loss)
        if not self._is_reduced:
            if loss is not None:
                loss.backward(seed)
            return
        carrier = self._wrapper.module.weight
        carrier.grad = None
        carried = self._carried_by(carrier, window.weights()[0] * self._processes.world)
        if loss is None:  # no target here, but maybe in other processes
            nothing = [torch.zeros_like(parameter) for parameter in self._trained]
            torch.autograd.backward([*self._trained, carrier], [*nothing, carried])
        else:
            torch.autograd.backward([loss, carrier], [seed, carried])

    def _carried_by(self, carrier: Tensor, weight: float | Tensor) -> Tensor:
        """The weight as a gradient; that of the usual windows is kept."""
        if isinstance(weight, Tensor):
            return weight.to(carrier.dtype).reshape(1)
        if self._usual is None or self._usual[0] != weight or self._usual[1].dtype != carrier.dtype:
            self._usual = (weight, carrier.new_full((1,), weight).detach())
        return self._usual[1]

    def close(self, held: Sequence[nn.Parameter]) -> None:
        """Leaves in the parameters the gradient of the window, the same in all processes."""
        window = self._window
        if self._is_reduced:
            weight = self._wrapper.module.weight.grad
            total: float | Tensor = _counted(weight.item()) if weight.is_cpu else weight.reshape(())
            # What only an accelerator knows is not asked for: there is something.
            window.holds_something = isinstance(total, Tensor) or total > 0
            window.weigh([total / self._processes.world])
            window.close(held)
            return
        weights = window.weights()
        # Each process counts, and one that has no micro-batch of the window counts nothing.
        counts = [float(weight) for weight in weights] or [0.0] * window.outputs
        *totals, holding, _ = summed([*counts, float(window.holds_something), 0.0])
        window.holds_something = holding > 0
        if not holding:
            return
        _check_alike(counts, totals, window)
        if weights:
            window.weigh([total / self._processes.world for total in totals])
            window.close(held)
        self._hand_over()
        if self._weight_of_sample is None and totals[0] > 0:
            self._weight_of_sample = totals[0] / self._samples

    def _hand_over(self) -> None:
        """Gives the wrapper gradients that are there already, to be summed."""
        gradients = [parameter.grad for parameter in self._trained]
        if self._wrapper is None:
            # DDP looks for parameters without a gradient, at a cost at each step, only where there are such.
            self._wrapper = self._wrap(any_of(any(gradient is None for gradient in gradients)))
        for parameter in self._trained:
            parameter.grad = None
        looks = self._wrapper.find_unused_parameters
        carrier = self._wrapper.module.weight
        given = [
            (parameter, torch.zeros_like(parameter) if gradient is None else gradient)
            for parameter, gradient in zip(self._trained, gradients, strict=True)
            if gradient is not None or not looks
        ]
        given.append((carrier, torch.zeros_like(carrier)))
        carrier.grad = None
        views = self._wrapper(lambda: [parameter.view_as(parameter) for parameter, _ in given])
        torch.autograd.backward(views, [gradient for _, gradient in given])

    def _wrap(self, looks: bool) -> Any:
        carrying = _Carrying(self._module, self._trained, self._device)
        return DistributedDataParallel(carrying, find_unused_parameters=looks, gradient_as_bucket_view=True)


def _counted(weight: float) -> float:
    """A number that came as a mean over processes, without the mean's rounding where it is a count."""
    return float(round(weight)) if abs(weight - round(weight)) <= 2e-7 * weight else weight


def _check_alike(counts: Sequence[float], totals: Sequence[float], window: Window) -> None:
    """Refuses outputs of which this process has different shares: their one backward pass would weigh them alike."""
    if window.is_separate:
        return
    shares = [count / total for count, total in zip(counts, totals, strict=True) if total]
    if shares and max(shares) - min(shares) > 1e-9:
        raise ValueError(
            f"Expected outputs whose sizes grow alike from part to part, received {list(counts)} in this process of "
            f"{list(totals)} in all. With outputs of varying lengths, let the losses return (value, weight)."
        )
