"""What a batch is: its parts, its samples, how a module is called on it, and how outputs become one."""

from __future__ import annotations

import traceback
from collections import UserDict, namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fitkit
from fitkit.batch import call, count_samples, described, join, on_cpu, own_loss, split, tensors, unpack, zeros
from fitkit.device import move

Pair = namedtuple("Pair", ["first", "second"])
A, B, C = torch.zeros(2, 1), torch.ones(2, 1), torch.full((2, 1), 2.0)


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_tuple_or_list_is_x_y_and_weights(kind: Any) -> None:
    assert unpack(kind([A])) == (A, None, None)
    assert unpack(kind([A, B])) == (A, B, None)
    assert unpack(kind([A, B, C])) == (A, B, C)
    assert unpack(Pair(A, B)) == (A, B, None)


@pytest.mark.parametrize("batch", [A, {"a": A}, UserDict(a=A), SimpleNamespace(a=A), "text"])
def test_any_other_batch_is_x(batch: Any) -> None:
    assert unpack(batch) == (batch, None, None)


@pytest.mark.parametrize("batch", [(), (A, B, C, A), [A] * 5])
def test_a_tuple_of_none_or_of_more_than_three_is_refused(batch: Any) -> None:
    with pytest.raises(ValueError, match=rf"received a (tuple|list) of {len(batch)}\. Nest several inputs"):
        unpack(batch)


def taken(*arguments: Any, **keywords: Any) -> Any:
    return arguments, keywords


@pytest.mark.parametrize(
    ("x", "arguments"),
    [
        (A, ((A,), {})),
        ((A, B), ((A, B), {})),
        ([A, B], ((A, B), {})),
        ({"a": A}, ((), {"a": A})),
        (UserDict(a=A), ((), {"a": A})),
        ("graph", (("graph",), {})),
        ([[A, B], C], (([A, B], C), {})),
    ],
)
def test_a_tuple_is_several_arguments_and_a_mapping_is_keywords(x: Any, arguments: Any) -> None:
    assert call(taken, x) == arguments


def test_the_tensors_of_a_batch_are_found_in_any_nest() -> None:
    assert list(tensors([A, {"b": (B, "text")}, UserDict(c=[C]), None, 3])) == [A, B, C]


class Graphs:
    """A batch object of another library."""

    def __init__(self, **says: int) -> None:
        self.__dict__.update(says)


class Sized:
    """A batch object that has a length."""

    def __len__(self) -> int:
        return 7


@pytest.mark.parametrize(
    ("x", "y", "samples"),
    [
        (torch.ones(5, 2), torch.ones(5), 5),
        (torch.ones(9, 5, 2), torch.ones(5), 5),  # time first
        (torch.ones(5, 2), None, 5),
        ([torch.ones(5, 2), torch.ones(5, 1), torch.ones(3)], None, 5),
        ({"ids": torch.ones(5, 2), "mask": torch.ones(5, 2), "scale": torch.tensor(1.0)}, None, 5),
        (torch.ones(5, 2), {"a": torch.ones(5), "b": torch.ones(5, 3)}, 5),
        (torch.ones(5, 2), torch.tensor(1.0), 5),
        (torch.ones(5, 2), "label", 5),
        (Graphs(num_graphs=6), None, 6),
        (Graphs(batch_size=6), None, 6),
        (Sized(), None, 7),
        (Graphs(), None, 1),
        (torch.tensor(1.0), None, 1),
        ({"a": torch.tensor(1.0), "b": "text"}, None, 1),
    ],
)
def test_samples_are_counted_where_the_batch_tells_them(x: Any, y: Any, samples: int) -> None:
    assert count_samples(x, y) == samples


def test_a_batch_is_split_where_it_has_samples() -> None:
    x, y = torch.arange(5.0), torch.arange(5)
    parts = split(({"a": x, "scale": torch.ones(3), "name": "text"}, [y]), 2)
    assert [part[0]["a"].tolist() for part in parts] == [[0, 1], [2, 3], [4]]
    assert [part[1][0].tolist() for part in parts] == [[0, 1], [2, 3], [4]]
    assert all(torch.equal(part[0]["scale"], torch.ones(3)) and part[0]["name"] == "text" for part in parts)


@pytest.mark.parametrize("size", [5, 6])
def test_a_batch_that_is_small_enough_is_not_split(size: int) -> None:
    batch = (torch.ones(5), torch.ones(5))
    assert split(batch, size) == [batch]


def test_the_parts_of_a_named_tuple_are_named() -> None:
    parts = split(Pair(torch.ones(3), torch.ones(3)), 2)
    assert [type(part) for part in parts] == [Pair, Pair]
    assert [len(part.second) for part in parts] == [2, 1]


def test_a_batch_of_another_library_is_not_split() -> None:
    with pytest.raises(
        TypeError, match=r"Expected a batch of tensors to split by micro_batch_size.*Let the loader give"
    ):
        split(Graphs(num_graphs=6), 2)


LOSS = torch.tensor(0.5)


@pytest.mark.parametrize(
    ("output", "weight"),
    [
        ({"loss": LOSS}, None),
        ({"loss": LOSS, "weight": 3}, 3),
        (UserDict(loss=LOSS), None),
        (SimpleNamespace(loss=LOSS), None),
        (SimpleNamespace(loss=LOSS, weight=2.0), 2.0),
    ],
)
def test_a_module_may_return_its_loss_and_its_weight(output: Any, weight: Any) -> None:
    assert own_loss(output) == (LOSS, weight)


@pytest.mark.parametrize("output", [LOSS, (LOSS,), {"loss": 0.5}, {"logits": LOSS}, SimpleNamespace(loss=None), None])
def test_a_module_that_returns_no_loss_is_told_what_to_do(output: Any) -> None:
    with pytest.raises(ValueError, match=r"Expected a module whose output has \.loss.*Pass compile\(loss=\.\.\.\), or"):
        own_loss(output)


def test_outputs_come_to_the_cpu_in_their_structure() -> None:
    a = torch.ones(2, requires_grad=True) * 2
    kept = on_cpu({"a": a, "b": [a, torch.tensor(1.0)], "pair": Pair(a, "text"), "none": None})
    assert not kept["a"].requires_grad
    assert kept["b"][1] is None
    assert kept["pair"].second is None
    assert kept["none"] is None


def joined(*outputs: Any) -> Any:
    return join([on_cpu(output) for output in outputs])


def test_outputs_are_joined_along_the_batch_dimension() -> None:
    assert joined(torch.ones(2, 3), torch.ones(1, 3)).shape == (3, 3)
    structure = joined({"a": (A, [B]), "pair": Pair(A, B)}, {"a": (A, [B]), "pair": Pair(A, B)})
    assert structure["a"][1][0].shape == (4, 1)
    assert isinstance(structure["pair"], Pair)


def test_what_has_no_batch_dimension_is_left_out() -> None:
    output = {"loss": torch.tensor(1.0), "logits": A, "cache": [None, "text"], "parts": (A, torch.tensor(0))}
    result = joined(output, output)
    assert set(result) == {"logits", "cache", "parts"}
    assert result["cache"] == []
    assert len(result["parts"]) == 1


def test_outputs_that_cannot_be_joined_are_named_by_their_shapes() -> None:
    with pytest.raises(
        ValueError, match=r"received \[\(3,\), \(4,\)\]\. Pad them in predict_step, or predict batch by"
    ):
        joined(torch.ones(2, 3), torch.ones(2, 4))


def test_predict_joins_what_a_module_returns_in_its_structure() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return {"twice": 2 * x, "all": (x, x.sum())}

    result = fitkit.Model(Two(), device="cpu").predict(torch.arange(5.0), batch_size=2, verbose=0)
    assert torch.equal(result["twice"], 2 * torch.arange(5.0))
    assert len(result["all"]) == 1


def test_a_description_has_shapes_and_types_and_no_memory() -> None:
    batch = {"a": torch.ones(2, 3, dtype=torch.int32), "b": [torch.ones(2), None], "c": Pair(torch.ones(1), "text")}
    description = described(batch)
    assert description["a"].is_meta
    assert (description["a"].shape, description["a"].dtype) == ((2, 3), torch.int32)
    made = zeros(description, torch.device("cpu"))
    assert torch.equal(made["a"], torch.zeros(2, 3, dtype=torch.int32))
    assert torch.equal(made["b"][0], torch.zeros(2))
    assert made["b"][1] is None
    assert made["c"] == Pair(torch.zeros(1), "text")


def test_a_description_keeps_the_memory_format() -> None:
    image = torch.ones(2, 3, 4, 4).to(memory_format=torch.channels_last)
    made = zeros(described(image), torch.device("cpu"))
    assert made.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("value", [Graphs(num_graphs=2), [Graphs(num_graphs=2)]], ids=["object", "list"])
def test_an_object_of_another_library_cannot_be_described(value: Any) -> None:
    with pytest.raises(TypeError, match="Expected tensors and nests of them"):
        described(value)


class TwoInputs(nn.Module):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left + right


@pytest.mark.parametrize(
    ("x", "given"), [({"left": 1, "right": 2, "label": 3}, "keywords left, right, label"), ([1], "1 arguments")]
)
def test_inputs_that_forward_does_not_take_are_explained(x: Any, given: str) -> None:
    with pytest.raises(TypeError) as caught:
        call(TwoInputs(), x)
    said = "".join(traceback.format_exception_only(caught.value))
    assert f"{given}; its forward takes (left, right)" in said
    assert "Targets stand beside the inputs, (inputs, targets)" in said


def test_a_type_error_from_within_forward_stays_as_it_is() -> None:
    with pytest.raises(TypeError) as caught:
        call(TwoInputs(), {"left": 1, "right": "2"})
    assert "its forward takes" not in "".join(traceback.format_exception_only(caught.value))


def test_what_is_no_tensor_stays_as_it_is_on_its_way_to_the_device() -> None:
    anything, nothing = object(), None
    moved = move({"x": A, "name": "text", "all": [anything, nothing, 3]}, torch.device("cpu"), torch.float64)
    assert moved["x"].dtype == torch.float64
    assert moved["name"] == "text"
    assert moved["all"] == [anything, nothing, 3]


def test_a_function_that_does_not_say_what_it_takes_keeps_its_error() -> None:
    with pytest.raises(TypeError, match="dot") as caught:
        call(torch.dot, [A])
    assert not getattr(caught.value, "__notes__", [])
