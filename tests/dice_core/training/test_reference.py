"""Training against a reference that is not the policy as it starts: offline DPO as the paper compares with."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from dice_core.models.cache import fetch_model
from dice_core.models.importing import import_model
from dice_core.models.loading import load_model
from dice_core.settings.base import ConfigError
from dice_core.stages.runner import StageReport
from dice_core.stages.train import train as train_stage
from dice_core.storage.manifest import require_manifest

pytestmark = pytest.mark.slow

TRAINING = {
    "reference": "base",
    "reference_logps": "recompute",  # of the policy it would be: the reference has a pass of its own
    "max_steps": 2,
    "global_batch_size": 4,
    "learning_rate": 1e-3,
    "precision": "float32",
    "saved_dtype": "float32",
    "gradient_checkpointing": False,
}


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Return the addresses of a policy and of a reference with other weights."""
    import shutil

    folder = tmp_path_factory.mktemp("models")
    other = Path(shutil.copytree(tiny_model, folder / "other"))
    weights = load_file(other / "model.safetensors")
    generator = torch.Generator().manual_seed(2)
    for weight in weights.values():
        weight += weight.std() * torch.randn(weight.shape, generator=generator)
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    import_model(str(tiny_model), str(folder / "policy"))
    import_model(str(other), str(folder / "reference"))
    return str(folder / "policy"), str(folder / "reference")


@pytest.fixture(scope="module")
def pairs(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict]]:
    import pyarrow as pa

    from dice_core.data import records
    from tests.dice_core.training.pair_rows import as_own_pairs, make_rows

    rows = as_own_pairs(make_rows(num_eval=2), tiny_model)
    for row in rows:
        # As scoring leaves them, under the policy: the reference's take their place.
        row |= {"chosen_reference_logps": -1.0, "rejected_reference_logps": -50.0}
    path = tmp_path_factory.mktemp("pairs") / "pairs.parquet"
    records.write_table(pa.Table.from_pylist(rows, records.PAIRS), records.PAIRS, path)
    return str(path), rows


def textbook_loss(policy_uri: str, reference_uri: str, rows: list[dict]) -> float:
    """Return the mean loss of DPO by two models, plain forwards of prompt and response."""
    models = [load_model(fetch_model(uri), "float32") for uri in (policy_uri, reference_uri)]
    losses = []
    for row in rows:
        ratios = []
        for name in ("chosen_token_ids", "rejected_token_ids"):
            ids = torch.tensor([row["prompt_token_ids"] + row[name]])
            with torch.no_grad():
                logps = [m(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]) for m in models]
            sums = [values[len(row["prompt_token_ids"]) - 1 :].sum() for values in logps]
            ratios.append(sums[0] - sums[1])
        losses.append(-F.logsigmoid(0.1 * (ratios[0] - ratios[1])).item())
    return sum(losses) / len(losses)


@pytest.fixture(scope="module")
def report(
    models: tuple[str, str], pairs: tuple[str, list[dict]], tmp_path_factory: pytest.TempPathFactory
) -> StageReport:
    """Return what a training in one process reports."""
    output = str(tmp_path_factory.mktemp("one"))
    return train_stage(models[0], pairs[0], output, reference_uri=models[1], training=TRAINING)


def test_the_loss_begins_where_both_models_put_it(
    models: tuple[str, str], pairs: tuple[str, list[dict]], report: StageReport
) -> None:
    policy, reference = models
    expected = textbook_loss(policy, reference, [row for row in pairs[1] if row["split"] == "train"])
    assert abs(expected - math.log(2)) > 1e-3
    assert report.metrics["first_loss"] == pytest.approx(expected, abs=1e-4)
    # What two models differ by is no noise.
    assert "reference_noise_rms" not in report.metrics
    assert require_manifest(report.uri).inputs["reference"].startswith(f"{reference}@")


@pytest.mark.parametrize("deepspeed", ["none", "zero3"])
def test_two_processes_share_the_pass_of_the_reference(
    deepspeed: str, models: tuple[str, str], pairs: tuple[str, list[dict]], report: StageReport, tmp_path: Path
) -> None:
    """Under ZeRO-3 transformers would cut the reference up, each process would have a part of it."""
    policy, reference = models
    launch, training = {"processes_per_node": 2}, {**TRAINING, "deepspeed": deepspeed}
    two = train_stage(
        policy, pairs[0], str(tmp_path / "two"), reference_uri=reference, training=training, launch=launch
    )
    for name in ("first_loss", "step0_loss", "last_loss"):
        assert two.metrics[name] == pytest.approx(report.metrics[name], abs=1e-4)


@pytest.mark.parametrize(
    ("reference", "uri", "message"),
    [
        ("base", "", "training.reference: is 'base', which needs a reference, and none is given"),
        ("start", "s3://b/sft", "training.reference: is 'start', which needs no reference: leave out s3://b/sft"),
    ],
)
def test_a_reference_is_given_where_it_is_read(reference: str, uri: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        train_stage("policy", "pairs", str(tmp_path), reference_uri=uri, training={"reference": reference})
