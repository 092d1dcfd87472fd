"""Prints what a training loop costs in fitkit, in loops written by hand and in the installed peers, as ratios.

    python benchmarks/speed.py [--short] [--only NAME ...] [--contestants NAME ...] [--repeats N] [--json PATH]

1.00 is a careful hand-written loop (contestants/raw.py) unless a row says otherwise. All contestants take turns in one
process, on one thread; a number is the median over the repeats of the ratio within a repeat. Memory and imports are
measured in fresh processes. The figures of a machine that does other things at the same time mean little.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Any

import contestants
import torch
from measures import Ratio, Result, measure
from report import print_table, write_json
from workloads import Workload, workloads


def cell(result: Result | None) -> str:
    """A result as the table shows it."""
    if result is None:
        return "-"
    if isinstance(result, str):
        return result.split(":")[0]
    number = result.median if isinstance(result, Ratio) else result
    return f"{number:.2f}" if number == 0 or abs(number) >= 0.1 else f"{number:.3f}"


def row(workload: Workload, results: dict[str, Result], names: list[str]) -> list[str]:
    at_most = "" if workload.at_most is None else f"{workload.at_most:g}"
    return [workload.title, at_most, *(cell(results.get(name)) for name in names)]


def as_json(result: Result) -> Any:
    return asdict(result) if isinstance(result, Ratio) else result


def parsed(rows: list[Workload]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [workload.name for workload in rows]
    parser.add_argument("--short", action="store_true", help="few steps and one repeat: shows that everything runs")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    everybody = contestants.TIMED
    parser.add_argument(
        "--contestants", nargs="+", choices=everybody, default=everybody, metavar="NAME", help=", ".join(everybody)
    )
    parser.add_argument("--repeats", type=int, help="how often everybody takes a turn (default: 7)")
    parser.add_argument("--json", metavar="PATH", help="where to write all numbers, with quartiles")
    return parser.parse_args()


def main() -> None:
    arguments = parsed(workloads(short=True))
    repeats = arguments.repeats or (1 if arguments.short else 7)
    torch.set_num_threads(1)
    asked = {"raw", *arguments.contestants}
    present = [name for name in contestants.TIMED if name in asked and contestants.is_installed(name)]

    chosen = [workload for workload in workloads(short=arguments.short) if workload.name in arguments.only]
    results: dict[str, dict[str, Result]] = {}
    for workload in chosen:
        print(f"{workload.title} ...", file=sys.stderr, flush=True)
        results[workload.name] = measure(workload, present, repeats)

    shown = [name for name in present if any(name in row for row in results.values())]
    table = [row(workload, results[workload.name], shown) for workload in chosen]
    print_table(
        f"Ratios to a careful hand-written loop, {repeats} repeat(s)",
        table,
        ["at most", *(name.replace("_", " ") for name in shown)],
    )
    absent = contestants.missing(arguments.contestants)
    if absent:
        print(f"Not installed, so left out: {', '.join(absent)}.")
    if arguments.json:
        numbers = {
            name: {contestant: as_json(result) for contestant, result in row.items()} for name, row in results.items()
        }
        limits = {workload.name: workload.at_most for workload in chosen}
        write_json(arguments.json, {"repeats": repeats, "at_most": limits, "results": numbers, "not_installed": absent})


if __name__ == "__main__":
    main()
