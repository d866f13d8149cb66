"""Environments for programs that do not fit into the project's lock: made from a lock of their own, once, in .cache.

Some ten seconds and up to 1 GB each. Where the package index cannot be reached, the tests that need one are skipped.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from filelock import FileLock

ROOT = Path(__file__).parents[1]
# What uv says of an index that does not answer; anything else is a fault of the lock.
_UNREACHABLE = (
    "error sending request",
    "Could not connect",
    "Failed to fetch",
    "Request failed",
    "operation timed out",
)


def python_of(lock: Path) -> Path:
    """Return the Python of an environment that holds a lock's packages; made where it is not there yet."""
    digest = hashlib.sha256(f"{sys.version}\n{lock.read_text()}".encode()).hexdigest()[:12]
    environments = ROOT / ".cache" / lock.stem
    folder = environments / digest
    python, complete = folder / "bin" / "python", folder / ".complete"
    environments.mkdir(parents=True, exist_ok=True)
    with FileLock(environments / "making.lock"):
        if not complete.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            _make_environment(lock, folder, python)
            complete.touch()
    return python


def _make_environment(lock: Path, folder: Path, python: Path) -> None:
    uv, environment = [sys.executable, "-m", "uv"], _without_bytecode_ban()
    subprocess.run([*uv, "venv", "--quiet", f"--python={sys.executable}", folder], check=True, env=environment)
    # uv does not read pip's configuration. Modules are compiled now: each start would compile them again.
    index = _installer().pip_config(Path(sys.executable)).get("index-url")
    install = [*uv, "pip", "install", "--quiet", "--no-deps", "--compile-bytecode", f"--python={python}", "-r", lock]
    install += ["--default-index", index] if index else []
    done = subprocess.run(install, capture_output=True, text=True, check=False, env=environment)
    if done.returncode and any(words in done.stderr for words in _UNREACHABLE):
        pytest.skip(f"{lock.name} cannot be installed, the package index does not answer: {done.stderr.strip()[:300]}")
    assert not done.returncode, f"{lock}: cannot be installed:\n{done.stderr}"


def _without_bytecode_ban() -> dict[str, str]:
    banned = {"PYTHONDONTWRITEBYTECODE": "", "UV_LINK_MODE": "copy"}
    return {**os.environ, **banned}


def _installer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", ROOT / "requirements" / "install.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
