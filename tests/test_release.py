"""What a release says of itself agrees: the version, the changelog, the versions of torch that are tested."""

from __future__ import annotations

import configparser
import datetime
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fitkit

ROOT = Path(__file__).parents[1]
VERSION = r"\d+\.\d+\.\d+"
# A heading is Unreleased, or a version and its date.
HEADING = re.compile(rf"^## (?:(?P<unreleased>Unreleased)|(?P<version>{VERSION}) \((?P<date>\d{{4}}-\d\d-\d\d)\))$")


def headings() -> list[re.Match[str]]:
    """The versions in CHANGELOG.md, the newest first."""
    lines = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    found = [(line, HEADING.match(line)) for line in lines if line.startswith("## ")]
    assert all(match for _, match in found), [line for line, match in found if match is None]
    return [match for _, match in found if match is not None]


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def tox() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "tox.ini", encoding="utf-8")
    return parser


def test_the_version_stands_in_one_file_alone() -> None:
    assert re.fullmatch(VERSION, fitkit.__version__)
    pattern = re.compile(rf"version\w*\s*=\s*[\"']{VERSION}")
    files = [ROOT / "setup.py", ROOT / "pyproject.toml", *sorted((ROOT / "fitkit").rglob("*.py"))]
    holding = [path.name for path in files if pattern.search(path.read_text(encoding="utf-8"))]
    assert holding == ["_version.py"]


def test_the_package_has_the_version_of_the_module() -> None:
    pytest.importorskip("setuptools", minversion="77")
    command = [sys.executable, "-W", "ignore", "setup.py", "--quiet", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == fitkit.__version__


def test_the_changelog_begins_with_what_is_unreleased() -> None:
    assert headings()[0]["unreleased"]
    assert sum(bool(match["unreleased"]) for match in headings()) == 1


def test_the_changelogs_versions_fall_and_end_at_the_present_one() -> None:
    released = [numbers(match["version"]) for match in headings() if match["version"]]
    assert released == sorted(released, reverse=True)
    assert len(set(released)) == len(released)
    # Before its release a version is the one that Unreleased will become; nothing is ahead of it.
    assert all(version <= numbers(fitkit.__version__) for version in released)


def test_the_changelogs_dates_are_dates() -> None:
    dates = [datetime.date.fromisoformat(match["date"]) for match in headings() if match["date"]]
    assert dates == sorted(dates, reverse=True)


def test_what_is_in_no_release_yet_has_a_version_of_its_own() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    unreleased = text.split("## Unreleased", 1)[1].split("\n## ", 1)[0]
    released = {match["version"] for match in headings()}
    # Something new under the number of a version that is out already could not be told from it.
    assert "- " not in unreleased or fitkit.__version__ not in released


def test_the_versions_of_torch_are_named_alike_everywhere() -> None:
    parser = tox()
    listed = set(re.findall(r"py-torch(\d+)", parser["tox"]["env_list"]))
    pinned = dict(re.findall(r"^torch(\d+): torch==([\d.]+)$", parser["testenv"]["deps"], re.M))
    assert listed == set(pinned)
    assert all(name == "".join(version.split(".")[:2]) for name, version in pinned.items())
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert set(re.findall(r"py-torch(\d+)", contributing)) == listed


def test_the_versions_of_python_are_named_alike_everywhere() -> None:
    listed = re.findall(r"\bpy3(\d+)", tox()["tox"]["env_list"])
    classifiers = re.findall(r'"Programming Language :: Python :: 3\.(\d+)"', (ROOT / "setup.py").read_text("utf-8"))
    assert listed == classifiers
    oldest = re.search(r'python_requires=">=3\.(\d+)"', (ROOT / "setup.py").read_text("utf-8"))
    target = re.search(r'^target-version = "py3(\d+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.M)
    assert oldest is not None
    assert target is not None
    assert oldest[1] == target[1] == min(listed, key=int)


def test_the_oldest_torch_that_is_tested_is_the_oldest_that_is_allowed() -> None:
    allowed = re.search(r'"torch>=([\d.]+)"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert allowed is not None
    pinned = re.findall(r"^torch\d+: torch==([\d.]+)$", tox()["testenv"]["deps"], re.M)
    assert min(map(numbers, pinned))[:2] == numbers(allowed[1])
