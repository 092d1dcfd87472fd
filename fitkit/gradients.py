"""Norms of gradients, measured together on the device, and clipping by them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from fitkit.distributed import is_first, is_shard, local

# What torch adds to a norm before it divides by it.
CLIP_EPSILON = 1e-6


@final
class GradientNorms:
    """The p-norm of every parameter's gradient and of all together, averaged over the steps of an epoch.

    Args:
        module: whose parameter names name the norms.
        parameters: those that are trained.
        order: p, above 0; math.inf is the largest absolute value.
    """

    def __init__(self, module: nn.Module, parameters: Sequence[nn.Parameter], order: float) -> None:
        self._parameters = parameters
        self._order = order
        self.names = norm_names(module, parameters, order)
        self.reset()

    def reset(self) -> None:
        """Starts an epoch."""
        self.last: Tensor | None = None
        self._sum: Tensor | None = None
        self._steps: Tensor | float = 0.0

    def measure(self) -> Tensor:
        """Norms of the gradients as they are: a vector with the total first, on the device."""
        gradients = [parameter.grad for parameter in self._parameters]
        present = [gradient for gradient in gradients if gradient is not None]
        if not present:
            return local(self._parameters[0]).new_zeros(len(gradients) + 1)
        norms = _norms(present, self._order)
        total = torch.linalg.vector_norm(norms, self._order)
        if len(present) < len(gradients):  # parameters that took no part have a gradient of norm 0
            places = torch.tensor([index for index, gradient in enumerate(gradients) if gradient is not None])
            norms = norms.new_zeros(len(gradients)).index_copy_(0, places.to(norms.device), norms)
        return torch.cat([total.reshape(1), norms])

    def add(self, norms: Tensor, *, only_finite: bool = False) -> None:
        """Takes one step's norms into the mean.

        Args:
            norms: what `measure` gave.
            only_finite: whether to leave norms out that are not finite, without asking the device.
        """
        self.last = norms
        counted: Tensor | float = 1.0
        if only_finite:
            counted = norms[0].isfinite().to(norms.dtype)
            norms = torch.where(counted > 0, norms, torch.zeros_like(norms))
        self._sum = norms if self._sum is None else self._sum + norms
        self._steps = self._steps + counted

    def means(self) -> dict[str, Tensor]:
        """The mean norms by name as 0-d tensors; nothing when no step was made."""
        if self._sum is None:
            return {}
        return dict(zip(self.names, (self._sum / self._steps).unbind(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """The norms of the epoch so far."""
        return {"names": list(self.names), "last": self.last, "sum": self._sum, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where the state was made.

        Raises:
            ValueError: the state is of other norms.
        """
        if list(state["names"]) != self.names:
            raise ValueError(f"Expected the norms {self.names[0]} and so on, received {state['names'][0]} and so on.")
        device = self._parameters[0].device if self._parameters else torch.device("cpu")
        self.last, self._sum, self._steps = (
            value.to(device) if isinstance(value, Tensor) else value
            for value in (state["last"], state["sum"], state["steps"])
        )

    def clip_total(self, norms: Tensor) -> Tensor | None:
        """The total that clipping by the 2-norm can use; None for another order."""
        return norms[0] if self._order == 2 else None


def clip_gradients(parameters: Sequence[nn.Parameter], most: float, total: Tensor | None) -> None:
    """Scales all gradients together so that their common 2-norm is at most that.

    Args:
        parameters: those that are trained.
        most: the largest norm allowed.
        total: the norm where it is known already.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if any(map(is_shard, gradients)):
        if total is None:
            total = torch.linalg.vector_norm(_norms(gradients, 2.0))
        factor = (most / (total + CLIP_EPSILON)).clamp(max=1.0)
        torch._foreach_mul_([local(gradient) for gradient in gradients], factor)
    elif total is None:
        torch.nn.utils.clip_grad_norm_(parameters, most)
    else:
        torch.nn.utils.clip_grads_with_norm_(parameters, most, total)


def _norms(gradients: list[Tensor], order: float) -> Tensor:
    """The norm of each gradient, over the parts of all processes where it is sharded."""
    if not any(map(is_shard, gradients)):
        return torch.stack(torch._foreach_norm(gradients, order))
    # A process may have an empty part, of which torch gives no largest value.
    parts = [part if part.numel() else part.new_zeros(1) for part in map(local, gradients)]
    norms = torch.stack(torch._foreach_norm(parts, order))
    # What is no shard is the same in all processes, and counted once.
    ours = torch.tensor([is_shard(gradient) or is_first() for gradient in gradients], device=norms.device)
    norms = torch.where(ours, norms, 0.0)
    if order == math.inf:
        torch.distributed.all_reduce(norms, op=torch.distributed.ReduceOp.MAX)
        return norms
    powers = norms**order
    torch.distributed.all_reduce(powers)
    return powers ** (1 / order)


def norm_names(module: nn.Module, parameters: Sequence[nn.Parameter], order: float) -> list[str]:
    """The log keys of the norms: the total, then each parameter's; "2" and not "2.0" for a whole order."""
    own = {id(parameter): name for name, parameter in module.named_parameters()}
    label = "inf" if order == math.inf else f"{order:g}"
    names = [own.get(id(parameter), f"parameter_{index}") for index, parameter in enumerate(parameters)]
    return [f"grad_{label}_norm_total", *(f"grad_{label}_norm_{name}" for name in names)]


@contextmanager
def kept_gradients(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Leaves the parameters with the gradients they had: those of a window that a fit has open."""
    gradients = [(parameter, parameter.grad) for parameter in parameters]
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
