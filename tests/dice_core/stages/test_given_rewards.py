"""Stage score where a reward model ranks the responses: real vLLM on a tiny reward model, and tiny policies."""

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dice_core.data import records
from dice_core.judges import judging
from dice_core.preferences import scoring
from dice_core.stages.pair import pair
from dice_core.stages.runner import StageReport
from dice_core.stages.score import score
from dice_core.storage.contract import UnfitError
from dice_core.storage.manifest import Manifest, fetch_files, publish_files, require_manifest
from tests.dice_core.judges.conftest import make_reward_model

pytestmark = pytest.mark.slow

SCORING = {"reward": "reward-model", "min_valid_responses": 2, "min_characters": 1, "dtype": "float32"}
GRADING = {"dtype": "float32", "cpu_kv_cache_gib": 1, "max_length": 128}
PROMPTS = ["Name a fruit.", "What is 2 + 2?", "Say hello."]
TEXTS = ["A pear.", "Yes, of course, gladly.", "No.", "It is four, and so on " + "and so on " * 60]
"""The last is too long for the reward model."""


def publish(uri: Path, stage: str, files: list[Path], **settings: str) -> str:
    manifest = Manifest(stage=stage, fingerprint=uri.name, files={}, settings=settings)
    publish_files(str(uri), {path.name: path for path in files}, manifest)
    return str(uri)


class Places:
    """Models, data and responses on this machine, as stages leave them."""

    def __init__(self, tiny_model: Path, smollm: Path, folder: Path) -> None:
        from transformers import AutoTokenizer, LlamaForCausalLM

        self.folder = folder
        self.policy = publish(folder / "policy", "import-model", [*tiny_model.iterdir()])
        model = LlamaForCausalLM.from_pretrained(tiny_model)
        model.model.norm.weight.data.mul_(1.1)
        model.save_pretrained(folder / "other")
        tokenizer_files = [path for path in tiny_model.iterdir() if path.name.startswith(("tokenizer", "chat"))]
        self.reference = publish(
            folder / "reference", "import-model", [*(folder / "other").iterdir(), *tokenizer_files]
        )
        made = make_reward_model("llama", smollm, folder / "reward-model")
        self.reward = publish(folder / "reward", "import-model", [*made.iterdir()], kind="reward-model")
        rows = [{"prompt_id": records.prompt_id(text), "prompt": text} for text in PROMPTS]
        prompts, preferences = folder / "prompts.parquet", folder / "preferences.parquet"
        records.write_table(pa.Table.from_pylist(rows, schema=records.PROMPTS), records.PROMPTS, prompts)
        records.write_table(records.PREFERENCES.empty_table(), records.PREFERENCES, preferences)
        self.data = publish(folder / "data", "prepare-data", [prompts, preferences])
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        parts = [folder / f"part-{index:05d}.parquet" for index in range(2)]
        for path, texts in zip(parts, (PROMPTS[:2], PROMPTS[2:]), strict=True):
            table = pa.Table.from_pylist([row for text in texts for row in answers(text, tokenizer)], records.RESPONSES)
            records.write_table(table, records.RESPONSES, path)
        self.responses = publish(folder / "responses", "generate", parts)

    def score(self, name: str, **given: Any) -> StageReport:
        arguments = {"reward_uri": self.reward, "data_uri": self.data, "scoring": SCORING, "grading": GRADING, **given}
        return score(self.policy, self.reference, self.responses, str(self.folder / name), **arguments)


def answers(prompt: str, tokenizer: Any) -> list[dict[str, Any]]:
    return [
        {
            "prompt_id": records.prompt_id(prompt),
            "sample_index": index,
            "prompt_token_ids": tokenizer.encode(prompt),
            "response_token_ids": [*tokenizer.encode(text), tokenizer.eos_token_id],
            "response": text,
            "finish_reason": "stop",
        }
        for index, text in enumerate(f"{text} {prompt}" for text in TEXTS)
    ]


@pytest.fixture(scope="module")
def places(tiny_model: Path, smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Places:
    return Places(tiny_model, smollm, tmp_path_factory.mktemp("given-rewards"))


@pytest.fixture(scope="module")
def scored(places: Places) -> StageReport:
    return places.score("scores")


def tables(report: StageReport, folder: Path) -> pa.Table:
    manifest = require_manifest(report.uri)
    names = sorted(name for name in manifest.files if name.endswith(".parquet"))
    paths = fetch_files(report.uri, manifest, folder, names)
    return pa.concat_tables([records.read_table(paths[name], records.SCORES) for name in names])


def test_scores_hold_the_reward_models_numbers_and_the_log_probs_of_training(
    places: Places, scored: StageReport, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    table = tables(scored, tmp_path)
    folder = places.folder / "reward-model"
    model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForSequenceClassification, AutoTokenizer))
    texts = {records.prompt_id(prompt): prompt for prompt in PROMPTS}
    for row in table.to_pylist():
        prompt = texts[row["prompt_id"]]
        messages = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": f"{TEXTS[row['sample_index']]} {prompt}"},
        ]
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=False)
        with torch.no_grad():
            assert row["reward"] == pytest.approx(float(model(ids[:, :-1]).logits[0, 0]), abs=1e-3)
        assert row["policy_logps"] < 0 > row["reference_logps"]
    assert table["reward"].null_count == 0


def test_a_response_without_a_grade_is_dropped_and_counted(scored: StageReport) -> None:
    metrics = scored.metrics
    assert (metrics["num_scored"], metrics["num_dropped_no_grade"]) == (9, 3)
    assert (metrics["num_dropped_non_finite"], metrics["num_dropped_few_finite_responses"]) == (0, 0)


def test_both_rewards_and_their_agreement_are_told(places: Places, scored: StageReport, tmp_path: Path) -> None:
    table, metrics = tables(scored, tmp_path), scored.metrics
    implicit = np.asarray(table["policy_logps"]) - np.asarray(table["reference_logps"])
    assert metrics["reward_std"] == pytest.approx(np.asarray(table["reward"]).std())
    assert metrics["implicit_reward_std"] == pytest.approx(implicit.std())
    assert metrics["num_agreement_prompts"] == 3
    assert -1 <= metrics["reward_agreement"] <= 1


def test_pairs_are_chosen_by_the_reward_model(places: Places, scored: StageReport, tmp_path: Path) -> None:
    pairing = {"length_penalty": 0.0, "replay_ratio": 0, "num_eval_pairs": 0}
    output = str(tmp_path / "pairs")
    report = pair(
        places.data,
        places.policy,
        output,
        scores_uris=[scored.uri],
        responses_uris=[places.responses],
        pairing=pairing,
    )
    assert report.metrics["reward"] == "reward-model"
    (path,) = fetch_files(output, require_manifest(output), tmp_path, ["pairs.parquet"]).values()
    rewards = {}
    for row in tables(scored, tmp_path).to_pylist():
        rewards.setdefault(row["prompt_id"], []).append(row["reward"])
    for row in records.read_table(path, records.PAIRS).to_pylist():
        own = rewards[row["prompt_id"]]
        assert (row["chosen_reward"], row["rejected_reward"]) == (max(own), min(own))
        assert row["chosen_reference_logps"] < 0


def test_a_judge_is_not_started_again_for_grades_that_are_stored(
    places: Places, scored: StageReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed with the grades of both parts stored and the log-probs of none: what comes after asks nobody."""

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scoring, "score_parts", killed)
        places.score("killed")
    with monkeypatch.context() as patch:
        patch.setattr(judging, "grading", None)
        resumed = places.score("killed")
    assert {**resumed.metrics, "seconds": 0} == {**scored.metrics, "seconds": 0}


def test_grades_of_other_responses_are_refused(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def one_too_few(*_: Any, **__: Any) -> Any:
        yield lambda responses, on_progress: [0.0] * (len(responses) - 1)

    monkeypatch.setattr(judging, "grading", one_too_few)
    with pytest.raises(UnfitError, match=r"grades-00000.json has 7 grades of 8 responses: take a new run name"):
        places.score("too-few")


def test_prompts_that_the_data_lacks_are_refused(places: Places, tmp_path: Path) -> None:
    records.write_table(records.PROMPTS.empty_table(), records.PROMPTS, tmp_path / "prompts.parquet")
    data = publish(tmp_path / "data", "prepare-data", [tmp_path / "prompts.parquet"])
    with pytest.raises(UnfitError, match=r"8 responses are to prompts that .* does not have"):
        places.score("lacking", data_uri=data)
