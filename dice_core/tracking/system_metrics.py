"""How busy this machine is, under MLflow's names: processors, memory, and each GPU that nvidia-smi tells of."""

import itertools
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dice_core.tracking.feed import Line

PREFIX = "system/"
SECONDS = 10.0
"""Between two measurements; MLflow's own."""
_MEGABYTE = 1e6
_GPU_FIELDS = {
    "utilization.gpu": "utilization_percentage",
    "memory.used": "memory_usage_megabytes",
    "memory.total": "",
    "power.draw": "power_usage_watts",
}
_MIB = 1.048576
_NVIDIA_SMI_SECONDS = 10.0
_NVIDIA_SMI_PREFIX = "system/"
SECONDS = 10.0


def system_metrics() -> dict[str, float]:
    """Return what can be measured here. Processor time is that since the last call."""
    return {f"{PREFIX}{name}": value for name, value in {**_machine(), **_gpus()}.items()}


@contextmanager
def sampled(put: Callable[[Line], None], seconds: float = SECONDS) -> Iterator[None]:
    """Measure now and then for the length of a block, in a thread.

    Args:
        put: takes each measurement; its step is its number.
        seconds: between two.
    """
    ended = threading.Event()

    def measure() -> None:
        numbers = itertools.count()
        while not ended.wait(seconds):
            if values := system_metrics():
                put(Line(next(numbers), values))

    thread = threading.Thread(target=measure, daemon=True, name="dice-system-metrics")
    thread.start()
    try:
        yield
    finally:
        ended.set()


def _machine() -> dict[str, float]:
    try:
        import psutil
    except ImportError:
        return {}
    memory = psutil.virtual_memory()
    return {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / _MEGABYTE,
        "system_memory_usage_percentage": memory.percent,
    }


def _gpus() -> dict[str, float]:
    command = shutil.which("nvidia-smi")
    if not command:
        return {}
    query = [command, f"--query-gpu=index,{','.join(_GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=_NVIDIA_SMI_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return read_gpus(output)


def read_gpus(output: str) -> dict[str, float]:
    """Return the numbers of nvidia-smi's table; a field that a GPU does not have (`[N/A]`) is left out."""
    values: dict[str, float] = {}
    for row in output.splitlines():
        index, *cells = (cell.strip() for cell in row.split(","))
        if len(cells) != len(_GPU_FIELDS):
            continue
        found = {field: _number(cell) for field, cell in zip(_GPU_FIELDS, cells, strict=True)}
        used, total = found["memory.used"], found["memory.total"]
        if used is not None and total:
            values[f"gpu_{index}_memory_usage_percentage"] = 100 * used / total
        if used is not None:
            found["memory.used"] = used * _MIB
        named = {name: found[field] for field, name in _GPU_FIELDS.items() if name}
        values |= {f"gpu_{index}_{name}": value for name, value in named.items() if value is not None}
    return values


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
