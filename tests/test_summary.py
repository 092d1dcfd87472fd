"""The summary counts what is there, and looking changes nothing."""

from __future__ import annotations

import copy
import random
import re
import weakref
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import fitkit
from fitkit.summary import summarize


def row(text: str, layer: str) -> list[str]:
    """The cells of the first row that names the layer."""
    line = next(line for line in text.splitlines() if line.strip().startswith(layer))
    return re.split(r" {2,}", line.strip())


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 3))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.body = nn.Linear(4, 4)
        self.again = self.body
        self.decoder = nn.Linear(4, 10)
        self.decoder.weight = self.embedding.weight

    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden = self.again(self.body(self.embedding(x)))
        return {"logits": self.decoder(hidden), "others": [hidden, None]}


class Restless(nn.Module):
    """Its forward changes whatever a forward can change."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("added", torch.zeros(2))
        self.register_buffer("replaced", torch.zeros(2))
        self.inner = nn.Dropout()
        self.modes: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.added += 1
        self.replaced = self.replaced + 1
        self.modes.append(self.training or self.inner.training)
        return x + torch.rand(1) + random.random() + np.random.rand()

    def train(self, mode: bool = True) -> Restless:
        raise AssertionError("train() may do more than to set the mode")


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


class Add(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        assert a.dtype == b.dtype == torch.float32
        return self.scale * (a + b)


def test_without_input_there_are_parameters_and_no_shapes() -> None:
    text = summarize(network())
    assert "Output shape" not in text
    assert "Multiply-adds" not in text
    assert row(text, "0 (") == ["0 (Conv2d)", "20", "yes"]
    assert row(text, "4 (") == ["4 (Linear)", "27", "yes"]


def test_with_input_each_layer_shows_its_output_shape() -> None:
    text = summarize(network(), torch.zeros(5, 1, 4, 4))
    assert row(text, "0 (")[1] == "(5, 2, 2, 2)"
    assert row(text, "2 (")[1] == "(5, 8)"
    assert row(text, "Sequential")[1] == "(5, 3)"


def test_totals_count_parameters_trainable_ones_and_bytes() -> None:
    module = network()
    module[0].requires_grad_(False)
    text = summarize(module)
    assert "Parameters: 51, of which trainable: 31, not trainable: 20" in text
    # 51 parameters and 4 buffered numbers of 4 bytes, and a counter of 8.
    assert f"Size of parameters and buffers: {55 * 4 + 8} bytes" in text


@pytest.mark.parametrize(("features", "size"), [(1000, "4.000 MB"), (250_000, "1.000 GB"), (10, "0.040 MB")])
def test_sizes_have_decimal_units(features: int, size: str) -> None:
    module = nn.Linear(features, 1000, bias=False, device="meta")
    assert summarize(module).endswith(f"Size of parameters and buffers: {size}")


def test_a_layer_is_trainable_not_or_partly() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2), nn.ReLU())
    module[0].requires_grad_(False)
    module[1].bias.requires_grad_(False)
    text = summarize(module)
    assert [row(text, f"{name} (")[-1] for name in range(4)] == ["no", "partly", "yes", "0"]
    assert row(text, "Sequential")[-1] == "partly"


def test_rows_are_indented_by_nesting_down_to_depth() -> None:
    module = nn.Sequential(nn.Sequential(nn.Sequential(nn.Sequential(nn.Linear(1, 1)))))
    indents = [len(line) - len(line.lstrip()) for line in summarize(module).splitlines() if "(" in line]
    assert indents == [2, 4, 6]
    assert "(" not in summarize(module, depth=0)
    assert "0 (Linear)" in summarize(module, depth=4)
    assert row(summarize(module, depth=0), "Sequential") == ["Sequential", "2", "yes"]


def test_shared_layers_and_tied_weights_are_counted_once() -> None:
    text = summarize(Tied(), torch.zeros(3, dtype=torch.long))
    assert row(text, "embedding")[2:] == ["40", "yes"]
    assert row(text, "body")[1:] == ["(3, 4) in 2 calls", "20", "yes"]
    assert row(text, "again")[1:] == ["0 (+20 shared)", "yes"]
    assert row(text, "decoder")[2:] == ["10 (+40 shared)", "yes"]
    assert "Parameters: 70," in text


def test_nested_outputs_show_every_shape() -> None:
    text = summarize(Tied(), torch.zeros(3, dtype=torch.long))
    assert row(text, "Tied")[1] == "{logits: (3, 10), others: [(3, 4), None]}"


@pytest.mark.parametrize(
    "data",
    [
        (torch.zeros(2), torch.zeros(2)),
        [np.zeros(2), np.zeros(2, dtype=np.float32)],
        {"a": pd.Series([0.0, 0.0]), "b": torch.zeros(2)},
        Pair(torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
    ],
    ids=lambda data: type(data).__name__,
)
def test_several_inputs_come_as_tuple_list_or_dict(data: Any) -> None:
    assert row(summarize(Add(), data), "Add")[1] == "(2,)"


def test_read_only_arrays_and_data_frames_are_inputs() -> None:
    array = np.zeros((4, 2))
    array.flags.writeable = False
    for data in (array, pd.DataFrame(array)):
        assert row(summarize(nn.Linear(2, 3), data), "Linear")[1] == "(4, 3)"


def test_a_pass_leaves_buffers_modes_and_random_numbers_as_they_were() -> None:
    module = Restless()
    module.inner.training = False
    buffers = dict(module.named_buffers())
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    summarize(module, torch.zeros(2))
    assert (module.training, module.inner.training, module.modes) == (True, False, [False])
    assert all(buffer is buffers[name] and not buffer.any() for name, buffer in module.named_buffers())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_a_pass_changes_no_batch_norm_and_leaves_no_gradient_and_no_hook() -> None:
    module = network()
    before = copy.deepcopy(module.state_dict())
    summarize(module, torch.ones(5, 1, 4, 4))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not any(child._forward_hooks for child in module.modules())


def test_a_failing_pass_raises_its_own_error_and_is_undone_too() -> None:
    module = network()
    with pytest.raises(RuntimeError, match="expected input"):
        summarize(module, torch.zeros(5, 2, 4, 4))
    assert all(child.training and not child._forward_hooks for child in module.modules())
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.is_grad_enabled()


def test_lazy_parameters_are_unknown_until_an_input_tells() -> None:
    module = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2), nn.LazyBatchNorm1d())
    text = summarize(module)
    assert row(text, "0 (") == ["0 (LazyLinear)", "?", "yes"]
    assert row(text, "Sequential") == ["Sequential", "8 + ?", "yes"]
    text = summarize(module, torch.zeros(4, 5))
    assert row(text, "0 (") == ["0 (Linear)", "(4, 3)", "18", "yes"]
    assert module[0].has_uninitialized_params()


@pytest.mark.parametrize(
    ("module", "data", "expected"),
    [
        (nn.Linear(3, 4), torch.zeros(5, 3), 5 * 3 * 4),
        (nn.Conv2d(1, 2, 3), torch.zeros(1, 1, 4, 4), 2 * 9 * 4),
        # Four gates for each of 5 steps of 2 sequences.
        (nn.LSTM(3, 4), torch.zeros(5, 2, 3), 5 * 2 * 4 * (3 * 4 + 4 * 4)),
        # Three projections in, one out, and two products of 3 by 3 attention for 2 heads of 4.
        (nn.MultiheadAttention(8, 2, batch_first=True), (torch.zeros(1, 3, 8),) * 3, 4 * 3 * 64 + 2 * 2 * 9 * 4),
        (nn.ReLU(), torch.zeros(3), 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_multiply_adds_are_those_of_the_formula(module: nn.Module, data: Any, expected: int) -> None:
    assert f"Multiply-adds of this input: {expected:,}" in summarize(module, data)


def test_a_fused_encoder_shows_its_inner_layers() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    assert row(summarize(encoder, torch.zeros(2, 3, 8)), "linear1")[1] == "(2, 3, 16)"


def test_a_module_on_its_own_counts_its_own_parameters() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.values = nn.ParameterList([torch.zeros(2), torch.zeros(3)])
            self.scale = nn.Parameter(torch.zeros(1))
            self.nothing = None

    text = summarize(Bare())
    assert row(text, "Bare") == ["Bare", "6", "yes"]
    assert row(text, "values") == ["values (ParameterList)", "5", "yes"]


def test_large_numbers_are_grouped() -> None:
    assert row(summarize(nn.Linear(2000, 1000, bias=False)), "Linear") == ["Linear", "2,000,000", "yes"]


def test_a_number_of_levels_is_checked() -> None:
    with pytest.raises(ValueError, match="at least 0, received depth=-1"):
        summarize(nn.ReLU(), depth=-1)
    with pytest.raises(TypeError, match=r"received depth=2\.0"):
        summarize(nn.ReLU(), depth=2.0)


def test_the_size_of_outputs_is_that_of_the_innermost_layers_in_every_call() -> None:
    text = summarize(nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 1))), torch.zeros(8, 2))
    assert f"Size of the layers' outputs for this input: {8 * (3 + 1) * 4} bytes" in text
    # Three vectors of 4 numbers each from embedding, body and again, and one of 10.
    text = summarize(Tied(), torch.zeros(3, dtype=torch.long))
    assert f"Size of the layers' outputs for this input: {3 * (3 * 4 + 10) * 4} bytes" in text


def summary_of(model: fitkit.Model, *arguments: Any) -> str:
    texts: list[str] = []
    model.summary(*arguments, print_fn=texts.append)
    return texts[0]


def test_after_a_fit_the_shapes_of_its_last_batch_are_remembered() -> None:
    model = fitkit.Model(nn.Linear(3, 2), device="cpu")
    model.compile("sgd", "mse")
    assert "Output shape" not in summary_of(model)
    model.fit(torch.randn(10, 3), torch.randn(10, 2), batch_size=8, epochs=1, verbose=0)
    assert row(summary_of(model), "Linear")[1] == "(2, 2)"
    assert "This input: zeros of (2, 3), as in the latest fit" in summary_of(model)
    assert row(summary_of(model, torch.zeros(5, 3)), "Linear")[1] == "(5, 2)"


@pytest.mark.parametrize("inputs", [[torch.zeros(6, 2)] * 2, {"a": torch.zeros(6, 2), "b": torch.zeros(6, 2)}])
def test_several_inputs_are_remembered_too(inputs: Any) -> None:
    model = fitkit.Model(Add(), device="cpu")
    model.compile("sgd", "mse")
    model.fit(inputs, torch.zeros(6, 2), epochs=1, verbose=0)
    assert row(summary_of(model), "Add")[1] == "(6, 2)"


def test_what_is_remembered_keeps_no_data_alive() -> None:
    class Batch(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> Any:
            x = torch.zeros(4, 3)
            alive.append(weakref.ref(x))
            return x, torch.zeros(4, 2)

    alive: list[Any] = []
    model = fitkit.Model(nn.Linear(3, 2), device="cpu")
    model.compile("sgd", "mse")
    model.fit(torch.utils.data.DataLoader(Batch(), batch_size=None), epochs=1, verbose=0)
    assert [reference() for reference in alive] == [None]
    assert "(4, 2)" in summary_of(model)


def test_a_module_that_refuses_zeros_is_shown_without_shapes_and_with_the_reason() -> None:
    class Picky(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if not x.any():
                raise ValueError("all zeros")
            return super().forward(x)

    model = fitkit.Model(Picky(3, 2), device="cpu")
    model.compile("sgd", "mse")
    model.fit(torch.ones(4, 3), torch.ones(4, 2), epochs=1, verbose=0)
    text = summary_of(model)
    assert row(text, "Picky") == ["Picky", "8", "yes"]
    assert "No output shapes: zeros of (4, 3), as in the latest fit, end in ValueError: all zeros" in text


def test_a_step_of_ones_own_leaves_no_shapes() -> None:
    class Own(fitkit.Model):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.module(batch["some"]).sum()

    model = Own(nn.Linear(3, 2), device="cpu")
    model.compile("sgd")
    model.fit([{"some": torch.ones(4, 3)}], epochs=1, verbose=0)
    assert "Output shape" not in summary_of(model)


@pytest.mark.parametrize(
    ("shape", "advice"),
    [
        ((2, 5), r"input_data=\(2, 5\), a shape. Pass summary\(torch.zeros\(2, 5\)\)"),
        (torch.Size([3, 4]), r"Pass summary\(torch.zeros\(3, 4\)\)"),
        ([(2, 5), (2, 3)], r"Pass summary\(\(torch.zeros\(2, 5\), torch.zeros\(2, 3\)\)\)"),
    ],
    ids=str,
)
def test_a_shape_is_refused_with_the_batch_to_give_instead(shape: Any, advice: str) -> None:
    with pytest.raises(TypeError, match=r"Expected a batch of inputs, with its samples along .*" + advice):
        fitkit.Model(nn.Linear(5, 1), device="cpu").summary(shape)
