"""Install a lock file and this project into a virtual environment: `python requirements/install.py VENV LOCK`.

Standard library only: it runs before anything is installed. uv does the work where it can be had (about four times as
fast as pip), pip where it cannot. What the lock holds, and why, is said in pyproject.toml, constraints.txt and
excludes.txt.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent


class InstallError(RuntimeError):
    """The environment cannot be made. The message is one line."""


def main(arguments: list[str]) -> int:
    """Install, and say in a few lines what was done and how long it took."""
    if len(arguments) != 2:
        print("usage: python requirements/install.py VENV LOCK", file=sys.stderr)
        return 2
    folder, lock = (Path(argument).resolve() for argument in arguments)
    start = time.monotonic()
    try:
        install(folder, lock)
    except InstallError as error:
        print(f"install: {error}", file=sys.stderr)
        return 1
    print(f"install: done in {time.monotonic() - start:.0f} s")
    return 0


def install(folder: Path, lock: Path) -> None:
    """Make the environment in `folder` hold the lock's packages and this project.

    An environment that holds them already gets only this project anew (its scripts and version may have changed).

    Raises:
        InstallError: a step failed; what it printed is above.
    """
    requirements = read_lock(lock)
    digest = hashlib.sha256("\n".join([sys.version, *requirements]).encode()).hexdigest()
    complete = folder / ".lock-digest"
    python = folder / "bin" / "python"
    if not (complete.is_file() and complete.read_text() == digest and python.exists()):
        create_environment(folder)
        install_lock(python, folder / "requirements.txt", requirements, lock.name)
        complete.write_text(digest)
    command = install_command(python, requirements, pip_config(python))
    _run([*command, "--no-deps", "--no-build-isolation", "-e", str(PROJECT)], "this project")


def install_lock(python: Path, effective: Path, requirements: list[str], name: str) -> None:
    """Install what a lock file requires; `effective` is written with what that came to on this machine."""
    config = pip_config(python)
    requirements, torch = choose_torch(requirements, config.get("find-links", "").split())
    print(f"install: {len(requirements)} packages of {name}; torch: {torch}", flush=True)
    effective.write_text("\n".join(requirements) + "\n")
    command = install_command(python, requirements, config)
    _run([*command, "--no-deps", "-r", str(effective)], "the packages of the lock")
    plain = [line for line in requirements if re.fullmatch(r"torch==[0-9.]+", line)]
    if plain and sys.platform == "linux":
        # This build of torch loads the CUDA libraries it depends on; they are not in a CPU lock.
        _run([*command, *plain, "-c", str(effective)], "torch with its libraries")


def read_lock(lock: Path) -> list[str]:
    """Return the requirements of a lock file, without its comments."""
    if not lock.is_file():
        raise InstallError(f"{lock}: no such lock file; `make lock` writes requirements/cpu.lock")
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in lock.read_text().splitlines())
    return [line for line in lines if line]


def choose_torch(requirements: list[str], find_links: list[str]) -> tuple[list[str], str]:
    """Keep the CPU build of torch where one of pip's link folders has it, else take the plain release.

    Returns:
        The requirements to install, and words that say which build was taken and why.
    """
    pin = next((line for line in requirements if re.match(r"torch==.*\+cpu$", line)), None)
    if pin is None:
        return requirements, "as locked"
    version = pin.removeprefix("torch==")
    for link in find_links:
        if list(Path(link.removeprefix("file://")).glob(f"torch-{version}-*.whl")):
            return requirements, f"{version}, from pip's link folder {link}"
    plain = pin.removesuffix("+cpu")
    chosen = [plain if line == pin else line for line in requirements]
    return chosen, f"{plain.removeprefix('torch==')} of the package index (pip has no link folder with {version})"


def create_environment(folder: Path) -> None:
    """Create the virtual environment, in place of an old one or of one whose installation was interrupted."""
    try:
        venv.create(folder, clear=True, with_pip=True, symlinks=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise InstallError(
            f"{folder}: no virtual environment could be made: {error}; on Debian and Ubuntu install python3-venv"
        ) from None


def pip_config(python: Path) -> dict[str, str]:
    """Return what pip is configured with, environment variables included, by option name."""
    result = subprocess.run([python, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    found = re.findall(r"^(?:global|install|:env:)\.([a-z-]+)='(.*)'$", result.stdout, flags=re.MULTILINE)
    return dict(found)


def install_command(python: Path, requirements: list[str], config: dict[str, str]) -> list[str]:
    """Return the start of an install command: uv's, or pip's where the locked uv cannot be installed."""
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pin = next((line for line in requirements if line.startswith("uv==")), "uv")
    if not (python.parent / "uv").exists() and subprocess.run([*pip, pin], check=False).returncode:
        print("install: uv cannot be had, pip does the work (a few minutes)", flush=True)
        return [*pip, "--compile"]
    # Modules are compiled now: with PYTHONDONTWRITEBYTECODE set, every later start would compile them again.
    command = [str(python), "-m", "uv", "pip", "install", "--quiet", "--python", str(python), "--compile-bytecode"]
    # uv does not read pip's configuration.
    for link in config.get("find-links", "").split():
        command += ["--find-links", link]
    if "index-url" in config:
        command += ["--default-index", config["index-url"]]
    return command


def _run(command: list[str], what: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    # Between file systems uv copies; it warns about that unless told to.
    environment.setdefault("UV_LINK_MODE", "copy" if not _same_disk() else "hardlink")
    if subprocess.run(command, env=environment, check=False).returncode:
        raise InstallError(
            f"installing {what} failed, see above; disk free: {shutil.disk_usage(PROJECT).free >> 30} GiB"
        )


def _same_disk() -> bool:
    cache = Path(os.environ.get("UV_CACHE_DIR", Path.home() / ".cache" / "uv"))
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    return existing.stat().st_dev == PROJECT.stat().st_dev


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
