"""Files are whole or not there, damage is an error, and a module is filled entirely or not at all."""

from __future__ import annotations

import copy
import os
import pickle
import random
import re
import stat
import sys
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from fitkit.checkpoints import load_state, load_weights, save_state, save_weights, write_atomically
from fitkit.errors import CheckpointError

ENDINGS = [".pt", ".safetensors"]


def network() -> nn.Sequential:
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    module(torch.randn(8, 2))
    return module


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.decoder = nn.Linear(3, 5)
        self.decoder.weight = self.embedding.weight


class WithExtraState(nn.Linear):
    extra = 1

    def get_extra_state(self) -> int:
        return self.extra

    def set_extra_state(self, state: int) -> None:
        if state < 0:
            raise ValueError("negative")
        self.extra = state


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return list(first) == list(second) and all(
        torch.equal(value, second[name]) and value.dtype == second[name].dtype for name, value in first.items()
    )


def with_flipped_bit(content: bytes, position: int) -> bytes:
    flipped = bytearray(content)
    flipped[position // 8] ^= 1 << position % 8
    return bytes(flipped)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# Writing


def test_an_error_in_mid_write_leaves_the_old_content_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="^$"):
        write_atomically(path, write)
    assert contents(tmp_path) == {"file": b"old"}


def test_the_old_content_is_readable_while_the_new_one_is_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    seen = []

    def write(file: Any) -> None:
        file.write(b"new")
        file.flush()
        seen.append(path.read_bytes())

    write_atomically(path, write)
    assert seen == [b"old"]
    assert contents(tmp_path) == {"file": b"new"}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_permissions_that_open_gives(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "ours", lambda file: None)
        (tmp_path / "plain").write_bytes(b"")
    finally:
        os.umask(before)
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("mode", [None, 0o640])
def test_a_safetensors_file_has_the_permissions_of_any_other(tmp_path: Path, mode: int | None) -> None:
    for name in ("weights.safetensors", "weights.pt"):
        if mode is not None:
            (tmp_path / name).touch(mode)
        save_weights(network(), tmp_path / name)
    ours, plain = (tmp_path / "weights.safetensors").stat(), (tmp_path / "weights.pt").stat()
    assert ours.st_mode == plain.st_mode
    assert mode is None or stat.S_IMODE(ours.st_mode) == mode


def test_a_replaced_file_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o640)
    write_atomically(path, lambda file: None)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("exists", [True, False])
def test_a_symbolic_link_stays_one_and_its_target_is_replaced(tmp_path: Path, exists: bool) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "target", tmp_path / "link"
    if exists:
        target.write_bytes(b"old")
    link.symlink_to(target)
    write_atomically(link, lambda file: file.write(b"new"))
    assert link.is_symlink()
    assert contents(tmp_path / "elsewhere") == {"target": b"new"}


def test_missing_folders_are_made(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a" / "b" / "file", lambda file: None)
    assert (tmp_path / "a" / "b" / "file").exists()


def test_a_relative_path_is_taken_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_state("file", {"epoch": 1})
    assert load_state("file") == {"epoch": 1}


@pytest.mark.parametrize("path", ["", os.devnull])
def test_a_folder_or_a_device_is_never_replaced(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="which is a folder or a device"):
        write_atomically(path, lambda file: None)
    assert not stat.S_ISREG(os.stat(os.devnull).st_mode)


# States


def test_a_state_comes_back_equal_and_of_the_same_types(tmp_path: Path) -> None:
    state = {
        "numbers": [1, 2**80, -1.5, float("inf"), 1 + 2j, True, None],
        "random": random.getstate(),
        3: {"text": "é", "raw": b"\x00\xff", "set": {1, 2}, "counter": Counter("aab"), "order": OrderedDict(b=1, a=2)},
        "torch": (torch.bfloat16, torch.device("cpu"), torch.Size([2, 3])),
    }
    save_state(tmp_path / "state", state)
    loaded = load_state(tmp_path / "state")
    assert loaded == state
    assert repr(loaded) == repr(state)


def test_tensors_of_a_state_keep_dtype_and_every_bit(tmp_path: Path) -> None:
    state = {str(dtype): torch.randn(3, 2).to(dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16)}
    state |= {"random": torch.get_rng_state(), "empty": torch.empty(0, 4), "number": torch.tensor(3)}
    save_state(tmp_path / "state", state)
    assert same(load_state(tmp_path / "state"), state)


def test_an_optimizer_goes_on_from_its_saved_state(tmp_path: Path) -> None:
    module = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(4, 2)).sum().backward()
    optimizer.step()
    save_state(tmp_path / "state", {"optimizer": optimizer.state_dict()})
    fresh = torch.optim.Adam(nn.Linear(2, 1).parameters())
    fresh.load_state_dict(load_state(tmp_path / "state")["optimizer"])
    assert same(fresh.state_dict()["state"][0], optimizer.state_dict()["state"][0])


@pytest.mark.parametrize(
    "value",
    [np.longdouble(1), np.zeros(2), defaultdict(list), frozenset(), range(2), network],
    ids=lambda value: type(value).__name__,
)
def test_what_could_not_be_loaded_safely_is_refused_when_saved(tmp_path: Path, value: object) -> None:
    with pytest.raises(TypeError, match=re.escape("state['callbacks'][1]['x']=")):
        save_state(tmp_path / "state", {"callbacks": [{}, {"x": value}]})
    assert contents(tmp_path) == {}


def test_weights_are_not_taken_for_a_state(tmp_path: Path) -> None:
    save_weights(network(), tmp_path / "weights")
    with pytest.raises(CheckpointError, match="weights holds no state but weights. Use load_weights"):
        load_state(tmp_path / "weights")


# Damage


@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.long)], ids=["every ninth", "every"])
def test_a_flipped_bit_of_a_state_is_an_error_that_names_the_path(tmp_path: Path, step: int) -> None:
    path = tmp_path / "the state"
    save_state(path, {"weights": torch.arange(3.0), "epoch": 3})
    content = path.read_bytes()
    for position in range(0, len(content) * 8, step):
        path.write_bytes(with_flipped_bit(content, position))
        with pytest.raises(CheckpointError, match="the state "):
            load_state(path)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_flipped_bit_never_changes_what_weights_are_loaded(tmp_path: Path, ending: str) -> None:
    path, module = tmp_path / f"weights{ending}", nn.Linear(1, 1)
    save_weights(module, path)
    content, right = path.read_bytes(), copy.deepcopy(module.state_dict())
    refused = 0
    for position in range(len(content)):
        path.write_bytes(with_flipped_bit(content, position * 8 + position % 7))
        try:
            load_weights(module, path)
        except CheckpointError:
            refused += 1
        assert same(module.state_dict(), right)
    # A safetensors file also holds names of metadata that nothing depends on.
    assert refused == len(content) or ending == ".safetensors"


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_truncation_is_an_error(tmp_path: Path, ending: str) -> None:
    path, module = tmp_path / f"weights{ending}", nn.Linear(1, 1)
    save_weights(module, path)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            load_weights(module, path)


def test_bytes_after_the_end_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "state"
    save_state(path, {})
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(CheckpointError, match="not written by fitkit, or is truncated or damaged"):
        load_state(path)


def test_a_file_of_a_newer_format_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fitkit.checkpoints.FORMAT", 2)
    save_state(tmp_path / "state", {})
    monkeypatch.undo()
    with pytest.raises(
        CheckpointError, match="is of format 2, written by a newer fitkit; this one reads up to format 1"
    ):
        load_state(tmp_path / "state")


@pytest.mark.parametrize("content", [b"hello", b"PK", pickle.dumps(print), pickle.dumps({"a": 1}), b"PK\x03\x04" * 9])
def test_a_foreign_file_is_an_error_that_names_the_path(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "foreign"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="foreign"):
        load_weights(network(), path)
    with pytest.raises(CheckpointError, match="foreign was not written by fitkit"):
        load_state(path)


@pytest.mark.parametrize("load", [load_state, lambda path: load_weights(network(), path)])
def test_a_file_that_is_not_there_is_no_damaged_one(tmp_path: Path, load: Any) -> None:
    with pytest.raises(FileNotFoundError, match="nothing here"):
        load(tmp_path / "nothing here")


def test_a_pickled_object_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save(network(), tmp_path / "module.pt")
    with pytest.raises(CheckpointError, match="holds objects that cannot be loaded safely"):
        load_weights(network(), tmp_path / "module.pt")


# Weights


@pytest.mark.parametrize("ending", ENDINGS)
def test_weights_come_back_bit_for_bit(tmp_path: Path, ending: str) -> None:
    module, other = network().to(torch.float64), network().to(torch.float64)
    save_weights(module, tmp_path / f"weights{ending}")
    load_weights(other, tmp_path / f"weights{ending}")
    assert same(other.state_dict(), module.state_dict())


def test_plain_torch_reads_the_weights(tmp_path: Path) -> None:
    module = network()
    save_weights(module, tmp_path / "weights.pt")
    for options in ({}, {"mmap": True}):
        assert same(torch.load(tmp_path / "weights.pt", weights_only=True, **options), module.state_dict())


def test_plain_safetensors_reads_the_weights(tmp_path: Path) -> None:
    from safetensors.torch import load_file, load_model

    module, other = Tied(), Tied()
    save_weights(module, tmp_path / "weights.safetensors")
    load_model(other, tmp_path / "weights.safetensors")
    assert same(other.state_dict(), module.state_dict())
    assert set(load_file(tmp_path / "weights.safetensors")) == {"embedding.weight", "decoder.bias"}


@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_that_torch_wrote_is_loaded(tmp_path: Path, zipped: bool) -> None:
    module, other = network(), network()
    torch.save(module.state_dict(), tmp_path / "plain.pt", _use_new_zipfile_serialization=zipped)
    load_weights(other, tmp_path / "plain.pt")
    assert same(other.state_dict(), module.state_dict())


def test_a_flipped_value_in_a_file_of_torch_is_an_error(tmp_path: Path) -> None:
    path, module = tmp_path / "plain.pt", nn.Linear(1, 1)
    torch.save(module.state_dict(), path)
    path.write_bytes(path.read_bytes().replace(module.weight.detach().numpy().tobytes(), b"1234"))
    with pytest.raises(CheckpointError, match="a part of it does not match its checksum"):
        load_weights(module, path)


def test_a_model_that_safetensors_wrote_is_loaded(tmp_path: Path) -> None:
    from safetensors.torch import save_model

    module, other = Tied(), Tied()
    save_model(module, str(tmp_path / "weights.safetensors"))
    load_weights(other, tmp_path / "weights.safetensors")
    assert same(other.state_dict(), module.state_dict())
    assert other.decoder.weight is other.embedding.weight


@pytest.mark.parametrize("ending", ENDINGS)
def test_tied_weights_stay_tied(tmp_path: Path, ending: str) -> None:
    module, other = Tied(), Tied()
    save_weights(module, tmp_path / f"weights{ending}")
    load_weights(other, tmp_path / f"weights{ending}")
    assert same(other.state_dict(), module.state_dict())
    assert other.decoder.weight is other.embedding.weight


def test_tensors_without_their_own_memory_go_to_safetensors(tmp_path: Path) -> None:
    module, other = nn.Linear(3, 3), nn.Linear(3, 3)
    for one in (module, other):
        whole = torch.randn(6, 3)
        one.register_buffer("whole", whole)
        one.register_buffer("transposed", whole[:3].t())
        one.register_buffer("empty", torch.empty(0))
    save_weights(module, tmp_path / "weights.safetensors")
    load_weights(other, tmp_path / "weights.safetensors")
    assert same(other.state_dict(), module.state_dict())


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_module_that_does_not_fit_is_told_all_and_left_as_it_was(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"weights{ending}"
    save_weights(nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(3, 1, bias=False)}), path)
    module = nn.ModuleDict({"a": nn.Linear(2, 4, bias=False), "c": nn.Linear(3, 1, bias=False)})
    before = copy.deepcopy(module.state_dict())
    message = (
        f"{path} does not fit the module, which is left as it was. Missing in the file: c.weight. Not in the module: "
        "a.bias, b.weight. Of another shape: a.weight ((3, 2) in the file, (4, 2) in the module)."
    )
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_weights(module, path)
    assert same(module.state_dict(), before)


def test_a_long_list_of_names_is_cut(tmp_path: Path) -> None:
    save_weights(nn.Sequential(*[nn.Linear(1, 1) for _ in range(20)]), tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"0\.weight, .*9\.bias and 20 more"):
        load_weights(nn.Flatten(), tmp_path / "weights.pt")


@pytest.mark.parametrize(
    "content", [[torch.ones(2)], torch.ones(2), {1: torch.ones(2)}], ids=["list", "tensor", "keys"]
)
def test_a_file_of_something_else_than_a_state_dict_is_an_error(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "file")
    with pytest.raises(CheckpointError, match="file holds no state_dict but"):
        load_weights(network(), tmp_path / "file")


def test_hooks_for_older_names_have_their_say(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        old = torch.nn.utils.weight_norm(nn.Linear(2, 3))
    new = parametrizations.weight_norm(nn.Linear(2, 3))
    save_weights(old, tmp_path / "weights.pt")
    load_weights(new, tmp_path / "weights.pt")
    x = torch.randn(4, 2)
    assert torch.equal(new(x), old(x))


def test_a_module_that_refuses_its_extra_state_is_left_as_it_was(tmp_path: Path) -> None:
    module, other = WithExtraState(2, 3), WithExtraState(2, 3)
    save_weights(module, tmp_path / "good.pt")
    module.extra = -1
    save_weights(module, tmp_path / "bad.pt")
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError, match="left as it was"):
        load_weights(other, tmp_path / "bad.pt")
    assert torch.equal(other.weight, before["weight"])
    load_weights(other, tmp_path / "good.pt")
    assert torch.equal(other.weight, module.weight)


def test_extra_state_does_not_go_to_safetensors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected tensors only.*_extra_state=1"):
        save_weights(WithExtraState(2, 3), tmp_path / "weights.safetensors")
    assert contents(tmp_path) == {}


def test_lazy_parameters_without_values_are_not_saved_but_can_be_filled(tmp_path: Path) -> None:
    lazy, full = nn.LazyLinear(3), nn.Linear(2, 3)
    with pytest.raises(ValueError, match="lazy parameters before their first batch: weight, bias"):
        save_weights(lazy, tmp_path / "weights.pt")
    save_weights(full, tmp_path / "weights.pt")
    load_weights(lazy, tmp_path / "weights.pt")
    assert same(lazy.state_dict(), full.state_dict())


def test_lazy_parameters_are_not_half_filled(tmp_path: Path) -> None:
    save_weights(nn.Linear(2, 3, bias=False), tmp_path / "weights.pt")
    lazy = nn.LazyLinear(3)
    with pytest.raises(CheckpointError, match="Missing in the file: bias"):
        load_weights(lazy, tmp_path / "weights.pt")
    assert lazy.has_uninitialized_params()


def test_values_take_the_dtype_of_the_module(tmp_path: Path) -> None:
    module, other = nn.Linear(2, 3), nn.Linear(2, 3, dtype=torch.float64)
    save_weights(module, tmp_path / "weights.pt")
    load_weights(other, tmp_path / "weights.pt")
    assert torch.equal(other.weight, module.weight.double())


def test_without_safetensors_the_message_names_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for act in (save_weights, load_weights):
        with pytest.raises(ImportError, match=re.escape("pip install 'fitkit[safetensors]'")):
            act(network(), tmp_path / "weights.SAFETENSORS")
