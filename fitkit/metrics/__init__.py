"""From what a user writes as metrics to running values, exact over the data however it is sliced into batches.

`CompiledMetrics` is what compile makes of ``metrics`` and ``weighted_metrics``; its `start` gives the `RunningMetrics`
of one run. Which names there are, and what each is, stands in names.py. Losses are not computed here.
"""

from __future__ import annotations

from fitkit.metrics.compiled import CompiledMetrics
from fitkit.metrics.running import RunningMetrics

__all__ = ["CompiledMetrics", "RunningMetrics"]
