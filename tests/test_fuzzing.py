"""Whatever fit is given: a History, or a ValueError or TypeError before anything is trained; never anything else."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fitkit
from fitkit.callbacks import Callback, EarlyStopping, LambdaCallback

# What nobody should pass for most arguments, and what may be right for some.
ODD = [
    *(None, True, False, -1, 0, 1, 2, 3, 7, 10**30, -0.5, 0.0, 0.3, 0.5, 1.0, 1.5, math.nan, math.inf, -math.inf),
    *("auto", "inf", "stop", "ignore", "", "nonsense", b"bytes", [], [1], (), (2, 1), {}, {0: 2}, {0: 0.5}, {"a": 1}),
    *(torch.ones(()), torch.ones(3), np.int64(2), np.float32(0.5), np.ones(2), object(), int, len),
]
ARGUMENTS = [
    *("batch_size", "callbacks", "validation_split", "validation_data", "shuffle", "class_weight", "sample_weight"),
    *("initial_epoch", "steps_per_epoch", "validation_steps", "validation_batch_size", "validation_freq"),
    *("min_nb_epochs", "early_stop_callback", "enable_early_stop", "accumulate_grad_batches", "gradient_clip_val"),
    *("track_grad_norm", "train_percent_check", "val_percent_check", "overfit_pct", "micro_batch_size", "on_nonfinite"),
    *("resume_from", "verbose", "max_nb_epochs", "epochs"),
]


class Noting(Callback):
    """Notes what ran, and ends what would run for ever."""

    steps = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.steps += 1
        if self.steps > 200:
            self.model.stop_training = True


@st.composite
def datas(draw: st.DrawFn) -> tuple[Any, ...]:
    """Some kind of data, most of which fits the module."""
    samples = draw(st.integers(0, 12))
    others = draw(st.sampled_from([samples, samples, samples, samples + 1]))
    shape = draw(st.sampled_from([(1,), (1,), (1,), (), (2,), (1, 1)]))
    x, y = torch.rand(samples, 3), torch.rand(others, *shape)
    kind = draw(st.sampled_from(["tensors", "arrays", "tuple", "dataset", "loader", "list", "generator", "one", "odd"]))
    if kind == "tensors":
        return x, y
    if kind == "arrays":
        return x.numpy(), y.double().numpy()
    if kind == "tuple":
        return ((x, y),)
    if kind == "one":
        return (x,)
    if kind == "odd":
        return (draw(st.sampled_from(ODD)),)
    if kind in ("dataset", "loader"):
        dataset = TensorDataset(x[: min(samples, others)], y[: min(samples, others)])
        size = draw(st.integers(1, 5))
        return (dataset if kind == "dataset" else DataLoader(dataset, batch_size=size, drop_last=draw(st.booleans())),)
    # Of ready batches the later ones are not looked at before their turn.
    batches = [(x[start : start + 4], y[start : start + 4]) for start in range(0, min(samples, others) // 4 * 4, 4)]
    return (batches if kind == "list" else iter(batches),)


@given(
    data=datas(),
    odd=st.dictionaries(st.sampled_from(ARGUMENTS), st.sampled_from(ODD), max_size=3),
    right=st.fixed_dictionaries(
        {},
        optional={
            "batch_size": st.integers(1, 20),
            "accumulate_grad_batches": st.integers(1, 4),
            "validation_split": st.floats(0, 0.9),
            "steps_per_epoch": st.integers(1, 5),
            "train_percent_check": st.floats(0.01, 1),
            "micro_batch_size": st.integers(1, 5),
            "overfit_pct": st.floats(0, 1),
        },
    ),
    stopping=st.booleans(),
)
@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])
@pytest.mark.filterwarnings("ignore")
def test_fit_trains_or_refuses_and_leaves_the_model_whole(
    data: tuple[Any, ...], odd: dict[str, Any], right: dict[str, Any], stopping: bool
) -> None:
    model = fitkit.Model(nn.Linear(3, 1), device="cpu")
    model.compile("adam", "mse")
    before = copy.deepcopy((model.module.state_dict(), model.optimizer.state_dict()))  # type: ignore[union-attr]
    noting = Noting()
    callbacks: list[Callback] = [noting, *([EarlyStopping("loss", patience=1)] if stopping else [])]
    arguments = {"epochs": 2, "verbose": 0, "callbacks": callbacks, **right, **odd}
    if "max_nb_epochs" in odd:
        del arguments["epochs"]
    refusal = ""
    try:
        history = model.fit(*data, **arguments)
    except (ValueError, TypeError) as error:
        refusal = f"{type(error).__name__}: {error}"
    except FileNotFoundError as error:
        refusal = f"There is no {odd['resume_from']}: {error}"
    if not refusal:
        assert all(len(column) == len(history.epoch) for column in history.history.values())
    elif not any(words in refusal for words in ("gave none", "ran dry")):
        after = (model.module.state_dict(), model.optimizer.state_dict())  # type: ignore[union-attr]
        assert noting.steps == 0
        assert repr(after) == repr(before)
    # Whatever came before, the Model is whole: modes, gradients, and a fit that works.
    assert model.module.training
    assert all(parameter.grad is None for parameter in model.module.parameters())
    assert model.fit(torch.ones(4, 3), torch.ones(4, 1), epochs=1, verbose=0).epoch == [0]


def test_the_callback_of_these_tests_ends_a_run() -> None:
    model = fitkit.Model(nn.Linear(3, 1), device="cpu")
    model.compile("adam", "mse")
    x = torch.ones(1, 3)
    history = model.fit(x, x[:, :1], epochs=500, verbose=0, callbacks=[Noting(), LambdaCallback()])
    assert len(history) == 201
