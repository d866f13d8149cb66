"""A stage of a pod that asks for GPUs ends in one line where it sees none. The tests see no GPU (conftest.py)."""

from pathlib import Path

import pyarrow as pa
import pytest

from dice_core.accelerator import GPU_VARIABLE, AcceleratorError, device_type, require_promised_gpu
from dice_core.data import records
from dice_core.evaluation.held_out import score_under
from dice_core.evaluation.settings import EvaluationConfig
from dice_core.preferences.scoring import score_parts
from dice_core.preferences.settings import ScoringConfig
from dice_core.stages.evaluate import evaluate
from dice_core.stages.generate import generate
from dice_core.stages.import_model import import_model
from dice_core.storage.manifest import Manifest, publish_files
from dice_core.training import ranks

pytestmark = pytest.mark.slow

REASON = r"this pod asks for GPUs \(DICE_GPU is set\), and torch .* can use none"


@pytest.fixture
def promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(GPU_VARIABLE, "1")


def test_without_a_promise_the_cpu_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(GPU_VARIABLE, raising=False)
    require_promised_gpu()
    assert device_type() == "cpu" and ranks.device().type == "cpu"


@pytest.mark.usefixtures("promised")
def test_training_ends(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AcceleratorError, match=REASON) as caught:
        ranks.device()
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("promised")
def test_scoring_ends_before_a_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(AcceleratorError, match=REASON):
        list(score_parts(tmp_path / "no-model", tmp_path / "none", [(0, pa.table({}))], ScoringConfig()))


@pytest.mark.usefixtures("promised")
def test_evaluation_ends_before_an_engine_starts(tiny_model: Path, tmp_path: Path) -> None:
    policy = import_model(str(tiny_model), str(tmp_path / "policy")).uri
    row = {"prompt_id": records.prompt_id("a"), "prompt": "a", "chosen": "b", "rejected": "c"}
    path, data = tmp_path / "held_out.parquet", str(tmp_path / "data")
    records.write_table(pa.Table.from_pylist([row], schema=records.PREFERENCES), records.PREFERENCES, path)
    publish_files(data, {path.name: path}, Manifest(stage="prepare-data", fingerprint="", files={}))
    with pytest.raises(AcceleratorError, match=REASON):
        evaluate(policy, policy, policy, data, str(tmp_path / "out"))


@pytest.mark.usefixtures("promised")
def test_scoring_held_out_pairs_ends_before_a_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(AcceleratorError, match=REASON):
        score_under(tmp_path / "no-model", EvaluationConfig(), "policy")


@pytest.mark.usefixtures("promised")
def test_generate_ends_before_the_engine_starts(tiny_model: Path, tmp_path: Path) -> None:
    import_model(str(tiny_model), str(tmp_path / "policy"))
    prompts = pa.Table.from_pylist([{"prompt_id": "a", "prompt": "Hello?"}], schema=records.PROMPTS)
    records.write_table(prompts, records.PROMPTS, tmp_path / "prompts.parquet")
    with pytest.raises(AcceleratorError, match=REASON):
        generate(str(tmp_path / "policy"), str(tmp_path / "prompts.parquet"), str(tmp_path / "out"))
