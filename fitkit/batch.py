"""What a batch is: inputs, targets and weights; how many samples it holds; how a module is called on it."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fitkit.errors import add_note, show


@dataclass(frozen=True)
class Placed:
    """A batch that is on the device already.

    Attributes:
        on_device: the batch.
        on_host: the same on the host, or of it the targets alone, ``(None, y)``: what is counted here asks the device
            nothing.
    """

    on_device: Any
    on_host: Any


@dataclass(frozen=True)
class Share:
    """What one of several processes has of a batch.

    Attributes:
        batch: its part; None where it has none of the samples. Where the module is sharded, one sample then stands in.
        samples: in its part, that count.
        of: samples in the whole batch.
    """

    batch: Any
    samples: int
    of: int


def unpack(batch: Any) -> tuple[Any, Any, Any]:
    """x, y and sample_weight of a batch; a batch that is neither tuple nor list is x.

    Raises:
        ValueError: a tuple or list of none or of more than three.
    """
    if type(batch) is tuple and len(batch) == 2:  # the usual case
        return batch[0], batch[1], None
    if not isinstance(batch, (tuple, list)) or isinstance(batch, PackedSequence):
        return batch, None, None
    parts = len(batch)
    if parts == 2:
        return batch[0], batch[1], None
    if parts == 1:
        return batch[0], None, None
    if parts == 3:
        return batch[0], batch[1], batch[2]
    if parts and all(isinstance(part, (int, float)) for part in batch):
        raise ValueError(
            f"Expected batches of tensors, received a {type(batch).__name__} of {parts} numbers. Make lists of numbers "
            "an array, with torch.tensor(...) or numpy.array(...)."
        )
    raise ValueError(
        f"Expected batches of x, (x, y) or (x, y, sample_weight), received a {type(batch).__name__} of {parts}. Nest "
        "several inputs, ((a, b), y), or override training_step, which is given the batch as it is."
    )


def split(batch: Any, size: int) -> list[Any]:
    """The batch in parts of at most that many samples.

    Every tensor whose first dimension is the number of samples is cut; anything else goes with each part.

    Raises:
        TypeError: a batch object of another library, which only its library can cut.
    """
    samples = samples_of(batch)
    if samples <= size:
        return [batch]
    if not any(True for _ in tensors(batch)):
        raise TypeError(
            f"Expected a batch of tensors to split by micro_batch_size, received {show(batch)}. Let the loader give "
            "smaller batches and use accumulate_grad_batches."
        )
    return [_rows(batch, samples, start, start + size) for start in range(0, samples, size)]


def part_of(batch: Any, samples: int, start: int, stop: int) -> Any:
    """The samples from start to stop of a batch that has so many; what is no tensor of so many rows stays as it is.

    Raises:
        TypeError: a batch object of another library, which only its library can cut.
    """
    if not any(True for _ in tensors(batch)):
        raise TypeError(
            f"Expected a batch of tensors, of which each process takes its part, received {show(batch)}. Pass a "
            "Dataset, of which each process loads its samples alone."
        )
    return _rows(batch, samples, start, stop)


def _rows(batch: Any, samples: int, start: int, stop: int) -> Any:
    def rows(tensor: Tensor) -> Tensor:
        # Detached, so that a module which works in place on one part ties no other part to its graph.
        return tensor[start:stop].detach() if tensor.dim() > 0 and tensor.shape[0] == samples else tensor

    return mapped(rows, batch)


def described(value: Any) -> Any:
    """The same structure with tensors that have shape and type but no memory (torch's "meta" device).

    Raises:
        TypeError: an object of another library, of which only its library knows what is in it.
    """
    if isinstance(value, Tensor):
        return torch.empty_like(value, device="meta", requires_grad=False)
    if isinstance(value, Mapping):
        return {key: described(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields") and not isinstance(value, PackedSequence):
        return type(value)(*map(described, value))
    if type(value) in (tuple, list):
        return type(value)(map(described, value))
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"Expected tensors and nests of them, received {show(value)}.")


def zeros(description: Any, device: torch.device) -> Any:
    """Zeros on the device for each tensor that `described` noted."""
    return mapped(partial(torch.zeros_like, device=device), description)


def copied(batch: Any) -> Any:
    """The batch with copies of its tensors."""
    return mapped(Tensor.clone, batch)


def mapped(function: Callable[[Tensor], Any], structure: Any) -> Any:
    """The structure with the function applied to each tensor in its tuples, lists and mappings."""
    if isinstance(structure, Tensor):
        return function(structure)
    if isinstance(structure, Mapping):
        return {key: mapped(function, item) for key, item in structure.items()}
    if isinstance(structure, tuple) and hasattr(structure, "_fields"):
        return type(structure)(*(mapped(function, item) for item in structure))
    if isinstance(structure, (tuple, list)):
        return type(structure)(mapped(function, item) for item in structure)
    if isinstance(structure, Placed):
        return Placed(mapped(function, structure.on_device), mapped(function, structure.on_host))
    return structure


def forward(module: Callable[..., Any], x: Any) -> Any:
    """`call`, whose errors say what the module was called on."""
    try:
        return module(x) if isinstance(x, Tensor) else call(module, x)
    except Exception as error:
        note_input(error, x)
        raise


def note_input(error: Exception, x: Any) -> None:
    """Says in an error of a module what it was called on."""
    add_note(error, f"The module was called on {_shown(x)}.")


def _shown(x: Any) -> str:
    if isinstance(x, Tensor):
        return f"{str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}"
    if isinstance(x, Mapping):
        return ", ".join(f"{key}={_shown(value)}" for key, value in x.items())
    if isinstance(x, (tuple, list)) and not isinstance(x, PackedSequence):
        return f"({', '.join(map(_shown, x))})"
    return show(x)


def call(module: Callable[..., Any], x: Any) -> Any:
    """The module's output: ``module(x)``, ``module(*x)`` for a tuple or list, ``module(**x)`` for a mapping."""
    if isinstance(x, Tensor):
        return module(x)
    positional: Sequence[Any] = ()
    keywords: Mapping[str, Any] = {}
    if isinstance(x, Mapping):
        keywords = x
    elif isinstance(x, (tuple, list)) and not isinstance(x, PackedSequence):
        positional = x
    else:
        positional = (x,)
    try:
        return module(*positional, **keywords)
    except TypeError as error:
        _explain_arguments(error, module, positional, keywords)
        raise


def _explain_arguments(
    error: TypeError, module: Callable[..., Any], positional: Sequence[Any], keywords: Mapping[str, Any]
) -> None:
    """Says below the error how x became arguments, if they are not those of the module's forward."""
    forward = getattr(module, "forward", module)
    try:
        takes = inspect.signature(forward)
    except (TypeError, ValueError):
        return
    try:
        takes.bind(*positional, **keywords)
    except TypeError:
        given = f"the keywords {', '.join(map(str, keywords))}" if keywords else f"{len(positional)} arguments"
        add_note(
            error,
            f"The inputs went to the module as {given}; its forward takes ({', '.join(takes.parameters)}). A dict goes "
            "there as keywords, a list as arguments. Targets stand beside the inputs, (inputs, targets), also in a "
            "Dataset and a DataLoader. For batches of another form override training_step, validation_step and "
            "predict_step, which are given them as they are.",
        )


def tensors(structure: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and mappings."""
    if isinstance(structure, Tensor):
        yield structure
    elif isinstance(structure, Mapping):
        for value in structure.values():
            yield from tensors(value)
    elif isinstance(structure, (tuple, list)):
        for value in structure:
            yield from tensors(value)
    elif isinstance(structure, Placed):
        yield from tensors(structure.on_device)


def samples_of(batch: Any) -> int:
    """The number of samples in a batch that may be placed."""
    x, y, _ = unpack(batch.on_device if isinstance(batch, Placed) else batch)
    return count_samples(x, y)


def count_samples(x: Any, y: Any) -> int:
    """The number of samples in a batch: the first dimension of the targets, or the one most inputs share.

    An object of another library says it by ``num_graphs``, ``batch_size`` or its length; one that says nothing
    counts as 1.
    """
    if isinstance(y, Tensor) and y.dim() > 0:
        return y.shape[0]
    lengths = Counter(tensor.shape[0] for tensor in tensors(y if y is not None else x) if tensor.dim() > 0)
    if not lengths and y is not None:
        lengths = Counter(tensor.shape[0] for tensor in tensors(x) if tensor.dim() > 0)
    if lengths:
        return lengths.most_common(1)[0][0]
    for name in ("num_graphs", "batch_size"):
        said = getattr(x, name, None)
        if isinstance(said, int):
            return said
    return len(x) if hasattr(type(x), "__len__") and not isinstance(x, (Tensor, Mapping)) else 1


def own_loss(output: Any) -> tuple[Tensor, Any]:
    """The loss that a module returned by itself, as ``.loss`` or ``["loss"]``, and the weight beside it (or None).

    Raises:
        ValueError: there is none.
    """
    read = output.get if isinstance(output, Mapping) else partial(getattr, output)
    loss = read("loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(
            "Expected a module whose output has .loss or ['loss'], since compile was given loss=None; received output "
            f"{show(output)}. Pass compile(loss=...), or override training_step."
        )
    return loss, read("weight", None)


def on_cpu(output: Any) -> Any:
    """Copies of an output's tensors on the CPU, in its structure; what has no batch dimension is None."""
    if isinstance(output, Tensor):
        if output.dim() == 0:
            return None
        # A module may write its next output where it wrote this one.
        detached = output.detach() if output.requires_grad else output
        return detached.clone() if output.is_cpu else detached.cpu()
    if isinstance(output, Mapping):
        return {key: on_cpu(value) for key, value in output.items()}
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*map(on_cpu, output))
    if isinstance(output, (tuple, list)):
        return type(output)(map(on_cpu, output))
    return None


def join(outputs: Sequence[Any]) -> Any:
    """The outputs of all batches as one, joined along the batch dimension; what is None is left out.

    Raises:
        ValueError: outputs whose further dimensions differ from batch to batch.
    """
    first = outputs[0]
    if isinstance(first, Tensor):
        shapes = {output.shape[1:] for output in outputs}
        if len(shapes) > 1:
            raise ValueError(
                "Expected outputs of one shape behind the batch dimension, received "
                f"{sorted(map(tuple, shapes))}. Pad them in predict_step, or predict batch by batch with "
                "predict_on_batch."
            )
        return torch.cat(list(outputs))
    if isinstance(first, Mapping):
        joined = {key: join([output[key] for output in outputs]) for key in first}
        return {key: value for key, value in joined.items() if value is not None}
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(*(join(column) for column in zip(*outputs, strict=True)))
    if isinstance(first, (tuple, list)):
        columns = [join(column) for column in zip(*outputs, strict=True)]
        return type(first)(column for column in columns if column is not None)
    return None
