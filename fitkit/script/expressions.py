"""From objects to the Python expressions that make them: modules, losses, optimizers and schedulers.

An expression is offered only when what it makes was made and found equal to the object; where that fails, the answer
is None, and who asked says what to do.
"""

from __future__ import annotations

import builtins
import copy
import inspect
import itertools
import math
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from fitkit.device import kept_random_state
from fitkit.rehearsal import Understudy
from fitkit.script.template import CLOSING, JUDGING, SCRIPT, STEP, STOPPING

# A line of a script is as long as formatters leave it.
WIDTH = 88
SIMPLE = (int, float, bool, str, type(None))
# What a script calls by these names is its own, or Python's.
TAKEN = {
    *re.findall(r"[A-Za-z_]\w*", SCRIPT + CLOSING + STEP + JUDGING + STOPPING),
    *("CLASS_WEIGHT", "DataLoader", "F", "LOSS_WEIGHT", "RATES", "TensorDataset", "arrays", "batches", "dataset"),
    *("islice", "items", "loss_function", "output", "scheduler", "training", "validation", "validation_batches"),
    *("w", "x", "y", *dir(builtins)),
}
# Schedules are compared over so many steps.
COMPARED_STEPS = 2_000


def fold(text: str, indent: int = 0, room: int = 0) -> str:
    """A statement on one line where it fits, else with what its last bracket holds an item a line.

    Args:
        text: a statement without line breaks.
        indent: columns that stand before it, also before its further lines.
        room: columns that are needed besides, for what stands around it.
    """
    if len(text) + indent + room <= WIDTH or text[-1] not in ")]}":
        return text
    opening, items = _last_bracket(text)
    inner = " " * (indent + 4)
    lines = [f"{inner}{fold(item, indent + 4, room + 1)},\n" for item in items]
    return f"{text[:opening]}\n{''.join(lines)}{' ' * indent}{text[-1]}" if items else text


def _last_bracket(text: str) -> tuple[int, list[str]]:
    """Where the bracket opens that the text ends with, one column on; and the items in it."""
    opened: list[int] = []
    commas: dict[int, list[int]] = {}
    quoted = False
    for index, character in enumerate(text):
        if character == '"' and text[index - 1] != "\\":
            quoted = not quoted
        elif quoted:
            continue
        elif character in "([{":
            opened.append(index)
            commas[index] = []
        elif character in ")]}":
            start = opened.pop()
        elif character == "," and opened:
            commas[opened[-1]].append(index)
    places = [start, *commas[start], len(text) - 1]
    items = [text[first + 1 : last].strip() for first, last in itertools.pairwise(places)]
    return start + 1, [item for item in items if item]


def importable(value: Any) -> tuple[str, str] | None:
    """The module and the name from which a class or function can be imported; None where it cannot."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    if module in (None, "__main__") or not name.isidentifier():
        return None
    return (module, name) if getattr(sys.modules.get(module), name, None) is value else None


def own_name(name: str) -> str:
    """What a class or function of the user's is called in a script, which has names of its own."""
    return f"own_{name}" if name in TAKEN else name


def literal(value: Any) -> str | None:
    """A number, a string or a tuple of them as it is written; None for anything else."""
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, float):
        return repr(value).replace("e+", "e")
    if type(value) is str:
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"' if value.isprintable() else None
    if type(value) in SIMPLE:
        return repr(value)
    if type(value) in (tuple, list):
        parts = [literal(item) for item in value]
        if None in parts:
            return None
        inner = ", ".join(part for part in parts if part is not None)
        if type(value) is list:
            return f"[{inner}]"
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    return None


def module_expression(module: nn.Module) -> str | None:
    """The expression that makes a module of this structure, apart from its weights; None where none is known.

    Classes of torch.nn are named ``nn.Linear``, others by their bare name. Their arguments are looked for in the
    attributes of the same names.
    """
    text = _module_text(module)
    if text is None:
        return None
    own = {type(each) for each in module.modules() if not is_torchs(type(each))}
    names = {"nn": nn, **{own_name(kind.__name__): kind for kind in own}}
    try:
        # Whatever a class of the user's does with guessed arguments: it is no answer then.
        with kept_random_state(torch.device("cpu")), torch.device("meta"):
            made = eval(text, names)
    except Exception:
        return None
    return text if _is_alike(made, module) else None


def is_torchs(kind: type[nn.Module]) -> bool:
    """Whether it is torch.nn's class of that name."""
    return getattr(nn, kind.__name__, None) is kind


def _module_text(module: nn.Module) -> str | None:
    kind = type(module)
    from_torch = is_torchs(kind)
    if kind is nn.Sequential:
        children = [_module_text(child) for child in module.children()]
        if [name for name, _ in module.named_children()] != [str(index) for index in range(len(children))]:
            return None
        return None if None in children else f"nn.Sequential({', '.join(child for child in children if child)})"
    if not from_torch and importable(kind) is None:
        return None
    arguments = _arguments(module, skipped=("device", "dtype"))
    name = f"nn.{kind.__name__}" if from_torch else own_name(kind.__name__)
    return None if arguments is None else f"{name}({', '.join(arguments)})"


def _arguments(made: Any, skipped: Sequence[str]) -> list[str] | None:
    """The arguments of a constructor, from attributes of the same names; defaults are left out."""
    arguments = []
    by_name = False
    # nn.LSTM and its like say what they take in their base.
    kind = nn.RNNBase if isinstance(made, nn.RNNBase) else type(made)
    for name, parameter in list(inspect.signature(kind.__init__).parameters.items())[1:]:
        if (
            name in skipped
            or (name == "mode" and kind is nn.RNNBase)
            or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ):
            continue
        has_default = parameter.default is not parameter.empty
        if not hasattr(made, name):
            if not has_default:
                return None
            by_name = True
            continue
        value = getattr(made, name)
        if name == "bias" and (value is None or isinstance(value, torch.Tensor)):
            value = value is not None
        if isinstance(value, tuple) and len(set(value)) == 1 and type(made).__module__.startswith("torch.nn."):
            value = value[0]
        text = literal(value)
        if text is None:
            return None
        if has_default and literal(parameter.default) == text:
            by_name = True
            continue
        by_name = by_name or has_default
        arguments.append(f"{name}={text}" if by_name else text)
    return arguments


def _is_alike(made: nn.Module, module: nn.Module) -> bool:
    """Whether the two would compute the same from the same weights, as far as their attributes tell."""
    pairs = list(zip(made.named_modules(), module.named_modules(), strict=False))
    if len(pairs) != len(list(module.named_modules())) or len(pairs) != len(list(made.named_modules())):
        return False
    for (made_name, one), (name, other) in pairs:
        if made_name != name or type(one) is not type(other) or _settings(one) != _settings(other):
            return False
        if other._forward_hooks or other._forward_pre_hooks or other._backward_hooks:
            return False
    return _shapes(made) == _shapes(module) and _sharing(made) == _sharing(module)


def _settings(module: nn.Module) -> dict[str, str]:
    """What a module holds besides parameters, buffers and modules, as text; of torch's own, what has a public name."""
    from_torch = type(module).__module__.startswith("torch.nn.")
    left_out = set(vars(nn.Module()))
    return {
        name: repr(value)
        for name, value in vars(module).items()
        if name not in left_out and not (from_torch and name[0] == "_")
    }


def _shapes(module: nn.Module) -> list[Any]:
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return [list(module.state_dict()), [(name, tensor.shape) for name, tensor in named]]


def _sharing(module: nn.Module) -> list[int]:
    """For each parameter, the first place at which the same one stands."""
    places: dict[int, int] = {}
    every = module.named_parameters(remove_duplicate=False)
    return [places.setdefault(id(parameter), index) for index, (_, parameter) in enumerate(every)]


def optimizer_options(optimizer: Optimizer, group: Mapping[str, Any]) -> list[str] | None:
    """The keyword arguments that give a parameter group its settings, the learning rate first; None where none do."""
    parameters = inspect.signature(type(optimizer).__init__).parameters
    options = {
        name: group[name]
        for name, parameter in parameters.items()
        if name in group and name != "params" and (name == "lr" or group[name] != parameter.default)
    }
    needed = [
        name for name, each in parameters.items() if each.default is each.empty and name not in ("self", "params")
    ]
    if any(name not in group and parameters[name].kind == inspect.Parameter.POSITIONAL_OR_KEYWORD for name in needed):
        return None
    stand_in = [torch.zeros(1, device=group["params"][0].device, dtype=group["params"][0].dtype, requires_grad=True)]
    made = type(optimizer)(stand_in, **options).param_groups[0]
    differing = [name for name in {**made, **group} if name not in ("params", "initial_lr", "max_lr", "min_lr")]
    if any(name not in made or made[name] != group.get(name) for name in differing if name in parameters):
        return None
    written = {name: literal(value) for name, value in options.items()}
    return None if None in written.values() else [f"{name}={text}" for name, text in written.items()]


def scheduler_expression(optimizer: Optimizer, make: Callable[[Optimizer], Any]) -> str | None:
    """The expression that makes the scheduler over ``optimizer``; None where none is known that does the same.

    Args:
        optimizer: the real one; it stays as it is.
        make: makes the scheduler over an optimizer that it is given.
    """
    understudy = Understudy(optimizer)
    text = _scheduler_text(make(understudy))
    if text is None:
        return None

    def made(again: Optimizer) -> Any:
        return eval(text, {"torch": torch, "optimizer": again})

    with warnings.catch_warnings():
        # What torch has to say of a scheduler, it says in the run.
        warnings.simplefilter("ignore")
        return text if _rates(optimizer, made) == _rates(optimizer, make) else None


def _scheduler_text(scheduler: Any) -> str | None:
    kind = type(scheduler)
    if getattr(lr_scheduler, kind.__name__, None) is not kind:
        return None
    name = f"torch.optim.lr_scheduler.{kind.__name__}"
    parts = getattr(scheduler, "_schedulers", None)
    if parts is not None:
        inner = [_scheduler_text(part) for part in parts]
        if None in inner:
            return None
        listed = f"[{', '.join(part for part in inner if part)}]"
        if kind is lr_scheduler.ChainedScheduler:
            return f"{name}({listed})"
        return f"{name}(optimizer, {listed}, milestones={literal(list(scheduler._milestones))})"
    arguments = _special_arguments(scheduler)
    if arguments is None:
        arguments = _arguments(scheduler, skipped=("optimizer", "last_epoch", "verbose"))
    return None if arguments is None else f"{name}({', '.join(['optimizer', *arguments])})"


def _special_arguments(scheduler: Any) -> list[str] | None:
    """Of schedulers that keep their arguments under other names."""
    if isinstance(scheduler, lr_scheduler.MultiStepLR):
        return [f"milestones={sorted(scheduler.milestones.elements())}", f"gamma={scheduler.gamma!r}"]
    group = scheduler.optimizer.param_groups[0]
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        names = ("mode", "factor", "patience", "threshold", "threshold_mode", "cooldown", "eps")
        written = {name: literal(getattr(scheduler, name)) for name in names}
        written["min_lr"] = literal(scheduler.min_lrs[0] or 0)
        defaults = inspect.signature(lr_scheduler.ReduceLROnPlateau.__init__).parameters
        return [f"{name}={text}" for name, text in written.items() if text != literal(defaults[name].default)]
    if isinstance(scheduler, lr_scheduler.OneCycleLR):
        phases: Any = scheduler._schedule_phases
        options = {
            "max_lr": group["max_lr"],
            "total_steps": scheduler.total_steps,
            "pct_start": round((phases[0]["end_step"] + 1) / scheduler.total_steps, 12),
            "div_factor": round(group["max_lr"] / group["initial_lr"], 9),
            "final_div_factor": round(group["initial_lr"] / group["min_lr"], 6),
            "anneal_strategy": getattr(scheduler, "_anneal_func_type", "cos"),
            "cycle_momentum": scheduler.cycle_momentum,
            "three_phase": len(phases) == 3,
        }
        if scheduler.cycle_momentum:
            options |= {"base_momentum": group["base_momentum"], "max_momentum": group["max_momentum"]}
        defaults = inspect.signature(lr_scheduler.OneCycleLR.__init__).parameters
        return [f"{name}={literal(value)}" for name, value in options.items() if value != defaults[name].default]
    return None


def _rates(optimizer: Optimizer, make: Callable[[Optimizer], Any]) -> list[Any]:
    """What a scheduler makes of the groups' settings over many steps."""
    understudy = Understudy(optimizer)
    scheduler = make(understudy)
    found = []
    judges = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
    most = min(COMPARED_STEPS, getattr(scheduler, "total_steps", None) or COMPARED_STEPS)
    for step in range(most):
        found.append([copy.copy({**group, "params": None}) for group in understudy.param_groups])
        understudy.step()
        # A number that falls, stays and falls again lets every setting of a plateau show.
        scheduler.step(*([1.0 / (1 + step // 40)] if judges else []))
    return found


def unknown(argument: str, what: str, advice: str) -> ValueError:
    """The error for what a script cannot say."""
    return ValueError(f"Expected what a plain script can say, received {argument}: {what}. {advice}")
