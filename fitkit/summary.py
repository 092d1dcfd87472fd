"""A module as a table: its layers, what they put out, and how large they are.

This describes; it changes nothing. Whatever runs to learn the output shapes is undone.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, is_lazy

from fitkit.batch import call, tensors, zeros
from fitkit.device import kept_modes, kept_random_state, module_dtype, move
from fitkit.errors import check_integer

# Stands for a space where tabulate would strip one.
INDENT = "\ue000"


@dataclass
class Forward:
    """What one forward pass told.

    Attributes:
        shapes: by a module's id, the shapes of what its first call put out, as text.
        calls: by a module's id, how often it was called.
        output_bytes: of what the innermost modules put out, over all their calls.
        multiply_adds: of the whole pass; None when there was none.
    """

    shapes: dict[int, str] = field(default_factory=dict)
    calls: dict[int, int] = field(default_factory=dict)
    output_bytes: int = 0
    multiply_adds: int | None = None

    def output_of(self, module: nn.Module) -> str:
        """A module's cell in the column of output shapes; empty for what is never called, as a ModuleList."""
        calls = self.calls.get(id(module), 0)
        return self.shapes.get(id(module), "") + (f" in {calls} calls" if calls > 1 else "")


def summarize(module: nn.Module, input_data: Any = None, *, depth: int = 3) -> str:
    """The module as a table of layers, with its totals below.

    A row's parameters are those of the layer and of all layers in it. What an earlier row has already counted stands
    as "shared", so the totals count everything once. Lazy parameters without a shape yet are "?".

    >>> print(summarize(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), torch.zeros(8, 2)))
    Layer         Output shape      Parameters  Trainable
    ------------  --------------  ------------  -----------
    Sequential    (8, 1)                    13  yes
      0 (Linear)  (8, 3)                     9  yes
      1 (Linear)  (8, 1)                     4  yes
    <BLANKLINE>
    Parameters: 13, of which trainable: 13, not trainable: 0
    Size of parameters and buffers: 52 bytes
    Size of the layers' outputs for this input: 128 bytes
    Multiply-adds of this input: 72

    Args:
        module: any module.
        input_data: one batch of inputs as tensors or arrays; a tuple or list is passed as ``module(*x)``, a dict as
            ``module(**x)``. With it, one forward pass in eval mode tells output shapes, the size of what the
            innermost layers put out (about what training keeps for its backward pass) and multiply-adds (those of
            matrix products, convolutions and attention); modes, buffers and random numbers are put back. None: no
            pass, and no shapes.
        depth: how many levels below the module get rows of their own; 0 shows the module alone.

    Raises:
        TypeError: depth is no integer.
        ValueError: depth is negative.
    """
    depth = check_integer("depth", depth, least=0)
    forward = None
    if input_data is not None:
        if any(is_lazy(tensor) for tensor in _tensors(module)):
            # The pass gives lazy parameters their shapes for good; the user's own module keeps waiting for its data.
            module = _copy(module)
        forward = run(module, input_data)
    rows = list(_rows(module, forward or Forward(), depth))
    headers = ["Layer", "Output shape", "Parameters", "Trainable"]
    if forward is None:
        rows, headers = [[row[0], *row[2:]] for row in rows], [headers[0], *headers[2:]]
    align = ["right" if header == "Parameters" else "left" for header in headers]
    # Where wcwidth is installed, as IPython brings it, tabulate takes a tenth of the time of torch to import.
    from tabulate import tabulate

    table = tabulate(rows, headers, disable_numparse=True, colalign=align).replace(INDENT, " ")
    return "\n".join([table, "", *_totals(module, forward)])


def check_is_no_shape(input_data: Any) -> None:
    """Refuses shapes, which Keras and torchsummary take, where a batch is wanted.

    Raises:
        TypeError: input_data is a shape, or a list of shapes.
    """
    shapes = input_data if isinstance(input_data, (tuple, list)) else []
    if shapes and all(isinstance(size, int) for size in shapes):
        shapes = [shapes]
    if shapes and all(isinstance(shape, (tuple, list)) and _is_shape(shape) for shape in shapes):
        zeros_of_shapes = ", ".join(f"torch.zeros({', '.join(map(str, shape))})" for shape in shapes)
        batch = zeros_of_shapes if len(shapes) == 1 else f"({zeros_of_shapes})"
        raise TypeError(
            f"Expected a batch of inputs, with its samples along the first dimension, received "
            f"input_data={input_data}, a shape. Pass summary({batch}), of the dtype that the module takes."
        )


def _is_shape(sizes: Any) -> bool:
    return len(sizes) > 0 and all(isinstance(size, int) and not isinstance(size, bool) for size in sizes)


def summarize_remembered(module: nn.Module, description: Any, *, depth: int = 3) -> str:
    """`summarize` on zeros of the shapes that an earlier batch had; without shapes where the module refuses zeros.

    Args:
        module: any module.
        description: what `batch.described` noted of a batch of inputs.
        depth: as in `summarize`.
    """
    device = next((tensor.device for tensor in _tensors(module)), torch.device("cpu"))
    shapes = _shape(description)
    try:
        table = summarize(module, zeros(description, device), depth=depth)
    except Exception as error:
        # Nobody asked for a pass: a table without shapes is still what summary() promises.
        note = f"No output shapes: zeros of {shapes}, as in the latest fit, end in {type(error).__name__}: {error}"
        return f"{summarize(module, depth=depth)}\n{note}\nPass input_data=... for them."
    return f"{table}\nThis input: zeros of {shapes}, as in the latest fit"


def run(module: nn.Module, input_data: Any) -> Forward:
    """One forward pass in eval mode that leaves the module and all random numbers as they were."""
    from torch.utils.flop_counter import FlopCounterMode

    forward = Forward()
    device = next((tensor.device for tensor in _tensors(module)), torch.device("cpu"))
    x = move(_as_tensors(input_data), device, module_dtype(module))

    def remember(child: nn.Module, inputs: Any, output: Any) -> None:
        forward.shapes.setdefault(id(child), _shape(output))
        forward.calls[id(child)] = forward.calls.get(id(child), 0) + 1
        if not child._modules:
            forward.output_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors(output))

    with ExitStack() as undo, torch.no_grad():
        undo.enter_context(kept_random_state(device))
        undo.enter_context(kept_buffers(module))
        undo.enter_context(kept_modes(module))
        for child in module.modules():
            # Not by eval(), which modules override to do more than to set the mode.
            child.training = False
            undo.callback(child.register_forward_hook(remember).remove)
        undo.enter_context(_countable(module))
        counter = undo.enter_context(FlopCounterMode(display=False))
        call(module, x)
    forward.multiply_adds = counter.get_total_flops() // 2
    return forward


@contextmanager
def kept_buffers(module: nn.Module) -> Iterator[None]:
    """Leaves every buffer as it was, the tensor and its values; also where forward puts a new tensor in its place."""
    before = [
        (child, name, buffer, buffer if is_lazy(buffer) else buffer.clone())
        for child in module.modules()
        for name, buffer in child._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for child, name, buffer, values in before:
            if buffer is not values:
                buffer.copy_(values)
            child._buffers[name] = buffer


@contextmanager
def _countable(module: nn.Module) -> Iterator[None]:
    """Keeps torch from fused forms that the counter of operations does not know, where a module has such."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fast_attention = torch.backends.mha.get_fastpath_enabled()
    backends: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.mkldnn)
    enabled = [backend.enabled for backend in backends]
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        if any(isinstance(child, nn.RNNBase) for child in module.modules()):
            for backend in backends:
                backend.enabled = False
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_attention)
        for backend, before in zip(backends, enabled, strict=True):
            backend.enabled = before


def _copy(module: nn.Module) -> nn.Module:
    """A copy with the same lazy parameters and buffers; torch itself does not copy the buffers among them."""
    lazy = [buffer for buffer in module.buffers() if is_lazy(buffer)]
    new: Any = UninitializedBuffer  # torch's stub of it lacks dtype
    return copy.deepcopy(module, {id(buffer): new(device=buffer.device, dtype=buffer.dtype) for buffer in lazy})


def _as_tensors(data: Any) -> Any:
    """The same structure with arrays and pandas objects as tensors."""
    if isinstance(data, Mapping) and not callable(getattr(data, "to", None)):
        return {name: _as_tensors(value) for name, value in data.items()}
    if isinstance(data, (tuple, list)):
        values = [_as_tensors(value) for value in data]
        return type(data)(*values) if hasattr(data, "_fields") else type(data)(values)
    if not isinstance(data, Tensor):
        data = data.to_numpy() if callable(getattr(data, "to_numpy", None)) else data
        # torch.tensor copies, so that read-only arrays are as good as others.
        return torch.tensor(data) if hasattr(data, "__array__") else data
    return data


def _shape(output: Any) -> str:
    if isinstance(output, Tensor):
        return str(tuple(output.shape))
    if isinstance(output, Mapping):
        return "{" + ", ".join(f"{name}: {_shape(value)}" for name, value in output.items()) + "}"
    if isinstance(output, (tuple, list)):
        return "[" + ", ".join(map(_shape, output)) + "]"
    return "None" if output is None else type(output).__name__


def _rows(module: nn.Module, forward: Forward, depth: int) -> Iterator[list[str]]:
    """The table's rows, from the module inwards; a module that several names share is opened at the first."""
    opened: set[int] = set()
    counted: set[int] = set()

    def rows_of(child: nn.Module, name: str, level: int) -> Iterator[list[str]]:
        first = id(child) not in opened
        opened.add(id(child))
        kind = type(child).__name__
        layer = INDENT * (2 * level) + (f"{name} ({kind})" if level else kind)
        own = list(child.parameters())
        new = [parameter for parameter in own if id(parameter) not in counted]
        shared = [parameter for parameter in own if id(parameter) in counted]
        count = _count(new) + (f" (+{_count(shared)} shared)" if shared else "")
        yield [layer, forward.output_of(child) if first else "", count, _trainable(own)]
        if first and level < depth:
            for part, grandchild in child._modules.items():
                if grandchild is not None:
                    yield from rows_of(grandchild, part, level + 1)
        # Only now: rows inside this one count the same parameters once more, as parts of it.
        counted.update(map(id, own))

    return rows_of(module, "", 0)


def _trainable(parameters: Iterable[Tensor]) -> str:
    answers = {parameter.requires_grad for parameter in parameters}
    return {(): "", (True,): "yes", (False,): "no"}.get(tuple(answers), "partly")


def _count(tensors: Iterable[Tensor]) -> str:
    """How many numbers the tensors hold; those without a shape add a question mark."""
    known, lazy = 0, False
    for tensor in tensors:
        lazy = lazy or is_lazy(tensor)
        known += 0 if is_lazy(tensor) else tensor.numel()
    parts = [f"{known:,}"] if known or not lazy else []
    return " + ".join([*parts, *(["?"] if lazy else [])])


def _size(count: int) -> str:
    """A number of bytes with its decimal unit."""
    if count < 1000:
        return f"{count} bytes"
    return f"{count / 1e6:,.3f} MB" if count < 1e9 else f"{count / 1e9:,.3f} GB"


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return itertools.chain(module.parameters(), module.buffers())


def _totals(module: nn.Module, forward: Forward | None) -> Iterator[str]:
    parameters = list(module.parameters())
    trainable = _count(parameter for parameter in parameters if parameter.requires_grad)
    fixed = _count(parameter for parameter in parameters if not parameter.requires_grad)
    yield f"Parameters: {_count(parameters)}, of which trainable: {trainable}, not trainable: {fixed}"
    size = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(module) if not is_lazy(tensor))
    yield f"Size of parameters and buffers: {_size(size)}"
    if forward is not None:
        yield f"Size of the layers' outputs for this input: {_size(forward.output_bytes)}"
        yield f"Multiply-adds of this input: {forward.multiply_adds:,}"
