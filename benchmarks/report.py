"""How results are shown: a table on the screen, everything in a JSON file, and what they were measured with."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

PACKAGES = (
    "fitkit",
    "torch",
    "keras",
    "lightning",
    "poutyne",
    "skorch",
    "pytorch-ignite",
    "accelerate",
    "transformers",
    "torchmetrics",
)


def print_table(title: str, rows: Sequence[Sequence[str]], headers: Sequence[str]) -> None:
    """Prints a titled table whose first column has no heading."""
    print(f"\n{title}")
    print(tabulate(rows, headers=["", *headers], tablefmt="github", disable_numparse=True))


def versions() -> dict[str, str]:
    """The versions of what is installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write_json(path: str, results: Mapping[str, Any]) -> None:
    """Writes the results and the versions they were found with."""
    Path(path).write_text(json.dumps({"versions": versions(), **results}, indent=2) + "\n", encoding="utf-8")
