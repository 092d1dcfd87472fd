"""The learning rate range test: a short training whose learning rate grows, to see where it is too small and too large.

`RangeTest` is the callback that raises the rate batch by batch, `LearningRateCurve` is what it saw, and `undone` puts
everything back that a training changes. The training itself is an ordinary fit.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import torch
from torch.optim import Optimizer

from fitkit.callbacks import Callback
from fitkit.computation import Compiled
from fitkit.data import kept_generators
from fitkit.device import copy_back, kept_random_state
from fitkit.errors import check_integer, check_number, needing
from fitkit.gradients import kept_gradients
from fitkit.optimization import learning_rates, set_learning_rates
from fitkit.steps import held_parameters
from fitkit.summary import kept_buffers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# How much of itself the running loss keeps at each batch.
MEMORY = 0.9
# The standard deviation of the smoothing, as a part of the whole curve.
REACH = 1 / 50
# How far above its lowest the running loss may be, in sizes of a loss.
EXPLOSION = 3.0
FEWEST_STEPS = 10


@final
@dataclass(frozen=True)
class LearningRateCurve:
    """The loss at each learning rate of a range test.

    Source: Leslie N. Smith, "Cyclical Learning Rates for Training Neural Networks", 2015, section 3.3.

    Attributes:
        rates: the learning rates that were tried, growing by equal factors. Where the optimizer has groups of several
            rates, that of the group with the largest; the others keep their proportion to it.
        losses: of the batch that was trained on with each rate, before its step. The last one may be huge or NaN.

    Example:
        >>> curve = LearningRateCurve(
        ...     [1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0], [1.0, 0.99, 0.9, 0.6, 0.1, 0.4, 9.0]
        ... )
        >>> print(curve)
        Suggested learning rate: 0.1 (a tenth of 1, where the loss was lowest; it fell fastest at 0.1)
    """

    rates: list[float]
    losses: list[float]

    @property
    def smoothed(self) -> list[float]:
        """The losses without the noise of single batches; a mean over neighbours on both sides, so nothing shifts."""
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        if not finite:
            return list(self.losses)
        # An exploded loss would outweigh all its neighbours: it counts as no more than some of it.
        values = [min(loss, self._top) if math.isfinite(loss) else self._top for loss in self.losses]
        reach = max(len(values) * REACH, 0.1)
        means = []
        for center in range(len(values)):
            weights = [math.exp(-(((center - index) / reach) ** 2) / 2) for index in range(len(values))]
            means.append(math.fsum(map(float.__mul__, weights, values)) / math.fsum(weights))
        return means

    @property
    def suggestion(self) -> float | None:
        """A tenth of the rate at which the smoothed loss was lowest; None when it fell less than batches differ.

        The rule is fastai's "minimum" (``SuggestionMethod``): where the loss is lowest it is about to explode, and a
        tenth of that is safe and still learns fast.
        """
        lowest = self._lowest
        return None if lowest is None else self.rates[lowest] / 10

    @property
    def steepest(self) -> float | None:
        """The rate at which the smoothed loss fell fastest, before it was lowest; None as for `suggestion`."""
        lowest = self._lowest
        if lowest is None:
            return None
        smoothed = self.smoothed
        slopes = [smoothed[index + 1] - smoothed[index] for index in range(lowest)]
        return self.rates[slopes.index(min(slopes))]

    @property
    def _top(self) -> float:
        """As far above the first loss as the lowest is below it, and a tenth at least: more is an explosion."""
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        return finite[0] + max(finite[0] - min(finite), 0.1 * abs(finite[0]))

    @property
    def _lowest(self) -> int | None:
        """The index of the lowest smoothed loss; None when it is no lower than the noise would make one."""
        smoothed = self.smoothed
        lowest = smoothed.index(min(smoothed))
        deviations = [(loss - mean) ** 2 for loss, mean in zip(self.losses[:lowest], smoothed, strict=False)]
        noise = math.sqrt(math.fsum(deviations) / max(lowest, 1))
        return lowest if smoothed[0] - smoothed[lowest] > noise else None

    def plot(self) -> Figure:
        """Draws the loss against the learning rate, with the suggestion and the steepest point marked.

        Returns:
            A matplotlib Figure, which no window shows by itself; notebooks draw it.

        Raises:
            ImportError: matplotlib is not installed.
        """
        with needing("matplotlib", "plot", "LearningRateCurve.plot"):
            from fitkit.figures import ShownFigure
        figure = ShownFigure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot()
        smoothed = self.smoothed
        axes.plot(self.rates, self.losses, color="tab:blue", alpha=0.35, linewidth=1, label="loss of each batch")
        axes.plot(self.rates, smoothed, color="tab:blue", label="smoothed")
        if self.suggestion is not None and self.steepest is not None:
            label = f"suggestion: {self.suggestion:.2g}"
            axes.axvline(self.suggestion, color="tab:orange", linestyle="--", label=label)
            height = smoothed[self.rates.index(self.steepest)]
            axes.plot(self.steepest, height, "o", color="tab:red", label=f"steepest: {self.steepest:.2g}")
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss", title="Learning rate range test")
        finite = [loss for loss in self.losses if math.isfinite(loss)]
        if finite and self._top > min(finite):
            # The explosion at the end would flatten all that there is to see.
            axes.set_ylim(min(finite) - 0.1 * (self._top - min(finite)), self._top)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        return figure

    def __str__(self) -> str:
        if self.suggestion is None or self.steepest is None:
            return (
                "No learning rate to suggest: the loss did not fall clearly at any rate "
                f"from {self.rates[0]:.3g} to {self.rates[-1]:.3g}"
            )
        return (
            f"Suggested learning rate: {self.suggestion:.3g} (a tenth of {self.suggestion * 10:.3g}, where the loss "
            f"was lowest; it fell fastest at {self.steepest:.3g})"
        )


@final
class RangeTest(Callback):
    """Raises the learning rate from batch to batch, until the last rate or until the loss explodes.

    Args:
        start: the first learning rate.
        end: the last.
        steps: how many there are.

    Raises:
        TypeError: an argument is no number.
        ValueError: no rising rates, or too few.
    """

    def __init__(self, start: float, end: float, steps: int) -> None:
        super().__init__()
        self._start = check_number("start", start, least=0.0)
        self._end = check_number("end", end, least=0.0)
        self._steps = check_integer("steps", steps, least=FEWEST_STEPS)
        if not 0.0 < self._start < self._end:
            raise ValueError(f"Expected learning rates that rise from above 0, received start={start}, end={end}.")
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.is_finished = False
        self._running = 0.0
        self._lowest = math.inf

    def on_train_begin(self, logs: Mapping[str, float] | None = None) -> None:
        """Notes how the groups of the optimizer stand to each other."""
        given = learning_rates(self._optimizer)
        largest = max(given)
        self._shares = [rate / largest if largest else 1.0 for rate in given]

    def on_train_batch_begin(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Sets the next rate."""
        rate = self._start * (self._end / self._start) ** (len(self.rates) / (self._steps - 1))
        self.rates.append(rate)
        set_learning_rates(self._optimizer, [rate * share for share in self._shares])

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Notes the loss, and ends the test after the last rate or when the loss has exploded."""
        loss = float((logs or {})["batch_loss"])
        self.losses.append(loss)
        self.is_finished = len(self.losses) == self._steps or self._has_exploded(loss)
        if self.is_finished:
            self.model.stop_training = True

    @property
    def _optimizer(self) -> Optimizer:
        optimizer = self.model.optimizer
        assert optimizer is not None  # Model.find_learning_rate has checked it
        return optimizer

    def _has_exploded(self, loss: float) -> bool:
        """Whether the running loss is NaN, infinite, or far above its lowest."""
        self._running = MEMORY * self._running + (1 - MEMORY) * loss
        running = self._running / (1 - MEMORY ** len(self.losses))
        self._lowest = min(self._lowest, running)
        size = max(abs(self.losses[0]), abs(self._lowest))
        return not math.isfinite(running) or running > self._lowest + EXPLOSION * size


@contextmanager
def undone(compiled: Compiled, data: Any) -> Iterator[None]:
    """Puts back what a training inside changes: weights, buffers, gradients, the optimizer, random generators.

    Args:
        compiled: what is trained.
        data: a DataLoader's own generators are put back too.
    """
    parameters = held_parameters(compiled)
    weights = [(parameter, parameter.detach().clone()) for parameter in parameters]
    with ExitStack() as stack:
        stack.enter_context(kept_random_state(compiled.device))
        stack.enter_context(kept_generators(data))
        stack.enter_context(kept_gradients(parameters))
        stack.enter_context(torch.no_grad())
        stack.enter_context(kept_buffers(compiled.module))
        if compiled.optimizer is not None:
            stack.enter_context(_kept_optimizer(compiled.optimizer))
        scale = None if compiled.scaler is None else compiled.scaler.state_dict()
        try:
            with torch.enable_grad():
                yield
        finally:
            copy_back(weights)
            if compiled.scaler is not None and scale is not None:
                compiled.scaler.load_state_dict(scale)


@contextmanager
def _kept_optimizer(optimizer: Optimizer) -> Iterator[None]:
    """Leaves an optimizer's state and options as they were, its groups the same objects."""
    state = {parameter: copy.deepcopy(values) for parameter, values in optimizer.state.items()}
    groups = [
        {name: copy.deepcopy(value) for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]
    try:
        yield
    finally:
        optimizer.state.clear()
        optimizer.state.update(state)
        for group, options in zip(optimizer.param_groups, groups, strict=True):
            for name in set(group) - set(options) - {"params"}:
                del group[name]
            for name, value in options.items():
                if isinstance(group[name], torch.Tensor):
                    group[name].copy_(value)  # others may hold the same tensor
                else:
                    group[name] = value
