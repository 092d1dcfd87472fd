"""The lines of a script that make the module and its optimizer, and bring them to where they were."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from fitkit.optimization import parameters_of
from fitkit.script.expressions import (
    fold,
    importable,
    is_torchs,
    module_expression,
    optimizer_options,
    own_name,
    unknown,
)

# The modules and names of what is imported from where it lives.
Imports = list[tuple[str, str]]


def module_line(module: nn.Module) -> tuple[str, Imports]:
    """The line that makes the module, and what it imports."""
    text, kind = module_expression(module), type(module)
    from_torch = is_torchs(kind)
    if not from_torch and importable(kind) is None:
        raise unknown(
            "module",
            f"a {kind.__name__}, which cannot be imported from {kind.__module__}",
            "Move the class into a file of its own, and import it from there.",
        )
    name = f"nn.{kind.__name__}" if from_torch else own_name(kind.__name__)
    line = f"module = {name}(...)  # FILL THIS IN: as you made it" if text is None else fold(f"module = {text}")
    named = {importable(type(each)) for each in module.modules() if not is_torchs(type(each))} - {None}
    imports = [each for each in named if each and re.search(rf"(?<!\.)\b{own_name(each[1])}\(", line)]
    return line, imports


def optimizer_line(optimizer: Optimizer, module: nn.Module) -> tuple[str, Imports]:
    """The line that makes the optimizer, and what it imports."""
    kind = type(optimizer)
    imports: Imports = []
    found = importable(kind)
    if getattr(torch.optim, kind.__name__, None) is kind:
        name = f"torch.optim.{kind.__name__}"
    elif found is not None:
        name = own_name(kind.__name__)
        imports.append(found)
    else:
        raise unknown("compile(optimizer=...)", f"a {kind.__name__} that cannot be imported", "Move its class.")
    groups = []
    for group in optimizer.param_groups:
        options, parameters = optimizer_options(optimizer, group), _named(group["params"], module)
        if options is None or parameters is None:
            what = f"a {kind.__name__} over parameters or with options that a script has no name for"
            raise unknown("compile(optimizer=...)", what, "Give it the parameters of the module or of submodules.")
        groups.append((parameters, options))
    if len(groups) == 1:
        return fold(f"optimizer = {name}({', '.join([groups[0][0], *groups[0][1]])})"), imports
    listed = [
        "{" + ", ".join([f'"params": {parameters}', *(re.sub(r"^(\w+)=", r'"\1": ', each) for each in options)]) + "}"
        for parameters, options in groups
    ]
    return fold(f"optimizer = {name}([{', '.join(listed)}])"), imports


def _named(parameters: Sequence[nn.Parameter], module: nn.Module) -> str | None:
    """The expression of a group's parameters: all of the module's or a submodule's, or those not frozen."""
    wanted = list(map(id, parameters))
    for name, child in module.named_modules():
        owner = f'module.get_submodule("{name}")' if name else "module"
        every = list(child.parameters())
        if list(map(id, every)) == wanted:
            return f"{owner}.parameters()"
        if [id(each) for each in every if each.requires_grad] == wanted:
            return f"[each for each in {owner}.parameters() if each.requires_grad]"
    return None


def holds_all(optimizer: Optimizer, module: nn.Module) -> bool:
    """Whether the optimizer has every parameter that gets a gradient."""
    held = {id(each) for each in parameters_of(optimizer)}
    return all(id(each) in held for each in module.parameters() if each.requires_grad)


def frozen_names(module: nn.Module) -> list[str]:
    """The parameters that are not trained."""
    return [name for name, each in module.named_parameters() if not each.requires_grad]


def evaluation_names(module: nn.Module) -> list[str]:
    """The outermost submodules that stay in evaluation mode; in a root of that mode, none does."""
    if not module.training:
        return []
    found: list[str] = []
    for name, child in module.named_modules():
        if child.training or any(name.startswith(f"{outer}.") for outer in found):
            continue
        if any(each.training for each in child.modules()):
            raise unknown("module", f"{name} in evaluation mode around what is trained", "Set modes from inside.")
        found.append(name)
    return found


def conversion(module: nn.Module, device: torch.device) -> str:
    """The line that takes the module to its device and dtype; empty where it is there."""
    tensors = [*module.parameters(), *module.buffers()]
    dtypes = {each.dtype for each in tensors if each.is_floating_point()} - {torch.float32}
    if len(dtypes) > 1 or (dtypes and any(each.dtype == torch.float32 for each in tensors)):
        raise unknown("module", "parameters of several dtypes", "Give them one.")
    places = [f'"{device}"'] if device.type != "cpu" else []
    arguments = ", ".join([*places, *(str(dtype) for dtype in dtypes)])
    return f"module.to({arguments})" if arguments else ""
