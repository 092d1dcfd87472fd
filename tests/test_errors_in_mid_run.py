"""Data that fails in the middle of a run: the original error, with its place, everything closed, history kept."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import fitkit
from fitkit.callbacks import LambdaCallback
from fitkit.errors import add_note

X, Y = torch.randn(20, 3), torch.randn(20, 1)


class Failing(Dataset[Any]):
    """Fails at the sample of that index, from its second time on."""

    def __init__(self, how: Any) -> None:
        self.how = how
        self.times = 0

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.times += index == 13
        if index == 13 and self.times > 1:
            return self.how()  # type: ignore[no-any-return]
        return X[index], Y[index]


def raise_it() -> None:
    raise OSError("the disk is gone")


def model() -> fitkit.Model:
    made = fitkit.Model(nn.Linear(3, 1), device="cpu")
    made.compile("sgd", "mse")
    return made


def shown(error: BaseException) -> str:
    """What a user sees of an error."""
    return "".join(traceback.format_exception(error))


def test_a_dataset_that_raises_is_located() -> None:
    trained = model()
    with pytest.raises(OSError, match="the disk is gone") as caught:
        trained.fit(Failing(raise_it), shuffle=False, batch_size=4, epochs=3, verbose=0)
    assert "This came up in epoch 2 (index 1), batch 4 (index 3)." in shown(caught.value)
    assert trained.history.epoch == [0]
    assert trained.history.stop_reason == "error"


def test_a_worker_that_raises_is_located() -> None:
    trained = model()
    loader = DataLoader(Failing(raise_it), batch_size=4, num_workers=1, persistent_workers=True)
    with pytest.raises(OSError, match="the disk is gone") as caught:
        trained.fit(loader, epochs=3, verbose=0)
    assert "This came up in epoch 2 (index 1), batch 4 (index 3)." in shown(caught.value)
    assert trained.history.epoch == [0]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_a_worker_that_dies_is_located(tmp_path: Path) -> None:
    # In a process of its own: torch goes on raising at any line of this one.
    (tmp_path / "script.py").write_text(DYING, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, str(tmp_path / "script.py")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    # By which error torch finds out, and which batches were ready by then, is a matter of moments.
    assert re.search(
        r"^(Runtime|ConnectionReset|BrokenPipe|EOF)Error.*\nThis came up in epoch 2 .*, batch ", ended.stderr, re.M
    )
    assert ended.stdout == "[0] error\n", ended.stderr


DYING = """
import os, signal, torch, fitkit

class Dying(torch.utils.data.Dataset):
    times = 0
    def __len__(self):
        return 20
    def __getitem__(self, index):
        self.times += index == 13
        if self.times == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.ones(3), torch.ones(1)

if __name__ == "__main__":
    model = fitkit.Model(torch.nn.Linear(3, 1), device="cpu")
    model.compile("sgd", "mse")
    loader = torch.utils.data.DataLoader(Dying(), batch_size=4, num_workers=1, persistent_workers=True)
    try:
        model.fit(loader, epochs=3, verbose=0)
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # by which torch raises once more, at whatever line is next
        print(model.history.epoch, model.history.stop_reason, flush=True)
"""


def test_a_batch_of_another_shape_is_located_and_the_module_is_as_it_was() -> None:
    trained = model()
    trained.module.weight.requires_grad_(True)  # type: ignore[union-attr,operator]
    batches = [(X[:4], Y[:4]), (X[:4], Y[:4]), (X[:4, :2], Y[:4])]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        trained.fit(batches, epochs=2, verbose=0, accumulate_grad_batches=2)
    assert "This came up in epoch 1 (index 0), batch 3 (index 2)." in shown(caught.value)
    assert trained.module.training
    assert all(parameter.grad is None for parameter in trained.module.parameters())


def test_a_dataset_that_shrinks_is_located() -> None:
    class Shrinking(Dataset[Any]):
        size = 20

        def __len__(self) -> int:
            return self.size

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            if index >= self.size:
                raise IndexError(f"no sample {index}")
            return X[index], Y[index]

    samples = Shrinking()

    def shrink(epoch: int, logs: Any) -> None:
        samples.size = 20 - 10 * epoch

    loader = DataLoader(samples, sampler=range(20), batch_size=4)
    trained = model()
    with pytest.raises(IndexError, match="no sample 10") as caught:
        trained.fit(loader, epochs=3, verbose=0, callbacks=[LambdaCallback(on_epoch_begin=shrink)])
    assert "This came up in epoch 2 (index 1), batch 3 (index 2)." in shown(caught.value)


def test_an_error_in_a_validation_is_located() -> None:
    trained = model()
    with pytest.raises(OSError, match="the disk is gone") as caught:
        trained.fit(X, Y, validation_data=Failing(raise_it), validation_batch_size=4, epochs=3, verbose=0)
    assert "This came up in the validation of epoch 2 (index 1), batch 4 (index 3)." in shown(caught.value)


def test_an_error_of_a_callback_is_located() -> None:
    def raising(batch: int, logs: Any) -> None:
        if batch == 2:
            raise KeyError("gone")

    with pytest.raises(KeyError, match="gone") as caught:
        model().fit(X, Y, batch_size=4, epochs=1, verbose=0, callbacks=[LambdaCallback(on_train_batch_end=raising)])
    assert "This came up in epoch 1 (index 0), batch 3 (index 2)." in shown(caught.value)


def test_an_error_before_the_first_batch_names_no_batch() -> None:
    def fail(logs: Any) -> None:
        raise KeyError("gone")

    with pytest.raises(KeyError, match="gone") as caught:
        model().fit(X, Y, epochs=1, verbose=0, callbacks=[LambdaCallback(on_train_begin=fail)])
    assert "batch" not in shown(caught.value).rpartition("KeyError")[2]


def test_a_generator_that_raises_is_closed_and_a_second_fit_starts_clean() -> None:
    closed: list[bool] = []

    def batches() -> Iterator[Any]:
        try:
            yield X[:4], Y[:4]
            raise ValueError("no more")
        finally:
            closed.append(True)

    trained = model()
    with pytest.raises(ValueError, match="no more") as caught:
        trained.fit(batches(), epochs=1, verbose=0)
    assert "batch 2 (index 1)" in shown(caught.value)
    assert closed == [True]
    assert trained.fit(X, Y, epochs=1, verbose=0).epoch == [0]


def test_before_python_311_the_note_stands_in_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10))
    error = OSError("the disk is gone")
    add_note(error, "This came up in epoch 1.")
    assert shown(error).endswith("OSError: the disk is gone\nThis came up in epoch 1.\n")


def test_an_error_with_a_number_keeps_it() -> None:
    error = FileNotFoundError(2, "No such file", "x.png")
    add_note(error, "This came up in epoch 1.")
    assert (error.errno, error.filename) == (2, "x.png")
    if sys.version_info >= (3, 11):  # before that there is no place for it
        assert shown(error).endswith("'x.png'\nThis came up in epoch 1.\n")


def notes_of(error: Exception) -> str:
    return "\n".join([str(error), *getattr(error, "__notes__", [])])


@pytest.mark.parametrize("method", ["fit", "evaluate", "predict"])
def test_an_error_of_the_module_says_what_it_was_called_on(method: str) -> None:
    model = fitkit.Model(nn.Linear(3, 1), device="cpu")
    model.compile("sgd", "mse")
    images = torch.zeros(4, 5, dtype=torch.uint8)
    data = (images,) if method == "predict" else (images, torch.zeros(4, 1))
    with pytest.raises(RuntimeError) as raised:
        getattr(model, method)(data, verbose=0)
    assert "The module was called on uint8 of shape (4, 5)." in notes_of(raised.value)


def test_a_dataset_of_dicts_under_a_loss_says_that_the_dict_is_all_inputs() -> None:
    samples = [{"x": torch.zeros(3), "y": torch.zeros(1)} for _ in range(4)]
    model = fitkit.Model(nn.Linear(3, 1), device="cpu")
    model.compile("sgd", "mse")
    with pytest.raises(
        ValueError, match=r"\(x, y\) .* received batches of a dict of x, y, all of it inputs\. Let the data give"
    ):
        model.fit(DataLoader(samples, batch_size=2), epochs=1, verbose=0)
