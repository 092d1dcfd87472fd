"""The plots of a History: one axis a metric, for one run or for several together.

It needs matplotlib, and is imported when something is plotted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fitkit.errors import unknown_name
from fitkit.figures import ShownFigure
from fitkit.log_keys import best_index, direction_of, has_no_best, is_detail


class Recorded(Protocol):
    """What a plot reads of a History."""

    history: dict[str, list[float | None]]
    epoch: list[int]


def plot_run(run: Recorded, metrics: str | Sequence[str] | None) -> Figure:
    """Draws training against validation, with the best epoch marked.

    Args:
        run: what is drawn.
        metrics: keys without ``val_``; None for all but the details.

    Raises:
        ValueError: a key is unknown, or there is nothing to draw.
    """
    names = _names(run.history, metrics)
    figure, places = _grid(len(names))
    for axes, name in zip(places, names, strict=True):
        _draw_metric(axes, run, name)
        _finish(axes, name)
    return figure


def plot_comparison(runs: Mapping[str, Recorded], metrics: str | Sequence[str] | None) -> Figure:
    """Draws several runs together, each in its color.

    Args:
        runs: by their labels.
        metrics: as in `plot_run`; None for all that any of the runs has.

    Raises:
        ValueError: no run has a key of that name, or there is nothing to draw.
    """
    names = _names({key: None for run in runs.values() for key in run.history}, metrics)
    figure, places = _grid(len(names))
    for axes, name in zip(places, names, strict=True):
        for index, (label, run) in enumerate(runs.items()):
            _draw_compared(axes, run, name, str(label), f"C{index % 10}")
        if any(line.get_linestyle() == "--" for line in axes.lines):
            axes.plot([], [], color="gray", linestyle="--", linewidth=1, label="training")
        _finish(axes, name)
    return figure


def _names(keys: Iterable[str], metrics: str | Sequence[str] | None) -> list[str]:
    """The names that a plot has an axis for."""
    keys = list(keys)
    known = list(dict.fromkeys(_training_key(key, keys) for key in keys))
    if metrics is None:
        names = [name for name in known if not is_detail(name)]
    else:
        names = [_training_key(name, keys) for name in ([metrics] if isinstance(metrics, str) else metrics)]
    for name in names:
        if name not in known:
            raise unknown_name("metrics", name, known)
    if not names:
        raise ValueError("There is nothing to plot: no numbers are recorded.")
    return names


def _training_key(key: str, keys: Sequence[str]) -> str:
    # A validation key without its training key, as a callback may add one, stands for itself.
    stripped = key.removeprefix("val_")
    return stripped if stripped in keys or f"val_{stripped}" in keys else key


def _draw_metric(axes: Axes, run: Recorded, name: str) -> None:
    # Of a learning rate or a gradient norm there is no validation to tell it from, and no best one.
    training = None if has_no_best(name) else "training"
    for key, label in ((name, training), (f"val_{name}", "validation")):
        points = _points(run, key)
        if points:
            marker = "o" if len(points) <= 30 else ""
            axes.plot(list(points), list(points.values()), marker=marker, markersize=3, label=label)
    best = _best_point(run, name)
    if best is not None:
        epoch, value = best
        axes.axvline(epoch, color="gray", linestyle="--", linewidth=1, label=f"best: epoch {epoch} ({value:.4g})")


def _draw_compared(axes: Axes, run: Recorded, name: str, label: str, color: str) -> None:
    judged = _judged(run, name)
    for key in dict.fromkeys((name, judged)):
        points = _points(run, key)
        if not points:
            continue
        solid = key == judged
        axes.plot(
            list(points),
            list(points.values()),
            color=color,
            linestyle="-" if solid else "--",
            linewidth=1.5 if solid else 1,
            label=label if solid else None,
        )
    best = _best_point(run, name)
    if best is not None:
        axes.plot([best[0]], [best[1]], marker="o", color=color)


def _judged(run: Recorded, name: str) -> str:
    """The key by which an epoch is the best: validation where there is one."""
    return f"val_{name}" if f"val_{name}" in run.history else name


def _points(run: Recorded, key: str) -> dict[int, float]:
    """What was measured, by the epoch counted from 1: a line has no gap where an epoch had no validation."""
    column = run.history.get(key, [])
    return {epoch + 1: value for epoch, value in zip(run.epoch, column, strict=False) if value is not None}


def _best_point(run: Recorded, name: str) -> tuple[int, float] | None:
    """The best epoch, counted from 1, and its value; None where none is the best."""
    judged = _judged(run, name)
    column = run.history.get(judged, [])
    best = None if has_no_best(name) else best_index(column, direction_of(judged))
    value = None if best is None else column[best]
    return None if best is None or value is None else (run.epoch[best] + 1, value)


def _grid(count: int) -> tuple[Figure, list[Axes]]:
    """A figure with so many axes, three in a row."""
    columns = min(count, 3)
    rows = math.ceil(count / columns)
    figure = ShownFigure(figsize=(4.5 * columns, 3.2 * rows), layout="constrained")
    return figure, [figure.add_subplot(rows, columns, position) for position in range(1, count + 1)]


def _finish(axes: Axes, name: str) -> None:
    axes.set(title=name, xlabel="epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize="small")
