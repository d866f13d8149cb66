"""Stage extrapolate, from the command line, on tiny models: what it writes is a model that every stage takes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dice_core import cli
from dice_core.models.cache import fetch_model
from dice_core.models.loading import load_model
from dice_core.stages.import_model import import_model
from dice_core.storage.manifest import require_manifest

pytestmark = pytest.mark.slow


@pytest.fixture
def models(tiny_model: Path, tmp_path: Path) -> tuple[str, str]:
    """Return the addresses of a policy and the model before it, whose weights are nine tenths of the policy's."""
    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    save_file({name: 0.9 * value for name, value in weights.items()}, other / "model.safetensors", {"format": "pt"})
    policy, previous = str(tmp_path / "policy"), str(tmp_path / "previous")
    import_model(str(tiny_model), policy)
    import_model(str(other), previous)
    return policy, previous


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any], str]:
    code = cli.main(["extrapolate", *words])
    out, err = capsys.readouterr()
    return code, json.loads(out or "{}"), err


def test_a_policy_goes_on_and_is_a_model_with_its_lineage(
    models: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, previous = models
    words = ["--policy", policy, "--previous", previous, "--output", str(tmp_path / "out")]
    code, report, _ = run(capsys, *words, "--alpha", "0.5")
    assert (code, report["status"]) == (0, "completed")
    # A tenth of each weight is the step, and half of that is added.
    assert report["metrics"]["relative_update"] == pytest.approx(0.05, rel=1e-3)
    manifest = require_manifest(report["uri"])
    assert manifest.settings["alpha"] == 0.5
    for name, uri in zip(("policy", "previous"), models, strict=True):
        assert manifest.inputs[name] == f"{uri}@{require_manifest(uri).content_digest}"
    assert manifest.text_digests == require_manifest(policy).text_digests
    before, after = (load_model(fetch_model(uri), "float32").state_dict() for uri in (policy, report["uri"]))
    for name, weight in before.items():
        torch.testing.assert_close(after[name], 1.05 * weight)
    assert run(capsys, *words, "--alpha", "0.5")[1]["status"] == "already complete"
    code, _, err = run(capsys, *words, "--alpha", "0.3")
    assert code == 1
    assert "alpha was 0.5, now 0.3" in err


def test_what_was_extrapolated_is_a_policy_for_other_stages(
    models: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, previous = models
    words = ["--policy", policy, "--previous", previous, "--output", str(tmp_path / "once")]
    once = run(capsys, *words)[1]["uri"]
    twice = run(capsys, "--policy", once, "--previous", policy, "--output", str(tmp_path / "twice"))[1]
    # 1.03 of the weights, and of the step of 0.03 another 0.3.
    assert twice["metrics"]["relative_update"] == pytest.approx(0.3 * 0.03 / 1.03, rel=1e-3)


def test_the_same_model_twice_is_refused(
    models: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(capsys, "--policy", models[0], "--previous", models[0], "--output", str(tmp_path / "out"))
    assert code == 1
    assert f"{models[0]}: has the weights of the policy" in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("alpha", ["0", "-1", "nan", "inf"])
def test_an_alpha_that_does_not_go_on_is_refused(
    alpha: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [str(tmp_path / name) for name in ("policy", "previous", "out")]
    words = [word for pair in zip(("--policy", "--previous", "--output"), places, strict=True) for word in pair]
    code, _, err = run(capsys, *words, f"--alpha={alpha}")
    assert code == 1
    assert "alpha: must be a number above 0, such as 0.3" in err
