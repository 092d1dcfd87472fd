"""The truth test: beside every fit a plain torch loop with the same seed, and the same weights, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import fitkit
from fitkit.callbacks import LambdaCallback

X = torch.randn(203, 6, generator=torch.Generator().manual_seed(0))
Y = (X[:, 0] + 0.5 * X[:, 1] > 0).long()
EPOCHS = 3

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
}


class Pairs(Dataset[Any]):
    """A Dataset of samples."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return X[index], Y[index]


def make_net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 2))


def make_loader(workers: int = 0, shuffle: bool = True) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), batch_size=32, shuffle=shuffle, num_workers=workers)


def plain_fit(make_optimizer: Any, loader: DataLoader[Any], *, window: int = 1, after_step: Any = None) -> nn.Module:
    """The loop that a careful user would write; the last window of an epoch may be short, its batches equal."""
    net = make_net()
    optimizer = make_optimizer(net.parameters())
    scheduler = None if after_step is None else after_step(optimizer)
    torch.manual_seed(2)
    for _ in range(EPOCHS):
        for index, (x, y) in enumerate(loader):
            if index % window == 0:
                optimizer.zero_grad()
            held = min(window, len(loader) - index + index % window)
            (F.cross_entropy(net(x), y) / held).backward()
            if (index + 1) % window == 0 or index + 1 == len(loader):
                optimizer.step()
                if scheduler is not None:
                    scheduler.step()
    return net


def fitkit_fit(make_optimizer: Any, data: Any, **arguments: Any) -> nn.Module:
    net = make_net()
    model = fitkit.Model(net, device="cpu")
    model.compile(make_optimizer(net.parameters()), "cross_entropy", metrics=["accuracy"])
    torch.manual_seed(2)
    model.fit(data, epochs=EPOCHS, verbose=0, **arguments)
    return net


def assert_same(first: nn.Module, second: nn.Module) -> None:
    for (name, one), other in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("kind", ["arrays", "numpy", "dataset", "tensor dataset", "loader"])
def test_fit_gives_the_weights_of_the_plain_loop(optimizer: str, shuffle: bool, kind: str) -> None:
    data: Any = {
        "arrays": (X, Y),
        "numpy": (X.numpy(), Y.numpy()),
        "dataset": Pairs(),
        "tensor dataset": TensorDataset(X, Y),
        "loader": make_loader(shuffle=shuffle),
    }[kind]
    arguments = {} if kind == "loader" else {"shuffle": shuffle}
    reference = plain_fit(OPTIMIZERS[optimizer], make_loader(shuffle=shuffle))
    assert_same(fitkit_fit(OPTIMIZERS[optimizer], data, **arguments), reference)


def test_a_loader_with_workers_gives_the_weights_of_the_plain_loop() -> None:
    reference = plain_fit(OPTIMIZERS["adam"], make_loader(workers=2))
    assert_same(fitkit_fit(OPTIMIZERS["adam"], make_loader(workers=2)), reference)


@pytest.mark.parametrize("validation", [(X, Y), make_loader(), Pairs()], ids=["arrays", "shuffled loader", "dataset"])
def test_validation_changes_no_weight(validation: Any) -> None:
    reference = plain_fit(OPTIMIZERS["adam"], make_loader())
    assert_same(fitkit_fit(OPTIMIZERS["adam"], (X, Y), validation_data=validation), reference)


@pytest.mark.parametrize("window", [2, 3, 4, 100])
def test_accumulation_of_equal_batches_is_the_plain_accumulation(window: int) -> None:
    loader = DataLoader(TensorDataset(X[:192], Y[:192]), batch_size=32, shuffle=True)
    reference = plain_fit(OPTIMIZERS["sgd"], loader, window=window)
    assert_same(fitkit_fit(OPTIMIZERS["sgd"], (X[:192], Y[:192]), accumulate_grad_batches=window), reference)


def test_a_scheduler_that_steps_with_the_optimizer_gives_the_same_weights() -> None:
    def schedule(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    reference = plain_fit(OPTIMIZERS["sgd"], make_loader(), after_step=schedule)
    net = make_net()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    scheduler = schedule(optimizer)
    model = fitkit.Model(net, device="cpu")
    model.compile(optimizer, "cross_entropy")
    torch.manual_seed(2)
    stepping = LambdaCallback(on_train_batch_end=lambda batch, logs: scheduler.step())
    model.fit(X, Y, epochs=EPOCHS, verbose=0, callbacks=[stepping])
    assert_same(net, reference)


@pytest.mark.parametrize("track", [-1, 2])
def test_clipping_is_torchs_own(track: int) -> None:
    net = make_net()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    torch.manual_seed(2)
    for _ in range(EPOCHS):
        for x, y in make_loader():
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            optimizer.step()
    fitted = fitkit_fit(OPTIMIZERS["sgd"], (X, Y), gradient_clip_val=0.1, track_grad_norm=track)
    assert_same(fitted, net)


@pytest.mark.parametrize("name", ["Adam", "SGD", "AdamW", "RMSprop", "Adagrad"])
def test_an_optimizer_by_name_is_torchs_own_class(name: str) -> None:
    net, plain = nn.Linear(6, 2), nn.Linear(6, 2)
    plain.load_state_dict(net.state_dict())
    model = fitkit.Model(net, device="cpu")
    model.compile(name.lower(), "cross_entropy", learning_rate=0.01)
    model.fit(X, Y, epochs=1, shuffle=False, verbose=0)
    optimizer = getattr(torch.optim, name)(plain.parameters(), lr=0.01)
    for x, y in make_loader(shuffle=False):
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    # Fused and foreach implementations round in another order: some units in the last place.
    for one, other in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_bf16_is_plain_autocast() -> None:
    net = make_net()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    torch.manual_seed(2)
    for _ in range(EPOCHS):
        for x, y in make_loader():
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
    fitted = make_net()
    model = fitkit.Model(fitted, device="cpu")
    model.compile(OPTIMIZERS["sgd"](fitted.parameters()), "cross_entropy", precision="bf16-mixed")
    torch.manual_seed(2)
    model.fit(X, Y, epochs=EPOCHS, verbose=0)
    assert_same(fitted, net)


@pytest.mark.parametrize("clip", [0, 0.05])
def test_float16_is_plain_autocast_with_a_scaler(clip: float) -> None:
    net = make_net()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    scaler = torch.amp.GradScaler("cpu")
    torch.manual_seed(2)
    for _ in range(EPOCHS):
        for x, y in make_loader():
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = F.cross_entropy(net(x), y)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            if clip:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
    fitted = make_net()
    model = fitkit.Model(fitted, device="cpu")
    model.compile(OPTIMIZERS["sgd"](fitted.parameters()), "cross_entropy", precision="16-mixed")
    torch.manual_seed(2)
    model.fit(X, Y, epochs=EPOCHS, verbose=0, gradient_clip_val=clip)
    assert_same(fitted, net)


def test_float64_is_the_plain_loop_in_float64() -> None:
    net = make_net().double()
    optimizer = OPTIMIZERS["adam"](net.parameters())
    torch.manual_seed(2)
    for _ in range(EPOCHS):
        for x, y in make_loader():
            optimizer.zero_grad()
            F.cross_entropy(net(x.double()), y).backward()
            optimizer.step()
    fitted = make_net()
    model = fitkit.Model(fitted, device="cpu")
    model.compile(OPTIMIZERS["adam"](fitted.parameters()), "cross_entropy", precision="64-true")
    torch.manual_seed(2)
    model.fit(X, Y, epochs=EPOCHS, verbose=0)
    assert_same(fitted, net)


def test_the_epoch_loss_is_the_plain_mean_over_samples() -> None:
    net = make_net()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    torch.manual_seed(2)
    total = 0.0
    for x, y in make_loader():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        total += loss.item() * len(x)
    fitted = make_net()
    model = fitkit.Model(fitted, device="cpu")
    model.compile(OPTIMIZERS["sgd"](fitted.parameters()), "cross_entropy")
    torch.manual_seed(2)
    history = model.fit(X, Y, epochs=1, verbose=0)
    assert history["loss"][0] == pytest.approx(total / len(X), rel=1e-9)


def test_a_scheduler_that_steps_with_the_epoch_gives_the_same_weights() -> None:
    plain, net = make_net(), make_net()
    optimizers = [OPTIMIZERS["adam"](module.parameters()) for module in (plain, net)]
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.3) for optimizer in optimizers]
    torch.manual_seed(2)
    for _ in range(EPOCHS):
        for x, y in make_loader():
            optimizers[0].zero_grad()
            F.cross_entropy(plain(x), y).backward()
            optimizers[0].step()
        schedulers[0].step()
    model = fitkit.Model(net, device="cpu")
    model.compile(optimizers[1], "cross_entropy")
    torch.manual_seed(2)
    stepping = LambdaCallback(on_epoch_end=lambda epoch, logs: schedulers[1].step())
    model.fit(X, Y, epochs=EPOCHS, verbose=0, callbacks=[stepping])
    assert_same(net, plain)
