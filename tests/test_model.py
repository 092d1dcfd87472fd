"""Model: what its methods take and give, and that each of them does what a plain loop does."""

from __future__ import annotations

import copy
import inspect
import re
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fitkit
from fitkit.callbacks import LambdaCallback
from fitkit.flags import INSTEAD

X, Y = torch.randn(10, 3, generator=torch.Generator().manual_seed(1)), torch.linspace(-1, 1, 10)[:, None]
LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])


def compiled(module: nn.Module | None = None, *arguments: Any, **options: Any) -> fitkit.Model:
    model = fitkit.Model(module or nn.Linear(3, 1), device="cpu")
    model.compile(*(arguments or ("sgd", "mse")), **options)
    return model


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Signatures.
# ---------------------------------------------------------------------------------------------------------------------

# Promised and not there yet; what arrives leaves this set.
LATER: set[str] = set()
SIGNATURES = {
    "__init__": "module, *, device='auto', strategy='auto'",
    "compile": "optimizer='adam', loss=None, metrics=None, *, learning_rate=None, loss_weights=None, "
    "weighted_metrics=None, precision='32-true', jit_compile=False, channels_last=False",
    "fit": "data, y=None, *, batch_size=None, epochs=None, verbose='auto', callbacks=None, validation_split=0.0, "
    "validation_data=None, shuffle=None, class_weight=None, sample_weight=None, initial_epoch=0, steps_per_epoch=None, "
    "validation_steps=None, validation_batch_size=None, validation_freq=1, min_nb_epochs=1, max_nb_epochs=1000, "
    "early_stop_callback=None, enable_early_stop=True, accumulate_grad_batches=1, gradient_clip_val=0, "
    "track_grad_norm=-1, train_percent_check=1.0, val_percent_check=1.0, overfit_pct=0.0, "
    "micro_batch_size=None, on_nonfinite='raise', resume_from=None, dataloader_options=None",
    "evaluate": "data, y=None, *, batch_size=None, sample_weight=None, steps=None, verbose='auto', callbacks=None, "
    "return_dict=False, dataloader_options=None",
    "predict": "data, *, batch_size=None, steps=None, verbose='auto', callbacks=None, dataloader_options=None",
    "find_learning_rate": "data, y=None, *, batch_size=None, sample_weight=None, class_weight=None, start=1e-07, "
    "end=10.0, steps=100, gradient_clip_val=0, micro_batch_size=None, verbose='auto'",
    "train_on_batch": "x, y=None, *, sample_weight=None, class_weight=None, return_dict=False",
    "test_on_batch": "x, y=None, *, sample_weight=None, return_dict=False",
    "predict_on_batch": "x",
    "training_step": "batch, batch_idx",
    "validation_step": "batch, batch_idx",
    "predict_step": "batch, batch_idx",
    "summary": "input_data=None, *, depth=3, print_fn=print",
    "save_weights": "path",
    "load_weights": "path",
    "save": "path",
    "load": "path",
    "plan": "data, y=None, **fit_arguments",
    "to_script": "path, **fit_arguments",
}
STARS = {inspect.Parameter.KEYWORD_ONLY: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def shown(method: Callable[..., Any]) -> list[str]:
    """A method's arguments with their defaults, without self and types; a keyword-only one behind a star."""
    shown = []
    for parameter in list(inspect.signature(method).parameters.values())[1:]:
        text = parameter.name
        if parameter.default is not parameter.empty:
            text += f"={getattr(parameter.default, '__name__', repr(parameter.default))}"
        shown.append(STARS.get(parameter.kind, "") + text)
    return shown


def listed(signature: str) -> list[str]:
    """The same of a text, without what is not there yet."""
    positional, _, keywords = signature.partition("*, ")
    named = [f"*{text}" for text in keywords.split(", ") if text and text not in LATER]
    return [text for text in positional.split(", ") if text] + named


@pytest.mark.parametrize("name", [name for name in SIGNATURES if name not in LATER])
def test_a_methods_arguments_have_the_promised_names_order_and_defaults(name: str) -> None:
    assert shown(getattr(fitkit.Model, name)) == listed(SIGNATURES[name])


def test_no_other_method_is_public() -> None:
    methods = {name for name, value in vars(fitkit.Model).items() if callable(value) and name[0] != "_"}
    assert methods == set(SIGNATURES) - {"__init__"} - LATER


def test_attributes_are_there_from_the_start() -> None:
    module = nn.Linear(3, 1)
    model = fitkit.Model(module)
    assert model.module is module
    assert (model.stop_training, len(model.history)) == (False, 0)
    assert model.device == next(module.parameters()).device


@pytest.mark.parametrize("value", [nn.Linear, F.relu, None, "resnet"])
def test_only_a_module_is_a_module(value: Any) -> None:
    with pytest.raises(TypeError, match="Expected a torch.nn.Module, received module="):
        fitkit.Model(value)


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ValueError, match="received device='gpu'"):
        fitkit.Model(nn.Linear(3, 1), device="gpu")


RUNS = ["fit", "evaluate", "train_on_batch", "test_on_batch"]


@pytest.mark.parametrize("run", RUNS)
def test_what_needs_a_loss_needs_compile(run: str) -> None:
    with pytest.raises(ValueError, match="Call model.compile"):
        getattr(fitkit.Model(nn.Linear(3, 1)), run)(X, Y)


def test_a_refused_compile_leaves_the_model_as_it_was() -> None:
    model = compiled()
    optimizer = model.optimizer
    for arguments in (("sgd", "no_loss"), ("no_optimizer", "mse"), ("sgd", "mse", "accuracy")):
        with pytest.raises((ValueError, TypeError), match="no_loss|no_optimizer|accuracy"):
            model.compile(*arguments)
    assert model.optimizer is optimizer
    assert len(model.fit(X, Y, epochs=1, verbose=0)) == 1


def test_a_refused_fit_leaves_the_history_of_the_one_before() -> None:
    model = compiled()
    history = model.fit(X, Y, epochs=2, verbose=0)
    with pytest.raises(ValueError, match="epochs=-1"):
        model.fit(X, Y, epochs=-1)
    assert model.history is history


# ---------------------------------------------------------------------------------------------------------------------
# What is returned.
# ---------------------------------------------------------------------------------------------------------------------


def test_evaluate_gives_a_float_where_there_is_the_loss_alone() -> None:
    model = compiled()
    loss = model.evaluate(X, Y, verbose=0)
    assert type(loss) is float
    assert loss == pytest.approx(F.mse_loss(model.module(X), Y).item())


def test_evaluate_gives_a_list_in_the_order_of_metrics_names() -> None:
    model = compiled(nn.Linear(3, 3), "sgd", "cross_entropy", ["accuracy"])
    output = model.module(X)
    assert model.metrics_names == ["loss", "accuracy"]
    expected = [F.cross_entropy(output, LABELS).item(), (output.argmax(1) == LABELS).float().mean().item()]
    assert model.evaluate(X, LABELS, verbose=0) == [pytest.approx(value) for value in expected]


@pytest.mark.parametrize("run", ["evaluate", "test_on_batch", "train_on_batch"])
def test_return_dict_names_the_same_numbers(run: str) -> None:
    options = {"verbose": 0} if run == "evaluate" else {}
    model = compiled(nn.Linear(3, 3), "sgd", "cross_entropy", ["accuracy"], learning_rate=0.0)
    named = getattr(model, run)(X, LABELS, return_dict=True, **options)
    assert list(named) == model.metrics_names
    assert list(named.values()) == getattr(model, run)(X, LABELS, **options)
    assert {type(value) for value in named.values()} == {float}


@pytest.mark.parametrize("value", [1, None, "yes"])
@pytest.mark.parametrize("run", ["evaluate", "test_on_batch", "train_on_batch"])
def test_return_dict_is_true_or_false(run: str, value: Any) -> None:
    with pytest.raises(TypeError, match="Expected True or False, received return_dict="):
        getattr(compiled(), run)(X, Y, return_dict=value)


@pytest.mark.parametrize("size", [1, 3, 7, 10, 32])
def test_evaluate_does_not_depend_on_the_batch_size(size: int) -> None:
    model = compiled(nn.Linear(3, 3), "sgd", "cross_entropy", ["accuracy"])
    assert model.evaluate(X, LABELS, batch_size=size, verbose=0) == pytest.approx(model.evaluate(X, LABELS, verbose=0))


def test_evaluate_of_steps_is_that_of_the_first_batches() -> None:
    model = compiled()
    first = model.evaluate(X[:4], Y[:4], batch_size=2, verbose=0)
    assert model.evaluate(X, Y, batch_size=2, steps=2, verbose=0) == first


def test_what_fit_returns_is_the_models_history() -> None:
    model = compiled()
    assert model.fit(X, Y, epochs=1, verbose=0) is model.history


# ---------------------------------------------------------------------------------------------------------------------
# One batch.
# ---------------------------------------------------------------------------------------------------------------------


def test_train_on_batch_is_one_plain_step() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    plain = copy.deepcopy(module)
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.1)
    model = compiled(module, torch.optim.Adam(module.parameters(), lr=0.1), "mse")
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.mse_loss(plain(X), Y)
        loss.backward()
        optimizer.step()
        assert model.train_on_batch(X, Y) == loss.item()
    assert_equal(module, plain)


def test_train_on_batch_takes_sample_weights_and_class_weights() -> None:
    module = nn.Linear(3, 3)
    weights = torch.tensor([1.0, 2.0, 0.5])[LABELS]
    expected = (F.cross_entropy(module(X), LABELS, reduction="none") * weights).mean().item()
    model = compiled(module, "sgd", "cross_entropy", learning_rate=0.0)
    assert model.train_on_batch(X, LABELS, sample_weight=weights) == pytest.approx(expected)
    assert model.train_on_batch(X, LABELS, class_weight={1: 2.0, 2: 0.5}) == pytest.approx(expected)
    assert model.test_on_batch(X, LABELS, sample_weight=weights) == pytest.approx(expected)


def test_test_on_batch_trains_nothing() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    before, model = copy.deepcopy(module), compiled(module)
    assert model.test_on_batch(X, Y) == F.mse_loss(before.eval()(X), Y).item()
    assert_equal(module, before)


def test_a_batch_may_be_numpy_or_a_tuple() -> None:
    model = compiled()
    expected = model.test_on_batch(X, Y)
    assert model.test_on_batch(X.double().numpy(), Y.double().numpy()) == expected
    assert model.test_on_batch((X, Y)) == expected
    assert torch.equal(model.predict_on_batch(X.numpy()), model.predict_on_batch((X, Y)))


# ---------------------------------------------------------------------------------------------------------------------
# Predictions.
# ---------------------------------------------------------------------------------------------------------------------

Named = namedtuple("Named", "one two")


class Shaped(nn.Module):
    """Gives what a function makes of its input."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(x)


def predicted(make: Callable[[Tensor], Any], **options: Any) -> Any:
    return fitkit.Model(Shaped(make), device="cpu").predict(X, verbose=0, **{"batch_size": 4, **options})


def test_predict_needs_no_compile() -> None:
    module = nn.Linear(3, 1)
    output = fitkit.Model(module, device="cpu").predict(X, verbose=0)
    torch.testing.assert_close(output, module(X).detach(), rtol=0, atol=0)
    assert not output.requires_grad


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: (x, 2 * x[:, 0]),
        lambda x: [x, (x, x)],
        lambda x: {"one": x, "two": {"three": x.long()}},
        lambda x: Named(x, x[:, :2]),
        lambda x: (x,),
    ],
)
def test_predictions_have_the_structure_of_the_modules_output(make: Callable[[Tensor], Any]) -> None:
    output = predicted(make)
    assert type(output) is type(make(X))
    torch.testing.assert_close(output, make(X), rtol=0, atol=0)


def test_0_d_tensors_and_what_is_no_tensor_are_left_out() -> None:
    torch.testing.assert_close(predicted(lambda x: {"loss": x.sum(), "x": x, "name": "linear"}), {"x": X})
    torch.testing.assert_close(predicted(lambda x: (x.sum(), x, None, 3)), (X,))


def test_a_namedtuples_field_without_a_batch_is_none() -> None:
    output = predicted(lambda x: Named(x.sum(), x))
    assert output.one is None
    assert torch.equal(output.two, X)


def test_a_mapping_of_another_library_becomes_a_dict() -> None:
    output = predicted(lambda x: Answer({"logits": x}))
    assert type(output) is dict
    assert torch.equal(output["logits"], X)


def test_outputs_of_different_lengths_are_refused_with_advice() -> None:
    sizes: Iterator[int] = iter([1, 2, 3])
    with pytest.raises(ValueError, match="Expected outputs of one shape behind the batch dimension.*predict_on_batch"):
        predicted(lambda x: x[:, : next(sizes)])


def test_a_module_that_reuses_its_output_predicts_every_batch() -> None:
    kept = torch.zeros(5, 3)
    assert torch.equal(predicted(kept.copy_, batch_size=5), X)


def test_targets_and_weights_are_dropped() -> None:
    model = compiled()
    expected = model.predict(X, verbose=0)
    loader = DataLoader(TensorDataset(X, Y), batch_size=10)
    for data in ((X, Y), (X, Y, torch.ones(10)), (X,), TensorDataset(X, Y), loader, [(X, Y)]):
        torch.testing.assert_close(model.predict(data, verbose=0), expected, rtol=0, atol=0)


def test_predict_of_steps_is_that_of_the_first_batches() -> None:
    assert torch.equal(predicted(lambda x: x, batch_size=3, steps=2), X[:6])


def test_predict_on_batch_has_the_same_structure() -> None:
    model = fitkit.Model(Shaped(lambda x: {"x": x, "mean": x.mean(), "pair": (x, x)}), device="cpu")
    torch.testing.assert_close(model.predict_on_batch(X), {"x": X, "pair": (X, X)})


# ---------------------------------------------------------------------------------------------------------------------
# Steps of the user's.
# ---------------------------------------------------------------------------------------------------------------------


class Own(fitkit.Model):
    """A model with steps of its own: a mean absolute error, and numbers beside it."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        output = self.module(x)
        loss = (output - y).abs().mean()
        return {"loss": loss, "bias": output.mean(), "batch": batch_idx, "rows": torch.tensor([float(len(x))])}

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": (self.module(batch[0]) - batch[1]).abs().mean(), "score": torch.tensor(7)}


def own(kind: type[fitkit.Model] = Own, *arguments: Any, **options: Any) -> Any:
    model = kind(nn.Linear(3, 1), device="cpu")
    model.compile(*(arguments or ("sgd",)), **options)
    return model


def test_a_training_step_is_trained_as_a_plain_loop_would() -> None:
    model = own()
    plain = copy.deepcopy(model.module)
    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-3, fused=True)
    for x, y in list(zip(X.split(4), Y.split(4), strict=True)) * 2:
        optimizer.zero_grad()
        (plain(x) - y).abs().mean().backward()
        optimizer.step()
    model.fit(X, Y, batch_size=4, epochs=2, shuffle=False, verbose=0)
    assert_equal(model.module, plain)


def test_further_numbers_are_logged_as_means_over_samples() -> None:
    history = own().fit(X, Y, batch_size=4, epochs=1, shuffle=False, validation_data=(X, Y), verbose=0)
    assert list(history) == ["loss", "bias", "batch", "rows", "val_loss", "val_score"]
    assert history["batch"] == [pytest.approx((0 * 4 + 1 * 4 + 2 * 2) / 10)]
    assert history["rows"] == [pytest.approx((4 * 4 + 4 * 4 + 2 * 2) / 10)]
    assert history["val_score"] == [7.0]


def test_a_number_that_a_step_no_longer_gives_is_not_measured() -> None:
    class Warming(fitkit.Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.module(batch[0]).mean()
            return {"loss": loss, "warmth": 1.0} if len(self.history) == 0 else loss

    history = own(Warming).fit(X, Y, batch_size=4, epochs=3, verbose=0)
    assert history["warmth"] == [1.0, None, None]


def test_further_numbers_are_in_the_batch_logs() -> None:
    seen: list[Any] = []
    looking = LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append((logs["rows"], "bias" in logs)))
    own().fit(X, Y, batch_size=4, epochs=1, verbose=0, callbacks=[looking])
    assert seen == [(4.0, True), (4.0, True), (pytest.approx(3.6), True)]


@pytest.mark.parametrize(
    "weight",
    [lambda x: len(x) ** 2, lambda x: torch.tensor(len(x) ** 2), lambda x: torch.tensor([float(len(x) ** 2)])],
    ids=["number", "tensor", "tensor of shape (1,)"],
)
def test_a_weight_beside_the_loss_weighs_it_and_the_further_numbers(weight: Callable[[Tensor], Any]) -> None:
    class Weighted(fitkit.Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.module(batch[0]).mean() * 0 + batch_idx
            return {"loss": loss, "index": loss, "weight": weight(batch[0])}

    history = own(Weighted).fit(X, Y, batch_size=4, epochs=1, verbose=0)
    assert history["loss"] == history["index"] == [pytest.approx((0 * 16 + 1 * 16 + 2 * 4) / 36)]
    assert list(history) == ["loss", "index"]


def test_a_weight_beside_the_loss_counts_in_a_window() -> None:
    class Weighted(fitkit.Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": batch_idx * self.module.weight.sum(), "weight": 1.0 if batch_idx == 0 else 3.0}

    model, seen = own(Weighted), []
    model.optimizer.register_step_pre_hook(lambda *_: seen.append(model.module.weight.grad[0, 0].item()))
    model.fit(X, Y, batch_size=5, epochs=1, accumulate_grad_batches=2, verbose=0)
    assert seen == [pytest.approx(3 / 4)]


def test_a_step_that_shows_output_and_target_has_the_compiled_metrics() -> None:
    class Shown(fitkit.Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            output = self.module(batch[0])
            return {"loss": F.cross_entropy(output, batch[1]), "output": output, "target": batch[1]}

    model = Shown(nn.Linear(3, 3), device="cpu")
    model.compile("sgd", "cross_entropy", ["accuracy"], learning_rate=0.0)
    history = model.fit(X, LABELS, batch_size=4, epochs=1, validation_data=(X, LABELS), verbose=0)
    assert history["accuracy"] == history["val_accuracy"]


@pytest.mark.parametrize(("name", "here"), [("train_step", "training_step"), ("test_step", "validation_step")])
def test_a_step_under_keras_name_is_refused_since_nobody_calls_it(name: str, here: str) -> None:
    kind = type("Mine", (fitkit.Model,), {name: lambda self, data: None})
    model = kind(nn.Linear(3, 1), device="cpu")
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=rf"Mine.{name} is never called: .* {here}\(self, batch, batch_idx\)"):
        model.fit(X, Y, epochs=1, verbose=0)


class WithHead(fitkit.Model):
    """With a head that is kept beside the module."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 2), device="cpu")
        self.head = nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.mse_loss(self.head(self.module(batch[0])), batch[1])


def test_a_module_beside_the_module_that_gets_gradients_and_no_steps_is_warned_of_once() -> None:
    model = WithHead()
    model.compile("sgd")
    with pytest.warns(UserWarning, match=r"model.head gets gradients, but no optimizer holds") as caught:
        model.fit(X, Y, epochs=2, verbose=0)
    assert len(caught) == 1


def test_a_module_beside_the_module_may_be_frozen_or_have_an_optimizer() -> None:
    frozen, with_optimizer = WithHead(), WithHead()
    frozen.head.requires_grad_(False)
    with_optimizer.own = torch.optim.SGD(with_optimizer.head.parameters(), lr=0.1)
    both = WithHead()
    for model in (frozen, with_optimizer):
        model.compile("sgd")
        model.fit(X, Y, epochs=1, verbose=0)
    both.compile(torch.optim.SGD([*both.module.parameters(), *both.head.parameters()], lr=0.1))
    both.fit(X, Y, epochs=1, verbose=0)


class TwoAnswers(fitkit.Model):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        hidden = self.module(batch["x"])
        output, target = {"kind": hidden, "size": hidden[:, 0]}, {"kind": batch["labels"], "size": batch["x"][:, 0]}
        return {"loss": F.cross_entropy(hidden, batch["labels"]), "output": output, "target": target}


def test_a_step_that_shows_several_outputs_has_the_metrics_of_each() -> None:
    model = TwoAnswers(nn.Linear(3, 3), device="cpu")
    model.compile("sgd", {"kind": "ce", "size": "mse"}, {"kind": ["accuracy"], "size": ["mae"]}, learning_rate=0.0)
    history = model.fit({"x": X, "labels": LABELS}, epochs=1, batch_size=4, verbose=0)
    output = model.module(X)
    assert history["kind_accuracy"] == [pytest.approx((output.argmax(1) == LABELS).float().mean().item())]
    assert history["size_mae"] == [pytest.approx((output[:, 0] - X[:, 0]).abs().mean().item())]


def test_a_step_that_shows_other_outputs_than_compile_was_told_is_refused() -> None:
    model = TwoAnswers(nn.Linear(3, 3), device="cpu")
    model.compile("sgd", {"sort": "ce", "size": "mse"}, {"size": ["mae"]})
    with pytest.raises(ValueError, match=r"the step's 'output' to have the keys of loss, \['sort', 'size'\]"):
        model.fit({"x": X, "labels": LABELS}, epochs=1, batch_size=4, verbose=0)


def test_targets_of_minus_100_stay_out_of_the_metrics_of_a_step() -> None:
    class Shown(fitkit.Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            output = self.module(batch[0])
            return {"loss": F.cross_entropy(output, batch[1]), "output": output, "target": batch[1]}

    model = Shown(nn.Linear(3, 3), device="cpu")
    model.compile("sgd", metrics=["accuracy"], learning_rate=0.0)
    labels = LABELS.clone()
    labels[::2] = -100
    history = model.fit(X, labels, batch_size=4, epochs=1, verbose=0)
    right = (model.module(X).argmax(1) == labels)[labels != -100]
    assert history["accuracy"] == [pytest.approx(right.float().mean().item())]


def test_metrics_that_a_step_does_not_feed_are_an_error_that_shows_how() -> None:
    model = own(Own, "sgd", "mse", ["mae"])
    with pytest.raises(ValueError, match='Return {"loss": ..., "output": ..., "target": ...}'):
        model.fit(X, Y, epochs=1, verbose=0)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda output: None, TypeError, "loss of one number as a tensor, received None"),
        (lambda output: output.mean().item(), TypeError, "loss of one number as a tensor"),
        (lambda output: output, TypeError, "tensor of shape"),
        (lambda output: {"los": output.mean()}, ValueError, 'a dict with "loss", received the keys'),
        (lambda output: {"loss": output.mean(), "all": output}, ValueError, "'all' to be one number.*Reduce it"),
        (lambda output: {"loss": output.mean(), "name": "x"}, TypeError, "number.*'name'"),
        (lambda output: {"loss": output.mean(), "name": None}, TypeError, "number.*'name'"),
        (lambda output: {"loss": output.mean(), "weight": -1}, ValueError, "weight"),
    ],
)
def test_what_a_step_must_not_return_is_refused(returned: Any, error: type[Exception], message: str) -> None:
    class Odd(fitkit.Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return returned(self.module(batch[0]))

    with pytest.raises(error, match=message):
        own(Odd).fit(X, Y, epochs=1, verbose=0)


def test_a_step_is_given_the_batch_as_the_data_gave_it() -> None:
    seen: list[Any] = []

    class Looking(fitkit.Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append(batch)
            return self.module(batch["x"]).mean()

    batches = [{"x": X, "name": "first"}, {"x": X, "name": "second"}]
    own(Looking).fit(batches, epochs=1, verbose=0)
    assert [batch["name"] for batch in seen] == ["first", "second"]


def test_without_a_validation_step_the_compiled_loss_judges() -> None:
    class Trained(fitkit.Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.module(batch[0]).mean() * 0 + 5

    model = own(Trained, "sgd", "mse")
    history = model.fit(X, Y, epochs=1, validation_data=(X, Y), verbose=0)
    assert history["loss"] == [5.0]
    assert history["val_loss"] == [model.evaluate(X, Y, verbose=0)]


@pytest.mark.parametrize("run", ["fit", "evaluate", "test_on_batch"])
def test_validation_without_any_loss_is_refused_before_the_first_batch(run: str) -> None:
    class Trained(fitkit.Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            pytest.fail("a batch was trained")

    options = {"fit": {"epochs": 1, "validation_data": (X, Y)}, "evaluate": {"verbose": 0}, "test_on_batch": {}}[run]
    with pytest.raises(ValueError, match="Override validation_step as well, or pass compile"):
        getattr(own(Trained), run)(X, Y, **options)


def test_a_step_may_ask_the_one_it_overrides() -> None:
    class Doubled(fitkit.Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return 2 * super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return 3 * super().validation_step(batch, batch_idx)

    model = own(Doubled, "sgd", "mse", learning_rate=0.0)
    history = model.fit(X, Y, epochs=1, validation_data=(X, Y), verbose=0)
    once = F.mse_loss(model.module(X), Y).item()
    assert history.history == {"loss": [pytest.approx(2 * once)], "val_loss": [pytest.approx(3 * once)]}


def test_the_overridden_step_of_several_outputs_is_their_weighted_sum() -> None:
    class Same(fitkit.Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx)

    losses = []
    for kind in (Same, fitkit.Model):
        model = kind(Two(), device="cpu")
        model.module.load_state_dict(TWO)
        model.compile("sgd", ["mse", "l1"], loss_weights=[1.0, 0.5], learning_rate=0.0)
        losses.append(model.fit(X, [Y, Y], epochs=1, verbose=0)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


class Adversarial(fitkit.Model):
    """Two parts that train against each other, each by an optimizer of its own."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        losses = alternating(self.module, self.optimizers, batch)
        return {"loss": sum(losses).detach(), "generator_loss": losses[0]}


def test_a_step_that_trains_by_itself_is_left_alone() -> None:
    parts = nn.ModuleDict({"generator": nn.Linear(3, 3), "discriminator": nn.Linear(3, 1)})
    plain, model = copy.deepcopy(parts), Adversarial(parts, device="cpu")
    model.compile("sgd", learning_rate=99.0)
    model.optimizers = two_optimizers(parts)
    history = model.fit(X, batch_size=4, epochs=2, shuffle=False, verbose=0)
    optimizers = two_optimizers(plain)
    expected = [alternating(plain, optimizers, x) for _ in range(2) for x in X.split(4)]
    assert_equal(parts, plain)
    mean = sum(losses[0].item() * size for losses, size in zip(expected, (4, 4, 2), strict=False)) / 10
    assert history["generator_loss"][0] == pytest.approx(mean)


def two_optimizers(module: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.Adam(part.parameters(), lr=0.01) for part in module.children()]


def alternating(module: Any, optimizers: list[torch.optim.Optimizer], x: Tensor) -> list[Tensor]:
    """A step of the generator, and one of the discriminator."""
    losses = []
    for turn, optimizer in enumerate(optimizers):
        judged = module["discriminator"](module["generator"](x))
        loss = F.binary_cross_entropy_with_logits(judged, torch.full_like(judged, 1.0 - turn))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def test_a_step_may_train_by_itself_now_and_then() -> None:
    class Sometimes(fitkit.Model):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = F.mse_loss(self.module(batch[0]), batch[1])
            return loss.detach() if batch_idx % 2 == 0 else loss

    model = own(Sometimes, "sgd", learning_rate=0.1)
    steps: list[int] = []
    model.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    model.fit(X, Y, batch_size=2, epochs=2, verbose=0)
    assert len(steps) == 4


def test_a_compiled_loss_without_a_gradient_is_an_error() -> None:
    class Cut(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    with pytest.raises((RuntimeError, ValueError), match="grad"):
        compiled(Cut(3, 1)).fit(X, Y, epochs=1, verbose=0)


def test_a_predict_step_gives_the_predictions() -> None:
    class Both(fitkit.Model):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            return {"error": super().predict_step(batch, batch_idx) - y, "batch": torch.full((len(x),), batch_idx)}

    model = Both(nn.Linear(3, 1), device="cpu")
    output = model.predict((X, Y), batch_size=4, verbose=0)
    torch.testing.assert_close(output["error"], (model.module(X) - Y).detach())
    assert output["batch"].tolist() == [0] * 4 + [1] * 4 + [2] * 2
    torch.testing.assert_close(model.predict_on_batch((X, Y))["error"], output["error"])


# ---------------------------------------------------------------------------------------------------------------------
# A loss that the module gives.
# ---------------------------------------------------------------------------------------------------------------------


class Answer(Mapping[str, Any]):
    """What a library of its own returns: a mapping, and attributes."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values_by_name = values

    def __getitem__(self, key: str) -> Any:
        return self.values_by_name[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_by_name)

    def __len__(self) -> int:
        return len(self.values_by_name)


class Slotted:
    """An object whose loss is a property."""

    def __init__(self, loss: Tensor, logits: Tensor) -> None:
        self.parts = loss, logits

    loss = property(lambda self: self.parts[0])
    logits = property(lambda self: self.parts[1])


class Losing(nn.Linear):
    """A module that gives its loss beside its logits when it is given labels."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        super().__init__(3, 3)
        self.answer = answer

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        logits = super().forward(x)
        return self.answer(loss=F.cross_entropy(logits, labels), logits=logits)


ANSWERS = [dict, SimpleNamespace, lambda **parts: Answer(parts), namedtuple("Output", "loss logits"), Slotted]


@pytest.mark.parametrize("answer", ANSWERS, ids=["dict", "attributes", "mapping", "namedtuple", "properties"])
def test_a_loss_that_the_module_returns_is_trained(answer: Callable[..., Any]) -> None:
    module = Losing(answer)
    plain = nn.Linear(3, 3)
    plain.load_state_dict(module.state_dict())
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for x, labels in zip(X.split(4), LABELS.split(4), strict=True):
        optimizer.zero_grad()
        F.cross_entropy(plain(x), labels).backward()
        optimizer.step()
    model = compiled(module, torch.optim.SGD(module.parameters(), lr=0.1))
    model.fit({"x": X, "labels": LABELS}, batch_size=4, epochs=1, shuffle=False, verbose=0)
    assert_equal(module, plain)
    assert model.metrics_names == ["loss"]


def test_a_mapping_of_another_library_is_a_batch() -> None:
    batches = [Answer({"x": x, "labels": labels}) for x, labels in zip(X.split(4), LABELS.split(4), strict=True)]
    model = compiled(Losing(SimpleNamespace), "sgd", learning_rate=0.0)
    history = model.fit(batches, epochs=1, validation_data=batches, verbose=0)
    expected = pytest.approx(F.cross_entropy(F.linear(X, model.module.weight, model.module.bias), LABELS).item())
    assert history.history == {"loss": [expected], "val_loss": [expected]}


def test_metrics_compare_a_modules_logits_with_the_batchs_labels() -> None:
    model = compiled(Losing(dict), "sgd", None, ["accuracy"])
    _, accuracy = model.evaluate({"x": X, "labels": LABELS}, batch_size=4, verbose=0)
    logits = F.linear(X, model.module.weight, model.module.bias)
    assert accuracy == pytest.approx((logits.argmax(1) == LABELS).float().mean().item())


def test_a_module_without_a_loss_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"whose output has .loss or \['loss'\].*Pass compile\(loss=...\)"):
        compiled(nn.Linear(3, 1), "sgd").fit(X, epochs=1, verbose=0)


def test_a_loss_without_targets_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"Expected .*compile was given a loss.* x alone\. Pass "):
        compiled().fit(X, epochs=1, verbose=0)


# ---------------------------------------------------------------------------------------------------------------------
# Several outputs.
# ---------------------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self, named: bool = False) -> None:
        super().__init__()
        self.one, self.two, self.named = nn.Linear(3, 1), nn.Linear(3, 1), named

    def forward(self, x: Tensor) -> Any:
        return {"one": self.one(x), "two": self.two(x)} if self.named else (self.one(x), self.two(x))


TWO = Two().state_dict()
LIST: dict[str, Any] = {"loss": ["mse", "l1"], "loss_weights": [1.0, 0.5]}
DICT: dict[str, Any] = {"loss": {"two": "l1", "one": "mse"}, "loss_weights": {"two": 0.5}}


@pytest.mark.parametrize(
    ("named", "options", "y", "names"),
    [
        (False, LIST, [Y, Y + 1], ["output_1_loss", "output_2_loss"]),
        (True, DICT, {"one": Y, "two": Y + 1}, ["two_loss", "one_loss"]),
    ],
)
def test_several_outputs_train_as_their_weighted_sum(named: bool, options: Any, y: Any, names: list[str]) -> None:
    module, plain = Two(named), Two()
    plain.load_state_dict(module.state_dict())
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for x, target in zip(X.split(4), Y.split(4), strict=True):
        optimizer.zero_grad()
        (F.mse_loss(plain.one(x), target) + 0.5 * F.l1_loss(plain.two(x), target + 1)).backward()
        optimizer.step()
    model = compiled(module, torch.optim.SGD(module.parameters(), lr=0.1), **options)
    history = model.fit(X, y, batch_size=4, epochs=1, shuffle=False, validation_data=(X, y), verbose=0)
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=1e-6, atol=1e-7)
    assert list(history) == ["loss", *names, "val_loss", *(f"val_{name}" for name in names)]


@pytest.mark.parametrize(("named", "options"), [(False, LIST), (True, DICT)])
def test_the_loss_of_several_outputs_is_the_weighted_sum_of_theirs(named: bool, options: Any) -> None:
    model = compiled(Two(named), "sgd", **options)
    y = {"one": Y, "two": Y + 1} if named else [Y, Y + 1]
    logs = model.evaluate(X, y, batch_size=4, verbose=0, return_dict=True)
    one, two = (logs["one_loss"], logs["two_loss"]) if named else list(logs.values())[1:]
    assert logs["loss"] == pytest.approx(one + 0.5 * two)
    assert list(logs) == model.metrics_names


def test_an_output_without_a_loss_is_left_alone() -> None:
    model = compiled(Two(), "sgd", [None, "mse"], learning_rate=0.1)
    before = copy.deepcopy(model.module)
    model.fit(X, [Y, Y], epochs=1, verbose=0)
    assert torch.equal(model.module.one.weight, before.one.weight)
    assert not torch.equal(model.module.two.weight, before.two.weight)
    assert model.metrics_names == ["loss", "output_2_loss"]


def test_one_callable_gets_the_whole_structures() -> None:
    def both(output: Any, target: Any) -> Tensor:
        return F.mse_loss(output["one"], target["a"]) + F.mse_loss(output["two"], target["b"])

    model = compiled(Two(named=True), "sgd", both)
    output = model.module(X)
    assert model.evaluate(X, {"a": Y, "b": Y}, verbose=0) == pytest.approx(both(output, {"a": Y, "b": Y}).item())
    assert model.metrics_names == ["loss"]


@pytest.mark.parametrize(
    ("loss", "y", "message"),
    [
        (["mse", "mse"], [Y], "Expected y to have 2 parts"),
        (["mse"] * 3, [Y] * 3, "Expected the module's output to have 3 parts"),
        ({"one": "mse", "tow": "mse"}, {"one": Y, "tow": Y}, "missing: .'tow'"),
    ],
)
def test_outputs_that_do_not_fit_the_losses_are_named(loss: Any, y: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compiled(Two(named=isinstance(loss, dict)), "sgd", loss).fit(X, y, epochs=1, verbose=0)


# ---------------------------------------------------------------------------------------------------------------------
# Precision and compilation.
# ---------------------------------------------------------------------------------------------------------------------

FLOATS = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3))


def plain_mixed(module: nn.Module, precision: str) -> Tensor:
    """The plain loop under autocast, with a scaler for float16; returns the last loss."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "16-mixed")
    for x, labels in list(zip(X.split(4), LABELS.split(4), strict=True)) * 3:
        optimizer.zero_grad()
        with torch.autocast("cpu", FLOATS[precision]):
            loss = F.cross_entropy(module(x), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return loss.detach()


@pytest.mark.parametrize("precision", FLOATS)
def test_mixed_precision_is_a_plain_loop_bit_for_bit(precision: str) -> None:
    module = network()
    plain = copy.deepcopy(module)
    plain_mixed(plain, precision)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    model = compiled(module, optimizer, "cross_entropy", precision=precision)
    model.fit(X, LABELS, batch_size=4, epochs=3, shuffle=False, verbose=0)
    assert_equal(module, plain)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", FLOATS)
def test_autocast_covers_evaluation_and_prediction(precision: str) -> None:
    module = network()
    model = compiled(module, "sgd", "cross_entropy", precision=precision)
    with torch.autocast("cpu", FLOATS[precision]), torch.no_grad():
        output = module(X)
        loss = F.cross_entropy(output, LABELS).item()
    assert model.evaluate(X, LABELS, verbose=0) == model.test_on_batch(X, LABELS) == loss
    torch.testing.assert_close(model.predict(X, verbose=0), output, rtol=0, atol=0)
    assert model.predict_on_batch(X).dtype == FLOATS[precision]


def test_a_scaler_halves_its_scale_and_goes_on_after_an_overflow() -> None:
    module = nn.Linear(3, 1)
    model = compiled(module, torch.optim.SGD(module.parameters(), lr=0.0), "mse", precision="16-mixed")
    steps: list[int] = []
    model.optimizer.register_step_post_hook(lambda *_: steps.append(1))
    model.fit(X, Y + 1000, batch_size=2, epochs=6, verbose=0)
    assert 0 < len(steps) < 30
    assert module.weight.isfinite().all()


def test_64_true_is_a_plain_loop_in_float64_bit_for_bit() -> None:
    module = network()
    plain = copy.deepcopy(module).double()
    optimizer = torch.optim.Adam(plain.parameters(), lr=0.1)
    for x, labels in list(zip(X.double().split(4), LABELS.split(4), strict=True)) * 3:
        optimizer.zero_grad()
        F.cross_entropy(plain(x), labels).backward()
        optimizer.step()
    model = compiled(module, torch.optim.Adam(module.parameters(), lr=0.1), "cross_entropy", precision="64-true")
    model.fit(X, LABELS, batch_size=4, epochs=3, shuffle=False, verbose=0)
    assert_equal(module, plain)
    assert model.predict(X, verbose=0).dtype == torch.float64


def test_64_true_converts_what_a_loader_gives() -> None:
    model = compiled(nn.Linear(3, 1), "sgd", "mse", precision="64-true")
    loader = DataLoader(TensorDataset(X, Y), batch_size=4)
    model.fit(loader, epochs=1, validation_data=loader, verbose=0)
    assert model.predict(loader, verbose=0).dtype == model.predict_on_batch(X).dtype == torch.float64


def test_64_true_converts_the_class_weights_of_a_loss() -> None:
    model = compiled(network(), "sgd", nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0])), precision="64-true")
    assert len(model.fit(X, LABELS, epochs=1, verbose=0)) == 1


def test_32_true_leaves_parameters_as_they_are() -> None:
    module = nn.Linear(3, 1).to(torch.bfloat16)
    history = compiled(module).fit(X, Y, epochs=1, verbose=0)
    assert module.weight.dtype == torch.bfloat16
    assert len(history) == 1


@pytest.mark.parametrize("value", ["16", 32, None, "bf16"])
def test_an_unknown_precision_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="Expected one of '32-true', 'bf16-mixed', '16-mixed', '64-true', received"):
        compiled(nn.Linear(3, 1), "sgd", "mse", precision=value)


@pytest.mark.long
def test_jit_compile_trains_and_predicts_as_the_module_does() -> None:
    module = network()
    plain = copy.deepcopy(module)
    for each, jit in ((module, True), (plain, False)):
        model = compiled(each, "sgd", "cross_entropy", ["accuracy"], learning_rate=0.1, jit_compile=jit)
        model.fit(X, LABELS, batch_size=5, epochs=2, shuffle=False, validation_data=(X, LABELS), verbose=0)
        output = model.predict(X, batch_size=5, verbose=0)
        torch.testing.assert_close(output, each.eval()(X).detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_jit_compile_is_true_or_false(value: Any) -> None:
    with pytest.raises(TypeError, match="Expected True or False, received jit_compile="):
        compiled(nn.Linear(3, 1), "sgd", "mse", jit_compile=value)


# ---------------------------------------------------------------------------------------------------------------------
# Freezing.
# ---------------------------------------------------------------------------------------------------------------------


def test_a_part_thawed_between_fits_is_trained_when_the_optimizer_has_it() -> None:
    module = network()
    plain = copy.deepcopy(module)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    model = compiled(module, torch.optim.SGD(module.parameters(), lr=0.1), "cross_entropy")
    for frozen in (True, False):
        for each in (module, plain):
            each[0].requires_grad_(not frozen)
        for x, labels in zip(X.split(4), LABELS.split(4), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(plain(x), labels).backward()
            optimizer.step()
        model.fit(X, LABELS, batch_size=4, epochs=1, shuffle=False, verbose=0)
    assert_equal(module, plain)


def test_a_part_thawed_after_compile_is_trained_after_another_compile() -> None:
    module = network()
    module[0].requires_grad_(False)
    model = compiled(module, "sgd", "cross_entropy", learning_rate=0.1)
    before = module[0].weight.clone()
    model.fit(X, LABELS, epochs=1, verbose=0)
    assert torch.equal(module[0].weight, before)
    module.requires_grad_(True)
    model.compile("sgd", "cross_entropy", learning_rate=0.1)
    model.fit(X, LABELS, epochs=1, verbose=0)
    assert not torch.equal(module[0].weight, before)


def test_a_module_without_anything_to_train_is_refused_by_fit_alone() -> None:
    module = network().requires_grad_(False)
    model = compiled(module, "sgd", "cross_entropy")
    assert model.evaluate(X, LABELS, verbose=0) == pytest.approx(F.cross_entropy(module(X), LABELS).item())
    for train in (lambda: model.fit(X, LABELS, epochs=1, verbose=0), lambda: model.train_on_batch(X, LABELS)):
        with pytest.raises(ValueError, match="trainable parameters"):
            train()


# ---------------------------------------------------------------------------------------------------------------------
# Class weights by what the loss takes for a class.
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool], ids=str)
def test_class_weight_of_one_hot_targets_is_that_of_their_indices(dtype: torch.dtype) -> None:
    losses = []
    for target in (LABELS, F.one_hot(LABELS, 3).to(dtype)):
        model = compiled(nn.Linear(3, 3), torch.optim.SGD, "cross_entropy")
        nn.init.eye_(model.module.weight)
        nn.init.zeros_(model.module.bias)
        losses.append(model.train_on_batch(X, target, class_weight={0: 5.0, 2: 0.1}))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool], ids=str)
def test_class_weight_of_labels_counts_each_label_by_itself(dtype: torch.dtype) -> None:
    module = nn.Linear(3, 2)
    target = X[:, :2] > 0
    weight = torch.where(target, 5.0, 1.0)
    expected = F.binary_cross_entropy_with_logits(module(X), target.float(), weight).item()
    model = compiled(module, "sgd", "bce_with_logits")
    assert model.train_on_batch(X, target.to(dtype), class_weight={1: 5.0}) == pytest.approx(expected, rel=1e-6)


def test_a_step_of_its_own_does_not_hide_the_number_of_train_on_batch() -> None:
    class Own(fitkit.Model):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.module(batch[0]).square().mean()

    model = Own(nn.Linear(3, 1), device="cpu")
    model.compile("sgd", ["mse", "mse"])
    assert isinstance(model.train_on_batch(X, [Y, Y]), float)


def test_an_output_without_a_loss_needs_no_target() -> None:
    model = compiled(Two(), "sgd", ["mse", None])
    assert list(model.fit(X, Y, epochs=1, verbose=0).history) == ["loss", "output_1_loss"]


def test_a_whole_batch_of_a_loader_is_one_for_train_on_batch() -> None:
    model = compiled(nn.Linear(3, 1), "sgd", "mse", learning_rate=0.0)
    batch = next(iter(DataLoader(TensorDataset(X, Y), batch_size=10)))
    assert model.train_on_batch(batch) == model.test_on_batch(X, Y)


def test_jit_compile_beside_a_step_of_its_own_is_refused() -> None:
    class Own(fitkit.Model):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.module(batch[0]).mean()

    with pytest.raises(ValueError, match=r"Call model.module.compile\(\) instead"):
        Own(nn.Linear(3, 1), device="cpu").compile("sgd", jit_compile=True)


def test_a_packed_sequence_is_one_input() -> None:
    sequence = nn.utils.rnn.pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = nn.GRU(3, 1)

        def forward(self, x: Any) -> Tensor:
            return self.cells(x)[1][0]

    history = compiled(Last(), "sgd", "mse").fit([(sequence, torch.zeros(2, 1))], epochs=1, verbose=0)
    assert len(history) == 1


def test_a_batch_object_of_a_graph_library_goes_to_the_module_whole() -> None:
    class Graphs:
        def __init__(self, count: int) -> None:
            self.num_graphs, self.y = count, torch.full((count, 1), float(count))

        def to(self, device: torch.device) -> Graphs:
            return self

    class Net(nn.Linear):
        def forward(self, graphs: Graphs) -> dict[str, Tensor]:  # type: ignore[override]
            output = super().forward(torch.ones(graphs.num_graphs, 3))
            return {"loss": F.mse_loss(output, graphs.y), "output": output}

    data = [Graphs(count) for count in (4, 4, 2)]
    model = compiled(Net(3, 1), "sgd", learning_rate=0.0)
    expected = sum(float(model.module(graphs)["loss"].detach()) * graphs.num_graphs for graphs in data) / 10
    assert model.fit(data, epochs=1, verbose=0)["loss"] == [pytest.approx(expected)]
    assert model.predict(data, verbose=0)["output"].shape == (10, 1)


@pytest.mark.parametrize("name", ["batch_loss", "val_extra", "grad_2_norm_total"])
def test_a_step_of_ones_own_cannot_log_under_a_name_of_fitkits(name: str) -> None:
    class Own(fitkit.Model):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            return {"loss": self.module(batch[0]).mean(), name: torch.tensor(1.0)}

    model = Own(nn.Linear(X.shape[1], 1), device="cpu")
    model.compile("sgd")
    with pytest.raises(ValueError, match=f"Expected another name for the step's '{name}', which fitkit uses itself"):
        model.fit(X, epochs=1, verbose=0)


@pytest.mark.parametrize(
    ("method", "name", "advice"),
    [
        ("compile", "lr", r"Write learning_rate=\.\.\."),
        ("compile", "metric", "Did you mean 'metrics'"),
        ("compile", "run_eagerly", "Leave it out: without jit_compile=True nothing is compiled"),
        ("compile", "epochs", r"Pass it to fit\(epochs=\.\.\.\)"),
        ("compile", "sample_weight", r"Pass it to fit\(sample_weight=\.\.\.\)"),
        ("fit", "batchsize", "Did you mean 'batch_size'"),
        ("fit", "workers", "Give a DataLoader its workers"),
        ("fit", "lr", r"Pass it to compile\(learning_rate=\.\.\.\)"),
        ("fit", "max_epochs", r"Write epochs=\.\.\., or max_nb_epochs="),
    ],
)
def test_an_unknown_argument_is_answered_with_what_to_write(method: str, name: str, advice: str) -> None:
    model = fitkit.Model(nn.Linear(X.shape[1], 1), device="cpu")
    arguments = () if method == "compile" else (X,)
    with pytest.raises(TypeError, match=rf"^{method}\(\) got an unexpected keyword argument '{name}'\. ?{advice}"):
        getattr(model, method)(*arguments, **{name: 1})


@pytest.mark.parametrize(("method", "other"), [("compile", "fit"), ("fit", "compile")])
def test_every_argument_of_the_other_method_is_answered_with_its_name(method: str, other: str) -> None:
    here, there = (inspect.signature(getattr(fitkit.Model, each)).parameters for each in (method, other))
    assert there.keys() - here.keys() <= INSTEAD[method].keys()


@pytest.mark.parametrize("method", INSTEAD)
def test_what_is_written_instead_of_an_argument_exists(method: str) -> None:
    taken = inspect.signature(getattr(fitkit.Model, method)).parameters
    everything = {
        name
        for each in (fitkit.Model.compile, fitkit.Model.fit, fitkit.Model)
        for name in inspect.signature(each).parameters
    }
    assert not taken.keys() & INSTEAD[method].keys()
    assert "_unknown" not in taken
    for advice in INSTEAD[method].values():
        assert set(re.findall(r"(\w+)=", advice)) <= everything


def weighed_loader(**options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, LABELS, torch.ones(len(X))), batch_size=4, **options)


@pytest.mark.parametrize(
    "data",
    [
        weighed_loader(),
        weighed_loader(sampler=torch.utils.data.SequentialSampler(range(4)), num_workers=1),
        DataLoader(torch.utils.data.Subset(weighed_loader().dataset, range(4))),
        [(X, LABELS, torch.ones(len(X)))],
    ],
    ids=["tensors", "workers", "subset", "ready"],
)
def test_class_weight_with_sample_weights_in_batches_is_refused_before_the_run(data: Any) -> None:
    begun: list[int] = []
    beginning = LambdaCallback(on_train_begin=lambda logs: begun.append(1))
    model = fitkit.Model(nn.Linear(X.shape[1], 3), device="cpu")
    model.compile("sgd", "cross_entropy")
    with pytest.raises(ValueError, match="class_weight=... and sample_weight=... exclude each other"):
        model.fit(data, epochs=1, class_weight={0: 2.0}, callbacks=beginning, verbose=0)
    assert not begun


def test_class_weight_with_sample_weights_of_a_dataset_is_refused_at_the_first_batch() -> None:
    model = fitkit.Model(nn.Linear(X.shape[1], 3), device="cpu")
    model.compile("sgd", "cross_entropy")
    loader = weighed_loader(collate_fn=lambda rows: torch.utils.data.default_collate(rows))
    with pytest.raises(ValueError, match="came with data that has sample weights. Use one of the two"):
        model.fit(loader, epochs=1, class_weight={0: 2.0}, verbose=0)


def test_class_weight_of_targets_in_a_column_is_that_of_the_row() -> None:
    def trained(target: Tensor) -> float:
        torch.manual_seed(0)
        model = fitkit.Model(nn.Linear(X.shape[1], 3), device="cpu")
        model.compile("sgd", "cross_entropy")
        return model.train_on_batch(X, target, class_weight={0: 2.0})  # type: ignore[return-value]

    assert trained(LABELS[:, None]) == trained(LABELS)


def test_a_fit_within_a_fit_of_the_same_model_is_refused() -> None:
    model = compiled()
    again = LambdaCallback(on_train_batch_end=lambda batch, logs: model.fit(X, Y, verbose=0))
    with pytest.raises(ValueError, match=r"fit\(...\) was called from within a fit of the same Model"):
        model.fit(X, Y, callbacks=again, verbose=0)


class Wordy(nn.Module):
    def forward(self, x: Tensor) -> str:
        return "many words"


def test_outputs_that_cannot_be_joined_say_what_to_override() -> None:
    model = fitkit.Model(Wordy(), device="cpu")
    with pytest.raises(ValueError, match="Expected outputs with a batch dimension.*Override predict_step"):
        model.predict(X, verbose=0)


class Picky(nn.Module):
    def forward(self, left: Tensor, right: Any = None) -> Tensor:
        raise RuntimeError("not these")


@pytest.mark.parametrize(
    ("x", "words"),
    [
        ({"left": X, "right": X}, r"left=float32 of shape \(10, 3\), right=float32 of shape \(10, 3\)"),
        ([X, X], r"\(float32 of shape \(10, 3\), float32 of shape \(10, 3\)\)"),
    ],
    ids=["mapping", "list"],
)
def test_an_error_of_the_module_says_what_it_was_called_on(x: Any, words: str) -> None:
    with pytest.raises(RuntimeError, match="not these") as caught:
        fitkit.Model(Picky(), device="cpu").predict(x, verbose=0)
    said = " ".join([str(caught.value), *getattr(caught.value, "__notes__", [])])  # Python 3.10 has no notes
    assert re.search(f"The module was called on {words}.", said)


def test_weights_of_samples_and_of_classes_together_are_refused_in_a_tuple_too() -> None:
    model = compiled(nn.Linear(3, 3), "sgd", "cross_entropy")
    with pytest.raises(ValueError, match="class_weight=... and sample_weight=... exclude each other"):
        model.fit((X, LABELS, torch.ones(10)), class_weight={0: 2.0}, verbose=0)


def test_class_weights_need_one_loss_over_one_output() -> None:
    class Own(fitkit.Model):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.module(batch[0]).mean()

    model = Own(nn.Linear(3, 3), device="cpu")
    model.compile("sgd")
    with pytest.raises(ValueError, match="class_weight=... needs one compiled loss over one output"):
        model.fit(X, LABELS, class_weight={0: 2.0}, verbose=0)
