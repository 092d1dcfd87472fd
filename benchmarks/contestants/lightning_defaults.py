"""Lightning's Trainer as it is when nothing is switched off."""

from __future__ import annotations

from contestants.lightning import fit_by_defaults

TIMED = {"fit-loader": fit_by_defaults}
