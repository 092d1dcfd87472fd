"""Where a script has its batches from: arrays that are saved beside it, or a function that is left to be filled in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from fitkit.batch import Placed, unpack
from fitkit.data import EpochPlan
from fitkit.data.arrays import ArrayBatches
from fitkit.data.loaders import LoaderBatches
from fitkit.data.tensor_loaders import TensorLoaderBatches
from fitkit.script.expressions import fold, unknown
from fitkit.transfer import Transfer

# Arrays of more bytes are not copied: a script of some kilobytes is not to fill a disk.
MOST_BYTES = 2**30


@final
@dataclass(frozen=True)
class Source:
    """The batches of training or of validation, for a script.

    Attributes:
        name: "training" or "validation".
        lines: what makes them in the script, and how many of them an epoch takes.
        saved: the tensors that are saved, None where there is something to fill in.
        inputs: how the inputs of a batch are named in the script.
        keywords: the names by which the module takes the inputs, where it does.
        y: targets such as they come: all of them where they are saved, of a batch elsewhere.
        w: sample weights in the same way; None where there are none.
        casts: what of a batch is given to the module in another dtype, by name.
        batches: what the batch loop runs over.
    """

    name: str
    lines: str
    saved: list[Tensor] | None
    inputs: tuple[str, ...]
    keywords: tuple[str, ...] | None
    y: Tensor
    w: Tensor | None
    casts: dict[str, torch.dtype]
    batches: str

    @property
    def weighted(self) -> bool:
        """Whether sample weights come with the batches."""
        return self.w is not None

    @property
    def batch(self) -> str:
        """The names of what a batch holds."""
        return ", ".join([*self.inputs, "y", *(["w"] if self.weighted else [])])


def source_of(plan: EpochPlan, transfer: Transfer, given: Any, name: str, limit: str | None, counted: bool) -> Source:
    """How a script gets these batches.

    Args:
        plan: the batches of an epoch.
        transfer: their way to the module.
        given: the data as fit was given it.
        name: "training" or "validation".
        limit: the expression of how many batches an epoch takes; None takes all.
        counted: whether the script needs to know how many there are.

    Raises:
        ValueError: batches that no loader of a plain script gives.
    """
    argument = "data" if name == "training" else "validation_data"
    data = plan.data
    if data.length is None or not data.again:
        raise unknown(argument, "data without a length, or that can be read once", "Pass a DataLoader, or arrays.")
    arguments = _loader_arguments(data)
    fills_in = arguments is None or _bytes(data) > MOST_BYTES
    x, y, w = unpack(transfer(first_batch(data)).on_device if fills_in else _whole(data, transfer))
    inputs, keywords, tensors = _inputs(x, argument)
    if not isinstance(y, Tensor) or not isinstance(w, (Tensor, type(None))):
        raise unknown(argument, "batches that are not (x, y) with one tensor y", "Write the loop by hand.")
    saved = [*tensors, y, *([] if w is None else [w])]
    casts = {}
    if fills_in:
        if isinstance(given, DataLoader) and isinstance(data, LoaderBatches) and data.loader is not given:
            raise unknown("overfit_pct", "a DataLoader whose order it changes", "Pass arrays or a Dataset.")
        lines = _left_open(name, given, data)
        casts = _casts(data, given, argument, [*tensors, y])
    else:
        tensors_text = f'TensorDataset(*data["{name}"])'
        lines = [fold(f"{name} = DataLoader({', '.join([tensors_text, *(arguments or [])])})")]
    count = "batches" if name == "training" else "validation_batches"
    if limit is not None or counted:
        lines.append(f"{count} = {limit or f'len({name})'}")
    return Source(
        name=name,
        lines="\n".join(lines),
        saved=None if fills_in else saved,
        inputs=inputs,
        keywords=keywords,
        y=y,
        w=w,
        casts=casts,
        batches=name if limit is None else f"islice({name}, {count})",
    )


def _loader_arguments(data: Any) -> list[str] | None:
    """The arguments beside its TensorDataset that a DataLoader of these batches takes; None where there are none."""
    if isinstance(data, ArrayBatches):
        return [f"batch_size={data.extent[1]}", *(["shuffle=True"] if data.shuffles else [])]
    if not isinstance(data, (LoaderBatches, TensorLoaderBatches)):
        return None
    loader, batching = data.loader, data.loader.batch_sampler
    if (
        type(loader) is not DataLoader
        or type(loader.dataset) is not TensorDataset
        or loader.collate_fn is not default_collate
        or type(batching) is not BatchSampler
        or loader.generator is not None
    ):
        return None
    sampler: Any = batching.sampler
    shuffles = type(sampler) is RandomSampler and not sampler.replacement and sampler.generator is None
    in_order = type(sampler) is SequentialSampler or sampler == range(len(loader.dataset))
    if not (shuffles and len(sampler) == len(loader.dataset)) and not in_order:
        return None
    arguments = [f"batch_size={batching.batch_size}", *(["shuffle=True"] if shuffles else [])]
    return [*arguments, *(["drop_last=True"] if batching.drop_last else [])]


def _bytes(data: Any) -> int:
    """Bytes of arrays, or of the tensors of a loader."""
    return data.nbytes if isinstance(data, ArrayBatches) else sum(each.nbytes for each in data.loader.dataset.tensors)


def _whole(data: Any, transfer: Transfer) -> Any:
    """All the data as one batch, in the dtypes in which the module is given it."""
    if isinstance(data, ArrayBatches):
        return transfer(first_batch(data.in_order().resized(data.samples))).on_device
    pairs = zip(data.loader.dataset.tensors, transfer(first_batch(data)).on_device, strict=True)
    return tuple(tensor.to(one.dtype) for tensor, one in pairs)


def first_batch(data: Any) -> Any:
    """The first batch of an epoch; random numbers that this draws are put back by `Model.to_script`."""
    first = next(iter(data))
    return first.on_device if isinstance(first, Placed) else first


def _inputs(x: Any, argument: str) -> tuple[tuple[str, ...], tuple[str, ...] | None, list[Tensor]]:
    """The names of a batch's inputs, the keywords by which the module takes them, and the tensors."""
    if isinstance(x, Tensor):
        return ("x",), None, [x]
    keywords = tuple(x) if isinstance(x, Mapping) else None
    tensors = list(x.values()) if isinstance(x, Mapping) else list(x) if isinstance(x, (tuple, list)) else []
    if not tensors or not all(isinstance(each, Tensor) for each in tensors):
        raise unknown(argument, "inputs that are neither tensors nor a list or dict of them", "Write the loop by hand.")
    return tuple(f"x{index + 1}" for index in range(len(tensors))), keywords, tensors


def _left_open(name: str, given: Any, data: Any) -> list[str]:
    """The lines that are left to who has the data."""
    if isinstance(data, ArrayBatches):
        given_to_loader = ", ".join(["TensorDataset(*arrays)", *(_loader_arguments(data) or [])])
        return [
            "arrays = ...  # FILL THIS IN: the tensors (x, y), which are too large to be copied",
            f"{name} = DataLoader({given_to_loader})",
        ]
    if not isinstance(data, LoaderBatches) or isinstance(given, DataLoader):
        return [f"{name} = ...  # FILL THIS IN: the {type(given).__name__} that fit was given"]
    loader: Any = data.loader
    # Workers draw numbers of their own.
    if loader.collate_fn is not default_collate or loader.num_workers:
        return [f"{name} = ...  # FILL THIS IN: a DataLoader as fit made it, with dataloader_options"]
    batching = loader.batch_sampler
    arguments = [
        f"batch_size={batching.batch_size}",
        *(["shuffle=True"] if type(batching.sampler) is RandomSampler else []),
        *(["drop_last=True"] if batching.drop_last else []),
    ]
    what = f"the {type(given).__name__}"
    if given is not loader.dataset and isinstance(loader.dataset, Subset):  # of validation_split
        what = f"samples {loader.dataset.indices[0]} to {loader.dataset.indices[-1]} of {what}"
    return [
        f"dataset = ...  # FILL THIS IN: {what} that fit was given",
        f"{name} = DataLoader(dataset, {', '.join(arguments)})",
    ]


def _casts(data: Any, given: Any, argument: str, tensors: Sequence[Tensor]) -> dict[str, torch.dtype]:
    """What comes in another dtype than fit gives to the module: Python's floats are collated to float64.

    Args:
        data: the batches.
        given: what fit was given, where they are no loader's.
        argument: of fit.
        tensors: inputs and targets of a batch as the module is given them.
    """
    if isinstance(data, ArrayBatches):
        return {}
    x, y, _ = unpack(next(iter(data.loader if isinstance(data, (LoaderBatches, TensorLoaderBatches)) else given)))
    names, _, raw = _inputs(x, argument)
    if not isinstance(y, Tensor):
        raise unknown(argument, "batches whose targets are no tensor", "Let it give tensors.")
    pairs = zip([*names, "y"], [*raw, y], tensors, strict=True)
    return {name: tensor.dtype for name, one, tensor in pairs if one.dtype != tensor.dtype}


def tensors_saved(sources: list[Source]) -> dict[str, list[Tensor]]:
    """What goes to the data file."""
    return {
        each.name: [tensor.detach().cpu().contiguous() for tensor in each.saved]
        for each in sources
        if each.saved is not None
    }


def may_be_ignored(source: Source, ignored: int | None) -> bool:
    """Whether a batch may have targets that the loss leaves out."""
    if ignored is None or source.y.is_floating_point():
        return False
    return source.saved is None or bool((source.y == ignored).any())


def some_class(source: Source) -> int:
    """The largest class among the targets."""
    return int(torch.max(source.y))
