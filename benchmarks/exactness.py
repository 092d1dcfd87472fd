"""Prints what fitkit and the installed peers make of small cases whose right numbers are known.

    python benchmarks/exactness.py [--only NAME ...] [--json PATH]

Each contestant runs in a process of its own, as its documentation tells. A number that is off by more than 1e-5 is
marked; a dash stands where a library has no such thing. The gradients are those that the optimizer's steps are given.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import contestants
from exact_cases import ACCUMULATION, MEANS, Case
from report import print_table, write_json

TIMEOUT = 300
WRONG = "≠"


def answer(name: str, case: Case) -> Any:
    """The numbers that a contestant gives for a case; None when it cannot be asked, a text when it failed."""
    ask = getattr(contestants.load(name), case.asks, None)
    if ask is None:
        return None
    try:
        given = ask(case)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return [float(number) for number in (given if isinstance(given, list) else [given])]


def answers(name: str) -> dict[str, Any]:
    """All answers of a contestant, from a fresh process."""
    command = [sys.executable, __file__, "--answer", name]
    run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    if run.returncode != 0:
        raise RuntimeError(f"{name} did not come to its end:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def is_right(given: Any, case: Case) -> bool:
    return (
        isinstance(given, list)
        and len(given) == len(case.correct)
        and all(math.isclose(a, b, abs_tol=1e-5) for a, b in zip(given, case.correct, strict=True))
    )


def shown(given: Any, case: Case) -> str:
    """An answer as a cell of the table."""
    if given is None:
        return "-"
    text = given.split(":")[0] if isinstance(given, str) else numbers(given, several=len(case.correct) > 1)
    return text if is_right(given, case) else f"{text} {WRONG}"


def numbers(values: Sequence[float], *, several: bool) -> str:
    listed = ", ".join(f"{value:.6g}" for value in values)
    return f"[{listed}]" if several else listed


def table(cases: list[Case], given: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The rows of all contestants, the correct numbers first."""
    rows = [["correct", *(numbers(case.correct, several=len(case.correct) > 1) for case in cases)]]
    for name, by_case in given.items():
        if any(by_case[case.title] is not None for case in cases):
            rows.append([name.replace("_", " "), *(shown(by_case[case.title], case) for case in cases)])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = contestants.ANSWERING
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help="whom to ask")
    parser.add_argument("--json", metavar="PATH", help="where to write all numbers")
    parser.add_argument("--answer", choices=names, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.answer is not None:
        # What peers warn of on their way is not what is asked here.
        warnings.simplefilter("ignore")
        print("\n" + json.dumps({case.title: answer(arguments.answer, case) for case in ACCUMULATION + MEANS}))
        return

    present = [name for name in arguments.only if contestants.is_installed(name)]
    given = {name: answers(name) for name in present}
    print_table("Gradients at the optimizer's steps, K=2", table(ACCUMULATION, given), [c.title for c in ACCUMULATION])
    print_table("Means that are reported", table(MEANS, given), [case.title for case in MEANS])
    print(f"{WRONG}: not the correct number.  -: the library has no such thing.")
    absent = contestants.missing(arguments.only)
    if absent:
        print(f"Not installed, so left out: {', '.join(absent)}.")
    if arguments.json:
        correct = {case.title: list(case.correct) for case in ACCUMULATION + MEANS}
        write_json(arguments.json, {"correct": correct, "given": given, "not_installed": absent})


if __name__ == "__main__":
    main()
