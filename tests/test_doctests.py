"""The examples in docstrings are true."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import fitkit

MODULES = ["fitkit", *(found.name for found in pkgutil.walk_packages(fitkit.__path__, prefix="fitkit."))]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_print_what_they_show(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.failed == 0, "the captured output shows which"
