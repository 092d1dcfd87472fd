"""K micro-batches give the gradient, the step and the reported numbers of the one batch that they make up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fitkit

SAMPLES = 23


class RecordingSGD(torch.optim.SGD):
    """Keeps the gradient that each step is given."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.seen: list[list[Tensor]] = []

    def step(self, closure: Any = None) -> None:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self.seen.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters])


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(x).tanh()
        return self.first(hidden), self.second(hidden)


class NamedHeads(TwoHeads):
    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return dict(zip(("kind", "size"), super().forward(x), strict=True))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x).tanh()).transpose(1, 2)


@dataclass
class Case:
    """A module, its data, a loss made for a dtype, and further arguments."""

    module: Callable[[], nn.Module]
    data: Any
    loss: Callable[[torch.dtype], Any]
    compile: dict[str, Any] = field(default_factory=dict)
    fit: dict[str, Any] = field(default_factory=dict)


def _linear() -> nn.Module:
    return nn.Linear(6, 4)


def _focal(output: Tensor, target: Tensor) -> Tensor:
    """A loss of the user's that gives item losses."""
    entropy = F.cross_entropy(output, target, reduction="none")
    return (1 - torch.exp(-entropy)) ** 2 * entropy


def _with_weight(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """A loss of the user's that brings its own weight."""
    kept = (target != -100).sum()
    return F.cross_entropy(output, target, reduction="sum") / kept.clamp(min=1), kept


_draw = torch.Generator().manual_seed(0)
_x = torch.randn(SAMPLES, 6, generator=_draw)
_classes = torch.randint(0, 4, (SAMPLES,), generator=_draw)
_ignored = torch.where(torch.rand(SAMPLES, generator=_draw) < 0.5, -100, _classes)
_values = torch.randn(SAMPLES, 4, generator=_draw)
_column = torch.randn(SAMPLES, 1, generator=_draw)
_weights = torch.rand(SAMPLES, generator=_draw)
_tokens = torch.randint(0, 11, (SAMPLES, 5), generator=_draw)
_labels = torch.where(
    torch.rand(SAMPLES, 5, generator=_draw) < 0.4, -100, torch.randint(0, 11, (SAMPLES, 5), generator=_draw)
)
_class_weights = torch.tensor([0.1, 2.0, 3.0, 0.5])

CASES = {
    "cross entropy": Case(_linear, (_x, _classes), lambda dtype: "cross_entropy"),
    "ignored targets": Case(_linear, (_x, _ignored), lambda dtype: "cross_entropy"),
    "class weights of the loss": Case(
        _linear, (_x, _ignored), lambda dtype: nn.CrossEntropyLoss(weight=_class_weights.to(dtype))
    ),
    "label smoothing": Case(
        _linear, (_x, _ignored), lambda dtype: nn.CrossEntropyLoss(_class_weights.to(dtype), label_smoothing=0.1)
    ),
    "targets as probabilities": Case(_linear, (_x, _values.softmax(1)), lambda dtype: "cross_entropy"),
    "targets per token": Case(Tokens, (_tokens, _labels), lambda dtype: "cross_entropy"),
    "nll": Case(
        lambda: nn.Sequential(nn.Linear(6, 4), nn.LogSoftmax(1)),
        (_x, _ignored),
        lambda dtype: nn.NLLLoss(_class_weights.to(dtype)),
    ),
    "bce with pos_weight": Case(
        lambda: nn.Linear(6, 1),
        (_x, (_column > 0).float()),
        lambda dtype: nn.BCEWithLogitsLoss(pos_weight=torch.tensor([3.0], dtype=dtype)),
    ),
    "mse over elements": Case(_linear, (_x, _values), lambda dtype: "mse"),
    "huber": Case(_linear, (_x, _values), lambda dtype: nn.HuberLoss(delta=0.5)),
    "sum": Case(_linear, (_x, _values), lambda dtype: nn.MSELoss(reduction="sum")),
    "sample weights": Case(_linear, (_x, _ignored, _weights), lambda dtype: "cross_entropy"),
    "sample weights over elements": Case(_linear, (_x, _values, _weights), lambda dtype: "l1"),
    "class_weight": Case(
        _linear, (_x, _classes), lambda dtype: "cross_entropy", fit={"class_weight": {0: 0.2, 2: 3.0}}
    ),
    "item losses of a callable": Case(_linear, (_x, _classes), lambda dtype: _focal),
    "weight of a callable": Case(_linear, (_x, _ignored), lambda dtype: _with_weight),
    "two outputs that grow alike": Case(
        TwoHeads, (_x, (_values, _column)), lambda dtype: ["mse", "l1"], compile={"loss_weights": [1.0, 0.3]}
    ),
    "two outputs, one with ignored targets": Case(
        TwoHeads, (_x, (_ignored, _column)), lambda dtype: ["cross_entropy", "mse"], compile={"loss_weights": [1, 0.3]}
    ),
    "two named outputs with sample weights": Case(
        NamedHeads,
        (_x, {"kind": _ignored, "size": _column}, _weights),
        lambda dtype: {"kind": "cross_entropy", "size": nn.MSELoss(reduction="sum")},
        compile={"loss_weights": {"size": 0.3}},
    ),
}
TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-12}


def _fit(
    case: Case, dtype: torch.dtype, batch_size: int, window: int | dict[int, int], **arguments: Any
) -> tuple[RecordingSGD, Any, fitkit.Model]:
    torch.manual_seed(3)
    module = case.module().to(dtype)
    optimizer = RecordingSGD(module.parameters())
    model = fitkit.Model(module, device="cpu")
    model.compile(optimizer, case.loss(dtype), **case.compile)
    arguments |= {"batch_size": batch_size, "accumulate_grad_batches": window, **case.fit}
    history = model.fit(case.data, epochs=1, shuffle=False, verbose=0, **arguments)
    return optimizer, history, model


def _distance(one: list[Tensor], other: list[Tensor]) -> float:
    first, second = (torch.cat([gradient.flatten() for gradient in gradients]) for gradients in (one, other))
    return float((first - second).norm() / second.norm().clamp(min=1e-9))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", CASES)
@settings(max_examples=4)
@given(batch_size=st.integers(1, SAMPLES - 1))
def test_the_window_s_gradient_is_that_of_the_one_batch(name: str, dtype: torch.dtype, batch_size: int) -> None:
    whole, whole_history, _ = _fit(CASES[name], dtype, SAMPLES, 1)
    sliced, history, _ = _fit(CASES[name], dtype, batch_size, SAMPLES)
    assert len(sliced.seen) == 1
    assert _distance(sliced.seen[0], whole.seen[0]) <= TOLERANCES[dtype]
    for key, column in whole_history.history.items():
        assert history[key][0] == pytest.approx(column[0], rel=TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", CASES)
@settings(max_examples=3)
@given(batch_size=st.integers(1, SAMPLES), part=st.integers(1, SAMPLES), window=st.integers(1, 3))
def test_splitting_batches_changes_no_step(
    name: str, dtype: torch.dtype, batch_size: int, part: int, window: int
) -> None:
    whole, whole_history, _ = _fit(CASES[name], dtype, batch_size, window)
    split, history, _ = _fit(CASES[name], dtype, batch_size, window, micro_batch_size=part)
    assert len(split.seen) == len(whole.seen)
    for one, other in zip(split.seen, whole.seen, strict=True):
        assert _distance(one, other) <= TOLERANCES[dtype]
    for key, column in whole_history.history.items():
        assert history[key][0] == pytest.approx(column[0], rel=TOLERANCES[dtype])


@pytest.mark.parametrize("name", [name for name in CASES if name != "class_weight"])
@settings(max_examples=4)
@given(batch_size=st.integers(1, SAMPLES - 1))
def test_evaluate_is_the_loss_of_one_batch_of_everything(name: str, batch_size: int) -> None:
    _, _, model = _fit(CASES[name], torch.float64, SAMPLES, 1)
    whole = model.evaluate(CASES[name].data, batch_size=SAMPLES, return_dict=True, verbose=0)
    sliced = model.evaluate(CASES[name].data, batch_size=batch_size, return_dict=True, verbose=0)
    assert sliced == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_the_loss_of_one_batch_is_what_torch_computes(name: str) -> None:
    case = CASES[name]
    optimizer, history, _ = _fit(case, torch.float64, SAMPLES, 1)
    torch.manual_seed(3)
    module = case.module().double()
    expected = _by_hand(name, case, module)
    expected.backward()
    expected = expected.detach()
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    assert _distance(optimizer.seen[0], gradients) <= 1e-12
    reported = expected / (SAMPLES if name == "sum" else 1)
    if "named" not in name:
        assert history["loss"][0] == pytest.approx(float(reported), rel=1e-12)


def _by_hand(name: str, case: Case, module: nn.Module) -> Tensor:
    """The loss of all the data written out in plain torch."""
    cast = lambda value: value.double() if value.is_floating_point() else value  # noqa: E731
    x, y = cast(case.data[0]), case.data[1]
    output = module(x)
    if name == "two outputs that grow alike":
        return F.mse_loss(output[0], cast(y[0])) + 0.3 * F.l1_loss(output[1], cast(y[1]))
    if name == "two outputs, one with ignored targets":
        return F.cross_entropy(output[0], y[0]) + 0.3 * F.mse_loss(output[1], cast(y[1]))
    if name == "two named outputs with sample weights":
        items = F.cross_entropy(output["kind"], y["kind"], reduction="none") * _weights.double()
        squares = (output["size"] - cast(y["size"])) ** 2 * _weights.double()[:, None]
        return items.sum() / (y["kind"] != -100).sum() + 0.3 * squares.sum()
    if name == "sample weights":
        return (F.cross_entropy(output, y, reduction="none") * _weights.double()).sum() / (y != -100).sum()
    if name == "sample weights over elements":
        return (F.l1_loss(output, cast(y), reduction="none") * _weights.double()[:, None]).mean()
    if name == "class_weight":
        table = torch.tensor([0.2, 1.0, 3.0, 1.0], dtype=torch.float64)
        return (F.cross_entropy(output, y, reduction="none") * table[y]).mean()
    if name == "item losses of a callable":
        return _focal(output, y).mean()
    if name == "weight of a callable":
        return _with_weight(output, y)[0]
    loss = case.loss(torch.float64)
    functions = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss, "l1": F.l1_loss}
    return functions.get(loss, loss)(output, cast(y)) if isinstance(loss, str) else loss(output, cast(y))


@settings(max_examples=15)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(1, 8))
def test_every_window_of_ready_batches_is_its_one_batch(sizes: list[int], window: int) -> None:
    x, y = torch.randn(sum(sizes), 6), torch.randint(-1, 4, (sum(sizes),))
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    windows = [batches[start : start + window] for start in range(0, len(batches), window)]
    joined = [tuple(map(torch.cat, zip(*each, strict=True))) for each in windows]
    loss = nn.CrossEntropyLoss(ignore_index=-1)
    sliced = _fit_ready(batches, loss, window)
    whole = _fit_ready(joined, loss, 1)
    assert len(sliced) == len(whole) == sum(bool((target != -1).any()) for _, target in joined)
    for one, other in zip(sliced, whole, strict=True):
        assert _distance(one, other) <= 1e-12


def _fit_ready(batches: Any, loss: Any, window: int) -> list[list[Tensor]]:
    torch.manual_seed(3)
    module = nn.Linear(6, 4).double()
    optimizer = RecordingSGD(module.parameters())
    model = fitkit.Model(module, device="cpu")
    model.compile(optimizer, loss)
    model.fit([(x.double(), y) for x, y in batches], epochs=1, accumulate_grad_batches=window, verbose=0)
    return optimizer.seen


def test_the_cases_that_peers_get_wrong() -> None:
    def gradients(batches: Any, loss: Any, module: nn.Module, window: int = 2) -> list[float]:
        nn.init.zeros_(module.weight)  # type: ignore[arg-type]
        optimizer = RecordingSGD(module.parameters())
        model = fitkit.Model(module, device="cpu")
        model.compile(optimizer, loss)
        model.fit(batches, epochs=1, accumulate_grad_batches=window, verbose=0)
        return [round(float(step[0].flatten()[0]), 5) for step in optimizer.seen]

    def batch(size: int, target: float) -> tuple[Tensor, Tensor]:
        return torch.ones(size, 1), torch.full((size, 1), target)

    def masked(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        valid = ~target.isnan()
        squares = torch.where(valid, (output - target.nan_to_num()) ** 2, 0.0)
        return squares.sum() / valid.sum(), valid.sum()

    single = nn.Linear(1, 1, bias=False)
    assert gradients([batch(4, 1.0), batch(2, 4.0)], "mse", single) == [-4.0]
    assert gradients([batch(4, 1.0)] * 3, "mse", single) == [-2.0, -2.0]
    one_valid = torch.tensor([[4.0], [torch.nan], [torch.nan], [torch.nan]])
    assert gradients([batch(4, 1.0), (torch.ones(4, 1), one_valid)], masked, single) == [-3.2]
