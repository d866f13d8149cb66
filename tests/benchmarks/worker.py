"""One run of one way: `python -m tests.benchmarks.worker MODULE:FUNCTION WORK_FOLDER RESULT_FILE [ARGUMENT...]`."""

import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path

from tests.benchmarks.measure import Timed, peak_resident_bytes


def main(way: str, folder: str, result: str, *arguments: str) -> None:
    """Run the way and write what it took."""
    module, _, name = way.partition(":")
    timed: Timed = getattr(importlib.import_module(f"tests.benchmarks.{module}"), name)(Path(folder), *arguments)
    values = {**asdict(timed), "peak_bytes": timed.peak_bytes or peak_resident_bytes()}
    Path(result).write_text(json.dumps(values))


if __name__ == "__main__":
    main(*sys.argv[1:])
