"""The running numbers of one run: losses, metrics, and what the user's step returned beside its loss.

They stay on the device until somebody asks; how a mean is kept is in logs.py, how metrics are in metrics/.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fitkit._types import OutputMeaning
from fitkit.batch import copied, mapped, tensors
from fitkit.computation import Compiled, Outcome, UserStep
from fitkit.distributed import gather
from fitkit.gradients import GradientNorms
from fitkit.logs import Tally, joined
from fitkit.metrics import RunningMetrics
from fitkit.output_losses import OutputLosses
from fitkit.windows import weighted_sum

# How many batches are put off, to be added one after the other: what is done between two passes of a module finds its
# code and its data out of the cache, and costs several times what it costs in a row.
MOST_PUT_OFF = 64

# What is kept of a batch that is put off: loss and weight, its index; where there are metrics output, target and sample
# weights. The module, the step and a loader write into none of it any more.
PutOff = tuple[Tensor, float | Tensor, int, Tensor | None, Any, Any]


@dataclass
class Numbers:
    """The running numbers of one run: losses, metrics and what the user's step returned.

    Attributes:
        compiled: what `Model.compile` made.
        several: the losses where each output has its own; None for one loss, also that of a user's step.
        adds_up: whether the one loss is a sum over samples.
        makes_losses: whether the losses are torch's own, new tensors that nobody writes into.
        owns_targets: whether nobody writes into targets and sample weights after their step.
        tally: running means.
        metrics: running metrics.
        last: the latest batch's loss.
        norms: of the gradients, where they are tracked.
        is_shared: whether an epoch's numbers are those of all processes together; until its end they are those of this
            process's samples.
    """

    compiled: Compiled
    several: OutputLosses | None
    adds_up: bool
    makes_losses: bool
    owns_targets: bool
    tally: Tally
    metrics: RunningMetrics
    last: Tensor | None = None
    norms: GradientNorms | None = None
    is_shared: bool = False

    @classmethod
    def start(cls, compiled: Compiled, user_step: UserStep | None, *, owns_batches: bool) -> Numbers:
        """Empty numbers for a new run; they share nothing with those of any other run."""
        losses = compiled.losses
        own = OutputMeaning(ignore_index=-100)  # without a compiled loss: torch's own default, and Hugging Face's
        meanings = [own] if losses is None else losses.meanings
        several = None if losses is None or losses.names is None or user_step is not None else losses
        single = None if losses is None or user_step is not None else losses.losses[0]
        adds_up = single is not None and single.adds_up
        makes_losses = user_step is None and losses is not None and losses.are_torchs
        owns_targets = owns_batches and user_step is None
        metrics = compiled.metrics.start(meanings, compiled.device, owns_targets=owns_targets)
        return cls(compiled, several, adds_up, makes_losses, owns_targets, Tally(compiled.device), metrics)

    def __post_init__(self) -> None:
        # Nothing can be refused in a batch that is like the one before, where torch's loss and metrics by name see it.
        self._may_put_off = self.makes_losses and self.several is None and self.compiled.metrics.are_by_name
        self._measures = bool(self.metrics.names)
        self._put_off: list[PutOff] = []
        # How many batches may be put off; where they are measured only those whose output and target have these shapes.
        self._most_put_off = 0
        self._put_off_shapes: tuple[torch.Size, torch.Size] | None = None

    def reset(self) -> None:
        """Starts an epoch."""
        self._put_off.clear()
        self._most_put_off = 0
        self.tally.reset()
        self.metrics.reset()
        self.last = None
        if self.norms is not None:
            self.norms.reset()

    def state_dict(self) -> dict[str, Any]:
        """All that is kept; making it moves no number's last digit."""
        self._settle()
        norms = None if self.norms is None else self.norms.state_dict()
        return {
            "tally": self.tally.state_dict(),
            "metrics": self.metrics.state_dict(),
            "last": self.last,
            "norms": norms,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where the state was made.

        Raises:
            ValueError: the state is of other numbers.
        """
        if (self.norms is None) != (state["norms"] is None):
            raise ValueError("Expected a state with gradient norms where they are tracked, and only there.")
        self._put_off.clear()
        self._most_put_off = 0
        self.tally.load_state_dict(state["tally"])
        self.metrics.load_state_dict(state["metrics"])
        self.last = None if state["last"] is None else state["last"].to(self.compiled.device)
        if self.norms is not None:
            self.norms.load_state_dict(state["norms"])

    def add(self, outcome: Outcome, index: int, batch: Any = None) -> None:
        """Takes one batch in, or a part of it.

        Args:
            outcome: what forward and loss made of it.
            index: of the batch in the epoch.
            batch: itself; of the first one the size is looked at.
        """
        loss, weight, _ = outcome.parts[0]
        if self._most_put_off > 1 and (not self._measures or _shapes(outcome) == self._put_off_shapes):
            self.last = loss = loss.detach()
            output = target = weights = None
            if self._measures:
                output, target, weights = (
                    outcome.outputs[0].detach().clone(),
                    outcome.targets[0],
                    outcome.sample_weights,
                )
                if not self.owns_targets:
                    target, weights = target.clone(), copied(weights)
            self._put_off.append((loss, weight, index, output, target, weights))
            if len(self._put_off) >= self._most_put_off:
                self._settle()
            return
        self._settle()
        if index == 0 and self._measures:
            self.metrics.expect(sum(tensor.nbytes for tensor in tensors(batch)))
        # First what may run out of memory: micro_batch_size="auto" comes again then, with smaller parts.
        if self._measures:
            self._add_to_metrics(outcome)
        if self.several is None:
            self.last = loss.detach() if self.makes_losses else loss.detach().clone()
            self.tally.mean("loss", adds_up=self.adds_up).add(self.last, weight, index)
        else:
            self._add_several(self.several, outcome, index)
        if outcome.extra:
            for name, value in outcome.extra.items():
                number = value.detach().clone().reshape(()) if isinstance(value, Tensor) else torch.tensor(float(value))
                self.tally.mean(name).add(number.to(self.compiled.device), outcome.weight, index)
        if self._may_put_off:
            self._most_put_off = min(MOST_PUT_OFF, self.metrics.room)
            self._put_off_shapes = _shapes(outcome)

    def _settle(self) -> None:
        """Adds what was put off, in its order; sums are the same as if it had been added at once."""
        put_off, self._put_off = self._put_off, []
        if not put_off:
            return
        add, update = self.tally.mean("loss", adds_up=self.adds_up).add, self.metrics.update
        for loss, weight, index, output, target, sample_weights in put_off:
            add(loss, weight, index)
            if output is not None:
                update([output], [target], sample_weights, are_kept=True)

    def _add_several(self, losses: OutputLosses, outcome: Outcome, index: int) -> None:
        assert losses.names is not None  # they are named where there are several
        for position, part in zip(losses.active, outcome.parts, strict=True):
            loss = losses.losses[position]
            mean = self.tally.mean(f"{losses.names[position]}_loss", adds_up=loss is not None and loss.adds_up)
            mean.add(part.value.detach() if self.makes_losses else part.value.detach().clone(), part.weight, index)
        total = weighted_sum(outcome.parts, [losses.weights[position] for position in losses.active])
        self.last = None if total is None else total.detach()

    def _add_to_metrics(self, outcome: Outcome) -> None:
        if not outcome.targets:
            raise ValueError(
                f"metrics={self.metrics.names} need outputs and targets, which a step of your own or a module "
                'that returns its loss does not show. Return {"loss": ..., "output": ..., "target": ...} from the '
                "step, or return the metric's value by its name, or compile without metrics."
            )
        outputs = [mapped(Tensor.detach, output) for output in outcome.outputs]
        self.metrics.update(outputs, outcome.targets, outcome.sample_weights)

    def values(self) -> dict[str, Tensor]:
        """Every running number as a 0-d tensor on the device, "loss" first."""
        self._settle()
        means = self.tally.values()
        values = {"loss": self.loss(means), **means}
        return {**values, **self.metrics.compute()}

    def values_and_first_bad(self) -> tuple[dict[str, Tensor], Tensor]:
        """The numbers of an epoch that is complete, and the index of its first batch whose loss is not finite.

        Where processes share the batches, each of them has to call it.
        """
        if not self.is_shared:
            return self.values(), self.first_bad()
        self._settle()
        everywhere = gather((self.tally.sums(), self.metrics.states()))
        means, first_bad = joined([sums for sums, _ in everywhere], self.tally.device)
        measured = self.metrics.compute_across([states for _, states in everywhere])
        values = {"loss": self.loss(means), **means, **measured}
        return values, first_bad

    def loss(self, means: Mapping[str, Tensor]) -> Tensor:
        """The total loss: the mean, or the weighted sum of the outputs' means."""
        losses = self.several
        if losses is None or losses.names is None:
            return means["loss"]
        total = torch.zeros((), device=self.compiled.device)
        for position in losses.active:
            total = total + losses.weights[position] * means[f"{losses.names[position]}_loss"]
        return total

    def names(self) -> list[str]:
        """The keys that batch logs have now."""
        names = ["loss", *(name for name in self.tally.means if name != "loss"), *self.metrics.names]
        if self.last is not None:
            names.append("batch_loss")
        if self.norms is not None and self.norms.last is not None:
            names += self.norms.names
        return names

    def number(self, name: str) -> Tensor:
        """The running number of that name as a 0-d tensor on the device; KeyError for another name."""
        self._settle()
        if name == "loss":
            return self.loss(self.tally.values())
        if name in self.tally.means:
            return self.tally.means[name].value()
        if name in self.metrics.names:
            return self.metrics.compute([name])[name]
        if name == "batch_loss" and self.last is not None:
            return self.last
        if self.norms is not None and self.norms.last is not None and name in self.norms.names:
            return self.norms.last[self.norms.names.index(name)]
        raise KeyError(name)

    def first_bad(self) -> Tensor:
        """The index of the first batch with a loss that is not finite; -1 when there is none."""
        self._settle()
        judged = ["loss"]
        if self.several is not None and self.several.names is not None:
            judged = [f"{self.several.names[position]}_loss" for position in self.several.active]
        found = [self.tally.mean(name).first_bad() for name in judged]
        indices = torch.stack([index.to(torch.int64) for index in found])
        first = torch.where(indices < 0, torch.iinfo(torch.int64).max, indices).min()
        return torch.where((indices < 0).all(), -1, first)


def _shapes(outcome: Outcome) -> tuple[torch.Size, torch.Size]:
    """The shapes of the one output of a loss of torch's, and of its target."""
    return outcome.outputs[0].shape, outcome.targets[0].shape
