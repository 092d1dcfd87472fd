"""Metrics by name are the same for any slicing, cost little per batch, and hold little."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fitkit._types import OutputMeaning
from fitkit.metrics import CompiledMetrics
from fitkit.metrics import gathering as gathering_module
from fitkit.metrics.gathering import HELD_BATCHES, HELD_ELEMENTS, Gathering
from fitkit.metrics.names import NAMED, find_metric

CPU = torch.device("cpu")
CLASSES = OutputMeaning("logits", -100, classes=True)
VALUES = OutputMeaning("values")
OF_CLASSES = [name for name, metric in NAMED.items() if "multiclass" in metric.tasks]
OF_VALUES = [name for name, metric in NAMED.items() if "regression" in metric.tasks]

cuts = st.lists(st.integers(0, 40), max_size=5).map(lambda inner: [0, *sorted(inner), 40])


def gather(names: list[str], meaning: OutputMeaning, *, weighted: bool = False) -> Gathering:
    found = {name: find_metric("metrics", name) for name in names}
    return Gathering(found, meaning, CPU, weighted=weighted)


def sliced(names: list[str], pair: tuple[Tensor, Tensor], meaning: OutputMeaning, edges: list[int]) -> dict[str, float]:
    running = CompiledMetrics(names).start([meaning], CPU)
    for start, stop in itertools.pairwise(edges):
        running.update([pair[0][start:stop]], [pair[1][start:stop]], None)
    return {name: float(value) for name, value in running.compute().items()}


@given(edges=cuts, seed=st.integers(0, 99))
def test_any_slicing_of_classes_gives_the_same(edges: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    output, target = torch.randn(40, 4, generator=generator), torch.randint(0, 4, (40,), generator=generator)
    target[::7] = -100
    whole = sliced(OF_CLASSES, (output, target), CLASSES, [0, 40])
    assert sliced(OF_CLASSES, (output, target), CLASSES, edges) == pytest.approx(whole, rel=1e-12)


@given(edges=cuts, seed=st.integers(0, 99), centre=st.sampled_from([0.0, 1000.0]))
def test_any_slicing_of_values_gives_the_same(edges: list[int], seed: int, centre: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    output, target = torch.randn(2, 40, 2, generator=generator).abs() + centre
    whole = sliced(OF_VALUES, (output, target), VALUES, [0, 40])
    assert sliced(OF_VALUES, (output, target), VALUES, edges) == pytest.approx(whole, rel=1e-6)


@given(edges=cuts)
def test_any_slicing_gives_the_same_weighted_mean(edges: list[int]) -> None:
    output, target, weight = torch.randn(40, 3), torch.randn(40, 3), torch.rand(40)
    running = CompiledMetrics(None, ["mse"]).start([VALUES], CPU)
    for start, stop in itertools.pairwise(edges):
        running.update([output[start:stop]], [target[start:stop]], [weight[start:stop]])
    errors = (output - target).double().square().mean(1)
    assert float(running.compute()["mse"]) == pytest.approx(float((errors * weight).sum() / weight.sum()), rel=1e-6)


@settings(max_examples=8)
@given(edges=cuts, seed=st.integers(0, 99))
@pytest.mark.parametrize(("names", "meaning"), [(OF_CLASSES, CLASSES), (OF_VALUES, VALUES)])
def test_any_split_over_processes_gives_the_same(
    names: list[str], meaning: OutputMeaning, edges: list[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    output = torch.rand(40, 4, generator=generator)
    target = torch.randint(0, 4, (40,), generator=generator) if meaning is CLASSES else output.flip(1)
    processes = [gather(names, meaning) for _ in edges[1:]]
    for process, (start, stop) in zip(processes, itertools.pairwise(edges), strict=True):
        process.update(output[start:stop], target[start:stop], None)  # empty for some
    across = processes[0].compute_across([process.state() for process in processes], names)
    whole = sliced(names, (output, target), meaning, [0, 40])
    assert {name: float(value) for name, value in across.items()} == pytest.approx(whole, rel=1e-9)


def test_a_value_over_processes_leaves_those_of_each_as_they_were() -> None:
    here, there = gather(["mae", "r2"], VALUES), gather(["mae", "r2"], VALUES)
    here.update(torch.zeros(2), torch.tensor([1.0, 3.0]), None)
    there.update(torch.zeros(2), torch.tensor([5.0, 7.0]), None)
    assert here.compute_across([here.state(), there.state()], ["mae"])["mae"] == 4.0
    assert here.compute(["mae"])["mae"] == 2.0


def test_a_million_samples_lose_no_digits() -> None:
    output, target = torch.randn(2, 1_000_000) + 300
    names = ["mae", "mse", "r2", "explained_variance", "pearson"]
    whole = sliced(names, (output, target), VALUES, [0, 1_000_000])
    assert sliced(names, (output, target), VALUES, list(range(0, 1_000_001, 8000))) == pytest.approx(whole, rel=1e-6)
    exact = float((output.double() - target.double()).square().mean())
    assert whole["mse"] == pytest.approx(exact, rel=1e-12)


def test_what_waits_is_bounded_in_batches_and_elements() -> None:
    gathering = gather(["accuracy"], CLASSES)
    for rows in [10] * (3 * HELD_BATCHES) + [40_000] * 10 + [300_000] * 2:
        gathering.update(torch.zeros(rows, 4), torch.zeros(rows, dtype=torch.int64), None)
        held = sum(tensor.numel() for waiting in gathering._held for tensor in waiting if tensor is not None)
        assert held <= HELD_ELEMENTS
        assert len(gathering._held) < HELD_BATCHES
        assert held == gathering._held_elements
    assert gathering.compute(["accuracy"])["accuracy"] == 1.0


class HostReads(TorchDispatchMode):
    """Counts the numbers that are read from the device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


# torchmetrics looks whether scores are in [0, 1]; its pearson looked at its own state before 1.6.
READ = ("auroc", "average_precision", "pearson")


@pytest.mark.parametrize(("names", "meaning"), [(OF_CLASSES, CLASSES), (OF_VALUES, VALUES)])
def test_taking_in_batches_reads_no_number_from_the_device(names: list[str], meaning: OutputMeaning) -> None:
    target = torch.randint(0, 4, (8,)) if meaning is CLASSES else torch.rand(8, 4)
    running = CompiledMetrics([name for name in names if name not in READ]).start([meaning], CPU)
    with HostReads() as reads:
        for _ in range(HELD_BATCHES + 3):
            running.update([torch.rand(8, 4)], [target], None)
    assert reads.count == 0


@pytest.mark.parametrize(("names", "meaning"), [(["accuracy"], CLASSES), (["mae", "mse", "rmse", "mape"], VALUES)])
def test_reading_the_running_value_of_a_mean_reads_only_that(names: list[str], meaning: OutputMeaning) -> None:
    target = torch.randint(0, 4, (8,)) if meaning is CLASSES else torch.rand(8, 4)
    running = CompiledMetrics(names).start([meaning], CPU)
    running.update([torch.rand(8, 4)], [target], None)
    with HostReads() as reads:
        running.compute()
    assert reads.count == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize(("names", "meaning"), [(["accuracy"], CLASSES), (["mae", "mse", "rmse", "r2"], VALUES)])
def test_taking_in_batches_does_not_wait_for_the_gpu(names: list[str], meaning: OutputMeaning) -> None:
    pair = torch.rand(80, 4), torch.randint(0, 4, (80,)) if meaning is CLASSES else torch.rand(80, 4)
    output, target = (tensor.cuda() for tensor in pair)
    running = CompiledMetrics(names).start([meaning], output.device)
    running.update([output[:1]], [target[:1]], None)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for sample in range(1, 80):
            running.update([output[sample : sample + 1]], [target[sample : sample + 1]], None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = sliced(names, pair, meaning, [0, 80])
    assert {name: float(value) for name, value in running.compute().items()} == pytest.approx(expected, rel=1e-9)


def test_a_large_batch_is_taken_in_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, names = (torch.randn(64, 3, 9), torch.randint(0, 3, (64, 9))), ["accuracy", "f1", "auroc"]
    whole = sliced(names, pair, CLASSES, [0, 64])
    monkeypatch.setattr(gathering_module, "HELD_ELEMENTS", 100)
    monkeypatch.setattr(gathering_module, "PIECE_ELEMENTS", 200)
    assert sliced(names, pair, CLASSES, [0, 64]) == pytest.approx(whole, rel=1e-12)
    gathering = gather(["auroc"], CLASSES)
    gathering.update(*pair, None)
    (metric,) = gathering._keepers.values()
    assert max(map(len, metric.metric_state["target"])) == 50  # rows of 3 scores and a target


def test_no_batch_waits_where_algorithms_must_be_deterministic() -> None:
    gathering = gather(["f1"], CLASSES)
    torch.use_deterministic_algorithms(True)
    for _ in range(3):
        gathering.update(torch.eye(3), torch.arange(3), None)
        assert not gathering._held
    assert gathering.compute(["f1"])["f1"] == 1.0


def test_sequences_of_any_length_are_summed_up_together() -> None:
    gathering = gather(["accuracy"], CLASSES)
    for length in (5, 2, 9):
        gathering.update(torch.eye(3)[None].repeat(1, 1, length), torch.arange(3).repeat(length)[None], None)
    assert len(gathering._held) == 2  # the first batch does not wait
    assert gathering.compute(["accuracy"])["accuracy"] == 1.0


def test_windows_of_any_length_are_averaged_over_elements() -> None:
    gathering = gather(["mae"], VALUES)
    gathering.update(torch.zeros(1, 3), torch.ones(1, 3), None)
    gathering.update(torch.zeros(1, 1), torch.full((1, 1), 5.0), None)
    assert gathering.compute(["mae"])["mae"] == 2.0


def test_another_number_of_classes_is_refused() -> None:
    gathering = gather(["f1"], CLASSES)
    gathering.update(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), None)
    with pytest.raises(ValueError, match="multiclass with 3 columns, received a multiclass one with 4"):
        gathering.update(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64), None)


def test_another_number_of_columns_is_refused_where_columns_count() -> None:
    gathering = gather(["mae", "r2"], VALUES)
    gathering.update(torch.zeros(2, 3), torch.zeros(2, 3), None)
    with pytest.raises(ValueError, match="regression with 3 columns, received a regression one with 4"):
        gathering.update(torch.zeros(2, 4), torch.zeros(2, 4), None)


@pytest.mark.parametrize(("names", "meaning"), [(OF_CLASSES, CLASSES), (OF_VALUES, VALUES)])
def test_a_metric_has_the_same_value_alone_and_beside_all_others(names: list[str], meaning: OutputMeaning) -> None:
    output = torch.rand(90, 4)
    target = torch.randint(0, 4, (90,)) if meaning is CLASSES else torch.rand(90, 4)
    together = sliced(names, (output, target), meaning, [0, 50, 90])
    assert together == {name: sliced([name], (output, target), meaning, [0, 50, 90])[name] for name in reversed(names)}


def test_metrics_with_the_same_states_share_them() -> None:
    gathering = gather(["f1", "precision", "recall", "specificity", "auroc", "average_precision"], CLASSES)
    gathering.update(torch.eye(3), torch.arange(3), None)
    assert len(gathering._keepers) == 2


def test_only_what_is_asked_for_is_computed() -> None:
    gathering = gather(["accuracy", "auroc"], CLASSES)
    gathering.update(torch.eye(3), torch.arange(3), None)
    assert list(gathering.compute(["accuracy"])) == ["accuracy"]


def test_what_a_run_in_inference_mode_took_in_can_be_added_to_outside() -> None:
    gathering = gather(["accuracy", "f1", "auroc"], CLASSES)
    with torch.inference_mode():
        gathering.update(torch.eye(3), torch.arange(3), None)
    gathering.update(torch.eye(3), torch.arange(3), None)
    assert {float(value) for value in gathering.compute(gathering.keys).values()} == {1.0}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_outputs_of_any_floating_type_are_taken(dtype: torch.dtype) -> None:
    gathering = gather(OF_CLASSES, CLASSES)
    gathering.update((torch.eye(3) * 9).to(dtype), torch.arange(3, dtype=torch.int32), None)
    assert gathering.compute(["f1"])["f1"] == 1.0


def test_weights_weigh_items_and_ignored_ones_nothing() -> None:
    gathering = gather(["accuracy"], CLASSES, weighted=True)
    output, target = torch.eye(3), torch.tensor([0, 0, -100])
    gathering.update(output, target, torch.tensor([1.0, 3.0, 50.0]))
    assert gathering.compute(["accuracy"])["accuracy"] == 0.25


def test_batches_without_weights_weigh_1_beside_others() -> None:
    gathering = gather(["mae"], VALUES, weighted=True)
    gathering.update(torch.zeros(2), torch.tensor([1.0, 2.0]), None)
    gathering.update(torch.zeros(2), torch.tensor([4.0, 6.0]), torch.tensor([0.5, 1.5]))
    gathering.update(torch.zeros(1), torch.tensor([7.0]), None)
    assert gathering.compute(["mae"])["mae"] == pytest.approx((1 + 2 + 2 + 9 + 7) / 5)


def test_one_weight_per_sample_weighs_every_item_of_the_sample() -> None:
    gathering = gather(["accuracy"], CLASSES, weighted=True)
    output = torch.eye(2)[:, :, None].repeat(1, 1, 3)
    gathering.update(output, torch.tensor([[0, 0, 1], [0, 0, 0]]), torch.tensor([1.0, 3.0]))
    assert gathering.compute(["accuracy"])["accuracy"] == pytest.approx(2 / 12)


def test_weights_of_zero_alone_give_nan() -> None:
    gathering = gather(["mae"], VALUES, weighted=True)
    gathering.update(torch.zeros(2), torch.ones(2), torch.zeros(2))
    assert math.isnan(float(gathering.compute(["mae"])["mae"]))


@pytest.mark.parametrize("name", ["accuracy", "iou"])
def test_a_target_beyond_the_classes_is_refused_at_the_first_batch_of_a_loss_of_ones_own(name: str) -> None:
    metrics = gather([name], OutputMeaning("unknown"))
    with pytest.raises(ValueError, match=r"classes from 0 to 2, .* received the target 255\. If the loss ignores it"):
        metrics.update(torch.randn(2, 3, 2, 2), torch.full((2, 2, 2), 255), None)


def test_a_target_beyond_the_classes_is_named_where_torchmetrics_fails_on_it_later() -> None:
    metrics = gather(["iou"], OutputMeaning("unknown"))
    metrics.update(torch.randn(2, 3), torch.tensor([0, 1]), None)
    metrics.update(torch.randn(2, 3), torch.tensor([0, -1]), None)
    with pytest.raises(ValueError, match=r"received the target -1"):
        metrics.compute(["iou"])


def test_ignored_targets_of_a_loss_of_ones_own_stay_out() -> None:
    output, target = torch.randn(4, 3), torch.tensor([0, 1, 2, 255])
    metrics = gather(["iou", "accuracy"], OutputMeaning("unknown", 255))
    metrics.update(output, target, None)
    known = gather(["iou", "accuracy"], CLASSES)
    known.update(output[:3], target[:3], None)
    assert metrics.compute(["iou", "accuracy"]) == known.compute(["iou", "accuracy"])


@pytest.mark.parametrize("classes", [10, 1000, 2000, 100_000])
def test_there_is_room_for_no_more_elements_than_are_held(classes: int) -> None:
    running = CompiledMetrics(["accuracy"]).start([OutputMeaning("logits", classes=True)], torch.device("cpu"))
    for _ in range(2):
        running.update([torch.randn(4, classes)], [torch.randint(classes, (4,))], None)
    assert running.room * 4 * (classes + 1) <= HELD_ELEMENTS


@pytest.mark.parametrize("name", ["auroc", "average_precision", "spearman"])
def test_what_is_kept_of_large_batches_is_no_memory_that_is_written_into_again(name: str) -> None:
    classes, rows = name in OF_CLASSES, gathering_module.CACHED_ELEMENTS
    meaning = OutputMeaning("logits", classes=True) if classes else VALUES
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(3, rows, 3, generator=generator, dtype=torch.float64)
    targets = outputs + torch.randn(3, rows, 3, generator=generator, dtype=torch.float64)
    targets = targets.argmax(2) if classes else targets
    running, output, target = gather([name], meaning), torch.empty_like(outputs[0]), torch.empty_like(targets[0])
    for index in range(3):
        running.update(output.copy_(outputs[index]), target.copy_(targets[index]), None)
    alone = gather([name], meaning)
    alone.update(outputs.flatten(0, 1), targets.flatten(0, 1), None)
    assert running.compute([name])[name] == pytest.approx(alone.compute([name])[name])
