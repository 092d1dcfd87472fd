"""A target as torch's losses need it beside an output: its shape and its dtype, never broadcast."""

from __future__ import annotations

import torch
from torch import Tensor

from fitkit.errors import classes_last


def fit_elements(output: Tensor, target: Tensor, name: str) -> Tensor:
    """The target in the output's shape: ``(N,)`` against ``(N, 1)`` is squeezed, any other difference is refused.

    Raises:
        ValueError: the shapes differ, also where torch would broadcast them.
    """
    if output.shape != target.shape:
        column = (output.numel(), 1)
        if {tuple(output.shape), tuple(target.shape)} != {column, column[:1]}:
            raise ValueError(
                f"Expected output and target of the same shape for {name}, received output of shape "
                f"{tuple(output.shape)} and target of shape {tuple(target.shape)}. They are never broadcast: reshape "
                "one of them."
            )
        target = target.reshape(output.shape)
    return target if target.is_floating_point() else target.to(_loss_dtype(output))


def fit_classes(output: Tensor, target: Tensor, name: str) -> Tensor:
    """The target as class indices of shape ``(N, ...)``, or as probabilities of the output's shape ``(N, C, ...)``.

    Raises:
        ValueError: the shapes or the dtype fit neither.
    """
    if target.shape == output.shape and output.dim() > 1:
        dtype = _loss_dtype(output)
        return target if target.dtype == dtype else target.to(dtype)
    if not target.is_floating_point():
        if target.dim() == output.dim() > 1 and target.shape[1] == 1:
            target = target.squeeze(1)
        if output.dim() > 1 and target.shape == output.shape[:1] + output.shape[2:]:
            return target if target.dtype == torch.int64 else target.long()
    raise ValueError(
        f"Expected class indices of shape (N, ...) with an integer dtype, or probabilities of the output's shape "
        f"(N, C, ...), for {name}; received output of shape {tuple(output.shape)} and target of shape "
        f"{tuple(target.shape)} and {target.dtype}.{classes_last(output, target) or _class_advice(output, target)}"
    )


def _loss_dtype(output: Tensor) -> torch.dtype:
    """The type in which the loss of an output is computed: autocast takes every loss to float32, and back nothing.

    In the output's own half precision a target of 257 would be one of 256.
    """
    is_half = output.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if is_half and torch.is_autocast_enabled(output.device.type) else output.dtype


def _class_advice(output: Tensor, target: Tensor) -> str:
    items = output.shape[:1] + output.shape[2:]
    if output.dim() < 2 or output.shape[1] == 1:
        return ' For one output column use "bce_with_logits".'
    if target.is_floating_point() and target.shape in (items, (*items[:1], 1, *items[1:])):
        return " Convert class labels with .long() or .astype('int64')."
    if target.dim() == output.dim() > 2 and target.movedim(-1, 1).shape == output.shape:
        return " The classes come second, as in the output: target.movedim(-1, 1)."
    return " Their shapes differ: look at what made them."
