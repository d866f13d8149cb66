"""The example of docs/stages.md: responses of one's own, from texts to pairs."""

import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from dice_core import cli
from dice_core.data import records
from dice_core.stages.import_model import import_model
from dice_core.stages.import_responses import import_responses
from dice_core.stages.pair import pair
from dice_core.stages.prepare_data import prepare_data
from dice_core.stages.train import train

pytestmark = pytest.mark.slow

DOCUMENT = Path(__file__).parents[3] / "docs" / "stages.md"
CHAT = {"max_prompt_tokens": 64}


def blocks(kind: str) -> list[str]:
    section = DOCUMENT.read_text().partition("## Responses and scores of your own")[2].partition("\n## ")[0]
    return re.findall(rf"```{kind}\n(.*?)```", section, flags=re.DOTALL)


@pytest.fixture
def place(tiny_model: Path, tmp_path: Path) -> Path:
    """Return a folder with the document's file, its two models, and data with its prompts."""
    (tmp_path / "responses.jsonl").write_text(blocks("json")[0])
    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    save_file({name: 0.9 * value for name, value in weights.items()}, other / "model.safetensors", {"format": "pt"})
    import_model(str(tiny_model), str(tmp_path / "models" / "policy"))
    import_model(str(other), str(tmp_path / "models" / "sft"))
    rows = [{"prompt": f"Question {i}?", "chosen": f"Yes, {i}.", "rejected": "No."} for i in range(3)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare_data(
        str(tmp_path / "pairs.jsonl"),
        str(tmp_path / "run" / "data"),
        policy_uri=str(tmp_path / "models" / "policy"),
        prompts_source=str(tmp_path / "responses.jsonl"),
        data={"num_held_out": 1},
    )
    return tmp_path


def test_the_commands_of_the_document_make_pairs_of_texts(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    commands = re.findall(r"^\$ dice (.*(?:\n +.*)*)", blocks("console")[0], flags=re.MULTILINE)
    reports = []
    for command in commands:
        words = shlex.split(command.replace("\\\n", " ").replace("s3://bucket", str(place)))
        assert cli.main(words) == 0, capsys.readouterr().err
        reports.append(json.loads(capsys.readouterr().out)["metrics"])
    imported, scored, paired = reports
    assert (imported["num_prompts"], imported["num_responses"]) == (2, 5)
    assert (scored["num_scored"], paired["num_generated_pairs"]) == (5, 2)
    pairs = pq.read_table(place / "run" / "own-pairs" / "pairs.parquet").to_pylist()
    assert {row["prompt"] for row in pairs} == {"Name a fruit.", "What is 2 + 2?"}


def test_a_table_whose_ids_are_not_its_texts_is_refused_by_name(place: Path) -> None:
    models, responses = place / "models", place / "own"
    import_responses(str(place / "responses.jsonl"), str(models / "policy"), str(responses), chat=CHAT)
    rows: list[dict[str, Any]] = pq.read_table(responses / "part-00000.parquet").to_pylist()
    rows[1]["response_token_ids"] = rows[0]["response_token_ids"]
    mine = pa.Table.from_pylist(rows, schema=records.RESPONSES)
    pq.write_table(mine, place / "mine.parquet")
    scores = [
        {"prompt_id": row["prompt_id"], "sample_index": row["sample_index"], "policy_logps": -1.0}
        | {"reference_logps": -float(i), "num_chars": 7 + i, "num_tokens": 3}
        for i, row in enumerate(rows)
    ]
    pq.write_table(pa.Table.from_pylist(scores, schema=records.SCORES), place / "scores.parquet")
    with pytest.raises(
        ValueError, match=r"mine\.parquet: prompt_id .*, sample_index 1: response_token_ids are 'A pear"
    ):
        pair(
            str(place / "run" / "data"),
            str(models / "policy"),
            str(place / "pairs"),
            scores_uris=[str(place / "scores.parquet")],
            responses_uris=[str(place / "mine.parquet")],
            pairing={"replay_ratio": 0},
            chat=CHAT,
        )


def test_own_pairs_with_ids_beyond_the_vocabulary_and_losses_for_scores_start_nothing(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    models, data = place / "models", place / "run" / "data"
    pair(str(data), str(models / "policy"), str(place / "offline"), pairing={"replay_ratio": 1}, chat=CHAT)
    table = pq.read_table(place / "offline" / "pairs.parquet")
    rows = table.to_pylist()
    rows[0]["rejected_token_ids"] = [10**6, *rows[0]["rejected_token_ids"]]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), place / "mine.parquet")
    capfd.readouterr()
    with pytest.raises(ValueError, match=r"mine\.parquet: the pair of .*: rejected_token_ids are '<no such token>'"):
        train(str(models / "policy"), str(place / "mine.parquet"), str(place / "trained"), training={"max_steps": 1})
    assert "torchrun" not in capfd.readouterr().err
    import_responses(str(place / "responses.jsonl"), str(models / "policy"), str(place / "own"), chat=CHAT)
    losses = [
        {"prompt_id": row["prompt_id"], "sample_index": row["sample_index"], "policy_logps": 9.0 + i}
        | {"reference_logps": 9.0, "num_chars": 7 + i, "num_tokens": 3}
        for i, row in enumerate(pq.read_table(place / "own" / "part-00000.parquet").to_pylist())
    ]
    pq.write_table(pa.Table.from_pylist(losses, schema=records.SCORES), place / "losses.parquet")
    with pytest.raises(ValueError, match=r"losses\.parquet: policy_logps is 9 for .*: log-probs are at most 0"):
        pair(
            str(data),
            str(models / "policy"),
            str(place / "pairs"),
            scores_uris=[str(place / "losses.parquet")],
            responses_uris=[str(place / "own")],
            chat=CHAT,
        )


def test_a_file_of_responses_that_were_all_cut_off_says_so(place: Path) -> None:
    row = {"prompt": "Name a fruit.", "response": "A pe", "finish_reason": "length"}
    (place / "cut.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"cut.jsonl: no response is left, dropped: 1 rows_not_finished$"):
        import_responses(str(place / "cut.jsonl"), str(place / "models" / "policy"), str(place / "own"), chat=CHAT)
