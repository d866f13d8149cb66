"""The stages of an iteration one after another on a tiny model and a real S3 server, each run twice.

Responses are made here and not sampled: generation has its own test with a real engine, and random weights never end
an answer.
"""

import itertools
import json
import math

import pyarrow as pa
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dice_core.data import records
from dice_core.data.records import RecordError
from dice_core.preferences import scoring
from dice_core.settings.base import ConfigError
from dice_core.stages.evaluate import evaluate
from dice_core.stages.generate import generate
from dice_core.stages.import_model import import_model
from dice_core.stages.pair import pair
from dice_core.stages.prepare_data import prepare_data
from dice_core.stages.report import report
from dice_core.stages.score import score
from dice_core.stages.train import train
from dice_core.storage import layout
from dice_core.storage.address import open_storage
from dice_core.storage.contract import StorageError
from dice_core.storage.manifest import Manifest, publish_files, read_manifest, require_manifest
from dice_core.storage.promotion import read_promotion

pytestmark = pytest.mark.slow

CHAT = {"max_prompt_tokens": 64}
TRAINING = {
    "max_steps": 2,
    "global_batch_size": 2,
    "per_device_batch_size": 2,
    "learning_rate": 1e-3,
    "precision": "float32",
    "saved_dtype": "float32",
    "max_length": 128,
    "save_steps": 1,
    "eval_steps": 2,
    "gradient_checkpointing": False,
}
SCORING = {"min_valid_responses": 2, "dtype": "float32", "min_characters": 1}
PAIRING = {"replay_ratio": 0.5, "num_eval_pairs": 1}


def write_preferences(path, num_pairs):
    rows = [
        {"prompt": f"Question {i}?", "chosen": f"A good answer to {i}.", "rejected": f"Bad {i}."}
        for i in range(num_pairs)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make_responses(prompts, tokenizer, path, num_responses=4):
    """Write a RESPONSES table of answers of different lengths; the last of each prompt is cut by the token limit."""
    rows = []
    for prompt in prompts.to_pylist():
        for index in range(num_responses):
            text = f"Answer {index} to {prompt['prompt']}" + " and more" * index
            rows.append(
                {
                    "prompt_id": prompt["prompt_id"],
                    "sample_index": index,
                    "prompt_token_ids": tokenizer.encode(f"<|im_start|>user\n{prompt['prompt']}"),
                    "response_token_ids": [*tokenizer.encode(text), tokenizer.eos_token_id],
                    "response": text,
                    "finish_reason": "length" if index == num_responses - 1 else "stop",
                }
            )
    records.write_table(pa.Table.from_pylist(rows, schema=records.RESPONSES), records.RESPONSES, path)
    return str(path)


class Run:
    """One run's places on S3, with a policy, its reference, and data."""

    def __init__(self, root, model, folder):
        from dice_core.models.loading import load_tokenizer

        self.source = str(model)
        self.root, self.folder, self.uri = root, folder, layout.run(root, "stages")
        self.policy = import_model(self.source, layout.model(root, "tiny")).uri
        self.tokenizer = load_tokenizer(model)
        source = write_preferences(folder / "preferences.jsonl", 12)
        self.data = prepare_data(
            source, layout.data(self.uri), policy_uri=self.policy, data={"num_held_out": 3}, chat=CHAT
        ).uri

    def stage(self, name):
        return layout.stage(self.uri, 1, name)


@pytest.fixture(scope="module")
def run(s3, served_model, tmp_path_factory):
    return Run(s3, served_model, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def warm_start(run):
    """The policy that offline pairs make of the tiny model."""
    pairs = pair(run.data, run.policy, layout.warm_start(run.uri, "pair"), iteration=0, pairing=PAIRING, chat=CHAT)
    return train(run.policy, pairs.uri, layout.warm_start(run.uri, "train"), iteration=0, training=TRAINING)


@pytest.fixture(scope="module")
def scored(run, warm_start):
    """Responses and their scores under the warm-started policy against the model it came from."""
    local = open_storage(run.data)
    local.download("prompts.parquet", run.folder / "prompts.parquet")
    prompts = records.read_table(run.folder / "prompts.parquet", records.PROMPTS)
    responses = make_responses(prompts, run.tokenizer, run.folder / "responses.parquet")
    return responses, score(warm_start.uri, run.policy, responses, run.stage("score"), scoring=SCORING)


@pytest.fixture(scope="module")
def paired(run, warm_start, scored):
    responses, scores = scored
    arguments = {"scores_uris": [scores.uri], "responses_uris": [responses], "pairing": PAIRING, "chat": CHAT}
    return pair(run.data, warm_start.uri, run.stage("pair"), **arguments)


def test_data_is_split_and_counted(run):
    metrics = require_manifest(run.data).metrics
    assert (metrics["num_prompts"], metrics["num_preferences"], metrics["num_held_out"]) == (9, 9, 3)


def test_the_warm_start_trains_on_offline_pairs_and_makes_another_model(run, warm_start):
    pairs = require_manifest(layout.warm_start(run.uri, "pair")).metrics
    assert (pairs["num_generated_pairs"], pairs["num_replayed_pairs"]) == (0, 9)
    trained, start = require_manifest(warm_start.uri), require_manifest(run.policy)
    assert trained.files["model.safetensors"].sha256 != start.files["model.safetensors"].sha256
    assert trained.text_digests == start.text_digests, "of what turns text into ids"
    assert abs(warm_start.metrics["step0_loss"] - 0.693147) < 1e-4


def test_a_trained_model_has_a_card_that_its_manifest_does_not_name(run, warm_start):
    card = open_storage(warm_start.uri).read_bytes("README.md").decode()
    assert "The policy of the warm start of run `stages`" in card and f"`{run.policy}`" in card
    assert "README.md" not in require_manifest(warm_start.uri).files


def test_cut_responses_are_counted_and_not_scored(scored):
    metrics = scored[1].metrics
    assert (metrics["num_scored"], metrics["num_dropped_length_limit"]) == (27, 9)
    assert metrics["num_dropped_non_finite"] == 0
    assert metrics["reward_std"] > 0


def test_a_prompt_left_with_too_few_finite_log_probs_is_dropped_and_each_row_has_one_reason(tiny_model, tmp_path):
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    uris = {}
    for name in ("policy", "reference"):
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            model.get_input_embeddings().weight[5] = math.nan if name == "policy" else 0
        model.save_pretrained(tmp_path / name)
        paths = [*(tmp_path / name).iterdir(), *tiny_model.glob("tokenizer*")]
        files = {path.name: path for path in paths}
        uris[name] = str(tmp_path / f"{name}-model")
        # Training ran into it: an import would refuse such weights.
        publish_files(uris[name], files, Manifest(stage="train", fingerprint="", files={}))
    # A response with token 5 has no finite log-prob: a keeps two of three responses, b one.
    # Of c all have one: so few responses of all are odd ones, and no broken model.
    tokens = {"a": [7, 8, 5], "b": [5, 7, 5], "c": [7] * 40}
    rows = [
        {
            "prompt_id": prompt,
            "sample_index": index,
            "prompt_token_ids": [10, 11],
            "response_token_ids": [token, 1],
            "response": "words",
            "finish_reason": "stop",
        }
        for prompt, own in tokens.items()
        for index, token in enumerate(own)
    ]
    path = tmp_path / "responses.parquet"
    records.write_table(pa.Table.from_pylist(rows, schema=records.RESPONSES), records.RESPONSES, path)
    responses = str(tmp_path / "responses")
    publish_files(responses, {"part-00000.parquet": path}, Manifest(stage="generate", fingerprint="", files={}))
    metrics = score(uris["policy"], uris["reference"], responses, str(tmp_path / "out"), scoring=SCORING).metrics
    assert (metrics["num_scored"], metrics["num_dropped_non_finite"]) == (42, 1)
    assert (metrics["num_dropped_few_finite_responses"], metrics["num_dropped_few_valid_responses"]) == (3, 0)


def test_scoring_that_was_killed_goes_on_and_counts_every_part_once(
    run, warm_start, scored, tmp_path, monkeypatch, capsys
):
    table = records.read_table(run.folder / "responses.parquet", records.RESPONSES)
    files = {}
    for index in range(3):
        files[f"part-{index}.parquet"] = tmp_path / f"part-{index}.parquet"
        records.write_table(table.slice(12 * index, 12), records.RESPONSES, files[f"part-{index}.parquet"])
    responses = str(tmp_path / "responses")
    publish_files(responses, files, Manifest(stage="generate", fingerprint="", files={}))
    score_parts = scoring.score_parts

    def killed(*arguments, **settings):
        yield from itertools.islice(score_parts(*arguments, **settings), 2)
        raise KeyboardInterrupt

    arguments = (warm_start.uri, run.policy, responses)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scoring, "score_parts", killed)
        score(*arguments, str(tmp_path / "killed"), scoring=SCORING)
    capsys.readouterr()
    resumed = score(*arguments, str(tmp_path / "killed"), scoring=SCORING).metrics
    # Of all three parts, though this attempt scored fewer.
    assert "score: 36 of 36 responses" in capsys.readouterr().err
    whole = score(*arguments, str(tmp_path / "whole"), scoring=SCORING).metrics
    assert {**resumed, "seconds": 0} == {**whole, "seconds": 0}
    assert resumed["num_scored"] == scored[1].metrics["num_scored"]


def test_pairs_mix_generated_and_replayed_and_carry_the_reference_of_training(run, paired):
    metrics = paired.metrics
    assert metrics["num_generated_pairs"] == metrics["num_replayed_pairs"] == 4
    open_storage(paired.uri).download("pairs.parquet", run.folder / "pairs.parquet")
    pairs = records.read_table(run.folder / "pairs.parquet", records.PAIRS).to_pylist()
    for row in pairs:
        assert (row["chosen_reference_logps"] is None) == (row["source"] == "replayed")
        assert row["chosen_token_ids"][-1] == row["rejected_token_ids"][-1] == run.tokenizer.eos_token_id


def test_an_accepted_policy_is_promoted_and_the_next_iteration_starts_with_it(run, warm_start, paired):
    trained = train(warm_start.uri, paired.uri, run.stage("train"), training=TRAINING)
    promoted = layout.promoted(run.root, "tiny")
    evaluation = {
        "dtype": "float32",
        "num_sample_prompts": 2,
        "num_shown_samples": 2,
        "max_new_tokens": 4,
        "max_length_growth": 100.0,
        "max_accuracy_drop": 1.0,
    }
    evaluated = evaluate(
        trained.uri,
        warm_start.uri,
        run.policy,
        run.data,
        run.stage("evaluate"),
        promoted_uri=promoted,
        evaluation=evaluation,
        chat=CHAT,
    )
    assert {"heldout_reward_accuracy", "heldout_reward_accuracy_incumbent", "accepted"} <= set(evaluated.metrics)
    found = read_promotion(promoted)
    assert (found is not None) == bool(evaluated.metrics["promotable"])
    assert found is None or (found.policy_uri, found.reference_uri) == (trained.uri, warm_start.uri)
    written = report(output_uri=layout.report(run.uri), run_uri=run.uri, num_iterations=1)
    page = open_storage(written.uri).read_bytes("report.html")
    assert len(page) < 1_000_000
    assert b"</html>" in page


def test_every_stage_run_again_returns_at_once(run, warm_start, scored, paired):
    responses, scores = scored
    arguments = {"scores_uris": [scores.uri], "responses_uris": [responses], "pairing": PAIRING, "chat": CHAT}
    again = [
        import_model(run.source, run.policy),
        score(warm_start.uri, run.policy, responses, run.stage("score"), scoring=SCORING),
        pair(run.data, warm_start.uri, run.stage("pair"), **arguments),
    ]
    assert {report.status for report in again} == {"already complete"}


def test_outside_score_tables_are_paired_as_they_are(run, warm_start, scored, tmp_path):
    """A Parquet file in the schema of records.SCORES, of nobody's run."""
    responses, scores = scored
    open_storage(scores.uri).download(next(iter(require_manifest(scores.uri).files)), tmp_path / "mine.parquet")
    report = pair(
        run.data,
        warm_start.uri,
        str(tmp_path / "out"),
        scores_uris=[str(tmp_path / "mine.parquet")],
        responses_uris=[responses],
        pairing=PAIRING | {"length_penalty": "grid", "replay_ratio": 0},
        chat=CHAT,
    )
    assert report.metrics["num_generated_pairs"] == 9
    assert 0 <= report.metrics["length_penalty"] < 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "preferences.jsonl"),
        ('{"prompt": "a", "chosen": "b"}\n', "preferences.jsonl.*rejected"),
        ('{"prompt": "a", "chosen": "b", "rejected": 3}\n', "preferences.jsonl.*rejected"),
    ],
)
def test_bad_preferences_are_refused_by_file_and_leave_nothing(run, tmp_path, content, message):
    (tmp_path / "preferences.jsonl").write_text(content)
    with pytest.raises(RecordError, match=message):
        prepare_data(str(tmp_path / "preferences.jsonl"), str(tmp_path / "data"), policy_uri=run.policy, chat=CHAT)
    assert read_manifest(str(tmp_path / "data")) is None


def test_one_response_a_prompt_is_refused_before_anything_runs():
    with pytest.raises(ConfigError, match=r"generation.num_responses: .* 2, got 1"):
        generate("p", "d", "o", generation={"num_responses": 1})


def test_scores_of_another_policy_are_refused(run, scored, tmp_path):
    responses, scores = scored
    with pytest.raises(StorageError, match="give the policy that it was made with"):
        pair(
            run.data,
            run.policy,
            str(tmp_path / "out"),
            scores_uris=[scores.uri],
            responses_uris=[responses],
            pairing=PAIRING,
            chat=CHAT,
        )


def test_a_shard_without_prompts_goes_through(run, warm_start, scored, tmp_path):
    """More shards than prompts."""
    responses, scores = scored
    empty = [str(tmp_path / name) for name in ("responses", "scores", "pairs")]
    generate(warm_start.uri, run.data, empty[0], shard=19, num_shards=20, chat=CHAT)
    assert score(warm_start.uri, run.policy, empty[0], empty[1], scoring=SCORING).metrics["num_scored"] == 0
    paired = pair(
        run.data,
        warm_start.uri,
        empty[2],
        scores_uris=[scores.uri, empty[1]],
        responses_uris=[responses, empty[0]],
        pairing=PAIRING,
        chat=CHAT,
    )
    assert paired.metrics["num_generated_pairs"] == 4


def test_too_few_prompts_with_enough_responses_are_refused_with_counts(run, warm_start, scored, tmp_path):
    responses, scores = scored
    open_storage(scores.uri).download(next(iter(require_manifest(scores.uri).files)), tmp_path / "all.parquet")
    # Three scores of the first prompt, one of the second.
    few = records.read_table(tmp_path / "all.parquet", records.SCORES).slice(0, 4)
    records.write_table(few, records.SCORES, tmp_path / "few.parquet")
    with pytest.raises(ValueError, match=r"1 of 2 prompts have at least 2 responses .* \(4 scores in all\)"):
        pair(
            run.data,
            warm_start.uri,
            str(tmp_path / "out"),
            scores_uris=[str(tmp_path / "few.parquet")],
            responses_uris=[responses],
            pairing=PAIRING,
            chat=CHAT,
        )
    assert read_manifest(str(tmp_path / "out")) is None


def test_a_bucket_that_does_not_exist_is_named(s3):
    with pytest.raises(StorageError, match="no-such-bucket"):
        score("s3://no-such-bucket/m", "s3://no-such-bucket/r", "s3://no-such-bucket/x", f"{s3}/out")


def test_the_wrong_credentials_are_named_as_such(s3, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match="AWS_SECRET_ACCESS_KEY does not fit AWS_ACCESS_KEY_ID"):
        score(f"{s3}/m", f"{s3}/r", f"{s3}/x", f"{s3}/out")
