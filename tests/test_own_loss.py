"""Modules that return their loss beside logits, as those of transformers do: what metrics by name compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fitkit

GENERATOR = torch.Generator().manual_seed(0)


class Tokens(nn.Module):
    """As a transformers token classifier: logits ``(N, T, C)``, labels ``(N, T)``, -100 is left out."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(torch.randn(10, classes, generator=GENERATOR), freeze=False)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.embedding(input_ids)
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


@dataclass
class CausalLMOutput:
    """Named as in transformers, whose losses compare each token with the one after it."""

    loss: Tensor
    logits: Tensor


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(torch.randn(10, 10, generator=GENERATOR), freeze=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> CausalLMOutput:
        logits = self.embedding(input_ids)
        return CausalLMOutput(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits)


class Rows(nn.Module):
    """As a classifier of whole texts, or with a kernel of 1 a segmentation: logits ``(N, C, ...)``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        logits = self.layer(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def accuracy(module: nn.Module, **batch: Tensor) -> float:
    """Of the module over three batches."""
    model = fitkit.Model(module, device="cpu")
    model.compile("sgd", metrics=["accuracy"])
    parts = zip(*(tensor.split(16) for tensor in batch.values()), strict=True)
    return model.evaluate([dict(zip(batch, part, strict=True)) for part in parts], verbose=0)[1]


def labelled(*shape: int, classes: int = 5) -> Tensor:
    """Random labels, with a part of them ignored that differs from row to row."""
    labels = torch.randint(classes, shape, generator=GENERATOR)
    return labels.masked_fill(torch.rand(shape, generator=GENERATOR) < 0.3, -100)


@pytest.mark.parametrize("length", [5, 7])  # 5 is also the number of classes
def test_a_classifier_of_tokens_has_its_classes_last(length: int) -> None:
    module, ids, labels = Tokens(5), torch.randint(10, (40, length), generator=GENERATOR), labelled(40, length)
    right = (module(ids)["logits"].argmax(-1) == labels)[labels != -100]
    assert accuracy(module, input_ids=ids, labels=labels) == pytest.approx(right.double().mean().item(), abs=1e-7)


def test_ignored_rows_are_no_mistakes() -> None:
    layer, x, labels = nn.Linear(4, 5), torch.randn(40, 4, generator=GENERATOR), labelled(40)
    right = (layer(x).argmax(1) == labels)[labels != -100]
    assert accuracy(Rows(layer), x=x, labels=labels) == pytest.approx(right.double().mean().item(), abs=1e-7)


@pytest.mark.parametrize("size", [5, 6])
def test_a_segmentation_has_its_classes_second(size: int) -> None:
    layer, x, labels = nn.Conv2d(3, 5, 1), torch.randn(40, 3, size, size, generator=GENERATOR), labelled(40, size, size)
    right = (layer(x).argmax(1) == labels)[labels != -100]
    assert accuracy(Rows(layer), x=x, labels=labels) == pytest.approx(right.double().mean().item(), abs=1e-7)


def test_a_causal_language_model_is_compared_with_the_tokens_that_come_next() -> None:
    module, ids = Language(), torch.randint(10, (40, 6), generator=GENERATOR)
    right = module(ids, ids).logits[:, :-1].argmax(-1) == ids[:, 1:]
    assert accuracy(module, input_ids=ids, labels=ids) == pytest.approx(right.double().mean().item(), abs=1e-7)
