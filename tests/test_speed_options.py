"""jit_compile, channels_last and mixed precision: what they promise about the numbers, on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fitkit
from fitkit.callbacks import LambdaCallback

X = torch.randn(22, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randint(4, (22,), generator=torch.Generator().manual_seed(1))


class Watched(nn.Module):
    """A small CNN that notes the memory format of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
        )
        self.seen: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(is_channels_last(x))
        output: Tensor = self.layers(x)
        return output


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def compiled(module: nn.Module, **options: Any) -> fitkit.Model:
    model = fitkit.Model(module, device="cpu")
    model.compile("sgd", "cross_entropy", ["accuracy"], learning_rate=0.05, **options)
    return model


def fitted(model: fitkit.Model, **options: Any) -> fitkit.History:
    """The last batch has 6 samples, the others 8."""
    torch.manual_seed(4)
    return model.fit(X, Y, batch_size=8, epochs=2, validation_data=(X, Y), verbose=0, **options)


def test_channels_last_reaches_weights_batches_validation_and_prediction() -> None:
    model = compiled(Watched(), channels_last=True)
    fitted(model)
    model.evaluate(X, Y, verbose=0)
    model.predict(X, verbose=0)
    model.train_on_batch(X, Y)
    model.predict_on_batch(X)
    assert all(model.module.seen)
    assert is_channels_last(model.module.layers[0].weight)


def test_without_channels_last_batches_are_given_as_they_are() -> None:
    model = compiled(Watched())
    fitted(model)
    assert not any(model.module.seen)
    assert not is_channels_last(model.module.layers[0].weight)


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 3}, {"accumulate_grad_batches": 2}], ids=str)
def test_channels_last_gives_the_numbers_of_the_usual_format(options: Any) -> None:
    plain, other = compiled(Watched()), compiled(Watched(), channels_last=True)
    expected, history = fitted(plain, **options), fitted(other, **options)
    for key in expected:
        assert history[key] == pytest.approx(expected[key], rel=1e-5), key
    torch.testing.assert_close(other.module.state_dict(), plain.module.state_dict(), rtol=1e-4, atol=1e-6)


def test_channels_last_leaves_vectors_and_integers_alone() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.seen = nn.Conv2d(3, 1, 8), []  # type: ignore[var-annotated]

        def forward(self, image: Tensor, vector: Tensor, index: Tensor) -> Tensor:
            self.seen.append([is_channels_last(image), is_channels_last(index), vector.stride()])
            output: Tensor = self.conv(image).flatten(1) + vector.sum(1, keepdim=True)
            return output

    model = fitkit.Model(Mixed(), device="cpu")
    model.compile("sgd", "mse", channels_last=True)
    model.fit([X, torch.ones(22, 2), X.long()], torch.ones(22, 1), batch_size=22, epochs=1, verbose=0)
    assert model.module.seen == [[True, False, (2, 1)]]


def test_a_training_step_of_ones_own_is_given_channels_last_images() -> None:
    class Own(fitkit.Model):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            return nn.functional.cross_entropy(self.module(x), y)

    model = Own(Watched(), device="cpu")
    model.compile("sgd", channels_last=True)
    model.fit(X, Y, epochs=1, verbose=0)
    assert model.module.seen == [True]


def test_channels_last_of_three_dimensional_convolutions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"channels_last=True is for 2-d images.*channels_last_3d"):
        fitkit.Model(nn.Conv3d(1, 1, 2), device="cpu").compile("sgd", "mse", channels_last=True)
    with pytest.raises(TypeError, match="Expected True or False, received channels_last=1"):
        compiled(Watched(), channels_last=1)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_keeps_weights_and_losses_in_float32_and_stays_near(precision: str) -> None:
    plain, mixed = compiled(Watched()), compiled(Watched(), precision=precision)
    expected, history = fitted(plain), fitted(mixed)
    assert history["val_loss"] == pytest.approx(expected["val_loss"], rel=0.02)
    assert {parameter.dtype for parameter in mixed.module.parameters()} == {torch.float32}
    assert mixed.predict(X, verbose=0).dtype == (torch.bfloat16 if precision == "bf16-mixed" else torch.float16)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_accumulates_to_the_step_of_the_large_batch(precision: str) -> None:
    whole, parts = nn.Linear(6, 1), nn.Linear(6, 1)
    parts.load_state_dict(whole.state_dict())
    # Small enough for the first step's scale of 65536: a step that overflows float16 is skipped.
    x, y = 0.1 * torch.randn(20, 6), 0.1 * torch.randn(20, 1)
    for module, options in ((whole, {"batch_size": 20}), (parts, {"batch_size": 8, "accumulate_grad_batches": 3})):
        model = fitkit.Model(module, device="cpu")
        model.compile("sgd", "mse", learning_rate=0.1, precision=precision)
        model.fit(x, y, epochs=1, shuffle=False, verbose=0, **options)
    torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=1e-2, atol=2e-3)


@pytest.mark.long
def test_jit_compile_gives_the_numbers_of_the_plain_module_everywhere() -> None:
    plain, compiled_one = compiled(Watched().layers), compiled(Watched().layers, jit_compile=True)
    batches: list[int] = []
    counting = LambdaCallback(on_train_batch_end=lambda batch, logs: batches.append(batch))
    expected, history = fitted(plain), fitted(compiled_one, callbacks=[counting])
    for key in expected:
        assert history[key] == pytest.approx(expected[key], rel=1e-4), key
    assert batches == [0, 1, 2, 0, 1, 2]
    assert compiled_one.evaluate(X, Y, verbose=0) == pytest.approx(plain.evaluate(X, Y, verbose=0), rel=1e-4)
    torch.testing.assert_close(compiled_one.predict(X, verbose=0), plain.predict(X, verbose=0), rtol=1e-3, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 2}, {"micro_batch_size": 5}], ids=str)
def test_jit_compile_goes_with_accumulation_and_with_parts(options: Any) -> None:
    plain, compiled_one = compiled(Watched().layers), compiled(Watched().layers, jit_compile=True, channels_last=True)
    expected, history = fitted(plain, **options), fitted(compiled_one, **options)
    assert history["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert history["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-4)
