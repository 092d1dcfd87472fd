"""check_kinds: a dict for a dict, a number for a number, at any depth."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fitkit.kinds import check_kinds


@pytest.mark.parametrize(
    ("found", "like"),
    [(1, 2.0), (True, 0), (torch.tensor(1.0), 0), ([1], (2, 3)), ({"a": 1}, {}), ({}, {"a": 1}), ([], None), ("a", "")],
)
def test_what_is_of_one_kind_passes(found: Any, like: Any) -> None:
    check_kinds(found, like, "it")
    check_kinds({"deep": [found]}, {"deep": [like]}, "it")


@pytest.mark.parametrize(
    ("found", "like", "kind"),
    [
        (None, 1, "a number"),
        ("1", 1, "a number"),
        (torch.zeros(2), 1, "a number"),
        ([], {}, "a dict"),
        ({}, [], "a list"),
        (1.0, "train", "a str"),
        ([0.0, 0.0], torch.zeros(2), "a tensor"),
    ],
)
def test_what_is_of_another_kind_is_refused_by_its_place(found: Any, like: Any, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"Expected {kind} as it\['deep'\]\[0\], received "):
        check_kinds({"deep": [found]}, {"deep": [like]}, "it")
