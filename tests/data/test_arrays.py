"""ArrayBatches: batched by index, in chunks, with a DataLoader's draws, and without touching the user's arrays."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fitkit
from fitkit.data import Batching, as_batches, as_split_batches
from fitkit.data.arrays import ArrayBatches

CPU = torch.device("cpu")


def arrays(*parts: Any, batch_size: int = 4, shuffle: bool = False, draws: bool = False) -> ArrayBatches:
    return ArrayBatches(parts, batch_size=batch_size, shuffle=shuffle, draws=draws, dtype=torch.float32, device=CPU)


def numbers(samples: int) -> Tensor:
    return torch.arange(float(samples))


def assert_same_passes(first: Any, second: Any, passes: int) -> None:
    """The same batches at each pass, and the same state of torch's generator after it."""
    states: list[list[Tensor]] = [[], []]
    given: list[list[Tensor]] = [[], []]
    for index, source in enumerate((first, second)):
        torch.manual_seed(5)
        for _ in range(passes):
            given[index] += [tensor for batch in source for tensor in batch]
            states[index].append(torch.get_rng_state())
    assert len(given[0]) == len(given[1]) > 0
    assert all(map(torch.equal, given[0], given[1]))
    assert all(map(torch.equal, states[0], states[1]))


@given(samples=st.integers(1, 400), batch_size=st.integers(1, 60), shuffle=st.booleans())
def test_passes_are_those_of_a_dataloader_bit_for_bit(samples: int, batch_size: int, shuffle: bool) -> None:
    x, y = numbers(samples).reshape(-1, 1), torch.arange(samples)
    loader = DataLoader(TensorDataset(x, y), batch_size=batch_size, shuffle=shuffle)
    assert_same_passes(arrays(x, y, batch_size=batch_size, shuffle=shuffle, draws=True), loader, passes=3)


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_pass_cut_short_has_drawn_what_a_dataloader_has_drawn(shuffle: bool) -> None:
    x, y = numbers(10), torch.arange(10)

    def cut_short(source: Any) -> Any:
        return [next(iter(source)) for _ in range(3)]

    torch.manual_seed(1)
    expected = cut_short(DataLoader(TensorDataset(x, y), batch_size=4, shuffle=shuffle)), torch.rand(1)
    torch.manual_seed(1)
    found = cut_short(arrays(x, y, shuffle=shuffle, draws=True)), torch.rand(1)
    torch.testing.assert_close([list(batch) for batch in found[0]], expected[0], rtol=0, atol=0)
    assert torch.equal(found[1], expected[1])


def test_validation_data_draws_nothing() -> None:
    batching = Batching(4, None, training=True, dtype=torch.float32, device=CPU)
    _, held_out = as_split_batches(numbers(10), numbers(10), None, batching, 0.5, None)
    before = torch.get_rng_state()
    for source in (held_out, arrays(numbers(10), numbers(10))):
        assert source is not None
        assert len(list(source)) > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_come_from_the_cpu_whatever_the_default_device_is() -> None:
    source = arrays(numbers(10), numbers(10), shuffle=True, draws=True)
    torch.manual_seed(1)
    expected = torch.cat([x for x, _ in source])
    torch.manual_seed(1)
    with torch.device("meta"):
        assert torch.equal(torch.cat([x for x, _ in source]), expected)


@given(samples=st.integers(1, 1000), batch_size=st.integers(1, 9), shuffle=st.booleans())
def test_every_sample_comes_once_and_only_the_last_batch_is_short(samples: int, batch_size: int, shuffle: bool) -> None:
    source = arrays(numbers(samples), numbers(samples), batch_size=batch_size, shuffle=shuffle)
    sizes = [len(x) for x, _ in source]
    assert torch.cat([x for x, _ in source]).sort().values.equal(numbers(samples))
    assert len(sizes) == source.length
    assert all(size == batch_size for size in sizes[:-1])


def test_x_and_y_are_shuffled_alike() -> None:
    for x, y in arrays(numbers(300), {"twice": [2 * numbers(300).numpy()]}, shuffle=True):
        assert torch.equal(2 * x, y["twice"][0])


def test_a_batch_of_x_alone_is_x_and_a_list_is_wrapped() -> None:
    x = numbers(4)
    (bare,) = arrays(x)
    (mapping,) = arrays({"a": x})
    (several,) = arrays([x, x])
    assert torch.equal(bare, x)
    assert torch.equal(mapping["a"], x)
    assert isinstance(several, tuple)
    torch.testing.assert_close(several, ([x, x],))


def test_nests_keep_their_structure() -> None:
    x = {"a": (numbers(4), [numbers(4)]), "b": numbers(4)}
    ((batch, y),) = arrays(x, [numbers(4)])
    torch.testing.assert_close(batch, x)
    torch.testing.assert_close(y, [numbers(4)])


@pytest.mark.parametrize(
    ("samples", "fraction", "sizes"),
    [(10, 0.25, (7, 3)), (10, 0.9, (1, 9)), (10, 0.1, (9, 1)), (3, 0.5, (1, 2)), (100, 0.29, (71, 29))],
)
def test_a_split_rounds_the_training_part_down(samples: int, fraction: float, sizes: tuple[int, int]) -> None:
    batching = Batching(4, None, training=True, dtype=torch.float32, device=CPU)
    first, rest = as_split_batches(numbers(samples), numbers(samples), None, batching, fraction, None)
    assert rest is not None
    assert (sum(len(x) for x, _ in first), sum(len(x) for x, _ in rest)) == sizes
    assert torch.equal(torch.cat([x for x, _ in rest]), numbers(samples)[sizes[0] :])


def test_a_split_shuffles_the_first_part_only() -> None:
    first, rest = arrays(numbers(100), numbers(100), shuffle=True, draws=True).split(90)
    order = torch.cat([x for x, _ in first])
    assert not torch.equal(order, numbers(90))
    assert torch.equal(order.sort().values, numbers(90))
    assert torch.equal(torch.cat([x for x, _ in rest]), torch.arange(90.0, 100.0))


def test_in_order_is_unshuffled_and_resized_changes_the_batches_only() -> None:
    source = arrays(numbers(10), numbers(10), shuffle=True)
    assert torch.equal(torch.cat([x for x, _ in source.in_order()]), numbers(10))
    assert [len(x) for x, _ in source.resized(6)] == [6, 4]
    assert (source.resized(6).length, source.length) == (2, 3)


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_in_place_module_leaves_the_arrays_alone(shuffle: bool) -> None:
    x, y = torch.randn(50, 3), np.random.default_rng(0).normal(size=(50, 3)).astype("float32")
    kept = x.clone(), y.copy()
    for one, other in arrays(x, y, shuffle=shuffle):
        nn.functional.relu_(one)
        other.zero_()
    assert torch.equal(x, kept[0])
    assert (y == kept[1]).all()


def test_a_module_may_train_through_an_in_place_change_of_its_input() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            x += self.shift
            return x

    model = fitkit.Model(Shifted(), device="cpu")
    model.compile(torch.optim.SGD(model.module.parameters(), lr=0.1), "mse")
    model.fit(torch.zeros(12, 3), torch.ones(12, 3), batch_size=4, epochs=2, verbose=0)
    torch.testing.assert_close(model.module.get_parameter("shift"), torch.full((3,), 1 - (1 - 0.2 / 3) ** 6))


def test_batches_change_nothing_of_each_other() -> None:
    for x, _ in arrays(torch.ones(12, 2), torch.ones(12)):
        assert torch.equal(x, torch.ones(4, 2))
        x.zero_()


def test_a_memory_map_is_read_in_chunks(tmp_path: Path) -> None:
    mapped = np.memmap(tmp_path / "x", dtype="float64", mode="w+", shape=(64, 2**17))  # 64 MiB
    source = arrays(np.memmap(tmp_path / "x", dtype=">f8", mode="r", shape=mapped.shape), torch.ones(64))
    tracemalloc.start()
    for _ in source:
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 48 * 2**20  # two chunks of 16 MiB and their conversion, not 64 MiB


def test_a_memory_map_trains_without_being_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fitkit.data.arrays.BYTES_PER_CHUNK", 2**10)
    np.random.default_rng(0).normal(size=(200, 4)).tofile(tmp_path / "x")
    x = np.memmap(tmp_path / "x", dtype="float64", mode="r", shape=(200, 4))
    source = arrays(x, torch.ones(200, 1), batch_size=8, shuffle=True)
    storages = [batch.untyped_storage().nbytes() for batch, _ in source]
    assert max(storages) <= 2**10
    model = fitkit.Model(nn.Linear(4, 1), device="cpu")
    model.compile("sgd", "mse")
    assert len(model.fit((x, torch.ones(200, 1)), epochs=1, verbose=0)["loss"]) == 1


def test_an_array_larger_than_a_chunk_is_taken_batch_by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fitkit.data.arrays.BYTES_PER_CHUNK", 1)
    torch.manual_seed(1)
    one = [x for x, _ in arrays(numbers(10), numbers(10), shuffle=True)]
    monkeypatch.undo()
    torch.manual_seed(1)
    other = [x for x, _ in arrays(numbers(10), numbers(10), shuffle=True)]
    assert all(map(torch.equal, one, other))


def test_a_batch_size_beyond_the_data_gives_one_batch() -> None:
    for size in (10, 11, 2**40, 10**30):
        ((x, _),) = arrays(numbers(10), numbers(10), batch_size=size)
        assert torch.equal(x, numbers(10))


def test_the_parts_of_a_batch_are_known_beforehand() -> None:
    x = numbers(4)
    assert [arrays(*(x,) * count).parts for count in (1, 2, 3)] == [1, 2, 3]
    assert arrays([x, x], x).parts == 2
    assert arrays(x, x).in_order().parts == 2


def test_no_dataset_and_no_sample_by_sample_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("Samples were asked for one by one.")

    monkeypatch.setattr(TensorDataset, "__getitem__", refuse)
    monkeypatch.setattr(DataLoader, "__iter__", refuse)
    batching = Batching(4, None, training=True, dtype=torch.float32, device=CPU)
    dataset = TensorDataset(numbers(10), numbers(10))
    assert len(list(as_batches(dataset, None, None, batching))) == 3
    assert len(list(as_batches(numbers(10), numbers(10), None, batching))) == 3


def test_a_tensor_dataset_of_one_tensor_gives_tuples_of_one() -> None:
    batching = Batching(4, False, training=True, dtype=torch.float32, device=CPU)
    (x,) = next(iter(as_batches(TensorDataset(numbers(10)), None, None, batching)))
    assert torch.equal(x, numbers(4))


def test_a_subclass_of_tensor_dataset_gives_its_own_samples() -> None:
    class Doubled(TensorDataset):
        def __getitem__(self, index: Any) -> Any:
            return tuple(2 * tensor for tensor in super().__getitem__(index))

    batching = Batching(4, False, training=True, dtype=torch.float32, device=CPU)
    x, _ = next(iter(as_batches(Doubled(numbers(10), numbers(10)), None, None, batching)))
    assert torch.equal(x, 2 * numbers(4))


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ((numbers(3), numbers(2)), ValueError, r"different lengths: x has 3, y has 2\. The first dimension of every"),
        (({"a": numbers(3), "b": [numbers(2)]},), ValueError, r"different lengths: x\['a'\] has 3, x\['b'\]\[0\] has"),
        ((numbers(3), numbers(3), numbers(2)), ValueError, r"x has 3, y has 3, sample_weight has 2"),
        ((numbers(0), numbers(0)), ValueError, r"Expected at least one sample, received x with 0 samples"),
        (({},), ValueError, r"Expected at least one array, received x=\{\}\. Leave it out"),
        (([numbers(3), []],), TypeError, r"Expected an array, received x\[1\]=\[\]"),
    ],
)
def test_arrays_that_make_no_batches_are_refused(parts: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        arrays(*parts)


FLAT = """
import sys
import numpy, torch, fitkit
from torch import nn

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

x = numpy.memmap(sys.argv[1], dtype="float32", mode="w+", shape=(65536, 1024))
y = numpy.zeros(65536, dtype="int64")
model = fitkit.Model(nn.Linear(1024, 2), device="cpu")
model.compile("sgd", "cross_entropy", ["accuracy"])
seen = []
look = fitkit.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(anonymous()))
model.fit(x[:512], y[:512], batch_size=512, epochs=1, callbacks=[look], verbose=0)
model.fit(x, y, batch_size=512, epochs=2, callbacks=[look], verbose=0)
print(max(seen) - seen[0])
"""


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks Linux for the memory in use")
def test_a_file_larger_than_what_is_held_trains_in_flat_memory(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FLAT, str(tmp_path / "x")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    # The file has 256 MB, the largest batch 2.
    assert int(run.stdout) < 40 * 1024
