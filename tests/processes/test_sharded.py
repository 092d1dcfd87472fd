"""A module of which each process keeps a part gives the numbers of one process; sharded.py has the scripts."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

import fitkit
from fitkit.errors import CheckpointError


def sibling(name: str) -> Any:
    """A module of this folder."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SAME = sibling("test_same_numbers")
CASES, differences = SAME.CASES, SAME.differences
needs_sharding = pytest.mark.skipif(
    not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"), reason="this torch cannot shard on the CPU"
)
# What is refused, each with a message (see `refusals`): parts that fit into memory, other precisions, averages of
# weights, and windows in which several outputs grow differently.
REFUSED = {
    *("micro_batches_that_fit", "scaled_losses", "double_precision", "an_average_of_weights"),
    *("single_batches", "several_outputs"),
}
SHARDED = [name for name in CASES if name not in REFUSED]
# Those of which a sharded module needs something of its own.
FIRST = [
    *(
        "batches_of_one",
        "a_loader",
        "accumulation_with_ignored_targets",
        "clipping_and_norms",
        "a_window_without_targets",
    ),
    *("bfloat16", "predicting", "saved_in_mid_epoch", "heads_of_which_a_process_has_no_target", "a_single_layer"),
    *("micro_batches", "a_stop_within_a_window", "evaluating_within_a_window"),
]


def compare(launch: Any, folder: Path, names: list[str], processes: int, *, by_torchrun: bool = False) -> None:
    for each in ("one", "many"):
        (folder / each).mkdir()
    with ThreadPoolExecutor() as pool:
        one = pool.submit(launch, "cases.py", folder / "one", *names, processes=1)
        options = {"processes": processes, "strategy": "fsdp", "by_torchrun": by_torchrun}
        many = pool.submit(launch, "cases.py", folder / "many", *names, **options)
    assert one.result().code == 0, one.result().output
    assert many.result().code == 0, many.result().output
    expected = json.loads((folder / "one" / "0.json").read_text())
    first, *others = ((folder / "many" / f"{rank}.json").read_text() for rank in range(processes))
    assert all(other == first for other in others)
    found = json.loads(first)
    assert {name: list(differences(expected[name], found[name])) for name in names} == {name: [] for name in names}


@needs_sharding
def test_a_sharded_module_gives_the_numbers_of_one_process(launch: Any, tmp_path: Path) -> None:
    compare(launch, tmp_path, FIRST, 2)


@needs_sharding
@pytest.mark.long
@pytest.mark.parametrize("processes", [2, 3])
def test_a_sharded_module_gives_the_numbers_of_one_process_in_every_case(
    launch: Any, tmp_path: Path, processes: int
) -> None:
    compare(launch, tmp_path, SHARDED, processes, by_torchrun=processes == 3)


@needs_sharding
def test_windows_of_passes_by_a_forward_method_may_end_early(launch: Any, tmp_path: Path) -> None:
    for processes, strategy in ((1, "auto"), (2, "fsdp")):
        folder = tmp_path / strategy
        folder.mkdir()
        ended = launch("sharded.py", "methods", folder, processes=processes, strategy=strategy)
        assert ended.code == 0, ended.output
    for rank in range(2):
        one, each = found(tmp_path / "auto", "methods"), found(tmp_path / "fsdp", "methods", rank)
        assert list(differences(one, each)) == []


@pytest.fixture(scope="module")
def trained(launch: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By number of processes, the folder in which half a run is saved, and what came of the whole."""
    folders = {processes: tmp_path_factory.mktemp("trained") for processes in (1, 2)}
    for processes, folder in folders.items():
        strategy = "fsdp" if processes > 1 else "auto"
        ended = launch("sharded.py", "train", folder, processes=processes, strategy=strategy)
        assert ended.code == 0, ended.output
    return folders


def found(folder: Path, what: str, rank: int = 0) -> Any:
    return json.loads((folder / f"{what}-{rank}.json").read_text())


@needs_sharding
def test_each_process_keeps_its_part_of_weights_and_of_the_optimizers_state(trained: dict[int, Path]) -> None:
    parts = [found(trained[2], "train", rank) for rank in range(2)]
    whole = found(trained[1], "train")
    assert sum(part["held"] for part in parts) == whole["held"]
    assert sum(part["kept"] for part in parts) == whole["kept"] == 2 * whole["held"]
    assert max(part["held"] for part in parts) < 0.7 * whole["held"]


@needs_sharding
@pytest.mark.parametrize(
    ("saved_by", "processes"),
    [(2, 1), pytest.param(2, 3, marks=pytest.mark.long), pytest.param(1, 2, marks=pytest.mark.long)],
)
def test_a_run_goes_on_in_another_number_of_processes(
    launch: Any, trained: dict[int, Path], tmp_path: Path, saved_by: int, processes: int
) -> None:
    strategy = "fsdp" if processes > 1 else "auto"
    half = trained[saved_by] / "half"
    ended = launch("sharded.py", "resume", tmp_path, half, processes=processes, strategy=strategy)
    assert ended.code == 0, ended.output
    expected = found(trained[1], "train")
    resumed = found(tmp_path, "resume", processes - 1)
    assert list(differences({key: expected[key] for key in resumed}, resumed)) == []


def model() -> fitkit.Model:
    made = fitkit.Model(sibling("cases").network(), device="cpu")
    made.compile("adam", "cross_entropy", learning_rate=0.01)
    return made


@needs_sharding
@pytest.mark.parametrize("name", ["half.pt", "half.safetensors"])
def test_exported_weights_are_a_plain_file(trained: dict[int, Path], name: str) -> None:
    losses = []
    for processes in (1, 2):
        plain = model()
        plain.load_weights(trained[processes] / name)
        losses.append(plain.evaluate(*sibling("cases").classes(), verbose=0))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


@pytest.mark.long
@needs_sharding
def test_a_sharded_module_takes_the_weights_of_a_plain_file(
    launch: Any, trained: dict[int, Path], tmp_path: Path
) -> None:
    ended = launch("sharded.py", "weights", tmp_path, trained[1] / "half.pt", processes=2, strategy="fsdp")
    assert ended.code == 0, ended.output
    plain = model()
    plain.load_weights(trained[1] / "half.pt")
    expected = plain.evaluate(*sibling("cases").classes(), verbose=0)
    assert found(tmp_path, "weights", 1)["loss"] == pytest.approx(expected, rel=1e-6)


@needs_sharding
def test_a_damaged_shard_is_an_error_with_its_folder(trained: dict[int, Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(trained[2] / "half", folder)
    shard = next(folder.glob("shards-*/__1_*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(folder))} is damaged: __1_0.distcp does not match"):
        model().load(folder)


@needs_sharding
def test_a_folder_without_its_file_is_an_error(trained: dict[int, Path], tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(trained[2] / "half", folder)
    (folder / "state.fitkit").unlink()
    with pytest.raises(CheckpointError, match="holds no whole state"):
        model().load(folder)


@pytest.mark.long
@needs_sharding
def test_a_run_that_failed_goes_on_from_its_backup(launch: Any, tmp_path: Path) -> None:
    failed = launch("sharded.py", "back_up", tmp_path, processes=2, strategy="fsdp", seconds=60)
    assert failed.code != 0
    assert "on purpose" in failed.output
    assert (tmp_path / "backup").exists()
    (tmp_path / "failed").touch()
    ended = launch("sharded.py", "back_up", tmp_path, processes=2, strategy="fsdp")
    assert ended.code == 0, ended.output
    assert not (tmp_path / "backup").exists()
    assert len(found(tmp_path, "back_up")["history"]["loss"]) == 4


@needs_sharding
def test_what_a_sharded_module_cannot_have_is_refused_early(launch: Any, tmp_path: Path) -> None:
    ended = launch("sharded.py", "refusals", tmp_path, processes=2, strategy="fsdp")
    assert ended.code == 0, ended.output
    messages = found(tmp_path, "refusals")
    assert len(messages) == 7
    assert all('strategy="fsdp"' in message for message in messages)


@pytest.mark.long
@needs_sharding
def test_a_save_in_the_midst_of_a_window_is_refused(launch: Any, tmp_path: Path) -> None:
    ended = launch("sharded.py", "middle", tmp_path, processes=2, strategy="fsdp", seconds=60)
    assert ended.code != 0
    assert "saves after batches that complete a step" in ended.output


@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_one_process_that_no_launcher_has_started_is_refused(strategy: str) -> None:
    with pytest.raises(ValueError, match=rf'strategy="{strategy}" needs several processes'):
        fitkit.Model(torch.nn.Linear(1, 1), strategy=strategy)


@pytest.mark.long
@needs_sharding
def test_gradients_are_scattered_once_in_each_optimizer_step(launch: Any, tmp_path: Path) -> None:
    ended = launch("sharded.py", "scatters", tmp_path, processes=2, strategy="fsdp")
    assert ended.code == 0, ended.output
    assert found(tmp_path, "scatters") == {
        "plain": {"scatters": 2 * 16, "steps": 16},  # a layer at a time
        "accumulating": {"scatters": 2 * 4, "steps": 4},
        "outputs": {"scatters": 2 * 4, "steps": 4},
    }


@pytest.mark.long
def test_gradients_are_reduced_once_in_each_optimizer_step(launch: Any, tmp_path: Path) -> None:
    ended = launch("sharded.py", "reductions", tmp_path, processes=2, strategy="ddp")
    assert ended.code == 0, ended.output
    counts = found(tmp_path, "reductions")
    assert counts["plain"] == {"reductions": 16, "steps": 16}
    assert counts["accumulating"] == {"reductions": 4, "steps": 4}
