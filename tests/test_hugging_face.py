"""Models of Hugging Face's transformers train as they are: dict batches, their own loss, Datasets. None is loaded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fitkit

transformers = pytest.importorskip("transformers")

TOKENS = torch.randint(1, 50, (24, 8), generator=torch.Generator().manual_seed(0))
CLASSES = TOKENS[:, 0] % 3
ROWS = [{"input_ids": tokens, "labels": label} for tokens, label in zip(TOKENS, CLASSES, strict=True)]
# Texts of several lengths: what a batch's loss is a mean of differs from batch to batch.
LENGTHS = [8, 3, 5, 8, 2, 7] * 4


def bert() -> Any:
    """A random BERT, without dropout, that one can train in no time."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    dropouts = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=16, num_labels=3, **sizes, **dropouts)
    return transformers.BertForSequenceClassification(config)


def gpt() -> Any:
    torch.manual_seed(0)
    sizes = {"n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 1, "eos_token_id": 1}
    dropouts = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, **sizes, **dropouts))


def texts() -> list[dict[str, Tensor]]:
    """Rows for a language model; labels of -100, behind each text's end, count for nothing."""
    rows = []
    for tokens, length in zip(TOKENS, LENGTHS, strict=True):
        labels = torch.where(torch.arange(8) < length, tokens, -100)
        rows.append({"input_ids": tokens, "attention_mask": (labels != -100).long(), "labels": labels})
    return rows


def compiled(module: Any, kind: type[fitkit.Model] = fitkit.Model, **options: Any) -> fitkit.Model:
    model = kind(module, device="cpu")
    model.compile(**({"optimizer": "sgd", "learning_rate": 0.1} | options))
    return model


class CountsTokens(fitkit.Model):
    """The step that docs/hugging_face.md shows."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.module(**batch).loss
        return {"loss": loss, "weight": (batch["labels"][:, 1:] != -100).sum()}

    validation_step = training_step


def test_a_model_trains_from_dict_batches_by_its_own_loss_as_in_a_plain_loop() -> None:
    module = bert()
    plain = copy.deepcopy(module).train()
    history = compiled(module).fit(DataLoader(ROWS, batch_size=8), epochs=2, verbose=0)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, fused=True)
    losses = []
    for _ in range(2):
        for batch in DataLoader(ROWS, batch_size=8):
            optimizer.zero_grad()
            loss = plain(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert history["loss"] == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3], rel=1e-6)
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_metrics_compare_logits_and_labels() -> None:
    model = compiled(bert(), metrics=["accuracy"])
    loader = DataLoader(ROWS, batch_size=7)
    history = model.fit(loader, epochs=1, validation_data=loader, verbose=0)
    assert list(history) == ["loss", "accuracy", "val_loss", "val_accuracy"]
    logits = model.predict(loader, verbose=0)["logits"]
    assert logits.shape == (24, 3)
    loss, accuracy = model.evaluate(loader, verbose=0)
    assert accuracy == pytest.approx((logits.argmax(1) == CLASSES).float().mean().item())
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, CLASSES).item(), rel=1e-6)


def test_accuracy_of_a_language_model_counts_the_tokens_that_its_loss_counts() -> None:
    model, loader = compiled(gpt(), metrics=["accuracy"]), DataLoader(texts(), 7)
    ids, labels = TOKENS, torch.stack([row["labels"] for row in texts()])
    decided = model.module(input_ids=ids, attention_mask=(labels != -100).long()).logits[:, :-1].argmax(-1)
    counted = labels[:, 1:] != -100
    expected = (decided == labels[:, 1:])[counted].double().mean().item()
    assert model.evaluate(loader, verbose=0)[1] == pytest.approx(expected, abs=1e-7)


def test_accuracy_of_a_classifier_of_tokens_leaves_out_minus_100() -> None:
    module = transformers.BertForTokenClassification(bert().config)
    model, labels = compiled(module, metrics=["accuracy"]), torch.where(TOKENS % 4 == 0, -100, TOKENS % 3)
    rows = [{"input_ids": ids, "labels": label} for ids, label in zip(TOKENS, labels, strict=True)]
    decided = model.predict(DataLoader(rows, 24), verbose=0)["logits"].argmax(-1)
    expected = (decided == labels)[labels != -100].double().mean().item()
    assert model.evaluate(DataLoader(rows, 7), verbose=0)[1] == pytest.approx(expected, abs=1e-7)


def test_a_data_collator_and_its_batch_encodings_are_taken() -> None:
    def collate(rows: list[dict[str, Tensor]]) -> Any:
        return transformers.BatchEncoding(transformers.default_data_collator(rows))

    histories = [
        compiled(bert(), metrics=["accuracy"]).fit(
            DataLoader(ROWS, batch_size=8, collate_fn=collation), epochs=2, verbose=0
        )
        for collation in (None, collate, transformers.default_data_collator)
    ]
    assert histories[0].history == histories[1].history == histories[2].history


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 3}, {"micro_batch_size": 3}], ids=str)
def test_batches_of_a_classifier_add_up_to_the_large_batch(options: Any) -> None:
    whole, parts = compiled(bert()), compiled(bert())
    whole.fit(DataLoader(ROWS, batch_size=24), epochs=2, verbose=0)
    size = 10 if "accumulate_grad_batches" in options else 24
    parts.fit(DataLoader(ROWS, batch_size=size), epochs=2, verbose=0, **options)
    torch.testing.assert_close(parts.module.state_dict(), whole.module.state_dict(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 3}, {"micro_batch_size": 3}], ids=str)
def test_with_the_number_of_tokens_beside_the_loss_ignored_labels_add_up_too(options: Any) -> None:
    whole, parts = compiled(gpt(), CountsTokens), compiled(gpt(), CountsTokens)
    expected = whole.fit(DataLoader(texts(), batch_size=24), epochs=2, verbose=0)
    size = 10 if "accumulate_grad_batches" in options else 24
    history = parts.fit(DataLoader(texts(), batch_size=size), epochs=2, verbose=0, **options)
    torch.testing.assert_close(parts.module.state_dict(), whole.module.state_dict(), rtol=1e-5, atol=1e-7)
    assert history["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    losses = [model.evaluate(DataLoader(texts(), batch_size=5), verbose=0) for model in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_without_it_the_models_loss_counts_samples() -> None:
    model = compiled(gpt(), learning_rate=0.0)
    loss = model.fit(DataLoader(texts(), batch_size=10), epochs=1, verbose=0)["loss"][0]
    model.module.train()
    parts = [model.module(**batch).loss.item() for batch in DataLoader(texts(), batch_size=10)]
    assert loss == pytest.approx((10 * parts[0] + 10 * parts[1] + 4 * parts[2]) / 24, rel=1e-6)


def test_cross_entropy_over_shifted_tokens_is_the_models_own_loss() -> None:
    class Logits(nn.Module):
        def __init__(self, module: Any) -> None:
            super().__init__()
            self.module = module

        def forward(self, **inputs: Tensor) -> Tensor:
            return self.module(**inputs).logits[:, :-1].transpose(1, 2)  # type: ignore[no-any-return]

    batch = transformers.default_data_collator(texts())
    inputs, targets = {key: batch[key] for key in ("input_ids", "attention_mask")}, batch["labels"][:, 1:]
    model = compiled(Logits(gpt()), loss="cross_entropy", metrics=["accuracy"])
    expected = compiled(gpt(), CountsTokens).evaluate([batch], verbose=0)
    assert model.evaluate(inputs, targets, batch_size=5, verbose=0)[0] == pytest.approx(expected, rel=1e-6)


def test_a_dataset_of_the_datasets_package_trains_and_splits() -> None:
    datasets = pytest.importorskip("datasets")
    columns = {"input_ids": TOKENS.tolist(), "labels": CLASSES.tolist()}
    dataset = datasets.Dataset.from_dict(columns).with_format("torch")
    model = compiled(bert(), metrics=["accuracy"])
    history = model.fit(dataset, batch_size=6, epochs=2, shuffle=False, validation_split=0.25, verbose=0)
    expected = compiled(bert(), metrics=["accuracy"]).fit(
        DataLoader(ROWS[:18], batch_size=6), epochs=2, validation_data=DataLoader(ROWS[18:], batch_size=6), verbose=0
    )
    assert history.history == expected.history
    assert model.predict(dataset, verbose=0)["logits"].shape == (24, 3)


def test_train_on_batch_and_summary_take_an_encoding() -> None:
    model = compiled(bert())
    batch = transformers.BatchEncoding(transformers.default_data_collator(ROWS[:4]))
    before = model.module(**batch).loss.item()
    assert model.train_on_batch(batch) == pytest.approx(before, rel=1e-5)
    lines: list[str] = []
    model.summary(batch, print_fn=lines.append)
    assert "logits: (4, 3)" in lines[0]


def test_a_learning_rate_is_found_and_undone() -> None:
    model = compiled(bert(), optimizer="adamw", learning_rate=1e-3)
    before = copy.deepcopy(model.module.state_dict())
    model.find_learning_rate(DataLoader(ROWS, batch_size=8), steps=20, verbose=0)
    torch.testing.assert_close(model.module.state_dict(), before, rtol=0, atol=0)
