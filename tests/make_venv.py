"""A virtual environment for make that installs nothing: its Python is a shell script."""

import sys
from pathlib import Path

PRINTS_ITS_ARGUMENTS = "printf '%s\\n' \"$@\""
IS_THIS_PYTHON = f'exec "{sys.executable}" "$@"'


def make_venv(folder: Path, script: str) -> str:
    """Write the environment; return the argument of make that chooses it."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    # Newer than the lock, so that nothing is installed.
    (folder / ".installed").touch()
    return f"VENV={folder}"
