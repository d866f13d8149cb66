"""What is said of a training before its processes start: by the stage, in its own process."""

import json
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest

from dice_core.data import records
from dice_core.settings.base import ConfigError
from dice_core.stages.run_settings import write_settings
from dice_core.stages.train import train, train_task
from dice_core.storage import layout
from dice_core.storage.contract import StorageError
from dice_core.storage.manifest import Manifest, publish_files

TRAINING = {"max_steps": 1, "global_batch_size": 1}


def write_pairs(path: Path, num_tokens: int) -> str:
    row = {"prompt_id": "p", "prompt": "q", "chosen": "a", "rejected": "b", "source": "generated", "split": "train"}
    row |= {f"{name}_token_ids": [token] * num_tokens for token, name in enumerate(("prompt", "chosen", "rejected"))}
    records.write_table(pa.Table.from_pylist([row], records.PAIRS), records.PAIRS, path)
    return str(path)


@pytest.fixture
def policy_uri(tmp_path: Path) -> str:
    """Return a model of which nothing but the config is read: no process that would load it is started."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"max_position_embeddings": 64}))
    publish_files(
        str(tmp_path / "model"), {"config.json": config}, Manifest(stage="import-model", fingerprint="f", files={})
    )
    return str(tmp_path / "model")


def test_pairs_longer_than_max_length_are_told_before_a_process_starts(
    policy_uri: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(records.RecordError, match=r"no training pair is left .*max_length is 16, the shortest .* 40"):
        train(
            policy_uri,
            write_pairs(tmp_path / "p.parquet", 20),
            str(tmp_path / "out"),
            training={**TRAINING, "max_length": 16},
        )
    assert "torchrun" not in capfd.readouterr().err


def test_pairs_longer_than_the_model_are_told_before_a_process_starts(
    policy_uri: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="the model has 64 positions and the longest pair 80 tokens"):
        train(policy_uri, write_pairs(tmp_path / "p.parquet", 40), str(tmp_path / "out"), training=TRAINING)
    assert "torchrun" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "num_tokens", "reason"),
    [
        ({"max_length": 16}, 20, r"\(warm_start_training\.max_length is 16, the shortest"),
        ({}, 40, r"warm_start_training\.max_length: the model has 64 positions"),
        ({"global_batch_size": 3, "per_device_batch_size": 2}, 4, r"warm_start_training\.global_batch_size: must be"),
        ({"beta": -1}, 4, r"warm_start_training\.beta: "),
    ],
)
def test_a_warm_start_s_settings_are_told_by_the_name_of_their_own_section(
    changes: dict[str, int], num_tokens: int, reason: str, policy_uri: str, tmp_path: Path
) -> None:
    sections = {"training": TRAINING, "warm_start_training": TRAINING | changes}
    run, source = str(tmp_path / "runs" / "one"), "org/sft"
    place = Path(layout.imported_model(str(tmp_path), source))
    place.parent.mkdir()
    place.symlink_to(policy_uri)
    settings_uri = write_settings(run, sections, {"seed": 0, "policy_source": source, "reference_source": ""})
    file = Path(write_pairs(tmp_path / "p.parquet", num_tokens))
    made = Manifest(stage="pair", fingerprint="f", files={})
    publish_files(layout.warm_start(run, "pair"), {"pairs.parquet": file}, made)
    with pytest.raises(ValueError, match=reason):
        train_task(settings_uri, "warm-start/train", SimpleNamespace(metadata={}))


def test_changed_pairs_are_told_before_a_process_starts(
    policy_uri: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = Path(write_pairs(tmp_path / "p.parquet", 4))
    publish_files(str(tmp_path / "pairs"), {"pairs.parquet": file}, Manifest(stage="pair", fingerprint="f", files={}))
    (stored,) = (tmp_path / "pairs").glob("*.parquet")
    stored.write_bytes(stored.read_bytes()[:-1] + b"x")
    with pytest.raises(StorageError, match=r"pairs\.parquet"):
        train(policy_uri, str(tmp_path / "pairs"), str(tmp_path / "out"), training=TRAINING)
    assert "torchrun" not in capfd.readouterr().err
