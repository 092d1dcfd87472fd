"""What outlives a fit, gathered for a file and put back from one: weights, optimizer, random state, history.

Where a fit is, which a file of its midst holds beside that, is in progress.py; the form of the file in checkpoints.py.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from fitkit._types import ModelProtocol
from fitkit.checkpoints import Path, check_fits, fill, load_state
from fitkit.computation import Compiled
from fitkit.device import (
    get_modes,
    plain_random_state,
    random_state,
)
from fitkit.distributed import is_shard, shard_like
from fitkit.errors import CheckpointError, show
from fitkit.kinds import check_kinds
from fitkit.optimization import parameters_of
from fitkit.sharded_checkpoints import load_sharded, sharded_like

# Objects beside the compiled ones that a Model of the user's may train with.
OWN = (
    torch.optim.Optimizer,
    torch.optim.lr_scheduler.LRScheduler,
    torch.amp.GradScaler,
    torch.Generator,
    nn.Module,
)
# What torch's optimizers keep of a parameter as one number; all else has the parameter's shape.
NUMBERS = {"step", "eta", "mu", "mu_product"}
# What a file says of a run that can go on; and by its outcome, which is None while it runs.
WHOLE = {
    *("outcome", "arguments", "epoch", "stage", "logs", "stop", "called", "step", "part_size"),
    *("data", "validation_data", "callbacks"),
}
RUN_PARTS = {None: WHOLE, "finished": WHOLE, "interrupted": {"outcome", "epoch"}}
PARTS = {"weights", "buffers", "optimizer", "scaler", "own", "history", "random", "modes", "run"}


def read_training_state(path: Path, module: nn.Module) -> dict[str, Any]:
    """The state in a file of `Model.save`, or in a folder of a sharded module's.

    Args:
        path: of the file or folder.
        module: for which it is; where it is sharded, sharded tensors are read as such.

    Raises:
        CheckpointError: the file is damaged, or is no such file.
    """
    state = load_sharded(path, sharded_like(module)) if os.path.isdir(path) else load_state(path)
    if not set(state) >= PARTS:
        raise CheckpointError(f"{path!s} is no file of Model.save: it holds {sorted(map(str, state))}.")
    run = state["run"]
    with named_errors(path):
        if run is not None and not (isinstance(run, dict) and set(run) >= RUN_PARTS[run.get("outcome")]):
            raise CheckpointError(f"{path!s} is no file of Model.save: what it says of a run is incomplete.")
    return state


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Around the use of what a file holds: says for whatever is raised there which file it is about."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise CheckpointError(f"{path!s} cannot be used: {kind}{error}") from error


def load_model(model: ModelProtocol, compiled: Compiled, state: Mapping[str, Any], path: Path) -> None:
    """Gives the model what `model_state` took from one, without random state and modes, or leaves it as it was.

    Raises:
        CheckpointError: the state does not fit.
    """
    with named_errors(path):
        check_model(model, compiled, state, path)
        before = copied_state(model_state(model, compiled))
        try:
            restore_model(model, compiled, state, path)
        except BaseException:
            restore_model(model, compiled, before, path)
            raise


def copied_state(value: Any) -> Any:
    """A copy that shares no tensor with the value, its tensors on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone() if is_shard(value) else value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        same = copy.copy(value)  # with what a module's state has beside its items
        same.update({key: copied_state(item) for key, item in value.items()})
        return same
    if type(value) in (list, tuple):
        return type(value)(map(copied_state, value))
    return copy.deepcopy(value)


def model_state(model: ModelProtocol, compiled: Compiled) -> dict[str, Any]:
    """All that a run changes and that is there without it; the tensors are the model's own."""
    module, optimizer, scaler = compiled.module, compiled.optimizer, compiled.scaler
    kept = module.state_dict()
    return {
        "weights": kept,
        "buffers": {name: buffer for name, buffer in module.named_buffers() if name not in kept},
        "optimizer": None if optimizer is None else _named(optimizer),
        "scaler": None if scaler is None else scaler.state_dict(),
        "own": {name: _named(value) for name, value in _own(model).items()},
        "history": model.history.state_dict(),
        "random": plain_random_state(random_state(compiled.device)),
        "modes": get_modes(module),
    }


def check_model(model: ModelProtocol, compiled: Compiled, state: Mapping[str, Any], path: Path) -> None:
    """Refuses a state of another module, optimizer or precision, before anything is changed."""
    check_fits(compiled.module, state["weights"], path)
    own = _own(model)
    mine = {"compile(optimizer=...)": compiled.optimizer, **{f"model.{name}": value for name, value in own.items()}}
    theirs = {"compile(optimizer=...)": state["optimizer"]}
    theirs |= {f"model.{name}": kept for name, kept in state["own"].items()}
    for name in {**mine, **theirs}:
        now, then = mine.get(name), theirs.get(name)
        if (type(now).__name__ if now is not None else None) != (None if then is None else then["class"]):
            raise CheckpointError(
                f"{path!s} has {'nothing' if then is None else then['class']} for {name}, where there is now "
                f"{'nothing' if now is None else type(now).__name__}. Make and compile the Model as it was."
            )
        if not isinstance(now, torch.optim.Optimizer) or then is None:
            continue
        if _sizes(now.state_dict()) != _sizes(then["state"]):
            raise CheckpointError(
                f"{path!s} has an optimizer of {_sizes(then['state'])} parameters by group for {name}, received one of "
                f"{_sizes(now.state_dict())}. Give it the parameters that it had."
            )
        # An option that is None leaves the choice to torch, and is another one on another device.
        for group, saved in zip(now.param_groups, then["state"]["param_groups"], strict=True):
            options = {key: value for key, value in saved.items() if value is not None and key != "params"}
            check_kinds(options, group, f"the options of {name}")
        for shape, key, kept in _misfits(now, then["state"]):
            raise CheckpointError(
                f"{path!s} has {key}={show(kept)} for a parameter of shape {shape} in {name}. Give the optimizer the "
                "parameters that it had, in their order."
            )
    if (compiled.scaler is None) != (state["scaler"] is None):
        was = "without" if state["scaler"] is None else "with"
        raise CheckpointError(
            f'{path!s} was saved {was} precision="16-mixed", received precision={compiled.precision!r}.'
        )


def restore_model(model: ModelProtocol, compiled: Compiled, state: Mapping[str, Any], path: Path) -> None:
    """Gives the model what `model_state` took from it, apart from the random state and the modes."""
    fill(compiled.module, state["weights"], path)
    for name, buffer in compiled.module.named_buffers():
        if name in state["buffers"] and buffer.shape == state["buffers"][name].shape:
            with torch.no_grad():
                buffer.copy_(state["buffers"][name])
    if compiled.optimizer is not None:
        _put(compiled.optimizer, state["optimizer"]["state"])
    if compiled.scaler is not None:
        compiled.scaler.load_state_dict(state["scaler"])
    for name, value in _own(model).items():
        _put(value, state["own"][name]["state"])
    model.history.load_state_dict(state["history"])


def _named(value: Any) -> dict[str, Any]:
    state = value.get_state() if isinstance(value, torch.Generator) else value.state_dict()
    return {"class": type(value).__name__, "state": state}


def _put(value: Any, state: Any) -> None:
    """Gives an object the state that `_named` took from it."""
    if isinstance(value, torch.Generator):
        value.set_state(state)
    elif isinstance(value, torch.optim.Optimizer):
        # The rate that a scheduler started from is there as long as the scheduler is: a run's own one has gone.
        # Of sharded parameters not every optimizer has a fused step, which the file may have had.
        ours = ("fused", "foreach") if any(map(is_shard, parameters_of(value))) else ()
        groups = [
            {
                key: group[key] if key in ours else item
                for key, item in saved.items()
                if key != "initial_lr" or key in group
            }
            for group, saved in zip(value.param_groups, state["param_groups"], strict=True)
        ]
        value.load_state_dict({**state, "param_groups": groups})
        for parameter, kept in value.state.items():
            kept.update({key: shard_like(item, parameter) for key, item in kept.items()})
    else:
        value.load_state_dict(state)


def _own(model: ModelProtocol) -> dict[str, Any]:
    """What a subclass of Model keeps as attributes for a step of its own, in lists and dicts too, by where it is."""
    found: dict[str, Any] = {}
    for name, value in vars(model).items():
        found.update(_own_in(value, name, ()))
    return {name: value for name, value in found.items() if value is not model.module}


@contextmanager
def warned_of_untrained(model: ModelProtocol, compiled: Compiled) -> Iterator[None]:
    """Warns once for each module that a subclass keeps beside its module, if it gets gradients and no optimizer has it.

    Without such a module this costs nothing, and with one nothing after its first gradient.
    """
    own = _own(model)
    optimizers = [compiled.optimizer, *(value for value in own.values() if isinstance(value, torch.optim.Optimizer))]
    known = {id(parameter) for optimizer in optimizers for parameter in parameters_of(optimizer)}
    known |= {id(parameter) for parameter in compiled.module.parameters()}
    watches: list[list[Any]] = []
    for name, value in own.items():
        parameters = value.parameters() if isinstance(value, nn.Module) else ()
        watches.append(_watched([each for each in parameters if each.requires_grad and id(each) not in known], name))
    try:
        yield
    finally:
        for handle in chain.from_iterable(watches):
            handle.remove()


def _watched(parameters: Sequence[Tensor], name: str) -> list[Any]:
    """Handles of the hooks that warn at the first gradient of these parameters, and then are gone."""
    handles: list[Any] = []

    def warn(parameter: Tensor) -> None:
        for handle in handles:
            handle.remove()
        warnings.warn(
            f"model.{name} gets gradients, but no optimizer holds its parameters: they stay as they are. Make it a "
            f"part of the module that the Model is given, or freeze it by model.{name}.requires_grad_(False).",
            stacklevel=2,
        )

    handles += [parameter.register_post_accumulate_grad_hook(warn) for parameter in parameters]
    return handles


def _own_in(value: Any, name: str, around: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, OWN):
        yield name, value
    elif isinstance(value, (list, tuple, dict)) and id(value) not in around:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _own_in(item, f"{name}[{key!r}]", (*around, id(value)))


def _sizes(state: Mapping[str, Any]) -> list[int]:
    return [len(group["params"]) for group in state["param_groups"]]


def _misfits(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> Iterator[tuple[tuple[int, ...], str, Tensor]]:
    """What one of torch's optimizers does not keep of a parameter of that shape; a fused step would write beyond it."""
    own = type(optimizer).__module__.startswith("torch.optim.")
    if not own or isinstance(optimizer, (torch.optim.LBFGS, torch.optim.Adafactor)):
        return
    places = chain.from_iterable(group["params"] for group in state["param_groups"])
    for place, parameter in zip(places, parameters_of(optimizer), strict=True):
        for key, kept in state["state"].get(place, {}).items():
            if isinstance(kept, Tensor) and not (
                kept.numel() == 1 if key in NUMBERS else kept.shape == parameter.shape
            ):
                yield tuple(parameter.shape), key, kept
