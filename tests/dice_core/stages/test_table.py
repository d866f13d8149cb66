"""The table of stages, and a new stage made by the three lines of CONTRIBUTING."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dice_core.stages.table import STAGES, is_of_pipeline

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]

ROW = """
COUNT = Stage(
    name="count",
    inputs={"data": ("prepare-data",)},
    sections={"pairing": PairingConfig},
    shown=("num_prompts",),
)
STAGES[COUNT.name] = COUNT
"""
STAGE = '''"""Stage count: how many prompts a run has."""

from dice_core.data import records
from dice_core.preferences.settings import PairingConfig
from dice_core.settings.base import Values
from dice_core.stages.parts import read_input
from dice_core.stages.runner import StageReport, run_stage
from dice_core.stages.table import COUNT


def count(data_uri: str, output_uri: str, *, pairing: Values = None) -> StageReport:
    """Count the prompts of a run.

    Args:
        data_uri: prepare-data's output, or a Parquet file of prompts.
        output_uri: gets the manifest.
        pairing: PairingConfig.
    """
    config = PairingConfig.parse(pairing, "pairing")

    def work(context):
        prompts = read_input(context, context.inputs["data"], records.PROMPTS, "prompts")
        return context.publish({}, {"num_prompts": prompts.num_rows})

    return run_stage(COUNT, output_uri, work, settings={"pairing": config}, arguments={}, inputs={"data": data_uri})
'''
COMPONENT = '''"""Component of the count stage."""

from kfp import dsl

from components import images


@dsl.component(base_image=images.CORE, install_kfp_package=False)
def count(data_uri: str, output_uri: str, pairing: dict) -> str:
    """Count the prompts of a run.

    Args:
        data_uri: Prepared tables.
        output_uri: Where to write.
        pairing: Settings (PairingConfig).

    Returns:
        Output: Address of the count.
    """
    from dice_core.stages.count import count

    return count(data_uri, output_uri, pairing=pairing).uri
'''


def test_a_stage_draws_with_a_seed_of_its_own_in_each_iteration():
    # Pinned: runs of two versions agree.
    assert STAGES["generate"].seed(0, 1) == 2106931564
    seeds = {STAGES[name].seed(0, number) for name in ("generate", "pair", "train") for number in (1, 2)}
    assert len(seeds | {STAGES["generate"].seed(1, 1), STAGES["prepare-data"].seed(0)}) == 8


def test_every_input_is_made_by_stages_of_the_table() -> None:
    made_by = {maker for stage in STAGES.values() for makers in stage.inputs.values() for maker in makers}
    assert made_by <= set(STAGES)


def test_what_a_person_alone_runs_is_told_from_what_pipelines_run() -> None:
    """The page lists no stage as missing that no pipeline runs, and its settings do not keep a run from going on."""
    others = {name for name in STAGES if not is_of_pipeline(name)}
    assert others == {"import-responses", "alpaca-eval", "alpaca-scores", "extrapolate"}


@pytest.mark.parametrize("stage", STAGES.values(), ids=lambda stage: stage.name)
def test_a_stage_has_a_file_of_its_name_with_a_function_of_its_name(stage) -> None:
    assert stage.function.__module__ == f"dice_core.stages.{stage.name.replace('-', '_')}"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the project with a new stage, made as CONTRIBUTING says."""
    project = tmp_path_factory.mktemp("project")
    for package in ("dice_core", "components", "pipelines"):
        shutil.copytree(ROOT / package, project / package, ignore=shutil.ignore_patterns("__pycache__"))
    with (project / "dice_core/stages/table.py").open("a") as table:
        table.write(ROW)
    (project / "dice_core/stages/count.py").write_text(STAGE)
    (project / "components/count.py").write_text(COMPONENT)
    return project


def run(project: Path, *command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(project)}
    done = subprocess.run(
        [sys.executable, *command], cwd=project, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_new_stage_has_a_command_with_its_settings_and_runs_once(project: Path) -> None:
    assert "  pairing.replay_ratio=0.5  (float >= 0, <= 1)" in run(project, "-m", "dice_core.cli", "count", "--help")
    table = "import pyarrow as pa; from dice_core.data import records; from pathlib import Path;"
    table += "rows = pa.table({'prompt_id': ['a', 'b'], 'prompt': ['One?', 'Two?']});"
    run(project, "-c", table + "records.write_table(rows, records.PROMPTS, Path('prompts.parquet'))")
    command = ("-m", "dice_core.cli", "count", "--data", "prompts.parquet", "--output", "out")
    assert json.loads(run(project, *command)) == {
        "uri": "out",
        "status": "completed",
        "message": "",
        "metrics": {"num_prompts": 2},
    }
    assert json.loads(run(project, *command))["status"] == "already complete"


def test_a_new_stage_is_shown_on_the_screen_and_compiles_with_a_pod_of_its_own(project: Path) -> None:
    code = """if True:
        from kfp import compiler, dsl
        from components.count import count
        from dice_core.stages.table import COUNT
        from dice_core.storage.manifest import Manifest
        from pipelines.cluster.resources import configure_task
        from pipelines.demo.screen import describe
        from pipelines.presets import zephyr

        @dsl.pipeline(name="toy")
        def toy(pairing: dict):
            configure_task(count(data_uri="d", output_uri="o", pairing=pairing), COUNT, "count", zephyr())

        compiler.Compiler().compile(toy, "toy.yaml")
        print(describe(Manifest(stage="count", fingerprint="", files={}, metrics={"num_prompts": 3})))
    """
    assert run(project, "-c", code).strip() == "3 prompts"
    text = (project / "toy.yaml").read_text()
    assert "app.kubernetes.io/component: count" in text and "resourceMemoryLimit: 16Gi" in text
