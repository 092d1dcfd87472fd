"""Optimizers by name, by callable and as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import fitkit
from fitkit.callbacks import LambdaCallback
from fitkit.optimization import known_optimizers, make_optimizer


@pytest.mark.parametrize("name", sorted(set(known_optimizers()) - {"lbfgs", "muon"}))
def test_every_class_of_torch_optim_is_known_by_name(name: str) -> None:
    made = make_optimizer(name, nn.Linear(2, 1))
    assert type(made).__name__.lower() == name


@pytest.mark.parametrize("name", ["adam", "Adam", "ADAM"])
def test_case_does_not_matter(name: str) -> None:
    assert isinstance(make_optimizer(name, nn.Linear(2, 1)), torch.optim.Adam)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "adagrad"])
def test_a_name_takes_the_fused_implementation_where_there_is_one(name: str) -> None:
    made: Any = make_optimizer(name, nn.Linear(2, 1))
    assert made.defaults["fused"]


def test_a_name_takes_the_foreach_implementation_otherwise() -> None:
    made: Any = make_optimizer("rmsprop", nn.Linear(2, 1))
    assert made.defaults["foreach"]


def test_the_learning_rate_goes_to_the_class_and_is_its_default_otherwise() -> None:
    given: Any = make_optimizer("sgd", nn.Linear(2, 1), 0.5)
    default: Any = make_optimizer("sgd", nn.Linear(2, 1))
    assert given.defaults["lr"] == 0.5
    assert default.defaults["lr"] == torch.optim.SGD([torch.ones(1)]).defaults["lr"]


def test_frozen_parameters_are_left_out_by_name() -> None:
    module = nn.Linear(2, 1)
    module.bias.requires_grad_(False)
    made: Any = make_optimizer("adam", module)
    assert [id(p) for p in made.param_groups[0]["params"]] == [id(module.weight)]


def test_a_module_without_anything_to_train_has_no_optimizer() -> None:
    assert make_optimizer("adam", nn.ReLU()) is None


def test_a_callable_is_given_the_trainable_parameters() -> None:
    made = make_optimizer(lambda parameters: torch.optim.SGD(parameters, lr=0.1), nn.Linear(2, 1))
    assert isinstance(made, torch.optim.SGD)


def test_an_unknown_name_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(ValueError, match="optimizer='adm'.*Did you mean 'adam'.*adamw"):
        make_optimizer("adm", nn.Linear(2, 1))


def test_a_learning_rate_beside_an_optimizer_is_refused() -> None:
    module = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="learning_rate=0.1 goes with an optimizer by name"):
        make_optimizer(torch.optim.SGD(module.parameters()), module, 0.1)


@pytest.mark.parametrize("learning_rate", [-1.0, float("nan"), float("inf")])
def test_a_learning_rate_out_of_range_is_refused(learning_rate: float) -> None:
    with pytest.raises(ValueError, match="learning_rate"):
        make_optimizer("sgd", nn.Linear(2, 1), learning_rate)


@pytest.mark.parametrize("as_name", [True, False])
def test_lbfgs_is_refused_because_its_step_needs_a_closure(as_name: bool) -> None:
    module = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="no closure, received optimizer=LBFGS"):
        make_optimizer("lbfgs" if as_name else torch.optim.LBFGS(module.parameters()), module)


def test_a_class_is_a_callable_that_makes_an_optimizer() -> None:
    assert isinstance(make_optimizer(torch.optim.SGD, nn.Linear(2, 1)), torch.optim.SGD)
    with pytest.raises(ValueError, match="no closure"):
        make_optimizer(torch.optim.LBFGS, nn.Linear(2, 1))


@pytest.mark.parametrize("name", ["sgd", "sparseadam"])
def test_an_embedding_with_sparse_gradients_is_trained_by_name(name: str) -> None:
    module = nn.Embedding(4, 2, sparse=True)
    made = make_optimizer(name, module)
    module(torch.tensor([1])).sum().backward()
    assert made is not None
    made.step()


def test_an_optimizer_over_another_module_is_refused() -> None:
    with pytest.raises(ValueError, match="holds none of them"):
        make_optimizer(torch.optim.SGD(nn.Linear(2, 1).parameters()), nn.Linear(2, 1))


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
def test_lazy_parameters_are_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match="Call the module once on a batch"):
        make_optimizer("adam", nn.LazyLinear(1))


@pytest.mark.parametrize("optimizer", [3, None])
def test_anything_else_is_no_optimizer(optimizer: Any) -> None:
    with pytest.raises(TypeError, match="received optimizer="):
        make_optimizer(optimizer, nn.Linear(2, 1))


def test_a_callable_that_makes_no_optimizer_is_refused() -> None:
    with pytest.raises(TypeError, match="to return an optimizer"):
        make_optimizer(lambda parameters: 3, nn.Linear(2, 1))


@pytest.mark.parametrize("name", sorted(set(known_optimizers()) - {"lbfgs", "sparseadam", "muon"}))
def test_every_optimizer_trains_in_float64(name: str) -> None:
    model = fitkit.Model(nn.Linear(3, 2), device="cpu")
    model.compile(name, "mse", precision="64-true")
    before = model.module.weight.detach().clone()
    model.fit(torch.randn(8, 3), torch.randn(8, 2), epochs=2, verbose=0)
    assert model.module.weight.dtype == torch.float64
    assert not torch.equal(model.module.weight, before)


def small_model(optimizer: Any = "sgd", *, frozen: bool) -> fitkit.Model:
    model = fitkit.Model(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)), device="cpu")
    model.module[0].requires_grad_(not frozen)
    model.compile(optimizer, "mse")
    return model


def test_layers_unfrozen_after_compile_are_refused_since_they_would_not_train() -> None:
    model = small_model(frozen=True)
    model.module[0].requires_grad_(True)
    with pytest.raises(ValueError, match=r"'0.bias', '0.weight' became trainable after compile. Call compile again"):
        model.fit(torch.randn(8, 3), torch.randn(8, 1), epochs=1, verbose=0)


def test_layers_unfrozen_after_compile_are_refused_in_the_middle_of_a_run() -> None:
    model = small_model(frozen=True)
    unfreezing = LambdaCallback(on_epoch_begin=lambda epoch, logs: model.module[0].requires_grad_(epoch == 1))
    with pytest.raises(ValueError, match="became trainable after compile"):
        model.fit(torch.randn(8, 3), torch.randn(8, 1), epochs=2, callbacks=[unfreezing], verbose=0)


def test_a_layer_exchanged_after_compile_is_refused() -> None:
    model = small_model(frozen=False)
    model.module[1] = nn.Linear(2, 1)
    with pytest.raises(ValueError, match="'1.bias', '1.weight' became trainable after compile"):
        model.fit(torch.randn(8, 3), torch.randn(8, 1), epochs=1, verbose=0)


def test_layers_frozen_after_compile_train_once_they_are_unfrozen() -> None:
    model = small_model(frozen=False)
    before, seen = model.module[0].weight.detach().clone(), []
    hooks = LambdaCallback(
        on_epoch_begin=lambda epoch, logs: model.module[0].requires_grad_(epoch >= 1),
        on_epoch_end=lambda epoch, logs: seen.append(torch.equal(model.module[0].weight, before)),
    )
    model.fit(torch.randn(8, 3), torch.randn(8, 1), epochs=2, callbacks=[hooks], verbose=0)
    assert seen == [True, False]


def test_what_the_user_gives_to_no_optimizer_stays_out_without_an_error() -> None:
    model = small_model(lambda parameters: torch.optim.SGD(parameters[2:], lr=0.1), frozen=False)
    before = model.module[0].weight.detach().clone()
    model.fit(torch.randn(8, 3), torch.randn(8, 1), epochs=1, verbose=0)
    assert torch.equal(model.module[0].weight, before)


def test_a_callable_is_not_called_where_nothing_is_trained() -> None:
    def make(parameters: Any) -> Any:
        raise AssertionError("there are no parameters")

    frozen = nn.Linear(2, 1).requires_grad_(False)
    assert make_optimizer(make, frozen) is None
