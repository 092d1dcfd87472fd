"""Prints what compile's options for speed do to the time of a training epoch and of a prediction, as ratios.

    python benchmarks/options.py [--short] [--repeats N] [--json PATH]

1.00 is the model compiled without options. All options take turns in one process, on one thread, on the device that
"auto" takes; a number is the median over the repeats of the ratio within a repeat. What torch.compile does at the first
batches is not in it. "16-mixed" is measured on accelerators only: the backward pass of its convolutions takes dozens of
times as long on a CPU. The figures of a machine that does other things at the same time mean little.
"""

from __future__ import annotations

import argparse
import gc
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from measures import Ratio, middle
from report import print_table, write_json
from torch import Tensor, nn

import fitkit

OPTIONS: dict[str, dict[str, Any]] = {
    "no option": {},
    "channels_last=True": {"channels_last": True},
    'precision="bf16-mixed"': {"precision": "bf16-mixed"},
    'precision="bf16-mixed", channels_last=True': {"precision": "bf16-mixed", "channels_last": True},
    'precision="16-mixed"': {"precision": "16-mixed"},
    'precision="64-true"': {"precision": "64-true"},
    "jit_compile=True": {"jit_compile": True},
    'jit_compile=True, precision="bf16-mixed"': {"jit_compile": True, "precision": "bf16-mixed"},
    "jit_compile=True, channels_last=True": {"jit_compile": True, "channels_last": True},
}


def cnn() -> nn.Module:
    """Three convolutions with BatchNorm on small images."""
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {"CNN": (cnn, (3, 32, 32)), "MLP": (mlp, (256,))}


def prepared(
    make: Callable[[], nn.Module], options: dict[str, Any], x: Tensor, y: Tensor
) -> dict[str, Callable[[], Any]]:
    """A warm model's epoch and prediction, ready to be timed."""
    torch.manual_seed(0)
    model = fitkit.Model(make())
    model.compile("sgd", "cross_entropy", learning_rate=0.01, **options)

    def train() -> None:
        model.fit(x, y, batch_size=64, epochs=1, verbose=0)

    def predict() -> None:
        model.predict(x, batch_size=64, verbose=0)

    train()
    predict()
    return {"training": train, "prediction": predict}


def seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def measured(name: str, samples: int, repeats: int) -> dict[str, dict[str, Ratio]]:
    """For each option the ratios of training and of prediction to those without options."""
    make, shape = MODULES[name]
    x, y = torch.randn(samples, *shape), torch.randint(10, (samples,))
    on_cpu = not torch.accelerator.is_available()
    chosen = {
        option: given for option, given in OPTIONS.items() if not (on_cpu and given.get("precision") == "16-mixed")
    }
    runs = {option: prepared(make, given, x, y) for option, given in chosen.items()}
    ratios: dict[str, dict[str, list[float]]] = {option: {"training": [], "prediction": []} for option in runs}
    for repeat in range(repeats):
        # No option always comes first, or always after the same one.
        order = list(runs)[repeat % len(runs) :] + list(runs)[: repeat % len(runs)]
        for phase in ("training", "prediction"):
            gc.collect()
            times = {option: seconds(runs[option][phase]) for option in order}
            for option, taken in times.items():
                ratios[option][phase].append(taken / times["no option"])
    return {option: {phase: middle(values) for phase, values in phases.items()} for option, phases in ratios.items()}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="few samples and one repeat: shows that everything runs")
    parser.add_argument("--repeats", type=int, help="how often every option takes a turn (default: 9)")
    parser.add_argument("--json", metavar="PATH", help="where to write all numbers, with quartiles")
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    repeats = arguments.repeats or (1 if arguments.short else 9)
    torch.set_num_threads(1)
    # What torch.compile makes torch say of itself is of no interest here.
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
    # All compiled models share the code of nn.Module's call, and torch counts its compilations together.
    torch._dynamo.config.recompile_limit = 64
    results = {name: measured(name, 128 if arguments.short else 512, repeats) for name in MODULES}
    columns = [(name, phase) for name in results for phase in ("training", "prediction")]
    rows = results["CNN"]
    table = [[option, *(f"{results[name][option][phase].median:.2f}" for name, phase in columns)] for option in rows]
    device = fitkit.Model(nn.Linear(1, 1)).device.type
    title = f"Time against no option, on {device}, {repeats} repeat(s)"
    print_table(title, table, [f"{name}, {phase}" for name, phase in columns])
    if arguments.json:
        numbers = {
            name: {option: {phase: asdict(ratio) for phase, ratio in phases.items()} for option, phases in row.items()}
            for name, row in results.items()
        }
        write_json(arguments.json, {"repeats": repeats, "device": device, "results": numbers})


if __name__ == "__main__":
    main()
