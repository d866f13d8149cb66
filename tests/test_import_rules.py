"""Who may import whom: pipelines -> components -> dice_core, and inside dice_core pure <- effects <- stages <- cli."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("components", "dice_core", "pipelines", "tests")

BASE = {"config", "layout", "pod_settings", "progress", "records", "settings"}
PURE = {
    "chat",
    "decontamination",
    "dpo",
    "estimates",
    "gate",
    "length_penalty",
    "overrides",
    "recorded_logps",
    "replay",
    "reward",
    "selection",
}

# What a pipeline is built from; running the demo also looks at what a run left behind, preflight at the storage, and
# cancel at the jobs of a run.
BUILDING = {"dice_core"} | {f"dice_core.{name}" for name in ("checks", "config", "layout", "overrides", "pod_settings")}
RUNNING = BUILDING | {"dice_core.manifest", "dice_core.report", "dice_core.storage"}
RUNNING |= {"dice_core.failure_report", "dice_core.pytorchjob_spec", "dice_core.recurring"}
RUNNERS = {"demo", "findings", "runs", "s3_checks", "schedule", "screen", "training_jobs"}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).glob("*.py"))


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the modules of ours and others that a tree imports; `from dice_core import stages` is dice_core.stages."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            is_package = node.module in OURS
            yield from (f"{node.module}.{alias.name}" if is_package else node.module for alias in node.names)


def module_exists(name: str) -> bool:
    return (ROOT / f"{name.replace('.', '/')}.py").is_file()


def our_imports(tree: ast.AST) -> set[str]:
    """Return imported modules of this repository; a name that is no module counts as its package."""
    ours = {name for name in imports(tree) if name.split(".")[0] in OURS}
    return {name if module_exists(name) else name.split(".")[0] for name in ours}


def layer(name: str) -> int:
    """Return how far to the right a module of dice_core stands; one that is not listed has effects."""
    last = {"stage_runner": 3, "stages": 5, "cli": 6}
    if name in last:
        return last[name]
    return 0 if name in BASE else 1 if name in PURE else 4 if name.startswith("stage_") else 2


def at_module_level(path: Path) -> ast.Module:
    """Return the tree of a file without the bodies of its functions."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [ast.Pass()]
    return tree


def whole(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@pytest.mark.parametrize("path", modules("dice_core"), ids=lambda path: path.stem)
def test_dice_core_knows_neither_kfp_nor_the_packages_above_it(path: Path) -> None:
    above = {name for name in imports(whole(path)) if name.split(".")[0] in ("kfp", "components", "pipelines", "tests")}
    assert not above


@pytest.mark.parametrize("path", modules("dice_core"), ids=lambda path: path.stem)
def test_inside_dice_core_the_left_never_imports_the_right(path: Path) -> None:
    used = {name.removeprefix("dice_core.") for name in our_imports(whole(path)) if name != "dice_core"}
    assert {name for name in used if layer(name) > layer(path.stem)} == set()


@pytest.mark.parametrize("path", modules("components"), ids=lambda path: path.stem)
def test_components_import_dice_core_in_their_bodies_only(path: Path) -> None:
    outside = our_imports(at_module_level(path))
    assert outside <= ({"dice_core"} if path.stem == "images" else {"components.images"})
    assert {name.split(".")[0] for name in our_imports(whole(path))} <= {"components", "dice_core"}


@pytest.mark.parametrize("path", modules("components"), ids=lambda path: path.stem)
def test_components_load_nothing_but_kfp_and_the_standard_library(path: Path) -> None:
    others = {name.split(".")[0] for name in imports(at_module_level(path))} - sys.stdlib_module_names - set(OURS)
    assert others <= {"kfp"}


@pytest.mark.parametrize("path", modules("pipelines"), ids=lambda path: path.stem)
def test_pipelines_use_only_settings_and_addresses_of_dice_core(path: Path) -> None:
    used = our_imports(whole(path))
    assert "tests" not in {name.split(".")[0] for name in used}
    of_core = {name for name in used if name.split(".")[0] == "dice_core"}
    assert of_core <= (RUNNING if path.stem in RUNNERS else BUILDING)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("dice_core.config, dice_core.layout, dice_core.records", "boto3 datasets kfp torch transformers vllm"),
        ("dice_core.stages, dice_core.cli", "kfp torch transformers vllm"),
        ("pipelines.cli", "boto3 kfp torch transformers vllm"),
        ("pipelines.dice", "boto3 torch transformers vllm"),
    ],
)
def test_importing_loads_no_heavy_package(module: str, absent: str) -> None:
    code = f"import sys, {module}; print(*[name for name in {absent.split()!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
