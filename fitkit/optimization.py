"""From what a user writes as an optimizer to a torch optimizer.

By name, the fastest implementation that the parameters allow is chosen: fused, then foreach. Both compute what
the plain one computes, up to the order of roundings within a step (a few units in the last place).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fitkit.distributed import is_shard
from fitkit.errors import check_number, show, unknown_name

OptimizerArgument = str | Optimizer | Callable[[list[nn.Parameter]], Optimizer]


def known_optimizers() -> dict[str, type[Optimizer]]:
    """Every optimizer class of torch.optim by its name in lower case."""
    members = {name.lower(): member for name, member in vars(torch.optim).items() if inspect.isclass(member)}
    return {
        name: member for name, member in members.items() if issubclass(member, Optimizer) and member is not Optimizer
    }


def make_optimizer(
    optimizer: OptimizerArgument, module: nn.Module, learning_rate: float | None = None
) -> Optimizer | None:
    """The torch optimizer that a name, a callable or an optimizer means.

    Args:
        optimizer: the name of a torch.optim class in any case, a callable that takes the list of trainable
            parameters, or an optimizer.
        module: whose trainable parameters an optimizer by name, or a callable, is given.
        learning_rate: for an optimizer by name; None is the default of the torch class.

    Returns:
        The optimizer; None when every parameter is frozen and there is nothing to train.

    Raises:
        ValueError: an unknown name; LBFGS; learning_rate beside an optimizer that has one; lazy parameters.
        TypeError: what came is none of the three.
    """
    if learning_rate is not None:
        learning_rate = check_number("learning_rate", learning_rate, least=0.0)
    if isinstance(optimizer, str):
        return _by_name(optimizer, module, learning_rate)
    if learning_rate is not None:
        raise ValueError(
            f"learning_rate={learning_rate} goes with an optimizer by name; received a {type(optimizer).__name__}. "
            "Give the learning rate where you make the optimizer."
        )
    made = optimizer if isinstance(optimizer, Optimizer) else _made_by(optimizer, _trainable(module))
    if made is None:
        return None
    _refuse_lbfgs(type(made))
    _refuse_foreign(made, module)
    return made


def _trainable(module: nn.Module) -> list[nn.Parameter]:
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if any(isinstance(parameter, nn.parameter.UninitializedParameter) for parameter in parameters):
        raise ValueError(
            "Expected a module whose parameters have shapes, received lazy parameters that no batch has shaped yet. "
            "Call the module once on a batch before compile()."
        )
    return parameters


def _by_name(name: str, module: nn.Module, learning_rate: float | None) -> Optimizer | None:
    parameters = _trainable(module)
    known = known_optimizers()
    if name.lower() not in known:
        raise unknown_name("optimizer", name, known)
    kind: Any = known[name.lower()]
    _refuse_lbfgs(kind)
    if not parameters:
        return None
    options: dict[str, Any] = {} if learning_rate is None else {"lr": learning_rate}
    accepted = inspect.signature(kind).parameters
    # torch refuses fused kernels for some devices and dtypes, and says so in the constructor only.
    # Neither takes the sparse gradients that an embedding may be asked to make.
    sparse = any(getattr(child, "sparse", False) is True for child in module.modules())
    # Of sharded parameters torch has no fused step for every optimizer, and says so at the first one.
    implementations = ("foreach",) if any(map(is_shard, parameters)) else ("fused", "foreach")
    for implementation in () if sparse else implementations:
        if implementation in accepted and all(parameter.is_floating_point() for parameter in parameters):
            try:
                return kind(parameters, **options, **{implementation: True})  # type: ignore[no-any-return]
            except RuntimeError:
                continue
    return kind(parameters, **options)  # type: ignore[no-any-return]


def _made_by(make: Any, parameters: list[nn.Parameter]) -> Optimizer | None:
    if not callable(make):
        raise TypeError(
            "Expected a name, a torch.optim optimizer or a callable that takes the parameters, "
            f"received optimizer={show(make)}."
        )
    if inspect.isclass(make) and issubclass(make, Optimizer):
        _refuse_lbfgs(make)
    if not parameters:
        return None
    made = make(parameters)
    if not isinstance(made, Optimizer):
        raise TypeError(f"Expected optimizer(parameters) to return an optimizer, received {show(made)}.")
    return made


def _refuse_lbfgs(kind: type[Optimizer]) -> None:
    if issubclass(kind, torch.optim.LBFGS):
        raise ValueError(
            "Expected an optimizer whose step needs no closure, received optimizer=LBFGS. "
            "Override training_step to call optimizer.step(closure) by yourself, or choose another optimizer."
        )


def _refuse_foreign(optimizer: Optimizer, module: nn.Module) -> None:
    own = {id(parameter) for parameter in module.parameters()}
    if not any(id(parameter) in own for parameter in parameters_of(optimizer)):
        advice = "Make it from the parameters of the module that the Model was given."
        if any(map(is_shard, module.parameters())):
            advice = (
                'strategy="fsdp" has put others in their place: make it from model.module.parameters() after '
                "fitkit.Model(...), or pass a name or a callable."
            )
        raise ValueError(
            "Expected an optimizer over parameters of the module, received an optimizer that holds none of them. "
            f"{advice}"
        )


def parameters_of(optimizer: Optimizer | None) -> list[nn.Parameter]:
    """The parameters that the optimizer holds, group by group; none without one."""
    groups = [] if optimizer is None else optimizer.param_groups
    return [parameter for group in groups for parameter in group["params"]]


def left_out(optimizer: Optimizer | None, module: nn.Module) -> frozenset[str]:
    """The names of the module's trainable parameters that the optimizer does not hold."""
    held = {id(parameter) for parameter in parameters_of(optimizer)}
    named = module.named_parameters()
    return frozenset(name for name, parameter in named if parameter.requires_grad and id(parameter) not in held)


def check_holds_trainable(optimizer: Optimizer | None, module: nn.Module, left_out_before: frozenset[str]) -> None:
    """Refuses to train beside parameters that were unfrozen or exchanged since compile, which would stay as they are.

    Args:
        optimizer: that of compile.
        module: whose parameters it has.
        left_out_before: what `left_out` gave at compile, where the user left it out.

    Raises:
        ValueError: there are such parameters.
    """
    new = sorted(left_out(optimizer, module) - left_out_before)
    if new:
        names = ", ".join(map(repr, new[:3])) + (f" and {len(new) - 3} more" if len(new) > 3 else "")
        raise ValueError(
            f"Expected an optimizer that holds every trainable parameter, but {names} became trainable after compile. "
            "Call compile again when layers were unfrozen or exchanged. To unfreeze in the middle of a run, compile "
            "first and freeze then: the optimizer leaves what is frozen alone."
        )


def follow_parameters(optimizer: Optimizer) -> None:
    """Gives what an optimizer keeps for each parameter that parameter's dtype, after it has changed.

    Some, such as Adagrad, begin to keep it when they are made.
    """
    for parameter, kept in optimizer.state.items():
        for name, value in kept.items():
            if isinstance(value, torch.Tensor) and name != "step" and value.shape == parameter.shape:
                kept[name] = value.to(parameter.dtype) if value.is_floating_point() else value


def learning_rates(optimizer: Optimizer) -> list[float]:
    """The learning rate of each parameter group."""
    return [float(group["lr"]) for group in optimizer.param_groups]


def set_learning_rates(optimizer: Optimizer, rates: Sequence[float]) -> None:
    """Gives each parameter group its learning rate.

    Args:
        optimizer: whose groups.
        rates: one for each of them.
    """
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], torch.Tensor):  # a captured or compiled step reads this very tensor
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
