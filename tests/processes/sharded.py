"""What is done with a sharded module, by torchrun or alone: `python sharded.py WHAT FOLDER [PATH]`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cases import RANK, STRATEGY, SaveAt, StopAt, classes, compiled, network, result, several
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

import fitkit
from fitkit import synchronisation
from fitkit.callbacks import BackupAndRestore, Callback, ModelCheckpoint, SwapEMAWeights
from fitkit.distributed import local

ARGUMENTS: dict[str, Any] = {"batch_size": 16, "verbose": 0, "validation_split": 0.2}


def train(folder: Path) -> Any:
    """Half of a run, which is saved, and the other half."""
    model = compiled()
    model.fit(*classes(), epochs=2, **ARGUMENTS)
    model.save(folder / "half")
    model.save_weights(folder / "half.pt")
    model.save_weights(folder / "half.safetensors")
    held = sum(local(parameter).numel() for parameter in model.module.parameters())
    kept = [each for state in model.optimizer.state.values() for each in state.values() if each.dim()]
    model.fit(*classes(), epochs=4, resume_from=folder / "half", **ARGUMENTS)
    return result(model, held=held, kept=sum(local(each).numel() for each in kept))


def resume(folder: Path, path: str) -> Any:
    """The other half of a run that was saved elsewhere."""
    model = compiled()
    model.fit(*classes(), epochs=4, resume_from=path, **ARGUMENTS)
    return result(model)


def weights(folder: Path, path: str) -> Any:
    """Weights that a plain file has."""
    model = compiled()
    model.load_weights(path)
    return model.evaluate(*classes(), verbose=0, return_dict=True)


def back_up(folder: Path) -> Any:
    """A run that fails, and goes on from its backup; files that are among the best are kept, others removed."""

    class Fails(Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            if epoch == 2 and not (folder / "failed").exists():
                raise KeyError("on purpose")

    model = compiled()
    kept = ModelCheckpoint(folder / "best" / "{epoch}", "val_loss", save_best_only=True)
    callbacks = [Fails(), BackupAndRestore(folder / "backup", double_checkpoint=True), kept]
    model.fit(*classes(), epochs=4, callbacks=callbacks, **ARGUMENTS)
    return result(model, best=sorted(path.name for path in (folder / "best").iterdir()))


def partly_sharded() -> nn.Module:
    """A module of which the user has left a parameter whole."""
    module = network()
    fully_shard(module, ignored_params={module[0].bias})
    return module


def refusals(folder: Path) -> Any:
    """What is refused before the first batch."""
    x, y = classes()
    fit = {"epochs": 1, "verbose": 0}
    plain = network()
    early = torch.optim.SGD(plain.parameters(), lr=0.1)
    sharded = fitkit.Model(plain, device="cpu", strategy=STRATEGY)

    def attempts() -> Iterator[Callable[[], Any]]:
        yield lambda: sharded.compile(early, "cross_entropy")
        yield lambda: compiled(precision="64-true")
        yield lambda: compiled(jit_compile=True)
        yield lambda: compiled().fit(x, y, micro_batch_size="auto", **fit)
        yield lambda: compiled().fit(x, y, callbacks=[SwapEMAWeights()], **fit)
        yield lambda: compiled().train_on_batch(x, y)
        yield lambda: fitkit.Model(partly_sharded(), device="cpu", strategy=STRATEGY)

    messages = []
    for attempt in attempts():
        try:
            attempt()
        except ValueError as error:
            messages.append(str(error))
    return messages


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = network(), nn.Linear(3, 3)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x))


class Encoding(fitkit.Model):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.module.encode(batch[0]), batch[1])


def methods(folder: Path) -> Any:
    """Two runs by a method of the module's, the first of which ends within a window."""
    model = Encoding(Encoder(), device="cpu", strategy=STRATEGY)
    model.compile("adam", "cross_entropy")
    if STRATEGY == "fsdp":
        register_fsdp_forward_method(model.module, "encode")
    for callbacks in ([StopAt(2)], []):
        model.fit(*classes(), epochs=1, batch_size=8, verbose=0, accumulate_grad_batches=4, callbacks=callbacks)
    return result(model)


def middle(folder: Path) -> Any:
    """A save in the midst of a window."""
    arguments: dict[str, Any] = {"epochs": 3, "batch_size": 8, "verbose": 0, "accumulate_grad_batches": 5}
    compiled().fit(*classes(), callbacks=[SaveAt(folder / "never")], **arguments)


def reductions(folder: Path) -> Any:
    """How often gradients are reduced in the optimizer steps of an epoch."""
    counts = {"reductions": 0, "steps": 0}

    def counted(state: object, bucket: Any) -> Any:
        counts["reductions"] += 1
        return allreduce_hook(dist.group.WORLD, bucket)

    # torch looks at these, and not for words.
    counted.__annotations__ = {"bucket": dist.GradBucket, "return": torch.futures.Future[torch.Tensor]}

    class Counting(DistributedDataParallel):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.register_comm_hook(None, counted)

    synchronisation.DistributedDataParallel = Counting  # type: ignore[misc]
    found = {}
    for name, arguments in {"plain": {}, "accumulating": {"accumulate_grad_batches": 4, "micro_batch_size": 3}}.items():
        counts.update(reductions=0, steps=0)
        model = compiled()
        model.optimizer.register_step_post_hook(lambda *_: counts.update(steps=counts["steps"] + 1))
        model.fit(*classes(64), epochs=2, batch_size=8, verbose=0, **arguments)
        found[name] = dict(counts)
    return found


def scatters(folder: Path) -> Any:
    """How often gradients are scattered in the optimizer steps of a run, with batches accumulated and in parts."""
    counts = {"scatters": 0, "steps": 0}
    name_of_torchs = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    scatter = getattr(dist, name_of_torchs)

    def counted(*args: Any, **kwargs: Any) -> Any:
        counts["scatters"] += 1
        return scatter(*args, **kwargs)

    setattr(dist, name_of_torchs, counted)
    found = {}
    accumulating = {"accumulate_grad_batches": 4, "micro_batch_size": 3}
    x, y = classes(64)
    for name, model, target, arguments in (
        ("plain", compiled(), y, {}),
        ("accumulating", compiled(), y, accumulating),
        ("outputs", several("cross_entropy"), {"kind": y, "place": x[:, :2]}, accumulating),
    ):
        counts.update(scatters=0, steps=0)
        model.optimizer.register_step_post_hook(lambda *_: counts.update(steps=counts["steps"] + 1))
        model.fit(x, target, epochs=2, batch_size=8, verbose=0, **arguments)
        found[name] = dict(counts)
    return found


if __name__ == "__main__":
    what, folder, *more = sys.argv[1:]
    found = globals()[what](Path(folder), *more)
    (Path(folder) / f"{what}-{RANK}.json").write_text(json.dumps(found))
