"""Running values: runs are independent, states travel, processes agree."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from torch import Tensor
from torchmetrics import MeanSquaredError, MetricCollection
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy

from fitkit._types import OutputMeaning
from fitkit.metrics import CompiledMetrics, RunningMetrics
from fitkit.metrics.states import check_grown

CPU = torch.device("cpu")
CLASSES = OutputMeaning("logits", -100, classes=True)


def gap(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) - target).float().mean()


def compiled() -> CompiledMetrics:
    own = MetricCollection({"own": MulticlassAccuracy(3), "other": MulticlassAccuracy(3, average="micro")})
    return CompiledMetrics(["accuracy", "f1", "auroc", gap, own], {"weighted": "accuracy"})


def start() -> RunningMetrics:
    return compiled().start([CLASSES], CPU)


def batch(seed: int, size: int = 6) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, 3, (size,), generator=generator)
    return [torch.randn(size, 3, generator=generator)], [target], [torch.rand(size, generator=generator)]


def numbers(running: RunningMetrics) -> dict[str, float]:
    return {name: float(value) for name, value in running.compute().items()}


def numbers_of_all(running: RunningMetrics) -> dict[str, float]:
    everywhere: list[Any] = [None, None]
    torch.distributed.all_gather_object(everywhere, running.states())
    return {name: float(value) for name, value in running.compute_across(everywhere).items()}


def test_values_come_in_the_order_of_names() -> None:
    running = start()
    running.update(*batch(0))
    assert list(running.compute()) == running.names == compiled().names


def test_nothing_taken_in_gives_nothing() -> None:
    running = start()
    assert running.compute() == {}
    running.update([torch.zeros(0, 3)], [torch.zeros(0, dtype=torch.int64)], None)
    assert running.compute() == {}


def test_without_metrics_any_outputs_will_do() -> None:
    running = CompiledMetrics(None).start([OutputMeaning()], CPU)
    running.update([None, {"a": 1}], [], None)
    assert running.compute() == {}


def test_an_empty_batch_changes_nothing() -> None:
    running = start()
    running.update(*batch(0))
    before = numbers(running)
    running.update([torch.zeros(0, 3)], [torch.zeros(0, dtype=torch.int64)], None)
    assert numbers(running) == before


def test_reset_forgets_everything() -> None:
    running, fresh = start(), start()
    running.update(*batch(0))
    running.reset()
    assert running.compute() == {}
    running.update(*batch(1))
    fresh.update(*batch(1))
    assert numbers(running) == numbers(fresh)


def test_a_run_inside_another_changes_no_number() -> None:
    metrics = compiled()
    outer, alone = metrics.start([CLASSES], CPU), start()
    for seed in range(3):
        outer.update(*batch(seed))
        inner = metrics.start([CLASSES], CPU)
        inner.update(*batch(seed + 10))
        inner.compute()
        alone.update(*batch(seed))
    assert numbers(outer) == numbers(alone)


def test_reading_running_values_changes_no_later_one() -> None:
    read, unread = start(), start()
    for seed in range(5):
        read.update(*batch(seed))
        read.compute()
        unread.update(*batch(seed))
    assert numbers(read) == pytest.approx(numbers(unread), rel=1e-12)


def test_only_what_is_asked_for_is_computed() -> None:
    running = CompiledMetrics(["accuracy", "r2"], output_names=None).start([CLASSES], CPU)
    group = next(group for _, group in running._groups if group.keys == ("accuracy",))
    group.update(*[entry[0] for entry in batch(0)])
    assert list(running.compute(["accuracy"])) == ["accuracy"]


def test_a_state_goes_on_where_it_was_made() -> None:
    whole, first, second = start(), start(), start()
    for seed in range(4):
        whole.update(*batch(seed))
        (first if seed < 2 else second).update(*batch(seed))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = start()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert numbers(resumed) == numbers(first)
    for seed in (2, 3):
        resumed.update(*batch(seed))
    assert numbers(resumed) == pytest.approx(numbers(whole), rel=1e-12)


def test_a_state_of_nothing_is_taken_too() -> None:
    running = start()
    running.update(*batch(0))
    running.load_state_dict(start().state_dict())
    assert running.compute() == {}


def test_a_state_is_no_view_of_the_run() -> None:
    running = start()
    running.update(*batch(0))
    state, before = running.state_dict(), numbers(running)
    running.update(*batch(1))
    resumed = start()
    resumed.load_state_dict(state)
    assert numbers(resumed) == before


def test_a_state_of_other_metrics_is_refused() -> None:
    other = CompiledMetrics(["mae"]).start([OutputMeaning()], CPU)
    with pytest.raises(ValueError, match=r"Expected the running values of \['mae'\], received those of \['accuracy'"):
        other.load_state_dict(start().state_dict())


def load(running: RunningMetrics, state: dict[str, Any]) -> None:
    """As a run that goes on from a file does."""
    running.load_state_dict(state)
    running.check_loaded()


def changed(state: Any, place: Sequence[Any], value: Any) -> Any:
    """The state with another value at a place."""
    if not place:
        return value
    first, *rest = place
    state = state.copy()
    state[first] = changed(state[first], rest, value)
    return state


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (["samples"], torch.tensor(8), "Expected an integer of at least 0, received samples="),
        (["samples"], -1, "Expected an integer of at least 0, received samples=-1"),
        (["samples"], math.nan, "TypeError: Expected an integer"),
        (["reading", "columns"], 1.5, "received Reading"),
        (["reading", "ignore_index"], "text", "received Reading"),
        (["shapes"], ((8,), (8,), torch.int64), "expect class indices"),
        (["held"], None, "TypeError: "),
        (["held", 0, 0], torch.zeros(3), "Expected 2 tensors of as many rows each"),
        (["held", 0, 0], torch.zeros(3, 3), "Expected 2 tensors of as many rows each"),
        (["held", 0], [], "Expected 2 tensors of as many rows each"),
        (["metrics", 0, "total"], torch.tensor(True), "Expected what tensor"),
        (["metrics", 0], {}, "Expected what .* becomes as total, received None"),
        (["metrics", 1, "tp"], torch.zeros(5, dtype=torch.float64), "RuntimeError: "),
        (["metrics", 2, "preds"], torch.zeros(8, 3), r"Expected what \[\] becomes as preds"),
        (["metrics", 2, "preds", 0], torch.zeros(2), "Tensors must have same number of dimensions"),
    ],
)
def test_a_state_of_no_values_is_refused_by_the_metrics_names(place: list[Any], value: Any, words: str) -> None:
    first, resumed = start(), start()
    for seed in (0, 1):
        first.update(*batch(seed))
    with pytest.raises(ValueError, match=f"the running values of 'accuracy', 'f1', 'auroc' are none: .*{words}"):
        load(resumed, changed(first.state_dict(), ["parts", 0, *place], value))


def test_a_state_of_several_numbers_where_one_is_logged_is_refused() -> None:
    first, resumed = (CompiledMetrics(["rmse"]).start([OutputMeaning()], CPU) for _ in range(2))
    first.update([torch.zeros(8)], [torch.ones(8)], None)
    state = changed(first.state_dict(), ["parts", 0, "metrics", 0, "total"], torch.ones(1, dtype=torch.float64))
    with pytest.raises(ValueError, match="the running values of 'rmse' are none: Expected sums of one number each"):
        load(resumed, state)


@pytest.mark.parametrize("value", [None, 1, torch.tensor(True), []], ids=repr)
def test_a_state_of_ones_own_metric_that_is_no_sum_is_refused(value: Any) -> None:
    metrics = CompiledMetrics([MeanSquaredError()])
    first, resumed = (metrics.start([OutputMeaning()], CPU) for _ in range(2))
    first.update([torch.zeros(8)], [torch.ones(8)], None)
    with pytest.raises(ValueError, match="the running values of 'mean_squared_error' are none: "):
        load(resumed, changed(first.state_dict(), ["parts", 0, "metric", "total"], value))


def test_states_that_are_neither_tensors_nor_lists_are_left_to_the_metric() -> None:
    check_grown({"kept": "text"}, {"kept": 1, "missing": None})


def test_each_output_has_its_own_metrics_and_meaning() -> None:
    meanings = [OutputMeaning("values"), OutputMeaning("logits")]
    running = CompiledMetrics({"b": ["accuracy"], "a": "mae"}, output_names=["a", "b"]).start(meanings, CPU)
    running.update([torch.zeros(2), torch.tensor([0.1, -0.1])], [torch.ones(2), torch.tensor([1, 0])], None)
    assert numbers(running) == {"a_mae": 1.0, "b_accuracy": 1.0}


def test_more_outputs_than_compiled_are_answered_with_what_to_do() -> None:
    running = CompiledMetrics(["mae"]).start([OutputMeaning()], CPU)
    with pytest.raises(ValueError, match=r"Expected 1 output\(s\).*received 2 outputs and 2 targets.*compile\(loss=\["):
        running.update([torch.zeros(2)] * 2, [torch.zeros(2)] * 2, None)


@pytest.mark.parametrize(
    ("output", "target", "message"),
    [
        ({"a": torch.zeros(2)}, torch.zeros(2), "The metrics 'mae' read one tensor, received output="),
        (torch.zeros(2), [torch.zeros(2)], "The metrics 'mae' read one tensor, received target="),
        (torch.zeros(2), None, "The metrics 'mae' compare outputs with targets, received y=None"),
    ],
)
def test_metrics_by_name_need_two_tensors(output: Any, target: Any, message: str) -> None:
    running = CompiledMetrics(["mae"]).start([OutputMeaning("values")], CPU)
    with pytest.raises(ValueError, match=message):
        running.update([output], [target], None)


def test_weighted_metrics_without_weights_are_the_plain_ones() -> None:
    running = CompiledMetrics(["mse"], {"weighted": "mse"}).start([OutputMeaning("values")], CPU)
    running.update([torch.randn(9, 2)], [torch.randn(9, 2)], None)
    values = numbers(running)
    assert values["weighted"] == pytest.approx(values["mse"], rel=1e-12)


def in_one_of_two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    running = start()
    if rank == 1:  # the other process has no data
        running.update(*batch(0))
        running.update(*batch(1))
        running.compute()  # of this process alone: waits for nobody
    torch.save(numbers_of_all(running), f"{folder}/{rank}.pt")
    running.update(*batch(2 + rank))
    torch.save(numbers_of_all(running), f"{folder}/{rank}_later.pt")
    torch.distributed.destroy_process_group()


# Another process cannot import a test by name, only by its file.
IN_A_PROCESS = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("test_running", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.in_one_of_two_processes(int(sys.argv[2]), sys.argv[3])
"""


@pytest.mark.long
def test_processes_agree_on_the_values_over_the_data_of_all(tmp_path: Path) -> None:
    command = [sys.executable, "-c", IN_A_PROCESS, __file__]
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in (0, 1)]
    assert [process.wait(timeout=200) for process in processes] == [0, 0]
    whole = start()
    for seeds, name in (((0, 1), ""), ((2, 3), "_later")):
        for seed in seeds:
            whole.update(*batch(seed))
        for rank in (0, 1):
            assert torch.load(tmp_path / f"{rank}{name}.pt") == pytest.approx(numbers(whole), rel=1e-6)


def test_metrics_that_keep_lists_travel_too() -> None:
    first = CompiledMetrics({"area": BinaryAUROC(), "mse": MeanSquaredError()}).start([OutputMeaning()], CPU)
    first.update([torch.tensor([0.1, 0.9, 0.3])], [torch.tensor([0, 1, 1])], None)
    second = CompiledMetrics({"area": BinaryAUROC(), "mse": MeanSquaredError()}).start([OutputMeaning()], CPU)
    second.load_state_dict(first.state_dict())
    for running in (first, second):
        running.update([torch.tensor([0.2, 0.8])], [torch.tensor([1, 0])], None)
    assert numbers(first) == numbers(second)
