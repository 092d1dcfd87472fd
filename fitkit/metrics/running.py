"""The running values of the metrics of one run; how they are summed up stands in gathering.py and objects.py."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor

from fitkit._types import Structure
from fitkit.batch import copied, mapped
from fitkit.metrics.gathering import HELD_BATCHES, Gathering
from fitkit.metrics.objects import TorchmetricsMetric

# What is updated together, under one or more log keys of one output.
MetricGroup = Gathering | TorchmetricsMetric


@final
class RunningMetrics:
    """Running values over all batches since `reset`, the same for any slicing of the data into batches.

    Made by `CompiledMetrics.start`; two of them share nothing, so runs may be nested or interleaved. Taking in a batch
    costs little: for metrics by name batches wait, and many are summed up at once. Metrics that compare all
    items with each other ("auroc", "average_precision", "spearman"; "cosine_similarity"; what a user's torchmetrics
    metric keeps in lists) keep every row on the device until reset.

    Args:
        names: all log keys in order.
        groups: each with the index of its output.
        outputs: how many outputs there are.
        shared: whether several metrics of the user's are given the same, so that each needs copies of its own.
    """

    def __init__(
        self, names: Sequence[str], groups: Sequence[tuple[int, MetricGroup]], outputs: int, *, shared: bool = False
    ) -> None:
        self._shared = shared
        self.names = list(names)
        self._groups = list(groups)
        self._outputs = outputs

    def update(
        self,
        outputs: Sequence[Structure],
        targets: Sequence[Structure],
        sample_weight: Sequence[Tensor | None] | None,
        *,
        are_kept: bool = False,
    ) -> None:
        """Takes in one batch.

        Args:
            outputs: one entry per output, detached and on the device; callables may get whole structures.
            targets: one entry per output.
            sample_weight: for ``weighted_metrics``, one entry per output of shape ``(N,)`` or the items' shape; None
                where all samples weigh 1.
            are_kept: whether nobody writes into any of them afterwards; for metrics by name.

        Raises:
            ValueError: the outputs are not those of compile, or a metric cannot read its output and target.
        """
        if not self._groups:
            return
        if len(outputs) != self._outputs or len(targets) != self._outputs:
            raise ValueError(
                f"Expected {self._outputs} output(s) as compile was told, received {len(outputs)} outputs and "
                f"{len(targets)} targets. With several outputs give a loss for each, compile(loss=[...]) or "
                "compile(loss={name: ...}), and metrics in the same structure."
            )
        for index, group in self._groups:
            weight = None if sample_weight is None else sample_weight[index]
            output, target = outputs[index], targets[index]
            if isinstance(group, Gathering) and group.by_name:
                group.update(output, target, weight, are_kept=are_kept)
                continue
            if self._shared:
                output, target = copied(output), copied(target)
            group.update(output, target, weight)

    def expect(self, batch_bytes: int) -> None:
        """Says how large batches are, by which it is decided how many outputs wait."""
        for _, group in self._groups:
            group.expect(batch_bytes)

    @property
    def room(self) -> int:
        """How many batches like the latest may wait before `update`, all of them by name."""
        return min((group.room for _, group in self._groups if isinstance(group, Gathering)), default=HELD_BATCHES)

    def compute(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """The values over all batches since reset, as 0-d tensors on the device, in the order of `names`.

        Args:
            names: the log keys that are wanted; None for all. Others are not computed.

        Returns:
            The values by log key; empty when nothing was taken in.

        Raises:
            ValueError: a metric of the user's gives something else than one number.
        """
        wanted = set(self.names if names is None else names)
        return self._in_order(group.compute(wanted) for _, group in self._groups if wanted.intersection(group.keys))

    def states(self) -> list[dict[str, Any]]:
        """What `compute_across` needs of this process, on the CPU."""
        return [mapped(torch.Tensor.cpu, group.state()) for _, group in self._groups]

    def compute_across(self, everywhere: Sequence[list[dict[str, Any]]]) -> dict[str, Tensor]:
        """The values over the data of several processes, to be called by each of them.

        Args:
            everywhere: the `states` of each.
        """
        of_groups = zip(self._groups, zip(*everywhere, strict=True), strict=True)
        return self._in_order(group.compute_across(states, self.names) for (_, group), states in of_groups)

    def _in_order(self, computed: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
        values = {name: value for group in computed for name, value in group.items()}
        return {name: values[name] for name in self.names if name in values}

    def reset(self) -> None:
        """Starts anew, as at the beginning of an epoch."""
        for _, group in self._groups:
            group.reset()

    def state_dict(self) -> dict[str, Any]:
        """All that is kept, as nested dicts and lists of tensors, numbers and strings."""
        return {"names": list(self.names), "parts": [group.waiting_state() for _, group in self._groups]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where the state was made.

        Raises:
            ValueError: the state is of other metrics, or of none; it names the metrics.
        """
        if list(state["names"]) != self.names:
            raise ValueError(f"Expected the running values of {self.names}, received those of {list(state['names'])}.")
        for (_, group), kept in zip(self._groups, state["parts"], strict=True):
            with _naming(group):
                group.load_state(kept)

    def check_loaded(self) -> None:
        """Refuses a state of a file that no values come of; it is called once, after `load_state_dict`.

        Raises:
            ValueError: it names the metrics.
        """
        for _, group in self._groups:
            with _naming(group):
                group.check_loaded()


@contextmanager
def _naming(group: MetricGroup) -> Iterator[None]:
    """Says for whatever is raised about the state of metrics which they are."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"the running values of {', '.join(map(repr, group.keys))} are none: {kind}{error}") from error
