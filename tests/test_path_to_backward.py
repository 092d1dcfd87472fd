"""The budget of the way from ``fit`` to ``loss.backward()``: frames, files and lines of ours."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from pathlib import Path
from types import FrameType

import pytest
import torch

import fitkit

PACKAGE = Path(fitkit.__file__).parent
MOST_FRAMES, MOST_FILES, MOST_LINES = 4, 3, 120


def _frames_at_backward(**arguments: object) -> list[FrameType]:
    """Our frames on the stack while autograd runs, the innermost first."""
    found: list[FrameType] = []

    def look(gradient: torch.Tensor) -> None:
        frame: FrameType | None = sys._getframe()
        while frame is not None and not found:
            if Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
                while frame is not None and Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
                    found.append(frame)
                    frame = frame.f_back
                return
            frame = frame.f_back

    module = torch.nn.Linear(2, 2)
    module.weight.register_hook(look)
    model = fitkit.Model(module, device="cpu")
    model.compile("sgd", "cross_entropy", metrics=["accuracy"])
    model.fit(torch.randn(8, 2), torch.randint(0, 2, (8,)), epochs=1, verbose=0, **arguments)  # type: ignore[arg-type]
    return found


def _code_lines(frame: FrameType) -> int:
    """Lines of the function's body that are neither blank, comment nor docstring."""
    source = textwrap.dedent(inspect.getsource(frame.f_code))
    function = ast.parse(source).body[0]
    assert isinstance(function, ast.FunctionDef)
    statements = function.body[1:] if ast.get_docstring(function) is not None else function.body
    lines = source.splitlines()[statements[0].lineno - 1 : statements[-1].end_lineno]
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in lines)


@pytest.mark.parametrize("window", [1, 2], ids=["a step a batch", "accumulating"])
def test_the_way_from_fit_to_backward_is_short(window: int) -> None:
    frames = _frames_at_backward(accumulate_grad_batches=window, batch_size=4)
    assert frames[-1].f_code.co_name == "fit"
    assert len(frames) <= MOST_FRAMES
    assert len({frame.f_code.co_filename for frame in frames}) <= MOST_FILES


def test_the_way_from_fit_to_backward_has_few_lines() -> None:
    lines = [(frame.f_code.co_name, _code_lines(frame)) for frame in _frames_at_backward()]
    assert sum(count for _, count in lines) <= MOST_LINES, lines


def test_a_hook_is_called_from_the_loop_itself() -> None:
    callers: list[str] = []

    class Looking(fitkit.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: object = None) -> None:
            caller = sys._getframe().f_back
            assert caller is not None
            callers.append(Path(caller.f_code.co_filename).name)

    model = fitkit.Model(torch.nn.Linear(2, 1), device="cpu")
    model.compile("sgd", "mse")
    model.fit(torch.randn(8, 2), torch.randn(8, 1), epochs=1, verbose=0, callbacks=[Looking()])
    assert callers == ["loop.py"]
