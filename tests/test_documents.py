"""What README.md and docs/ show runs as it stands, and the commands they name exist."""

from __future__ import annotations

import configparser
import re
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
TEST_COMMAND = "pip install tox && tox"

# A fenced block, and before it the comment that says which error it ends in: <!-- raises ValueError -->
BLOCK = re.compile(
    r"^(?:<!-- raises (?P<error>\w+) -->\s*\n)?```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```\s*$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    line: int
    error: str | None


def blocks(text: str) -> Iterator[Block]:
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code"))
        yield Block(match["language"], match["code"], line, match["error"])


def section(title: str) -> str:
    """The part of README.md under a heading of the second level."""
    parts = re.split(r"^## (.+)$", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))[title]


def environments() -> set[str]:
    """The names that `tox -e` takes."""
    tox = configparser.ConfigParser()
    tox.read(ROOT / "tox.ini", encoding="utf-8")
    named = {name.removeprefix("testenv:") for name in tox.sections() if name.startswith("testenv:")}
    return named | set(re.findall(r"[\w-]+", tox["tox"]["env_list"]))


@pytest.fixture
def namespace(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, object]:
    """A module of its own in an empty folder; it is registered, so that what a document defines can be pickled."""
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("document")
    monkeypatch.setitem(sys.modules, "document", module)
    return vars(module)


def ends_as_marked(block: Block, path: Path, namespace: dict[str, object]) -> bool:
    # The blank lines make a traceback show the document's own line.
    code = compile("\n" * block.line + block.code, str(path), "exec")
    try:
        exec(code, namespace)
    except Exception as error:
        if block.error in {kind.__name__ for kind in type(error).__mro__}:
            return True
        raise
    return block.error is None


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_python_in_documents_runs(path: Path, namespace: dict[str, object]) -> None:
    for block in blocks(path.read_text(encoding="utf-8")):
        if block.language == "python":
            assert ends_as_marked(block, path, namespace), f"no {block.error} in the block at line {block.line}"


@pytest.mark.parametrize("title", ["Quickstart", "Tests"])
def test_readme_commands_are_one_line_and_their_environments_exist(title: str) -> None:
    command = next(blocks(section(title))).code.strip()
    match = re.fullmatch(rf"{re.escape(TEST_COMMAND)}(?: -q?e (?P<name>[\w-]+))?", command)
    assert match, f"README's section {title} starts with {command!r}"
    assert match["name"] is None or match["name"] in environments()


def test_ci_runs_what_readme_says() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert next(blocks(section("Tests"))).code.strip() == TEST_COMMAND == script[-1]
    assert all(line.startswith(("#", "set ", "cd ")) for line in script[:-1])


def test_contributing_names_only_environments_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert set(re.findall(r"tox -q?e ([\w-]+)", text)) <= environments()
