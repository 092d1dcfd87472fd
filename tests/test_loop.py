"""The order of a run, how it ends, what its hooks are given, and that it reads no number that nobody asked for."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fitkit
from fitkit import loop
from fitkit.callbacks import Callback, LambdaCallback
from fitkit.callbacks.hooks import HOOKS

X, Y = torch.ones(6, 1), torch.zeros(6, 1)


# ---------------------------------------------------------------------------------------------------------------------
# What is compared: the pseudocode in loop.py's docstring, played, against the hooks that a run calls.
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Node:
    """A line of the pseudocode and the lines below it."""

    text: str
    children: list[Node] = field(default_factory=list)


def pseudocode() -> dict[str, Node]:
    """The blocks of the docstring by their names: fit, evaluate, predict."""
    assert loop.__doc__ is not None
    indented = loop.__doc__.partition("::\n")[2].split("\nThe loop knows")[0]
    path = [Node("")]
    for line in textwrap.dedent(indented).splitlines():
        if line.strip():
            depth = (len(line) - len(line.lstrip())) // 4
            node = Node(line.strip())
            del path[depth + 1 :]
            path[-1].children.append(node)
            path.append(node)
    return {block.text.removesuffix(":"): block for block in path[0].children}


BLOCKS = pseudocode()
STEPS = {"training step": "training_step", "test step": "validation_step", "prediction step": "predict_step"}


def played(block: str, sizes: dict[str, int], validated: tuple[int, ...] = ()) -> list[str]:
    """The events of a run by the pseudocode.

    Args:
        block: the run's name.
        sizes: how many epochs there are, and how many batches each block has.
        validated: the epochs with a validation.
    """

    def visit(nodes: list[Node], block: str, indices: dict[str, int]) -> Iterator[str]:
        for node in nodes:
            if node.text.startswith("on_"):
                name, argument = re.match(r"(\w+)\((\w*)", node.text).groups()  # type: ignore[union-attr]
                yield f"{name} {indices[argument]}" if argument in indices else name
            elif node.text in STEPS:
                yield f"{STEPS[node.text]} {indices['batch']}"
            elif node.text in BLOCKS:
                yield from visit(BLOCKS[node.text].children, node.text, {})
            elif match := re.match(r"for each (\w+)", node.text):
                count = sizes["epochs" if match[1] == "epoch" else block]
                for index in range(count):
                    yield from visit(node.children, block, {**indices, match[1]: index})
            else:
                assert node.text == "if this epoch has a validation:"
                if indices["epoch"] in validated:
                    yield from visit(node.children, block, indices)

    return list(visit(BLOCKS[block].children, block, {}))


def recorded(events: list[str], failing: str | None = None, error: BaseException | None = None) -> Callback:
    """A callback that notes every hook it is called with, and may raise in one of them."""

    def hook(name: str) -> Callable[..., None]:
        def note(*arguments: Any) -> None:
            events.append(" ".join([name, *(str(index) for index in arguments if isinstance(index, int))]))
            if name == failing and error is not None:
                raise error

        return note

    callback = Callback()
    for name in HOOKS:
        setattr(callback, name, hook(name))
    return callback


class Noting(fitkit.Model):
    """A model that learns nothing and notes its steps."""

    def __init__(self, events: list[str] | None = None) -> None:
        super().__init__(nn.Linear(1, 1), device="cpu")
        self.events = [] if events is None else events
        self.failing: tuple[str, BaseException] | None = None
        self.compile("sgd", "mse", learning_rate=0.0)

    def noted(self, name: str, batch_idx: int) -> None:
        self.events.append(f"{name} {batch_idx}")
        if self.failing is not None and self.failing[0] == name:
            raise self.failing[1]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.noted("training_step", batch_idx)
        return self.module(batch[0]).mean()  # type: ignore[no-any-return]

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.noted("validation_step", batch_idx)
        return self.module(batch[0]).mean()  # type: ignore[no-any-return]

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        self.noted("predict_step", batch_idx)
        return self.module(batch)


SIZES = {"epochs": 3, "fit": 3, "evaluate": 2, "predict": 2}


def fit(model: fitkit.Model, *callbacks: Callback, **options: Any) -> fitkit.History:
    """Three epochs of three batches, each with a validation of two."""
    options = {"batch_size": 2, "epochs": 3, "validation_data": (X[:4], Y[:4]), "verbose": 0, **options}
    return model.fit(X, Y, callbacks=list(callbacks), **options)


# ---------------------------------------------------------------------------------------------------------------------
# The order.
# ---------------------------------------------------------------------------------------------------------------------


def test_every_hook_but_that_of_errors_is_in_the_pseudocode_where_it_is_called() -> None:
    events = {event.split()[0] for block in BLOCKS for event in played(block, SIZES, (0,))}
    assert events - set(STEPS.values()) == set(HOOKS) - {"on_exception"}


@pytest.mark.parametrize(("frequency", "validated"), [(1, (0, 1, 2)), (2, (1,)), (3, (2,)), ([1, 3], (0, 2)), (9, ())])
def test_fit_goes_by_the_pseudocode(frequency: Any, validated: tuple[int, ...]) -> None:
    model = Noting()
    fit(model, recorded(model.events), validation_freq=frequency)
    assert model.events == played("fit", SIZES, validated)


def test_fit_without_validation_goes_by_the_pseudocode() -> None:
    model = Noting()
    fit(model, recorded(model.events), validation_data=None)
    assert model.events == played("fit", SIZES)


def test_evaluate_goes_by_the_pseudocode() -> None:
    model = Noting()
    model.evaluate(X[:4], Y[:4], batch_size=2, verbose=0, callbacks=[recorded(model.events)])
    assert model.events == played("evaluate", SIZES)


def test_predict_goes_by_the_pseudocode() -> None:
    model = Noting()
    model.predict(X[:4], batch_size=2, verbose=0, callbacks=[recorded(model.events)])
    assert model.events == played("predict", SIZES)


def test_callbacks_are_called_in_their_order_and_then_history() -> None:
    order: list[str] = []
    model = Noting()
    first = LambdaCallback(on_epoch_end=lambda epoch, logs: order.append("first"))
    second = LambdaCallback(on_epoch_end=lambda epoch, logs: order.append(f"second {len(model.history)}"))
    fit(model, first, second, epochs=1)
    assert order == ["first", "second 0"]
    assert len(model.history) == 1


def test_model_and_params_are_there_before_the_first_hook() -> None:
    model, told = Noting(), []
    callback = Callback()
    callback.on_train_begin = lambda logs=None: told.append((callback.model, callback.params["steps"]))  # type: ignore[method-assign]
    fit(model, callback)
    assert told == [(model, 3)]


def test_evaluate_and_predict_tell_their_number_of_batches() -> None:
    model, told = Noting(), []
    callback = Callback()
    callback.on_test_begin = callback.on_predict_begin = lambda logs=None: told.append(callback.params)  # type: ignore[method-assign]
    model.evaluate(X, Y, batch_size=4, verbose=0, callbacks=[callback])
    model.predict(X, batch_size=1, steps=5, verbose=0, callbacks=[callback])
    assert told == [{"steps": 2, "verbose": 0}, {"steps": 5, "verbose": 0}]


# ---------------------------------------------------------------------------------------------------------------------
# The end: on_train_end, or on_exception.
# ---------------------------------------------------------------------------------------------------------------------

ERRORS = [RuntimeError("broken"), KeyboardInterrupt("broken"), SystemExit("broken")]
IN_FIT = [name for name in HOOKS if "predict" not in name and name not in ("on_train_end", "on_exception")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("hook", IN_FIT)
def test_an_error_in_any_hook_ends_in_on_exception_alone(hook: str, error: BaseException) -> None:
    model = Noting()
    with pytest.raises(type(error), match="broken") as raised:
        fit(model, recorded(model.events, hook, error))
    whole = played("fit", SIZES, (0, 1, 2))
    assert raised.value is error
    reached = next(index for index, event in enumerate(whole) if event.split()[0] == hook)
    assert model.events == [*whole[: reached + 1], "on_exception"]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("step", ["training_step", "validation_step"])
def test_an_error_in_a_step_ends_in_on_exception_alone(step: str, error: BaseException) -> None:
    model = Noting()
    model.failing = (step, error)
    with pytest.raises(type(error), match="broken") as raised:
        fit(model, recorded(model.events))
    assert raised.value is error
    assert model.events[-2:] == [f"{step} 0", "on_exception"]
    assert "on_train_end" not in model.events


def test_an_error_in_on_train_end_is_raised_without_on_exception() -> None:
    model = Noting()
    with pytest.raises(RuntimeError, match="broken"):
        fit(model, recorded(model.events, "on_train_end", RuntimeError("broken")))
    assert model.events == played("fit", SIZES, (0, 1, 2))


def test_on_exception_is_told_the_error() -> None:
    told: list[BaseException] = []
    error = RuntimeError("broken")
    model, listening = Noting(), Callback()
    model.failing = ("training_step", error)
    listening.on_exception = told.append  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="broken"):
        fit(model, listening)
    assert told == [error]


def test_every_callback_hears_of_the_end_though_one_of_them_raises() -> None:
    heard: list[str] = []
    breaking = LambdaCallback(on_train_end=lambda logs: 1 / 0)
    with pytest.raises(ZeroDivisionError, match="division"):
        fit(Noting(), breaking, LambdaCallback(on_train_end=lambda logs: heard.append("end")))
    assert heard == ["end"]


def test_data_that_raises_ends_in_on_exception() -> None:
    def broken() -> Iterator[Any]:
        yield X, Y
        raise OSError("disk")

    model = Noting()
    with pytest.raises(OSError, match="disk"):
        model.fit(broken(), epochs=1, verbose=0, callbacks=[recorded(model.events)])
    assert model.events[-2:] == ["on_train_batch_end 0", "on_exception"]


@pytest.mark.parametrize(("run", "hook"), [("evaluate", "on_test_batch_end"), ("predict", "on_predict_batch_end")])
def test_evaluate_and_predict_end_in_on_exception_too(run: str, hook: str) -> None:
    model, data = Noting(), [X, Y] if run == "evaluate" else [X]
    with pytest.raises(RuntimeError, match="broken"):
        getattr(model, run)(*data, verbose=0, callbacks=[recorded(model.events, hook, RuntimeError("broken"))])
    assert model.events[-2:] == [f"{hook} 0", "on_exception"]
    assert not {"on_test_end", "on_predict_end"} & set(model.events)


@pytest.mark.parametrize(("error", "reason"), [(ERRORS[0], "error"), (ERRORS[1], "interrupted")])
def test_history_keeps_the_finished_epochs(error: BaseException, reason: str) -> None:
    model = Noting()
    begun: list[int] = []

    def fail(batch: int, logs: Any) -> None:
        if begun[-1] == 2:
            raise error

    counting = LambdaCallback(on_epoch_begin=lambda epoch, logs: begun.append(epoch), on_train_batch_end=fail)
    with pytest.raises(type(error), match="broken"):
        fit(model, counting)
    assert (model.history.epoch, len(model.history["val_loss"]), model.history.stop_reason) == ([0, 1], 2, reason)


def test_after_an_error_the_next_fit_is_a_whole_one() -> None:
    model = Noting()
    model.failing = ("training_step", RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        fit(model)
    model.failing = None
    model.events.clear()
    assert fit(model, recorded(model.events)).stop_reason == "epochs"
    assert model.events == played("fit", SIZES, (0, 1, 2))


# ---------------------------------------------------------------------------------------------------------------------
# stop_training.
# ---------------------------------------------------------------------------------------------------------------------


def stopping(model: fitkit.Model, **at: int) -> Callback:
    """Sets stop_training in one hook, at an epoch or a batch."""
    (hook, index), *_ = at.items()

    def stop(reached: int, logs: Any) -> None:
        model.stop_training = model.stop_training or reached == index

    return LambdaCallback(**{hook: stop})


def test_stop_training_in_on_train_begin_trains_nothing() -> None:
    model = Noting()
    setting = LambdaCallback(on_train_begin=lambda logs: setattr(model, "stop_training", True))
    history = fit(model, setting, recorded(model.events))
    assert model.events == ["on_train_begin", "on_train_end"]
    assert (history.epoch, history.stop_reason) == ([], "stop_training")


@pytest.mark.parametrize("hook", ["on_train_batch_begin", "on_train_batch_end"])
def test_stop_training_at_a_batch_ends_the_run_after_it(hook: str) -> None:
    model = Noting()
    history = fit(model, stopping(model, **{hook: 1}), recorded(model.events))
    assert model.events == played("fit", {"epochs": 1, "fit": 2, "evaluate": 2}, (0,))
    assert (history.epoch, history.stop_reason) == ([0], "stop_training")


@pytest.mark.parametrize("hook", ["on_epoch_end", "on_test_batch_end", "on_test_batch_begin"])
def test_stop_training_in_or_after_a_validation_ends_the_run_after_the_epoch(hook: str) -> None:
    model = Noting()
    fit(model, stopping(model, **{hook: 0}), recorded(model.events))
    assert model.events == played("fit", {**SIZES, "epochs": 1}, (0,))


def test_stop_training_in_on_epoch_begin_ends_the_run_with_that_epoch() -> None:
    model = Noting()
    history = fit(model, stopping(model, on_epoch_begin=1), recorded(model.events))
    assert history.epoch == [0, 1]
    assert model.events[-2:] == ["on_epoch_end 1", "on_train_end"]


def test_a_cut_epoch_is_validated_and_recorded_with_the_means_of_its_batches() -> None:
    model = fitkit.Model(nn.Linear(1, 1), device="cpu")
    model.compile("sgd", lambda output, target: (target + 0 * output).mean(), learning_rate=0.0)
    options = {"batch_size": 2, "shuffle": False, "epochs": 3, "verbose": 0}
    y = torch.arange(6.0)[:, None]
    history = model.fit(X, y, validation_data=(X, y), callbacks=[stopping(model, on_train_batch_end=1)], **options)
    assert history.history == {"loss": [1.5], "val_loss": [2.5]}


def test_the_open_window_of_a_cut_epoch_makes_its_step() -> None:
    module, steps = nn.Linear(1, 1, bias=False), []
    nn.init.zeros_(module.weight)
    model = fitkit.Model(module, device="cpu")
    model.compile(torch.optim.SGD(module.parameters(), lr=1.0), "mse")
    model.optimizer.register_step_pre_hook(lambda *_: steps.append(module.weight.grad.item()))  # type: ignore[union-attr]
    y = torch.tensor([1.0, 1, 3, 3, 9, 9])[:, None]
    options = {"batch_size": 2, "shuffle": False, "epochs": 3, "accumulate_grad_batches": 3, "verbose": 0}
    model.fit(X, y, callbacks=[stopping(model, on_train_batch_end=1)], **options)
    assert steps == [pytest.approx(-4.0)]
    assert module.weight.item() == pytest.approx(4.0)


def test_a_fit_after_a_stopped_one_is_not_stopped() -> None:
    model = Noting()
    fit(model, stopping(model, on_epoch_end=0))
    assert model.stop_training
    assert fit(model).epoch == [0, 1, 2]


def test_evaluate_and_predict_take_no_notice_of_stop_training() -> None:
    model = Noting()
    model.stop_training = True
    model.evaluate(X[:4], Y[:4], batch_size=2, verbose=0)
    model.predict(X[:4], batch_size=2, verbose=0)
    assert model.events == ["validation_step 0", "validation_step 1", "predict_step 0", "predict_step 1"]


# ---------------------------------------------------------------------------------------------------------------------
# Logs.
# ---------------------------------------------------------------------------------------------------------------------


def test_epoch_logs_are_plain_floats() -> None:
    seen: list[Any] = []
    fit(Noting(), LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(dict(logs))), track_grad_norm=2)
    assert {type(value) for logs in seen for value in logs.values()} == {float}
    assert type(seen[0]) is dict


def test_what_a_callback_adds_later_ones_and_history_see() -> None:
    seen: list[float] = []
    adding = LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(speed=float(epoch)))
    looking = LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(logs["speed"]))
    history = fit(Noting(), adding, looking)
    assert seen == history["speed"] == [0.0, 1.0, 2.0]


def test_what_a_callback_changes_or_takes_away_is_gone_for_later_ones() -> None:
    changing = LambdaCallback(on_epoch_end=lambda epoch, logs: logs.update(loss=7.0, gone=logs.pop("val_loss")))
    history = fit(Noting(), changing)
    assert history["loss"] == [7.0] * 3
    assert "val_loss" not in history


def test_on_train_end_is_given_the_last_epochs_logs() -> None:
    seen: list[Any] = []
    history = fit(Noting(), LambdaCallback(on_train_end=lambda logs: seen.append(dict(logs))))
    assert seen == [{key: column[-1] for key, column in history.history.items()}]


def test_batch_logs_are_running_means_and_the_batchs_own_loss() -> None:
    model, seen = fitkit.Model(nn.Linear(1, 1), device="cpu"), []
    model.compile("sgd", lambda output, target: (target + 0 * output).mean(), learning_rate=0.0)
    noting = LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append((logs["loss"], logs["batch_loss"])))
    y = torch.tensor([1.0, 1, 4, 4, 10])[:, None]
    model.fit(X[:5], y, batch_size=2, shuffle=False, epochs=2, verbose=0, callbacks=[noting])
    assert seen == [(1.0, 1.0), (2.5, 4.0), (4.0, 10.0)] * 2


def test_validations_batch_logs_have_no_prefix() -> None:
    seen: list[Any] = []
    fit(Noting(), LambdaCallback(on_test_batch_end=lambda batch, logs: seen.append(set(logs))), epochs=1)
    assert seen == [{"loss", "batch_loss"}] * 2


def test_test_ends_logs_are_those_of_the_validation() -> None:
    seen: list[Any] = []
    history = fit(Noting(), LambdaCallback(on_test_end=lambda logs: seen.append(logs["loss"])))
    assert seen == history["val_loss"]


def test_predictions_batch_logs_are_the_outputs() -> None:
    model, seen = Noting(), []
    looking = LambdaCallback(on_predict_batch_end=lambda batch, logs: seen.append(logs["outputs"]))
    predicted = model.predict(X, batch_size=2, verbose=0, callbacks=[looking])
    assert torch.equal(torch.cat(seen), predicted)


class Reads(TorchDispatchMode):
    """Counts how often a number is read from a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            self.count += 1
        return func(*args, **(kwargs or {}))


def reads(batches: int, epochs: int, *callbacks: Callback, **options: Any) -> int:
    """How many reads a run of so many batches and epochs makes."""
    model = fitkit.Model(nn.Linear(2, 3), device="cpu")
    compiled = {"metrics": ["accuracy"], "weighted_metrics": None}
    compiled = {name: options.pop(name, default) for name, default in compiled.items()}
    model.compile("adam", "cross_entropy", **compiled)
    x, y = torch.randn(batches, 2), torch.randint(0, 3, (batches,))
    y[1::3] = -100
    with Reads() as counting:
        model.fit(x, y, batch_size=1, epochs=epochs, verbose=0, callbacks=list(callbacks), **options)
    return counting.count


def test_a_read_is_counted() -> None:
    with Reads() as counting:
        float(torch.ones(()) + 1)
        bool(torch.ones(()) > 0)
    assert counting.count == 2


FREE: list[dict[str, Any]] = [
    {},
    {"gradient_clip_val": 1.0},
    {"track_grad_norm": 2},
    {"accumulate_grad_batches": 3},
    {"validation_split": 0.5},
    {"on_nonfinite": "ignore"},
    {"class_weight": {0: 2.0}},
    {"metrics": ["accuracy", "f1"], "weighted_metrics": {"weighted": "accuracy"}},
    {"gradient_clip_val": 1.0, "track_grad_norm": "inf", "accumulate_grad_batches": {0: 2, 1: 3}},
]


@pytest.mark.parametrize("options", FREE, ids=str)
def test_no_step_reads_a_number_and_no_epoch_more_than_one(options: dict[str, Any]) -> None:
    few, many = reads(8, 2, **options), reads(72, 2, **options)
    assert few == many
    assert many <= 2 * (2 if "validation_split" in options else 1)


def test_listening_without_reading_reads_nothing() -> None:
    listening = LambdaCallback(on_train_batch_end=lambda batch, logs: len(logs) + ("loss" in logs))
    assert reads(40, 1, listening) == reads(40, 1)


@pytest.mark.parametrize("key", ["loss", "batch_loss", "accuracy"])
def test_a_key_that_is_read_costs_one_read_then_and_no_other(key: str) -> None:
    reading = LambdaCallback(on_train_batch_end=lambda batch, logs: logs[key] if batch % 10 == 0 else None)
    assert reads(40, 1, reading) == reads(40, 1) + 4


def test_a_key_that_is_not_there_is_a_key_error() -> None:
    asking = LambdaCallback(on_train_batch_end=lambda batch, logs: logs["los"])
    with pytest.raises(KeyError, match="los"):
        fit(Noting(), asking)


def test_reading_logs_changes_no_number() -> None:
    y = torch.randn(6, 1)
    histories = []
    for callbacks in ([], [LambdaCallback(on_train_batch_end=lambda batch, logs: dict(logs))]):
        torch.manual_seed(0)
        model = fitkit.Model(nn.Linear(1, 1), device="cpu")
        model.compile("sgd", "mse")
        histories.append(model.fit(X, y, batch_size=2, epochs=3, verbose=0, callbacks=callbacks).history)
    assert histories[0] == histories[1]


def test_an_epochs_mean_is_that_of_its_data() -> None:
    y = torch.tensor([1.0] * 32 + [10.0])[:, None]
    model = fitkit.Model(nn.Linear(1, 1), device="cpu")
    nn.init.zeros_(model.module.weight)
    nn.init.zeros_(model.module.bias)
    model.compile("sgd", "mse", learning_rate=0.0)
    for size in (1, 7, 32, 33):
        history = model.fit(torch.ones(33, 1), y, batch_size=size, epochs=1, verbose=0)
        assert history["loss"] == [pytest.approx(4.0, rel=1e-6)]


def test_an_epoch_without_any_target_says_so() -> None:
    model = fitkit.Model(nn.Linear(1, 2), device="cpu")
    model.compile("sgd", "cross_entropy")
    with pytest.raises(fitkit.NonFiniteLossError, match="received batches of which none had any: all are ignored"):
        model.fit(X, torch.full((6,), -100), verbose=0)
