"""Where NaN or infinity comes from: one checked forward pass after a training loss was not finite."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fitkit.batch import tensors
from fitkit.device import copy_back, kept_random_state


def explain_nonfinite(module: nn.Module, batch: Any, forward: Callable[[], Any], device: torch.device) -> str:
    """Sentences that name what is not finite: the batch, the parameters, the first output on the way.

    By the time an epoch's numbers are read, one bad step may have made every parameter NaN. Such values are taken as
    0 for the pass, so that it finds the module that makes NaN by itself, where there is one.

    Args:
        module: as it is after the epoch; its parameters, buffers and the random generators stay as they are.
        batch: the last one of the epoch.
        forward: runs the module on it.
        device: that of the module.
    """
    if any(_is_bad(tensor) for tensor in tensors(batch)):
        return "The last batch itself holds NaN or infinity."
    bad = [(name, parameter) for name, parameter in module.named_parameters() if _is_bad(parameter)]
    weights = f"{len(bad)} parameters are not finite by now, the first being {bad[0][0]!r}. " if bad else ""
    changed = [*(parameter for _, parameter in bad), *module.buffers()]
    before = [tensor.detach().clone() for tensor in changed]
    with torch.no_grad(), kept_random_state(device):
        for _, parameter in bad:
            torch.nan_to_num_(parameter, 0.0, 0.0, 0.0)
        found = _first_bad_output(module, forward)
        copy_back(list(zip(changed, before, strict=True)))
    if found is not None:
        return f"{weights}The first module whose output on the last batch is not finite is {found}."
    if bad:
        return (
            f"{weights}That batch or one before it holds NaN or infinity, or its loss was, or a step was too large, or "
            "the weights were not finite before."
        )
    return "No module's output is not finite by itself: steps that are too large, or the loss, made it so."


def _first_bad_output(module: nn.Module, forward: Callable[[], Any]) -> str | None:
    names = {child: name or type(child).__name__ for name, child in module.named_modules()}
    found: list[str] = []

    def look(child: nn.Module, _: Any, output: Any) -> None:
        if not found and any(_is_bad(tensor) for tensor in tensors(output)):
            found.append(f"{names[child]!r} ({type(child).__name__})")

    handles = [child.register_forward_hook(look) for child in names]
    try:
        # The error that is being explained must not be replaced by one of looking.
        with contextlib.suppress(Exception), torch.enable_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _is_bad(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and not bool(tensor.isfinite().all())
