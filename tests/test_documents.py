"""What README.md and docs/ show runs and prints what they say, their links lead somewhere, their commands exist."""

from __future__ import annotations

import configparser
import contextlib
import doctest
import importlib
import importlib.util
import io
import re
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
TEST_COMMAND = "pip install tox && tox"

# A fenced block; before it the comment that says which packages it needs beside those of every test, <!-- needs
# transformers, datasets -->, and the one that says which error it ends in, <!-- raises ValueError -->; and after it the
# block of text that it prints, the error last. In this text "..." stands for anything.
BLOCK = re.compile(
    r"^(?:<!-- needs (?P<packages>[\w, ]+) -->\s*\n)?(?:<!-- raises (?P<error>\w+) -->\s*\n)?"
    r"```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```[ \t]*$"
    r"(?:\s*^```text\n(?P<output>.*?)^```[ \t]*$)?",
    re.M | re.S,
)
LINK = re.compile(r"\]\((?!https?:)(?P<path>[^)#\s]*)(?:#(?P<anchor>[^)\s]*))?\)")
HEADING = re.compile(r"^#+ (.+)$", re.M)


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    line: int
    packages: list[str]
    error: str | None
    output: str | None


def blocks(text: str) -> Iterator[Block]:
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("code"))
        packages = re.findall(r"\w+", match["packages"] or "")
        yield Block(match["language"], match["code"], line, packages, match["error"], match["output"])


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


def is_installed(package: str) -> bool:
    """Whether it can be imported; a folder of that name, such as the one that W&B makes, is no package."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None


def run(block: Block, path: Path, namespace: dict[str, object]) -> str:
    """What the block prints, and after it the error in which it is marked to end."""
    # The blank lines make a traceback show the document's own line.
    code = compile("\n" * block.line + block.code, str(path), "exec")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            exec(code, namespace)
        except Exception as error:
            if block.error not in {kind.__name__ for kind in type(error).__mro__}:
                raise
            # Before Python 3.11 a message has the note in it that says where in the run it came up.
            message = str(error).split("\nThis came up in ")[0]
            return f"{printed.getvalue()}{type(error).__name__}: {message}\n"
    assert block.error is None, f"no {block.error} in the block at line {block.line}"
    return printed.getvalue()


def import_quietly(packages: list[str]) -> None:
    """What other packages make torch say when they are imported is no business of a document's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in packages:
            importlib.import_module(name)


def says(output: str, printed: str) -> bool:
    return doctest.OutputChecker().check_output(output, printed, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)


def anchors(path: Path) -> set[str]:
    """The fragments by which a document's headings can be linked to."""
    text = BLOCK.sub("", path.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in HEADING.findall(text)}


# What SQLAlchemy says of MLflow.
@pytest.mark.filterwarnings("ignore:The ..noload:DeprecationWarning")
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_python_in_documents_runs_and_prints_what_they_say(path: Path, namespace: dict[str, object]) -> None:
    left_out = []
    for block in blocks(path.read_text(encoding="utf-8")):
        missing = [name for name in block.packages if not is_installed(name)]
        if missing:
            left_out.append(f"the block at line {block.line}, which needs {', '.join(missing)}")
        elif block.language == "python":
            import_quietly(block.packages)
            printed = run(block, path, namespace)
            assert block.output is None or says(block.output, printed), f"line {block.line} prints:\n{printed}"
    if left_out:
        pytest.skip(f"All but {'; '.join(left_out)}")


def test_packages_that_documents_need_are_installed_where_every_test_runs() -> None:
    needed = {
        name for path in DOCUMENTS for block in blocks(path.read_text(encoding="utf-8")) for name in block.packages
    }
    tox = configparser.ConfigParser()
    tox.read(ROOT / "tox.ini", encoding="utf-8")
    extras = set(re.findall(r'"([\w-]+)(?:>=[\d.]+)"', (ROOT / "setup.py").read_text(encoding="utf-8")))
    assert "mlflow-skinny" in extras  # which is imported as mlflow
    assert needed - {"mlflow"} <= extras | set(re.findall(r"^torch213: (\w+)$", tox["testenv"]["deps"], re.M))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_between_documents_lead_somewhere(path: Path) -> None:
    for link in LINK.finditer(BLOCK.sub("", path.read_text(encoding="utf-8"))):
        target = path.parent / link["path"] if link["path"] else path
        assert target.exists(), f"no file for {link[0]}"
        assert link["anchor"] is None or link["anchor"] in anchors(target), f"no heading for {link[0]}"


@pytest.mark.parametrize("title", ["Quickstart", "Tests"])
def test_readme_commands_are_one_line_and_their_environments_exist(title: str) -> None:
    command = next(blocks(section(title))).code.strip()
    match = re.fullmatch(rf"{re.escape(TEST_COMMAND)}(?: run)?(?: -q?e (?P<name>[\w-]+))?", command)
    assert match, f"README's section {title} starts with {command!r}"
    assert match["name"] is None or match["name"] in environments()
    # tox has a command of that name, for which it takes the argument of -qe.
    assert "tox -qe quickstart" not in command


def test_ci_runs_what_readme_says() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert next(blocks(section("Tests"))).code.strip() == TEST_COMMAND == script[-1]
    assert all(line.startswith(("#", "set ", "cd ")) for line in script[:-1])


def test_contributing_names_only_environments_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert set(re.findall(r"tox -q?e ([\w-]+)", text)) <= environments()
