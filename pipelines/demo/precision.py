"""Which floating-point format the demo computes in: the one that this machine's processor multiplies faster.

Processors differ by a factor of hundreds: one with bfloat16 instructions is four times as fast in bfloat16, one without
them a hundred times slower. Measured once for a folder, so that a run that goes on keeps its settings; in a process of
its own, which alone loads torch.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

BFLOAT16, FLOAT32 = "bfloat16", "float32"
LEAST_GAIN = 1.5
"""bfloat16 is taken from this ratio of speeds on: below it, exactness is worth more."""
_FILE = "precision.json"
SIZE = 512
"""Rows and columns of the matrices that are multiplied."""
_SECONDS, _TIMEOUT = 0.3, 120.0


def chosen_precision(folder: Path) -> str:
    """Return the format for the runs of a folder: that of its first run, or what a measurement says.

    float32 where the measurement fails.
    """
    kept = folder / _FILE
    try:
        return BFLOAT16 if json.loads(kept.read_text())["precision"] == BFLOAT16 else FLOAT32
    except (OSError, ValueError, KeyError, TypeError):
        precision = faster(measure())
    kept.write_text(json.dumps({"precision": precision}))
    return precision


def faster(speeds: dict[str, float]) -> str:
    """Return the format to take by the speeds of both; float32 in doubt."""
    return BFLOAT16 if speeds.get(BFLOAT16, 0.0) >= LEAST_GAIN * speeds.get(FLOAT32, float("inf")) else FLOAT32


def settings_for(precision: str) -> list[str]:
    """Return the settings that differ from the preset's, which are those of float32."""
    if precision != BFLOAT16:
        return []
    training = ("training", "warm_start_training")
    return [
        *(f"{section}.dtype=bfloat16" for section in ("generation", "scoring", "evaluation")),
        *(f"{section}.precision=bf16" for section in training),
        # Scoring's bfloat16 kernels and training's autocast differ: with so few steps that would show as loss.
        *(f"{section}.reference_logps=recompute" for section in training),
    ]


def measure() -> dict[str, float]:
    """Return the products of matrices that this machine makes in a second, by format; empty where it cannot tell."""
    try:
        found = subprocess.run(
            [sys.executable, "-m", __name__],
            # Threads that spin while they wait would count as work.
            env={"OMP_WAIT_POLICY": "passive", **os.environ},
            capture_output=True,
            check=True,
            timeout=_TIMEOUT,
            text=True,
        )
        return dict(json.loads(found.stdout))
    except (OSError, ValueError, subprocess.SubprocessError):
        return {}


def _products_per_second(format_name: str) -> float:
    """Return products by the processor's time that this process got: what else runs here decides nothing."""
    import torch

    left, right = (torch.randn(SIZE, SIZE).to(getattr(torch, format_name)) for _ in range(2))
    left @ right  # the first one also sets up the library
    start, number, threads = time.process_time(), 0, torch.get_num_threads()
    while (spent := (time.process_time() - start) / threads) < _SECONDS:
        left @ right
        number += 1
    return number / spent


if __name__ == "__main__":
    print(json.dumps({name: _products_per_second(name) for name in (FLOAT32, BFLOAT16)}))
