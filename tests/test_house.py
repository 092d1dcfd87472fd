"""The house keeps its shape: who may import whom, what is public, what files are called, how many loops there are."""

from __future__ import annotations

import ast
import graphlib
import inspect
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

import fitkit
import fitkit.callbacks

PACKAGE = Path(fitkit.__file__).parent

# From the roof down. A module imports from floors strictly below its own; a folder is one name here.
FLOORS = [
    {"sklearn"},
    {"__init__"},
    {"model"},
    {"plan", "script"},
    {"preparation"},
    {"loop", "microbatches", "learning_rate_finder", "shared_steps"},
    {"progress", "rehearsal", "run_callbacks", "epoch_plans"},
    {"steps", "callbacks"},
    {"joint_losses", "training_state"},
    {"numbers"},
    {"computation"},
    {"synchronisation", "sharding"},
    {"windows", "diagnosis", "transfer"},
    {"output_losses"},
    {"data", "metrics", "losses", "optimization", "gradients"},
    {"history", "logs", "summary", "sharded_checkpoints"},
    {"history_plots"},
    {"log_keys", "checkpoints"},
    {"distributed"},
    {"batch", "device", "durations", "figures", "flags", "kinds", "loss_names", "targets"},
    {"errors", "_types", "_version"},
]
# What a callback may import of its own folder; the folder's __init__ imports every callback.
CALLBACK_BASE = {"callback", "monitor", "hooks", "display", "optimizer", "extras"}
FORBIDDEN_NAMES = {"utils", "core", "engine", "manager", "helpers"}


def modules() -> dict[str, ast.Module]:
    """Every module by its dotted name inside fitkit: "model", "data.arrays", "callbacks" for the folder's __init__."""
    parsed = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)
        parsed[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return parsed


MODULES = modules()


def is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Everything that can run, also inside functions; what only type checkers read is left out."""
    for child in ast.iter_child_nodes(node):
        if not is_for_types_only(child):
            yield child
            yield from statements(child)


def imports(name: str) -> set[str]:
    """The modules of fitkit that a module imports, by their names inside fitkit."""
    found = set()
    for node in statements(MODULES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {path.removeprefix("fitkit.") for path in found if path.startswith("fitkit.")}
    return {known for path in ours if (known := innermost_module(path)) is not None}


def innermost_module(path: str) -> str | None:
    """The module that a path such as "data.arrays.ArrayBatches" or "errors.show" lies in."""
    parts = path.split(".")
    prefixes = [".".join(parts[:length]) for length in range(len(parts), 0, -1)]
    return next((prefix for prefix in prefixes if prefix in MODULES), None)


def floor(name: str) -> int:
    """The height of a module, the roof highest."""
    heights = [height for height, names in enumerate(reversed(FLOORS)) if name.split(".")[0] in names]
    assert heights, f"fitkit/{name} stands on no floor: add it to FLOORS"
    return heights[0]


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_to_lower_floors_only(name: str) -> None:
    folder = name.split(".")[0]
    outside = {other for other in imports(name) if other.split(".")[0] != folder}
    assert not [other for other in outside if floor(other) >= floor(name)]


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("callbacks.")])
def test_callbacks_import_nothing_of_each_other(name: str) -> None:
    siblings = {other for other in imports(name) if other.split(".")[0] == "callbacks"}
    assert siblings <= {f"callbacks.{base}" for base in CALLBACK_BASE} - {name}


def test_no_import_goes_in_a_circle() -> None:
    graph = {name: imports(name) - {name} for name in MODULES}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert set(order) == set(MODULES)


@pytest.mark.parametrize("package", [fitkit, fitkit.callbacks], ids=lambda package: package.__name__)
def test_all_is_complete_and_sorted(package: types.ModuleType) -> None:
    tree = MODULES[package.__name__.removeprefix("fitkit.").replace("fitkit", "__init__")]
    imported = {
        alias.asname or alias.name
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom)) and getattr(node, "module", "") != "__future__"
        for alias in node.names
    }
    assert package.__all__ == sorted(name for name in imported if name == "__version__" or name[0] != "_")


def undocumented(name: str, value: object) -> list[str]:
    """A public name without a docstring, and those of its methods; an override inherits what it overrides."""
    missing = [] if inspect.getdoc(value) else [name]
    if inspect.isclass(value):
        methods = inspect.getmembers(value, lambda member: inspect.isfunction(member) or isinstance(member, property))
        missing += [f"{name}.{key}" for key, method in methods if key[0] != "_" and not inspect.getdoc(method)]
    return missing


@pytest.mark.parametrize("package", [fitkit, fitkit.callbacks], ids=lambda package: package.__name__)
def test_every_public_name_has_a_docstring(package: types.ModuleType) -> None:
    public = [(name, getattr(package, name)) for name in package.__all__]
    assert not [missing for name, value in public for missing in undocumented(name, value)]


def test_no_file_has_a_name_that_says_nothing() -> None:
    assert not {part for name in MODULES for part in name.split(".")} & FORBIDDEN_NAMES


def test_importing_fitkit_imports_nothing_heavy() -> None:
    heavy = {"matplotlib", "pandas", "safetensors", "scipy", "sklearn", "tabulate", "tensorboard", "torchmetrics"}
    code = f"import sys, torch; known = set(sys.modules); import fitkit; print(({heavy} & set(sys.modules)) - known)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_there_is_one_loop_over_batches() -> None:
    loops = [
        f"{name}:{node.iter.lineno}"
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.For, ast.AsyncFor, ast.comprehension)) and names_batches(node.iter)
    ]
    assert len(loops) == 1, loops


def names_batches(iterated: ast.expr) -> bool:
    """Whether what is iterated is called batches, bare, as an attribute or inside enumerate and the like."""
    words = {getattr(node, "id", None) or getattr(node, "attr", None) for node in ast.walk(iterated)}
    return "batches" in words


# ---------------------------------------------------------------------------------------------------------------------
# The budgets of the path from fit to backward: frames, files, lines, hops to a hook; and the loop's docstring.
# ---------------------------------------------------------------------------------------------------------------------
