"""on_nonfinite: what a NaN or infinite training loss does to a run."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fitkit
from fitkit.callbacks import EarlyStopping, LambdaCallback

BAD = [math.nan, math.inf, -math.inf]


def shifted(output: Tensor, target: Tensor) -> Tensor:
    """A loss whose value may be anything while its gradient is finite."""
    return output.mean() + target.mean()


def fitted(y: list[float], loss: Any = shifted, **options: Any) -> fitkit.History:
    """Trains on single samples in order; a sample's target is its loss."""
    model = options.pop("model", None) or fitkit.Model(nn.Linear(1, 1), device="cpu")
    model.compile("sgd", loss, learning_rate=0.0)
    nn.init.zeros_(model.module.weight)
    nn.init.zeros_(model.module.bias)
    options = {"batch_size": 1, "epochs": 3, "shuffle": False, "verbose": 0, **options}
    history: fitkit.History = model.fit(torch.ones(len(y), 1), torch.tensor(y)[:, None], **options)
    return history


@pytest.mark.parametrize("bad", BAD)
def test_raise_names_the_epoch_and_the_first_bad_batch(bad: float) -> None:
    with pytest.raises(fitkit.NonFiniteLossError, match=r"epoch 3 \(index 2\).* batch 2 \(index 1\)") as raised:
        fitted([1.0, bad, 1.0, bad], on_nonfinite="raise", initial_epoch=2)
    assert (raised.value.epoch, raised.value.batch) == (2, 1)


def test_raise_is_the_default() -> None:
    with pytest.raises(FloatingPointError, match='on_nonfinite="stop" or "ignore"'):
        fitted([math.nan])


def test_the_first_bad_batch_of_a_long_epoch_is_found() -> None:
    for index in (0, 63, 64, 127, 128, 200):
        with pytest.raises(fitkit.NonFiniteLossError, match=rf"\(index {index}\)\. "):
            fitted([1.0] * index + [math.nan] * (201 - index))


def test_raise_keeps_the_finished_epochs_and_not_the_bad_one() -> None:
    model, calls = fitkit.Model(nn.Linear(1, 1), device="cpu"), []
    breaking = LambdaCallback(
        on_epoch_begin=lambda epoch, logs: nn.init.constant_(model.module.bias, math.nan if epoch == 2 else 0.0),
        on_epoch_end=lambda epoch, logs: calls.append(epoch),
        on_exception=lambda error: calls.append(type(error).__name__),
    )
    with pytest.raises(fitkit.NonFiniteLossError, match="epoch 3"):
        fitted([1.0, 2.0], model=model, callbacks=[breaking])
    assert (model.history["loss"], model.history.stop_reason) == ([1.5, 1.5], "error")
    assert calls == [0, 1, "NonFiniteLossError"]


def test_stop_records_the_epoch_and_stops() -> None:
    held_out = (torch.ones(2, 1), torch.ones(2, 1))
    history = fitted([1.0, math.inf], on_nonfinite="stop", validation_data=held_out)
    assert history.history == {"loss": [math.inf], "val_loss": [1.0]}
    assert history.stop_reason == "nonfinite"


def test_stop_does_not_wait_for_min_nb_epochs() -> None:
    assert len(fitted([math.nan], on_nonfinite="stop", min_nb_epochs=3)) == 1


def test_ignore_trains_on() -> None:
    history = fitted([1.0, math.nan], on_nonfinite="ignore")
    assert [math.isnan(loss) for loss in history["loss"]] == [True] * 3
    assert history.stop_reason == "epochs"


@pytest.mark.parametrize("option", ["raise", "stop"])
def test_only_the_training_loss_is_judged(option: str) -> None:
    class Noted(fitkit.Model):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            return {"loss": self.module(batch[0]).mean(), "ratio": math.nan, "aux_loss": torch.tensor(math.inf)}

    held_out = (torch.ones(2, 1), torch.full((2, 1), math.nan))
    model = Noted(nn.Linear(1, 1), device="cpu")
    history = fitted([1.0, 2.0], model=model, on_nonfinite=option, validation_data=held_out)
    assert (len(history), history.stop_reason) == (3, "epochs")


def test_a_batch_without_targets_is_no_bad_one() -> None:
    module = nn.Linear(1, 3)
    model = fitkit.Model(module, device="cpu")
    model.compile("sgd", "cross_entropy")
    y = torch.tensor([1, -100, -100, 2])
    history = model.fit(torch.ones(4, 1), y, batch_size=1, epochs=2, verbose=0)
    assert all(math.isfinite(loss) for loss in history["loss"])
    assert module.weight.isfinite().all()


def test_looking_for_the_cause_hides_no_error_and_changes_no_weight() -> None:
    class Penalised(fitkit.Model):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = batch[0].requires_grad_()
            (slope,) = torch.autograd.grad(self.module(x).sum(), x, create_graph=True)
            return slope.square().mean() / 0

    module = nn.Linear(1, 1)
    with pytest.raises(fitkit.NonFiniteLossError, match="epoch 1"):
        fitted([1.0], model=Penalised(module, device="cpu"))
    assert module.weight.isnan().all()


class Two(nn.Linear):
    """Gives its output twice."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        output = super().forward(x)
        return output, output


def test_the_loss_of_any_output_counts() -> None:
    model = fitkit.Model(Two(1, 1), device="cpu")
    model.compile("sgd", [shifted, shifted], learning_rate=0.0)
    y = [torch.ones(4, 1), torch.tensor([1.0, 1.0, math.nan, 1.0])[:, None]]
    with pytest.raises(fitkit.NonFiniteLossError, match=r"batch 3 \(index 2\)"):
        model.fit(torch.ones(4, 1), y, batch_size=1, epochs=1, shuffle=False, verbose=0)


def test_with_accumulation_the_batch_is_the_micro_batch() -> None:
    with pytest.raises(fitkit.NonFiniteLossError, match=r"\(index 2\)\. "):
        fitted([1.0, 1.0, math.nan, 1.0, 1.0], accumulate_grad_batches=2)


def test_clipping_does_not_hide_a_bad_loss() -> None:
    with pytest.raises(fitkit.NonFiniteLossError, match=r"\(index 1\)\. "):
        fitted([1.0, math.nan], "mse", gradient_clip_val=1.0, track_grad_norm=2)


def test_the_best_weights_come_back_after_the_error() -> None:
    model = fitkit.Model(nn.Linear(1, 1), device="cpu")
    weights = {0: 3.0, 1: 1.0, 2: 2.0, 3: math.nan}
    setting = LambdaCallback(on_epoch_begin=lambda epoch, logs: nn.init.constant_(model.module.bias, weights[epoch]))
    restoring = EarlyStopping("loss", restore_best_weights=True)
    with pytest.raises(fitkit.NonFiniteLossError, match="epoch 4"):
        fitted([1.0], model=model, epochs=5, callbacks=[setting, restoring])
    assert model.module.bias.item() == 1.0


def test_a_cut_epoch_is_judged_too() -> None:
    model = fitkit.Model(nn.Linear(1, 1), device="cpu")
    cutting = LambdaCallback(on_train_batch_end=lambda batch, logs: setattr(model, "stop_training", batch == 1))
    with pytest.raises(fitkit.NonFiniteLossError, match=r"\(index 1\)\. "):
        fitted([1.0, math.nan, 1.0], model=model, callbacks=[cutting])
    assert fitted([1.0, 2.0, math.nan], model=model, callbacks=[cutting]).stop_reason == "stop_training"


@pytest.mark.parametrize("value", ["warn", "Raise", None, True])
def test_an_unknown_choice_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="Expected one of 'raise', 'stop', 'ignore', received on_nonfinite="):
        fitted([1.0], on_nonfinite=value)
