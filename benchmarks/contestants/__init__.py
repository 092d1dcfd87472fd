"""Who is compared: one module for fitkit, the loops by hand and each peer.

A module answers the cases of exact_cases.py by functions named there, and does the workloads of workloads.py by its
dict TIMED, which gives for each a function that prepares a round and returns what makes it. What a library has no way
to do its module leaves out. A module imports its library at the top, so load it only when that is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from types import ModuleType

# Who answers the cases of exactness, and who does the workloads.
ANSWERING = (
    "fitkit",
    "keras",
    "lightning",
    "poutyne",
    "skorch",
    "ignite",
    "accelerate",
    "transformers",
    "transformers_counting",
)
TIMED = (
    "raw",
    "fitkit",
    "by_hand",
    "ignite",
    "skorch",
    "poutyne",
    "accelerate",
    "lightning",
    "lightning_defaults",
    "keras",
)
OURS = ("raw", "by_hand", "fitkit")
# The package that a contestant needs, where it is not called so itself.
PACKAGES = {"lightning_defaults": "lightning", "transformers_counting": "transformers"}


def is_installed(name: str) -> bool:
    """Whether a contestant can run here."""
    return name in OURS or importlib.util.find_spec(PACKAGES.get(name, name)) is not None


def missing(names: Iterable[str]) -> list[str]:
    """The packages that some of the contestants lack."""
    return sorted({PACKAGES.get(name, name) for name in names if not is_installed(name)})


def load(name: str) -> ModuleType:
    """The module of a contestant."""
    return importlib.import_module(f"contestants.{name}")
