"""The commands of the documents: those that need no cluster are run, the others are understood as they are written.

A command is a line after `$` in a console block. A new one fails until CHECKS says how it is checked. `make ...` in the
text may leave out what a block has: its target and variables exist.
"""

import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dice_core import cli as stages
from dice_core.settings.overrides import parse_overrides
from dice_core.stages.table import STAGES
from pipelines import cli as pipelines
from pipelines.overrides import apply_overrides, find_preset
from tests.kfp_api import name_a_registry
from tests.make_venv import IS_THIS_PYTHON, PRINTS_ITS_ARGUMENTS, make_venv

PROJECT = Path(__file__).parents[1]
DOCUMENTS = [
    "README.md",
    "CONTRIBUTING.md",
    "docs/stages.md",
    "docs/training.md",
    "docs/gpu.md",
    "docs/kubeflow.md",
    "docs/tracking.md",
    "docs/promotion.md",
    "docs/planning.md",
    "docs/judges.md",
    "docs/judges.md",
    "docs/promotion.md",
    "docs/report.md",
    "docs/training-jobs.md",
    "manifests/README.md",
    "images/README.md",
]
MAKEFILE = (PROJECT / "Makefile").read_text()


class Command(NamedTuple):
    """A command as a document has it, in words; `make a b` is two."""

    document: str
    words: tuple[str, ...]
    is_whole: bool
    """It stands in a block, not in the text."""

    @property
    def name(self) -> str:
        """Return the program, and make's target."""
        return " ".join(self.words[:2]) if self.words[0] == "make" else Path(self.words[0]).name

    def __str__(self) -> str:
        return f"{self.document}: {shlex.join(self.words)}"


BLOCK = re.compile(r"^( *)```console\n(.*?)^\1```$", flags=re.DOTALL | re.MULTILINE)


def lines_of_blocks(text: str) -> Iterator[str]:
    """Yield what follows a `$`, with the lines it goes on in: they are indented."""
    for _, body in BLOCK.findall(text):
        yield from re.findall(r"^\$ (.*(?:\n[ ]{2,}.*)*)", textwrap.dedent(body), flags=re.MULTILINE)


def lines_of_text(text: str) -> Iterator[str]:
    """Yield every `make ...` outside the blocks."""
    yield from re.findall(r"`(make\s[^`]*)`", BLOCK.sub("", text))


def split(line: str) -> Iterator[tuple[str, ...]]:
    """Yield the commands of a line in words, without comments and redirections."""
    lexer = shlex.shlex(line.replace("\\\n", " "), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if not set(word) <= set(";&|"):
            words.append(word)
        elif words:
            program, *arguments = words
            targets = [word for word in arguments if "=" not in word] if program == "make" else []
            variables = [word for word in arguments if "=" in word]
            yield from ((program, target, *variables) for target in targets)
            if not targets:
                yield tuple(words)
            words = []


def commands() -> list[Command]:
    """Return all commands of all documents, each once; what stands in a block wins."""
    found = {
        words: Command(name, words, is_whole)
        for is_whole, lines in ((False, lines_of_text), (True, lines_of_blocks))
        for name in reversed(DOCUMENTS)
        for line in lines((PROJECT / name).read_text())
        for words in split(line)
    }
    return list(found.values())


def run_make(arguments: tuple[str, ...], folder: Path, script: str) -> str:
    """Run make with a Python of that script, and return what it printed."""
    command = ["make", "--silent", make_venv(folder / "venv", script), *arguments]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


# ---- how a command is checked


def is_run(words: tuple[str, ...], folder: Path) -> None:
    assert run_make((*words[1:], f"OUT={folder / 'pipeline.yaml'}"), folder, IS_THIS_PYTHON)


def is_understood(words: tuple[str, ...], folder: Path) -> list[str]:
    """Options and settings are valid; what they do needs a cluster, or its stand-in in the tests of pipelines."""
    arguments = run_make(words[1:], folder, PRINTS_ITS_ARGUMENTS).splitlines()
    assert arguments[:2] == ["-m", "pipelines"]
    options = pipelines.build_parser().parse_args(arguments[2:])
    if hasattr(options, "preset"):
        apply_overrides(find_preset(options.preset), options.set)
    return arguments[2:]


def is_run_dry(words: tuple[str, ...], folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DICE_ROOT", "s3://bucket/dice")
        with pytest.MonkeyPatch.context() as patch:
            name_a_registry(patch)
            assert pipelines.main([*is_understood(words, folder), "--dry-run"]) == 0


def is_planned(words: tuple[str, ...], folder: Path) -> None:
    """make has the target. What it does needs a cluster or a network, or is what another test runs."""
    run_make(("--dry-run", *words[1:]), folder, IS_THIS_PYTHON)


def is_a_stage_or_command(words: tuple[str, ...], folder: Path) -> None:
    """Options and settings are valid; tests/dice_core/stages runs the stages, tests/dice_core/commands the others."""
    if words[-1] == "--help":
        subprocess.run([sys.executable, "-m", "dice_core.cli", *words[1:]], stdout=subprocess.DEVNULL, check=True)
        return
    options = stages.build_parser().parse_args(words[1:])
    if options.command not in STAGES:
        return
    sections = STAGES[options.command].sections
    for name, values in parse_overrides(options.set, sections).items():
        sections[name].parse(values, name)


def is_a_command_by_make(words: tuple[str, ...], folder: Path) -> None:
    """What it does is tested in tests/dice_core/commands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DICE_ROOT", "s3://bucket/dice/")
        arguments = run_make(words[1:], folder, PRINTS_ITS_ARGUMENTS).splitlines()
    assert arguments[:2] == ["-m", "dice_core.cli"]
    assert stages.build_parser().parse_args(arguments[2:]).pointer_uri == "s3://bucket/dice/promoted/zephyr.json"


def is_for_make(words: tuple[str, ...], folder: Path) -> None:
    """Variables of make, and those that programs read."""
    for word in words[1:]:
        name = word.partition("=")[0]
        assert f"{name} ?=" in MAKEFILE or name in ("DICE_ROOT", "DICE_ALPACA_EVAL")


def is_of_others(words: tuple[str, ...], folder: Path) -> None:
    """Somebody else's command."""


CHECKS: dict[str, Callable[[tuple[str, ...], Path], object]] = {
    "make help": is_run,
    "make compile": is_run,
    "make settings": is_run,
    "make manifests": is_run,
    "make submit": is_run_dry,
    "make schedule": is_run_dry,
    "make plan": is_understood,
    "make preflight": is_understood,
    "make status": is_understood,
    "make board": is_understood,
    "make logs": is_understood,
    "make cancel": is_understood,
    "make retry": is_understood,
    "make unschedule": is_understood,
    "make history": is_a_command_by_make,
    "make promote": is_a_command_by_make,
    "make rollback": is_a_command_by_make,
    # CI
    "make install": is_planned,
    "make check": is_planned,
    "make test": is_planned,
    "make test-fast": is_planned,
    # By hand
    "make lint": is_planned,
    "make format": is_planned,
    "make typecheck": is_planned,
    "make clean": is_planned,
    "make clean-all": is_planned,
    # tests/test_end_to_end.py, tests/pipelines/demo
    "make demo": is_planned,
    "make stop-s3": is_planned,
    # tests/test_benchmarks.py
    "make bench": is_planned,
    # tests/test_gpu_command.py
    "make test-gpu": is_planned,
    # tests/test_images.py, tests/test_make.py
    "make images": is_planned,
    "make push": is_planned,
    # The package index
    "make lock": is_planned,
    "make lock-images": is_planned,
    # A cluster
    "make kind-up": is_planned,
    "make kind-load": is_planned,
    "make deploy": is_planned,
    "kubectl": is_of_others,
    # tests/mlflow_server.py makes such an environment.
    "python3.11": is_of_others,
    "pip": is_of_others,
    "dice": is_a_stage_or_command,
    "export": is_for_make,
}
# kfp takes seconds.
SLOW = {"make compile", "make submit", "make schedule"}


def marked(command: Command) -> Any:
    is_slow = command.is_whole and command.name in SLOW
    return pytest.param(command, id=str(command), marks=[pytest.mark.slow] if is_slow else [])


@pytest.mark.parametrize("command", map(marked, commands()))
def test_a_command_of_the_documents_works(command: Command, tmp_path: Path) -> None:
    assert command.name in CHECKS, f"{command}: is new, say in CHECKS how it is checked"
    check = CHECKS[command.name]
    (check if command.is_whole or check is is_run else is_planned)(command.words, tmp_path)


@pytest.mark.parametrize("command", [pytest.param(c, id=str(c)) for c in commands() if c.words[0] == "make"])
def test_variables_of_make_are_read_and_tests_are_there(command: Command) -> None:
    variables = dict(word.split("=", 1) for word in command.words if "=" in word)
    assert [name for name in variables if not re.search(rf"[(,]{name}\)", MAKEFILE)] == []
    assert (PROJECT / variables.get("TESTS", "tests")).exists()


def test_every_document_has_commands() -> None:
    assert {command.document for command in commands()} == set(DOCUMENTS)


def test_the_tests_that_watch_a_fact_of_kubeflow_are_there() -> None:
    named = re.findall(r"`(tests/[\w./-]+)`", (PROJECT / "docs" / "kubeflow.md").read_text())
    assert len(set(named)) > 5 and [path for path in named if not (PROJECT / path).exists()] == []


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_link_within_the_project_leads_somewhere(name: str) -> None:
    path = PROJECT / name
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", path.read_text())
    for file, heading in links:
        target = (path.parent / file) if file else path
        assert target.exists(), file
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if heading else []
        assert not heading or heading in [re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings]


def test_commands_are_found_in_blocks_and_in_text() -> None:
    text = textwrap.dedent("""\
        Say `make a` or `b`, or `make
        c D=1`.

        ```console
        $ export A=1                    # why
        $ make b c D="1 2" && kubectl e &
        what it prints
        $ dice x --y z \\
              --set a.b=1
        $ kubectl f '{"g":
              1}'
        ```
          ```console
          $ make d
          ```
    """)
    found = [words for line in (*lines_of_blocks(text), *lines_of_text(text)) for words in split(line)]
    assert found == [
        ("export", "A=1"),
        ("make", "b", "D=1 2"),
        ("make", "c", "D=1 2"),
        ("kubectl", "e"),
        ("dice", "x", "--y", "z", "--set", "a.b=1"),
        ("kubectl", "f", '{"g":\n      1}'),
        ("make", "d"),
        ("make", "a"),
        ("make", "c", "D=1"),
    ]
