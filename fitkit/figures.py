"""The figures that plots are drawn into. It needs matplotlib, and is imported when something is plotted."""

from __future__ import annotations

import io

from matplotlib.figure import Figure


class ShownFigure(Figure):
    """A figure unknown to pyplot that a notebook shows as a cell's last value, whatever backend is active there."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", bbox_inches="tight")
        return file.getvalue()
