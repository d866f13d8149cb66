"""requirements/install.py and the Makefile: what they decide before anything is downloaded."""

import importlib.util
import os
import shutil
import subprocess
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements" / "cpu.lock"


@pytest.fixture(scope="module")
def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", ROOT / "requirements" / "install.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_lock_is_read_without_its_comments(install: ModuleType, tmp_path: Path) -> None:
    lock = tmp_path / "a.lock"
    lock.write_text("# by uv\nboto3==1.2  # via dice\n\n    # via x\ntorch==2.13.0+cpu\n")
    assert install.read_lock(lock) == ["boto3==1.2", "torch==2.13.0+cpu"]


def test_the_cpu_build_of_torch_is_taken_where_a_link_folder_has_it(install: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl").touch()
    lines, words = install.choose_torch(["a==1", "torch==2.13.0+cpu"], ["/nowhere", f"file://{tmp_path}"])
    assert lines == ["a==1", "torch==2.13.0+cpu"]
    assert str(tmp_path) in words


def test_the_plain_release_of_torch_does_elsewhere(install: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "torch-2.12.0+cpu-cp311-cp311-linux_x86_64.whl").touch()
    lines, words = install.choose_torch(["torch==2.13.0+cpu", "a==1"], [str(tmp_path)])
    assert lines == ["torch==2.13.0", "a==1"]
    assert words.startswith("2.13.0 of the package index")


def test_a_missing_lock_is_one_line(install: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert install.main([str(tmp_path / "venv"), str(tmp_path / "no.lock")]) == 1
    assert "no such lock file" in capsys.readouterr().err
    assert not (tmp_path / "venv").exists()


def test_the_lock_holds_what_pyproject_asks_for_and_nothing_that_is_left_out(install: ModuleType) -> None:
    locked = {line.partition("==")[0] for line in install.read_lock(LOCK)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [
        *project["dependencies"],
        *(
            name
            for extra, names in extras.items()
            if extra not in ("generate", "qlora", "wandb", "alpaca")
            for name in names
        ),
    ]
    assert {name.partition(">")[0].lower() for name in asked} <= locked
    excluded = (ROOT / "requirements" / "excludes.txt").read_text().splitlines()
    assert not locked & {line for line in excluded if line and not line.startswith("#")}


def test_versions_are_pinned_in_one_place(install: ModuleType) -> None:
    """Every lock agrees with the constraints it was made with, and no constraint is left over."""
    constraints = dict(line.split("==") for line in install.read_lock(LOCK.with_name("constraints.txt")))
    unused = set(constraints)
    for lock in LOCK.parent.glob("*.lock"):
        pins = [line.split()[0] for line in install.read_lock(lock) if "==" in line.split()[0]]
        versions = dict(pin.split("==") for pin in pins)
        locked = {name: version.partition("+")[0] for name, version in versions.items() if name in constraints}
        assert locked == {name: constraints[name] for name in locked}, lock.name
        unused -= set(locked)
    assert unused == set()


def test_make_alone_lists_every_command() -> None:
    listed = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True)
    phony = {line.split()[1] for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith(".PHONY:")}
    described = {line.split()[1] for line in listed.stdout.splitlines() if line.startswith("  make ")}
    assert described == phony


def test_a_machine_without_a_fitting_python_is_told_so_in_one_line(tmp_path: Path) -> None:
    for name in ("bash", "touch"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    make = str(shutil.which("make"))
    result = subprocess.run(
        [make, "install", f"VENV={tmp_path}/venv"],
        cwd=ROOT,
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert result.stderr.splitlines()[0].startswith("make: Python 3.11 or 3.12 is needed")
    assert not (tmp_path / "venv").exists()
