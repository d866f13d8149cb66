"""Who may import whom: between rooms by one table, inside a room and everywhere without a circle of files."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("components", "dice_core", "pipelines")

# A room, and the rooms below it that it may use. `settings`, `data` and `progress` are leaves.
ROOMS = {
    "dice_core.accelerator": "",
    "dice_core.child_processes": "",
    "dice_core.hub_access": "",
    "dice_core.interrupts": "",
    "dice_core.progress": "",
    "dice_core.settings": "",
    "dice_core.data": "hub_access settings",
    "dice_core.storage": "data progress settings",
    "dice_core.tracking": "progress storage",
    "dice_core.models": "hub_access progress settings storage",
    "dice_core.logprobs": "models",
    "dice_core.generation": "data models progress settings storage",
    "dice_core.judges": "accelerator data generation hub_access models progress settings storage",
    "dice_core.preferences": "accelerator data judges logprobs models progress settings storage",
    "dice_core.training": "accelerator child_processes data logprobs models progress settings storage tracking",
    "dice_core.launch": "accelerator child_processes progress settings storage tracking training",
    "dice_core.evaluation": "accelerator child_processes data generation judges logprobs models preferences progress "
    "settings storage",
    "dice_core.release": "models progress storage tracking",
    "dice_core.report": "data evaluation preferences storage",
    "dice_core.stages": "accelerator child_processes data evaluation generation judges launch logprobs models "
    "preferences progress release report settings storage tracking training",
    "dice_core.commands": "release settings storage",
    "dice_core.cli": "commands interrupts progress settings stages",
    "dice_core.__main__": "cli interrupts stages",
}


def files(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in files(*PACKAGES)}


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield what a tree imports; a name that is a module of ours is that module, any other name its module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


def whole(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def at_module_level(path: Path) -> ast.Module:
    """Return the tree of a file without the bodies of its functions."""
    tree = whole(path)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [ast.Pass()]
    return tree


def our_imports(tree: ast.AST) -> set[str]:
    return {name for name in imports(tree) if name in MODULES}


def room(name: str) -> str:
    """Return the room of a module: two names deep, `dice_core.data` of `dice_core.data.chat`."""
    return ".".join(name.split(".")[:2])


def packages_of(names: Iterable[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", files("dice_core"), ids=module_name)
def test_arrows_between_rooms_run_down_only(path: Path) -> None:
    own = room(module_name(path))
    used = {room(name) for name in our_imports(whole(path))} - {own, "dice_core"}
    if own != "dice_core":
        assert used <= {f"dice_core.{name}" for name in ROOMS[own].split()}


def test_every_room_is_in_the_table_and_the_table_has_no_circle() -> None:
    assert {room(module_name(path)) for path in files("dice_core")} - {"dice_core"} == set(ROOMS)
    table = {own: {f"dice_core.{name}" for name in below.split()} for own, below in ROOMS.items()}
    assert circle(table) == []
    assert circle(table | {"dice_core.progress": {"dice_core.cli"}}).count("dice_core.progress") in (1, 2)


def test_no_files_import_each_other_in_a_circle() -> None:
    """Imports inside functions and for types count too."""
    graph = {name: our_imports(whole(path)) - {name} for name, path in MODULES.items()}
    assert circle(graph) == []


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Return names that lead to each other, the first of them at both ends; none where there is no circle."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("path", files("dice_core"), ids=module_name)
def test_dice_core_knows_neither_kfp_nor_the_packages_above_it(path: Path) -> None:
    assert not packages_of(imports(whole(path))) & {"kfp", "components", "pipelines", "tests"}


@pytest.mark.parametrize("path", files("components"), ids=lambda path: path.stem)
def test_components_import_dice_core_in_their_bodies_only(path: Path) -> None:
    outside = our_imports(at_module_level(path))
    ours = {"components", "components.images", "components.component"}
    assert outside <= ({"dice_core"} if path.stem == "images" else ours)
    assert packages_of(our_imports(whole(path))) <= {"components", "dice_core"}


@pytest.mark.parametrize("path", files("components"), ids=lambda path: path.stem)
def test_components_load_nothing_but_kfp_and_the_standard_library(path: Path) -> None:
    others = packages_of(imports(at_module_level(path))) - sys.stdlib_module_names - {*PACKAGES, "tests"}
    assert others <= {"kfp"}


@pytest.mark.parametrize("path", files("pipelines"), ids=module_name)
def test_pipelines_do_not_know_the_tests(path: Path) -> None:
    assert "tests" not in packages_of(imports(whole(path)))


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("dice_core.settings.base, dice_core.storage.layout, dice_core.data.records", "boto3 kfp torch transformers"),
        ("dice_core.stages.pair, dice_core.cli", "kfp torch transformers vllm"),
        ("dice_core.models.files", "boto3 torch transformers"),
        ("pipelines.cli", "boto3 kfp torch transformers vllm"),
        ("pipelines.dice", "boto3 torch transformers vllm"),
    ],
)
def test_importing_loads_no_heavy_package(module: str, absent: str) -> None:
    code = f"import sys, {module}; print(*[name for name in {absent.split()!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
