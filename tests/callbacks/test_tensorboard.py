"""TensorBoard: the event files, read back, have the numbers of the run."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fitkit
from fitkit.callbacks import LambdaCallback, TensorBoard

pytest.importorskip("tensorboard")

X = torch.linspace(-1, 1, 40).reshape(20, 2)
Y = X.sum(1, keepdim=True) + 0.5


def fitted(*callbacks: Any, module: nn.Module | None = None, **flags: Any) -> fitkit.History:
    torch.manual_seed(0)
    model = fitkit.Model(nn.Linear(2, 1) if module is None else module, device="cpu")
    model.compile("sgd", "mse", metrics=["mae"], learning_rate=0.1)
    flags = {"epochs": 2, "batch_size": 4, "verbose": 0, **flags}
    return model.fit(X, Y, callbacks=list(callbacks), **flags)


def read(folder: Path) -> Any:
    """The event files of a folder, by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0}).Reload()


def points(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(folder).Scalars(tag)]


def expected(column: list[Any]) -> list[tuple[int, float]]:
    """The numbers of a History, with the precision of an event file."""
    return [(epoch, torch.tensor(value).item()) for epoch, value in enumerate(column)]


def test_epochs_of_training_and_validation_are_one_chart(tmp_path: Path) -> None:
    history = fitted(TensorBoard(tmp_path), validation_data=(X, Y))
    assert points(tmp_path / "train", "epoch_loss") == expected(history["loss"])
    assert points(tmp_path / "validation", "epoch_loss") == expected(history["val_loss"])
    assert points(tmp_path / "validation", "epoch_mae") == expected(history["val_mae"])


def test_the_learning_rate_is_there_in_any_case(tmp_path: Path) -> None:
    fitted(TensorBoard(tmp_path, update_freq="batch"), epochs=1)
    rate = torch.tensor(0.1).item()
    assert points(tmp_path / "train", "epoch_learning_rate") == [(0, rate)]
    assert points(tmp_path / "train", "batch_learning_rate") == [(batch, rate) for batch in range(5)]


def test_what_an_earlier_callback_adds_is_written(tmp_path: Path) -> None:
    adding = LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(answer=42.0))
    fitted(adding, TensorBoard(tmp_path))
    assert points(tmp_path / "train", "epoch_answer") == [(0, 42.0), (1, 42.0)]


def test_batches_are_counted_over_the_run(tmp_path: Path) -> None:
    losses: list[float] = []
    noting = LambdaCallback(on_train_batch_end=lambda batch, logs: losses.append(logs["batch_loss"]))
    fitted(TensorBoard(tmp_path, update_freq="batch"), noting)
    assert points(tmp_path / "train", "batch_loss") == expected(losses)


def test_update_freq_counts_batches(tmp_path: Path) -> None:
    fitted(TensorBoard(tmp_path, update_freq=3))
    assert [step for step, _ in points(tmp_path / "train", "batch_mae")] == [0, 3, 6, 9]


def test_by_default_no_batch_is_written(tmp_path: Path) -> None:
    fitted(TensorBoard(tmp_path))
    assert not [tag for tag in read(tmp_path / "train").Tags()["scalars"] if tag.startswith("batch_")]


def test_gradient_norms_are_written_in_total_by_batch_and_each_by_epoch(tmp_path: Path) -> None:
    fitted(TensorBoard(tmp_path, update_freq="batch"), track_grad_norm=2)
    tags = read(tmp_path / "train").Tags()["scalars"]
    assert {tag for tag in tags if "grad" in tag} == {
        "batch_grad_2_norm_total",
        "epoch_grad_2_norm_total",
        "epoch_grad_2_norm_weight",
        "epoch_grad_2_norm_bias",
    }


def test_histograms_are_those_of_the_parameters(tmp_path: Path) -> None:
    fitted(TensorBoard(tmp_path, histogram_freq=2), epochs=4)
    events = read(tmp_path / "train").Histograms("weight")
    assert [event.step for event in events] == [1, 3]
    assert events[0].histogram_value.num == 2


def test_the_graph_has_the_modules_and_changes_no_weight(tmp_path: Path) -> None:
    def module() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 1))

    with_graph, without = module(), module()
    with_graph[3].eval()  # type: ignore[index]
    modes: list[list[bool]] = []
    looking = LambdaCallback(
        on_train_batch_end=lambda batch, logs: modes.append([part.training for part in with_graph.modules()])
    )
    fitted(TensorBoard(tmp_path, write_graph=True), looking, module=with_graph)
    fitted(module=without)
    names = {node.name for node in read(tmp_path / "train").Graph().node}
    assert any("BatchNorm1d[1]" in name for name in names)
    assert all(map(torch.equal, with_graph.state_dict().values(), without.state_dict().values()))
    assert modes[0] == [True, True, True, True, False]
    assert not with_graph._forward_pre_hooks


def test_a_module_with_inputs_by_keyword_has_no_graph(tmp_path: Path) -> None:
    class Keywords(nn.Linear):
        def forward(self, *, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return super().forward(x)

    model = fitkit.Model(Keywords(2, 1), device="cpu")
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match="write_graph=True needs .* received inputs by keyword: x"):
        model.fit({"x": X}, Y, epochs=1, callbacks=[TensorBoard(tmp_path, write_graph=True)], verbose=0)
    assert not model.module._forward_pre_hooks


def test_a_module_that_cannot_be_traced_is_an_error_that_says_what_to_leave_out(tmp_path: Path) -> None:
    class Training(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not self.training:
                raise RuntimeError("only for training")
            return super().forward(x)

    with pytest.raises(
        ValueError, match="write_graph=True needs a module .* Leave write_graph out. .only for training."
    ):
        fitted(TensorBoard(tmp_path, write_graph=True), module=Training(2, 1))


def test_hyperparameters_are_written_with_the_last_numbers(tmp_path: Path) -> None:
    history = fitted(TensorBoard(tmp_path, hyperparameters={"rate": 0.1, "optimizer": "sgd", "nesterov": False}))
    events = read(tmp_path / "train")
    assert events.Scalars("hparam/loss")[0].value == torch.tensor(history["loss"][-1]).item()
    content = str(events.SummaryMetadata("_hparams_/session_start_info"))
    assert all(name in content for name in ("rate", "optimizer", "nesterov"))


def test_steps_per_second_are_written_when_asked(tmp_path: Path) -> None:
    fitted(TensorBoard(tmp_path, write_steps_per_second=True))
    assert all(value > 0 for _, value in points(tmp_path / "train", "epoch_steps_per_second"))


def test_what_was_written_before_an_error_is_there(tmp_path: Path) -> None:
    def fail(epoch: int, logs: Any) -> None:
        if epoch == 1:
            raise RuntimeError("in mid-run")

    with pytest.raises(RuntimeError, match="in mid-run"):
        fitted(TensorBoard(tmp_path), LambdaCallback(on_epoch_begin=fail))
    assert len(points(tmp_path / "train", "epoch_loss")) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_no_writer_is_left_at_work(fails: bool, tmp_path: Path) -> None:
    def writers() -> int:
        return sum("AsyncWriter" in type(thread).__name__ for thread in threading.enumerate())

    def step(epoch: int, logs: Any) -> None:
        assert writers() == 1 + (epoch > 0)  # that of training, and then that of validation
        if fails and epoch == 1:
            raise RuntimeError("in mid-run")

    with pytest.raises(RuntimeError, match="in mid-run") if fails else contextlib.nullcontext():
        fitted(TensorBoard(tmp_path), LambdaCallback(on_epoch_begin=step), validation_data=(X, Y))
    assert writers() == 0


def test_a_resumed_run_counts_on(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, update_freq=5)
    fitted(board, LambdaCallback(on_train_begin=lambda logs: board.load_state_dict({"batches": 100})))
    assert [step for step, _ in points(tmp_path / "train", "batch_loss")] == [100, 105]
    assert board.state_dict() == {"batches": 110}


def test_it_needs_no_tensorflow(tmp_path: Path) -> None:
    code = f"""
import sys
sys.modules["tensorflow"] = None  # importing it would fail
import torch, fitkit
model = fitkit.Model(torch.nn.Linear(1, 1), device="cpu")
model.compile("sgd", "mse")
board = fitkit.callbacks.TensorBoard({str(tmp_path)!r})
model.fit(torch.ones(4, 1), torch.ones(4, 1), epochs=1, callbacks=[board], verbose=0)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert len(points(tmp_path / "train", "epoch_loss")) == 1


@pytest.mark.parametrize("update_freq", ["step", 0, -1])
def test_an_unknown_update_freq_is_refused(update_freq: Any) -> None:
    with pytest.raises(ValueError, match="received update_freq="):
        TensorBoard(update_freq=update_freq)


def test_hyperparameters_have_names() -> None:
    with pytest.raises(TypeError, match="Expected {name: value}, received hyperparameters="):
        TensorBoard(hyperparameters=[0.1])  # type: ignore[arg-type]


def test_without_the_package_the_constructor_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r"TensorBoard needs tensorboard: pip install 'fitkit\[tensorboard\]'"):
        TensorBoard()


def test_a_log_dir_that_is_no_path_is_refused() -> None:
    with pytest.raises(TypeError, match="Expected a path, received log_dir=3"):
        TensorBoard(3)  # type: ignore[arg-type]
