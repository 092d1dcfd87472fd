"""The folder of a sharded state in one process: what is damaged, what cannot be written, what is not loaded."""

from __future__ import annotations

import gc
import hashlib
import pickle
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

import fitkit
from fitkit.checkpoints import load_state, save_state
from fitkit.errors import CheckpointError
from fitkit.sharded_checkpoints import METADATA, STATE, check_whole, load_sharded, remove, save_sharded, state_file

pytestmark = pytest.mark.skipif(
    not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"), reason="this torch cannot shard on the CPU"
)

X, Y = torch.randn(20, 3), torch.randn(20, 2)


@pytest.fixture(scope="module")
def sharded() -> Iterator[fitkit.Model]:
    """A sharded Model in a group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = fitkit.Model(in_shards(), device="cpu")
    model.compile("adam", "mse")
    model.fit(X, Y, epochs=1, verbose=0)
    yield model
    dist.destroy_process_group()


def in_shards() -> nn.Module:
    return fully_shard(nn.Linear(3, 2), mesh=init_device_mesh("cpu", (1,)))


@pytest.fixture
def folder(sharded: fitkit.Model, tmp_path: Path) -> Path:
    sharded.save(tmp_path / "saved")
    return tmp_path / "saved"


def shards(folder: Path) -> Path:
    (found,) = folder.glob("shards-*")
    return found


def plain() -> fitkit.Model:
    model = fitkit.Model(nn.Linear(3, 2), device="cpu")
    model.compile("adam", "mse")
    return model


def test_weights_are_read_from_the_folder_of_a_whole_state(sharded: fitkit.Model, folder: Path) -> None:
    model, again = plain(), fitkit.Model(in_shards(), device="cpu")
    model.load_weights(folder)
    again.load_weights(folder)
    expected = sharded.evaluate(X, Y, verbose=0)
    assert model.evaluate(X, Y, verbose=0) == pytest.approx(expected, rel=1e-6)
    again.compile("adam", "mse")
    assert again.evaluate(X, Y, verbose=0) == expected


def test_weights_of_another_module_are_refused_and_nothing_changes(folder: Path) -> None:
    model = fitkit.Model(nn.Linear(3, 3), device="cpu")
    before = model.module.weight.clone()
    with pytest.raises(CheckpointError, match=r"saved does not fit the module.*weight"):
        model.load_weights(folder)
    assert torch.equal(model.module.weight, before)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damage(folder: Path, what: str) -> None:
    shard = next(shards(folder).glob("*.distcp"))
    state = None if what not in ("a state of another kind", "shards of another name") else load_state(folder / STATE)
    if what == "a flipped bit in a shard":
        flip(shard)
    elif what == "a shard that is gone":
        shard.unlink()
    elif what == "a flipped bit in the state":
        flip(folder / STATE)
    elif what == "no state":
        (folder / STATE).unlink()
    elif what == "a state of another kind":
        save_state(folder / STATE, {"weights": {}})
    else:
        save_state(folder / STATE, {**state, "shards": "elsewhere"})  # type: ignore[dict-item]


DAMAGES = {
    "a flipped bit in a shard": r"saved is damaged: .*\.distcp does not match its checksum",
    "a shard that is gone": r"saved is damaged: .*\.distcp does not match its checksum",
    "a flipped bit in the state": r"state\.fitkit is damaged",
    "no state": "saved holds no whole state: it is no folder of Model.save, or not written to its end",
    "a state of another kind": "saved is no folder of Model.save",
    "shards of another name": "saved is damaged: .* does not match its checksum",
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_folder_is_an_error_that_names_it(sharded: fitkit.Model, folder: Path, what: str) -> None:
    damage(folder, what)
    for load in (sharded.load, sharded.load_weights, plain().load_weights, check_whole):
        with pytest.raises(CheckpointError, match=DAMAGES[what]):
            load(folder)


class Evil:
    def __reduce__(self) -> Any:
        return print, ("this code ran",)


@pytest.mark.parametrize("plan", [pickle.dumps(Evil()), b"no pickle"], ids=["code", "nonsense"])
def test_a_plan_that_is_none_is_refused_and_not_run(
    folder: Path, plan: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_state(folder / STATE)
    (shards(folder) / METADATA).write_bytes(plan)
    # A file that somebody has made so, its checksum among it.
    digests = {**state["digests"], METADATA: hashlib.sha256(plan).hexdigest()}
    save_state(folder / STATE, {**state, "digests": digests})
    with pytest.raises(CheckpointError, match="saved is damaged, or cannot be read: "):
        plain().load_weights(folder)
    assert "this code ran" not in capsys.readouterr().out


@contextmanager
def little_room() -> Iterator[None]:
    """No file may become larger than 200 bytes, as where a disk is full; nor may the one that pytest reports to."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# Torch's writer of a shard tries once more when it goes; Python 3.13 says so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_an_error_and_leaves_what_was_saved_before(sharded: fitkit.Model, folder: Path) -> None:
    before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    with pytest.raises(OSError, match="saved could not be written: "), little_room():
        sharded.save(folder)
    gc.collect()
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before
    check_whole(folder)


def test_a_file_in_the_place_of_the_folder_is_refused(sharded: fitkit.Model, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match='strategy="fsdp" saves a folder, and .*file is a file'):
        sharded.save(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_later_save_leaves_nothing_of_the_one_before(sharded: fitkit.Model, folder: Path) -> None:
    before = shards(folder)
    sharded.save(folder)
    assert shards(folder) != before


def test_tensors_in_lists_and_tuples_come_back_in_their_places(sharded: fitkit.Model, tmp_path: Path) -> None:
    weight = sharded.module.weight
    save_sharded(tmp_path, {"nest": [(weight, 1), {"deep": weight}], "plain": torch.ones(2)})
    found = load_sharded(tmp_path, None)
    assert torch.equal(found["nest"][0][0], weight.full_tensor())
    assert torch.equal(found["nest"][1]["deep"], weight.full_tensor())
    assert found["nest"][0][1] == 1


def test_what_is_at_a_path_is_removed_be_it_file_folder_or_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    shutil.copy(state_file(folder), tmp_path / "file")
    for name in ("link", "file", "saved"):
        assert Path(state_file(tmp_path / name)).is_file()
        remove(tmp_path / name)
        assert not Path(state_file(tmp_path / name)).exists()
