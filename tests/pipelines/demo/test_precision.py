"""Which format the demo computes in."""

import json
from pathlib import Path

import pytest

from pipelines.demo.precision import chosen_precision, faster, measure, settings_for
from pipelines.overrides import apply_overrides
from pipelines.presets import demo


@pytest.mark.parametrize(
    ("speeds", "expected"),
    [
        ({"float32": 179, "bfloat16": 771}, "bfloat16"),  # AMD with avx512_bf16
        ({"float32": 207, "bfloat16": 168}, "float32"),  # Intel without AMX
        ({"float32": 62, "bfloat16": 1}, "float32"),  # AVX2 alone
        ({"float32": 100, "bfloat16": 149}, "float32"),
        ({}, "float32"),
    ],
)
def test_bfloat16_is_taken_where_it_is_faster_beyond_doubt(speeds: dict[str, float], expected: str) -> None:
    assert faster(speeds) == expected


def test_a_folder_keeps_the_format_of_its_first_run(tmp_path: Path) -> None:
    """Another one would be refused by what the run has made."""
    (tmp_path / "precision.json").write_text(json.dumps({"precision": "bfloat16"}))
    assert chosen_precision(tmp_path) == "bfloat16"


def test_the_settings_of_bfloat16_recompute_what_they_cannot_reuse_exactly() -> None:
    assert settings_for("float32") == []
    preset = apply_overrides(demo(), settings_for("bfloat16"))
    for training in (preset.training, preset.warm_start_training):
        assert training is not None
        assert (training.precision, training.reference_logps) == ("bf16", "recompute")
    assert {preset.generation.dtype, preset.scoring.dtype, preset.evaluation.dtype} == {"bfloat16"}


@pytest.mark.slow
def test_a_real_measurement_is_kept(tmp_path: Path) -> None:
    assert measure().keys() == {"float32", "bfloat16"}
    chosen = chosen_precision(tmp_path)
    assert json.loads((tmp_path / "precision.json").read_text()) == {"precision": chosen}
