"""Positions of a model: the same in training as in scoring, vLLM and the published model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]

_BUFFERS = """
import json, sys
from pathlib import Path
from dice_core.training.settings import TrainingConfig
from dice_core.models.loading import load_model
from dice_core.training.arguments import training_arguments

folder, stage = Path(sys.argv[1]), sys.argv[2]
if stage != "plain":
    config = TrainingConfig(deepspeed=stage, precision="bf16", global_batch_size=1)
    arguments = training_arguments(config, folder, has_eval_pairs=False, seed=0)
model = load_model(folder, "float32")
found = {name: [str(b.dtype), b.double().tolist()] for name, b in model.named_buffers() if b.is_floating_point()}
Path(sys.argv[3]).write_text(json.dumps(found))
"""


def buffers(folder: Path, deepspeed: str, tmp_path: Path) -> dict[str, list[object]]:
    script, result = tmp_path / "buffers.py", tmp_path / f"{deepspeed}.json"
    script.write_text(_BUFFERS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    subprocess.run(
        [*torchrun, str(script), str(folder), deepspeed, str(result)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    found: dict[str, list[object]] = json.loads(result.read_text())
    return found


@pytest.mark.parametrize("deepspeed", ["zero2", "zero3"])
def test_rotary_frequencies_under_zero_in_bf16_are_those_of_the_plain_model(
    deepspeed: str, tiny_model: Path, tmp_path: Path
) -> None:
    plain = buffers(tiny_model, "plain", tmp_path)
    assert plain
    assert buffers(tiny_model, deepspeed, tmp_path) == plain
