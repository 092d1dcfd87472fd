"""Model.save and Model.load: what a file holds, that a fit after it is a plain one, that nothing is half-changed."""

from __future__ import annotations

import copy
import functools
import operator
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fitkit
from fitkit.callbacks import Callback, EarlyStopping, LambdaCallback, ModelCheckpoint, ReduceLROnPlateau, Timer
from fitkit.checkpoints import load_state, save_state
from fitkit.device import plain_random_state, random_state, random_state_of, restore_random_state
from fitkit.errors import CheckpointError

X, Y = torch.randn(12, 3), torch.randn(12, 1)


def compiled(**arguments: Any) -> fitkit.Model:
    model = fitkit.Model(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1)), device="cpu")
    model.compile(**{"optimizer": "adam", "loss": "mse", **arguments})
    return model


def fitted(**arguments: Any) -> fitkit.Model:
    model = compiled(**arguments)
    model.fit(X, Y, epochs=2, verbose=0)
    return model


def snapshot(model: fitkit.Model) -> Any:
    assert model.optimizer is not None
    return copy.deepcopy((model.module.state_dict(), model.optimizer.state_dict(), model.history.state_dict()))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_load_brings_weights_optimizer_and_history_back(tmp_path: Path) -> None:
    model = fitted()
    model.save(tmp_path / "file")
    fresh = compiled()
    fresh.load(tmp_path / "file")
    assert same(snapshot(fresh), snapshot(model))


def test_a_plain_fit_after_load_trains_all_its_epochs_with_the_optimizer_as_it_was(tmp_path: Path) -> None:
    model = fitted()
    model.save(tmp_path / "file")
    fresh = compiled()
    fresh.load(tmp_path / "file")
    for each in (model, fresh):
        torch.manual_seed(3)
        assert each.fit(X, Y, epochs=3, verbose=0).epoch == [0, 1, 2]
    assert same(snapshot(fresh), snapshot(model))


def test_the_scaler_is_part_of_it(tmp_path: Path) -> None:
    model = fitted(precision="16-mixed")
    model.save(tmp_path / "file")
    fresh = compiled(precision="16-mixed")
    fresh.load(tmp_path / "file")
    assert fresh._compiled is not None
    assert model._compiled is not None
    assert fresh._compiled.scaler.state_dict() == model._compiled.scaler.state_dict()  # type: ignore[union-attr]


def test_a_loaded_model_saves_what_it_loaded(tmp_path: Path) -> None:
    fitted().save(tmp_path / "file")
    model = compiled()
    model.load(tmp_path / "file")
    model.save(tmp_path / "copy")
    assert load_state(tmp_path / "copy")["run"]["epoch"] == 2
    resumed = compiled()
    assert resumed.fit(X, Y, epochs=4, verbose=0, resume_from=tmp_path / "copy").epoch == [0, 1, 2, 3]


def test_what_is_not_persistent_in_a_module_is_kept_too(tmp_path: Path) -> None:
    class Counting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(3, 1)
            self.register_buffer("calls", torch.zeros(()), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return super().forward(x)

    def model() -> fitkit.Model:
        made = fitkit.Model(Counting(), device="cpu")
        made.compile("sgd", "mse")
        return made

    first, second = model(), model()
    first.fit(X, Y, batch_size=4, epochs=2, verbose=0)
    first.save(tmp_path / "file")
    second.load(tmp_path / "file")
    assert int(second.module.calls) == 6  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"optimizer": "sgd"}, "file has Adam for compile.* where there is now SGD"),
        ({"precision": "16-mixed"}, 'saved without precision="16-mixed", received precision='),
        ({"optimizer": lambda parameters: torch.optim.Adam(parameters[:2])}, r"optimizer of \[6\] parameters by group"),
    ],
)
def test_a_file_of_another_model_is_refused_and_changes_nothing(
    tmp_path: Path, other: dict[str, Any], message: str
) -> None:
    fitted().save(tmp_path / "file")
    model = compiled(**other)
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=message):
        model.load(tmp_path / "file")
    assert same(snapshot(model), before)


def test_a_file_of_another_module_is_refused(tmp_path: Path) -> None:
    fitted().save(tmp_path / "file")
    model = fitkit.Model(nn.Linear(3, 1), device="cpu")
    model.compile("adam", "mse")
    with pytest.raises(
        CheckpointError, match=r"does not fit the module, which is left as it was\. Missing in the file"
    ):
        model.load(tmp_path / "file")


def test_a_state_that_save_did_not_write_is_refused(tmp_path: Path) -> None:
    save_state(tmp_path / "file", {"something": 1})
    with pytest.raises(CheckpointError, match=r"file is no file of Model\.save: it holds \['something'\]"):
        compiled().load(tmp_path / "file")


def test_a_state_with_half_a_run_is_refused(tmp_path: Path) -> None:
    fitted().save(tmp_path / "file")
    state = load_state(tmp_path / "file")
    del state["run"]["data"]
    save_state(tmp_path / "file", state)
    with pytest.raises(CheckpointError, match="what it says of a run is incomplete"):
        compiled().fit(X, Y, epochs=3, verbose=0, resume_from=tmp_path / "file")


def test_weights_are_no_training_state(tmp_path: Path) -> None:
    fitted().save_weights(tmp_path / "file")
    with pytest.raises(CheckpointError, match="holds no state but weights. Use load_weights"):
        compiled().load(tmp_path / "file")


@pytest.mark.parametrize("method", ["save", "load"])
def test_a_model_that_is_not_compiled_says_so(tmp_path: Path, method: str) -> None:
    model = fitkit.Model(nn.Linear(3, 1), device="cpu")
    with pytest.raises(ValueError, match="Expected a compiled model"):
        getattr(model, method)(tmp_path / "file")


def test_load_within_a_fit_is_refused(tmp_path: Path) -> None:
    model = fitted()
    model.save(tmp_path / "file")
    loading = LambdaCallback(on_epoch_end=lambda epoch, logs: model.load(tmp_path / "file"))
    with pytest.raises(ValueError, match="called from within a fit of the same Model"):
        model.fit(X, Y, epochs=1, verbose=0, callbacks=[loading])


def test_a_callback_whose_state_cannot_be_kept_safely_says_where(tmp_path: Path) -> None:
    class Hoarding(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"when": tmp_path}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise AssertionError

    model = compiled()
    model.fit(X, Y, epochs=1, verbose=0, callbacks=[Hoarding()])
    with pytest.raises(TypeError, match=r"state\['run'\]\['callbacks'\]\['Hoarding'\]\['when'\]"):
        model.save(tmp_path / "file")


def test_a_root_module_that_was_in_eval_mode_is_trained_when_a_saved_run_goes_on(tmp_path: Path) -> None:
    model = fitted()
    model.module.eval()
    model.save(tmp_path / "file")
    fresh, modes = compiled(), []
    looking = LambdaCallback(on_train_batch_begin=lambda batch, logs: modes.append(fresh.module.training))
    fresh.fit(X, Y, epochs=3, verbose=0, callbacks=[looking], resume_from=tmp_path / "file")
    assert modes == [True]


def test_random_numbers_go_on_from_a_plain_state() -> None:
    device = torch.device("cpu")
    random.gauss(0, 1)
    np.random.randn()
    state = plain_random_state(random_state(device))
    expected = (random.gauss(0, 1), np.random.randn(), torch.rand(3).tolist())
    restore_random_state(random_state_of(state), device)
    assert (random.gauss(0, 1), np.random.randn(), torch.rand(3).tolist()) == expected


@given(data=st.data())
def test_a_flipped_byte_is_an_error_that_names_the_file_or_changes_nothing(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("flip") / "file"
    model = fitted()
    model.save(path)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    fresh = compiled()
    before = snapshot(fresh)
    with pytest.raises(CheckpointError, match="file"):
        fresh.load(path)
    assert same(snapshot(fresh), before)


@given(length=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_an_error_that_names_it(tmp_path_factory: pytest.TempPathFactory, length: float) -> None:
    path = tmp_path_factory.mktemp("cut") / "file"
    fitted().save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * length)])
    with pytest.raises(CheckpointError, match="file"):
        compiled().fit(X, Y, epochs=3, verbose=0, resume_from=path)


def test_a_state_that_does_not_fit_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = fitted()
    model.save(tmp_path / "saved")
    state = load_state(tmp_path / "saved")
    state["history"]["history"]["loss"].pop()
    state["weights"]["0.bias"] += 1.0
    save_state(tmp_path / "saved", state)
    before = snapshot(model)
    with pytest.raises(CheckpointError, match="saved cannot be used: Damaged History"):
        model.load(tmp_path / "saved")
    assert same(snapshot(model), before)


# Places in the state of a run that was saved in mid-epoch, and what does not belong there.
MISPLACED: list[tuple[str, Any]] = [
    ("weights", ["0.weight"]),
    ("optimizer/state", None),
    ("optimizer/state/param_groups/0/lr", "text"),
    ("optimizer/state/param_groups/0/betas", 0.9),
    ("optimizer/state/state/0/exp_avg", torch.zeros(3)),
    ("optimizer/state/state/0/step", torch.zeros(3)),
    ("history/epoch", [0, "a"]),
    ("history/history", [1.0]),
    ("run/epoch", 1.5),
    ("run/stage", "lunch"),
    ("run/logs", [0.5]),
    ("run/data", []),
    ("run/data/given", "3"),
    ("run/called", 7),
    ("run/callbacks", [1]),
    ("run/callbacks/EarlyStopping(val_loss)", []),
    ("run/callbacks/EarlyStopping(val_loss)/wait", None),
    ("run/callbacks/EarlyStopping(val_loss)/best", []),
    ("run/callbacks/EarlyStopping(val_loss)/best_weights", {}),
    ("run/callbacks/ReduceLROnPlateau(val_loss)/best", {"a": 1}),
    ("run/callbacks/Timer/elapsed", "soon"),
    ("run/step", None),
    ("run/step/numbers", []),
    ("run/step/numbers/tally/loss/values", []),
    ("run/step/numbers/tally/loss/weights", "text"),
    ("run/step/numbers/tally/loss/host_weight", None),
    ("run/step/numbers/tally/loss/host_weight", torch.zeros(2)),
]


@pytest.fixture(scope="module")
def in_mid_epoch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("run") / "{epoch}-{batch}.pt"
    watched(compiled(), ModelCheckpoint(path, save_freq=1))
    return load_state(path.with_name("2-2.pt"))


def watched(model: fitkit.Model, *saving: Callback, **arguments: Any) -> None:
    stopping = EarlyStopping("val_loss", restore_best_weights=True)
    callbacks = [stopping, ReduceLROnPlateau("val_loss"), Timer(1000), *saving]
    model.fit(X, Y, batch_size=4, epochs=3, validation_data=(X, Y), callbacks=callbacks, verbose=0, **arguments)


@pytest.mark.parametrize(("place", "value"), MISPLACED)
def test_a_whole_file_with_another_kind_of_value_in_it_is_an_error_that_names_it(
    tmp_path: Path, in_mid_epoch: dict[str, Any], place: str, value: Any
) -> None:
    state = copy.deepcopy(in_mid_epoch)
    *folders, name = place.split("/")
    keys = [int(folder) if folder.isdigit() else folder for folder in folders]
    functools.reduce(operator.getitem, keys, state)[name] = value
    save_state(tmp_path / "file", state)
    model = compiled()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=f"^{re.escape(str(tmp_path / 'file'))} "):
        watched(model, resume_from=tmp_path / "file")
    assert same(snapshot(model)[:2], before[:2])


def test_wrong_values_of_metrics_are_an_error_that_names_file_and_metrics(tmp_path: Path) -> None:
    model, resumed = compiled(metrics=["mae"]), compiled(metrics=["mae"])
    model.fit(X, Y, batch_size=4, epochs=1, callbacks=ModelCheckpoint(tmp_path / "{batch}.pt", save_freq=1), verbose=0)
    state = load_state(tmp_path / "2.pt")
    state["run"]["step"]["numbers"]["metrics"]["parts"][0]["held"][0][0] = torch.zeros(3)
    save_state(tmp_path / "file", state)
    before = snapshot(resumed)
    with pytest.raises(
        CheckpointError, match="file cannot be used: the running values of 'mae' are none: Expected 2 t"
    ):
        resumed.fit(X, Y, batch_size=4, epochs=1, resume_from=tmp_path / "file", verbose=0)
    assert same(snapshot(resumed)[:2], before[:2])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("resumes", [True, False])
def test_an_optimizer_with_its_parameters_in_another_order_is_refused(
    tmp_path: Path, fused: bool, resumes: bool
) -> None:
    model, other = (fitkit.Model(nn.Linear(3, 1), device="cpu") for _ in range(2))
    for each, step in ((model, 1), (other, -1)):
        each.compile(torch.optim.Adam(list(each.module.parameters())[::step], fused=fused), "mse")
    model.fit(X, Y, epochs=1, verbose=0)
    model.save(tmp_path / "saved")
    with pytest.raises(
        CheckpointError, match=r"saved has exp_avg=Tensor of shape \(1, 3\) for a parameter of shape \(1,\)"
    ):
        other.fit(X, Y, epochs=2, verbose=0, resume_from=tmp_path / "saved") if resumes else other.load(
            tmp_path / "saved"
        )


OPTIMIZERS = [
    kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and name not in ("Optimizer", "LBFGS", "SparseAdam", "Muon")  # those need more
]


@pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)
def test_what_any_optimizer_of_torchs_keeps_is_loaded(tmp_path: Path, kind: Any) -> None:
    model, other = compiled(optimizer=kind), compiled(optimizer=kind)
    model.fit(X, Y, epochs=2, verbose=0)
    model.save(tmp_path / "saved")
    other.load(tmp_path / "saved")
    assert same(snapshot(model)[:2], snapshot(other)[:2])


def test_numbers_of_numpy_are_saved_as_pythons(tmp_path: Path) -> None:
    save_state(tmp_path / "saved", {"a": [np.float64(0.1), (np.int64(2),)], np.int64(3): np.bool_(True)})
    assert repr(load_state(tmp_path / "saved")) == "{'a': [0.1, (2,)], 3: True}"


def test_what_a_model_keeps_in_lists_and_dicts_is_saved(tmp_path: Path) -> None:
    def made(seed: int) -> fitkit.Model:
        model = compiled()
        adam = torch.optim.Adam(model.module.parameters(), lr=seed / 10)
        vars(model)["own"] = [{"a": adam}, (torch.Generator().manual_seed(seed),)]
        return model

    one, other = made(1), made(2)
    one.save(tmp_path / "saved")
    other.load(tmp_path / "saved")
    (adam,), (generator,) = vars(other)["own"][0].values(), vars(other)["own"][1]
    assert adam.param_groups[0]["lr"] == 0.1
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(1).get_state())


def test_a_save_in_the_midst_of_a_callbacks_evaluation_is_one_of_the_fit(tmp_path: Path) -> None:
    saving = LambdaCallback(on_test_batch_end=lambda batch, logs: saving.model.save(tmp_path / "nested"))
    model = compiled()

    def evaluate(batch: int, logs: Any) -> None:
        model.save(tmp_path / "beside")
        torch.rand(2)
        model.save(tmp_path / "beside")
        model.evaluate(X, Y, callbacks=[saving], verbose=0)

    model.fit(X, Y, epochs=1, callbacks=[LambdaCallback(on_train_batch_end=evaluate)], verbose=0)
    nested, beside = load_state(tmp_path / "nested"), load_state(tmp_path / "beside")
    assert nested["modes"] == beside["modes"]
    assert same(nested["random"], beside["random"])


def test_a_save_before_a_resumed_run_has_gone_on_is_what_it_goes_on_from(tmp_path: Path) -> None:
    fitted().save(tmp_path / "saved")
    model = compiled()
    saving = LambdaCallback(on_train_begin=lambda logs: model.save(tmp_path / "again"))
    model.fit(X, Y, epochs=3, callbacks=[saving], verbose=0, resume_from=tmp_path / "saved")
    assert same(load_state(tmp_path / "again"), load_state(tmp_path / "saved"))


def test_load_weights_takes_those_of_a_whole_state_whatever_the_optimizer(tmp_path: Path) -> None:
    model = fitkit.Model(nn.Linear(3, 1), device="cpu")
    model.compile("adamw", "mse")
    model.save(tmp_path / "state.pt")
    other = fitkit.Model(nn.Linear(3, 1), device="cpu")
    other.load_weights(tmp_path / "state.pt")
    assert torch.equal(other.module.weight, model.module.weight)


def test_load_weights_refuses_the_state_of_another_module(tmp_path: Path) -> None:
    model = fitkit.Model(nn.Linear(3, 1), device="cpu")
    model.compile("adamw", "mse")
    model.save(tmp_path / "state.pt")
    with pytest.raises(fitkit.CheckpointError, match="state.pt does not fit the module"):
        fitkit.Model(nn.Linear(2, 1), device="cpu").load_weights(tmp_path / "state.pt")


def test_the_weights_of_a_whole_state_are_loaded_without_compile(tmp_path: Path) -> None:
    model = fitted()
    model.save(tmp_path / "file")
    plain = fitkit.Model(copy.deepcopy(compiled().module), device="cpu")
    plain.load_weights(tmp_path / "file")
    assert same(plain.module.state_dict(), model.module.state_dict())
    assert not plain.history.epoch
