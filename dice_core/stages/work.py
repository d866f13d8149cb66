"""The work of each stage: tables and models carried between storage and the module that computes.

Called by stage_runner.py when there is something to do; stages.py has what people call. Heavy modules (torch, vLLM) are
imported where they are needed, so that a launcher pod without them can run the stages it runs.
"""

import json
import tempfile
import time
from collections import Counter
from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dice_core.data import records
from dice_core.data.settings import ChatConfig
from dice_core.evaluation.settings import EvaluationConfig
from dice_core.launch.settings import LaunchConfig
from dice_core.preferences.settings import GenerationConfig, PairingConfig, ScoringConfig
from dice_core.progress import Throttle, log
from dice_core.stages.parts import group_tables, part_name, published_behind, read_input, stored_parts
from dice_core.stages.runner import StageContext, StageReport
from dice_core.storage import layout
from dice_core.storage.contract import StorageError
from dice_core.storage.manifest import Manifest, Metric, publish_files, read_manifest, require_manifest, require_stage
from dice_core.storage.promotion import promote
from dice_core.storage.transfers import read_ahead
from dice_core.training.settings import TrainingConfig

if TYPE_CHECKING:
    from dice_core.preferences.scoring import Filtered

_EVALUATION = "evaluation.json"
_RESPONSE_COUNTS = ("num_responses", "num_response_tokens", "num_cut_responses", "num_duplicate_responses")

# Parts of responses on their way while one is scored, which takes much longer.
_NUM_AHEAD = 2


class Progress:
    """Log lines such as `generate shard 1/8: 512 of 1250 prompts`, at most one in ten seconds."""

    def __init__(self, what: str, unit: str) -> None:
        self._what, self._unit, self._throttle = what, unit, Throttle()

    def __call__(self, num_done: int, num_all: int, *_: object) -> None:
        """Take the counts of now."""
        if num_done == num_all or self._throttle.is_due():
            log(f"{self._what}: {num_done} of {num_all} {self._unit}")


def generate(
    context: StageContext, *, shard: int, num_shards: int, seed: int, generation: GenerationConfig, chat: ChatConfig
) -> Manifest:
    """Sample the responses of the parts that are not stored yet."""
    from dice_core.models.cache import fetch_model
    from dice_core.preferences.generation import generate_parts, num_parts, shard_rows

    gate = context.inputs.get("gate")
    if gate and not gate.manifest.metrics.get("accepted"):
        return context.skip(f"the policy was refused by {gate.uri}: {gate.manifest.metrics.get('reason')}")
    start = time.monotonic()
    prompts = read_input(context, context.inputs["data"], records.PROMPTS, "prompts")
    if not prompts.num_rows:
        raise records.RecordError(f"{context.inputs['data'].uri}: the prompts table is empty, nothing to generate")
    rows = shard_rows(prompts.num_rows, shard, num_shards)
    prompts = prompts.slice(rows.start, len(rows))
    wanted = [i for i in range(num_parts(prompts.num_rows, generation)) if part_name(i) not in context.parts]
    counts = dict.fromkeys(_RESPONSE_COUNTS, 0)
    for _, table in stored_parts(context, records.RESPONSES):
        _count_responses(counts, "", table)
    if wanted:
        policy = fetch_model(context.inputs["policy"].uri)
        progress = Progress(f"generate shard {shard + 1}/{num_shards}", "prompts")
        with published_behind(context, records.RESPONSES, partial(_count_responses, counts)) as publish:
            for index, table in generate_parts(
                policy, prompts, config=generation, chat=chat, seed=seed, parts=wanted, on_progress=progress
            ):
                publish(index, table)
    return context.publish({}, {"num_prompts": prompts.num_rows, **counts, "seconds": _seconds(start)})


def _count_responses(counts: dict[str, int], _: str, table: pa.Table) -> None:
    from dice_core.preferences.generation import num_duplicate_responses

    counts["num_responses"] += table.num_rows
    counts["num_response_tokens"] += pc.sum(pc.list_value_length(table["response_token_ids"])).as_py() or 0
    counts["num_cut_responses"] += pc.sum(pc.equal(table["finish_reason"], "length")).as_py() or 0
    counts["num_duplicate_responses"] += num_duplicate_responses(table)


def score(context: StageContext, *, config: ScoringConfig) -> Manifest:
    """Filter the responses, and score the parts that are not stored yet."""
    from dice_core.models.cache import fetch_model
    from dice_core.preferences.scoring import score_parts

    start = time.monotonic()
    dropped: Counter[str] = Counter()
    names = context.inputs["responses"].tables()
    wanted = [index for index in range(len(names)) if part_name(index) not in context.parts]
    rewards: dict[str, np.ndarray] = {}
    for name, table in stored_parts(context, records.SCORES):
        _keep_rewards(rewards, name, table)
    # Lazily: a shard's responses need not fit in memory. Parts already scored are read for their counts alone.
    valid = context.until_end(_valid_parts(context, names, wanted, config, dropped))
    if wanted:
        folders = [fetch_model(context.inputs[name].uri) for name in ("policy", "reference")]
        with published_behind(context, records.SCORES, partial(_keep_rewards, rewards)) as publish:
            for index, table, _ in score_parts(*folders, valid, config, on_progress=Progress("score", "responses")):
                publish(index, table)
    for _ in valid:
        pass
    all_rewards = np.concatenate([[], *(rewards[name] for name in sorted(rewards))])
    num_valid = dropped.pop("valid", 0)
    metrics: dict[str, Metric] = {
        "num_scored": all_rewards.size,
        **{f"num_dropped_{reason}": count for reason, count in dropped.items()},
        "num_dropped_non_finite": num_valid - all_rewards.size,
        "reward_mean": float(all_rewards.mean()) if all_rewards.size else 0.0,
        "reward_std": float(all_rewards.std()) if all_rewards.size else 0.0,
    }
    return context.publish({}, {**metrics, "seconds": _seconds(start)})


def _keep_rewards(rewards: dict[str, np.ndarray], name: str, scores: pa.Table) -> None:
    rewards[name] = np.asarray(scores["policy_logps"]) - np.asarray(scores["reference_logps"])


def _valid_parts(
    context: StageContext, names: list[str], wanted: list[int], config: ScoringConfig, counts: Counter[str]
) -> Generator[tuple[int, pa.Table], None, None]:
    from dice_core.preferences.scoring import filter_responses

    def read(name: str) -> "Filtered":
        return filter_responses(read_input(context, context.inputs["responses"], records.RESPONSES, name), config)

    for index, filtered in enumerate(read_ahead(read, names, _NUM_AHEAD)):
        counts.update({**filtered.num_dropped, "valid": filtered.responses.num_rows})
        if index in wanted:
            yield index, filtered.responses


def pair(context: StageContext, *, pairing: PairingConfig, chat: ChatConfig, seed: int) -> Manifest:
    """Choose the length penalty, select pairs, mix in offline ones; offline ones alone where there are no scores."""
    from dice_core.data.chat import chat_format
    from dice_core.models.loading import load_tokenizer
    from dice_core.preferences.length_penalty import choose_length_penalty
    from dice_core.preferences.pairs import build_pairs, offline_pairs
    from dice_core.preferences.selection import group_scores, select_pairs

    start = time.monotonic()
    preferences = read_input(context, context.inputs["data"], records.PREFERENCES, "preferences")
    template = chat_format(load_tokenizer(context.fetch_tokenizer("policy")), chat)
    draw = {
        "config": pairing,
        "seed": seed,
        "tokenise_prompt": template.prompt_token_ids,
        "tokenise_response": template.response_token_ids,
    }
    for scores, responses in zip(context.group("scores"), context.group("responses"), strict=True):
        scores.require_same("responses", responses)
        scores.require_same("policy", context.inputs["policy"])
    files: dict[str, Path] = {}
    metrics: dict[str, Metric] = {}
    if context.group("scores"):
        scores = group_scores(group_tables(context, "scores", records.SCORES), pairing)
        penalty = choose_length_penalty(scores, pairing)
        prompts = read_input(context, context.inputs["data"], records.PROMPTS, "prompts")
        responses = group_tables(context, "responses", records.RESPONSES)
        built = build_pairs(
            select_pairs(scores, penalty.value, pairing),
            responses,
            preferences,
            prompts=prompts,
            folder=context.folder,
            **draw,
        )
        curve = {"length_penalties": penalty.curve[0].tolist(), "length_gaps": penalty.curve[1].tolist()}
        files["length_penalty.json"] = context.write_json(curve, "length_penalty.json")
        metrics = {
            "length_penalty": penalty.value,
            "length_gap": penalty.gap,
            "length_gap_unpenalised": penalty.unpenalised_gap,
        }
    else:
        built = offline_pairs(preferences, **draw)
    files["pairs.parquet"] = context.write_tables(built.tables, records.PAIRS, "pairs.parquet")
    return context.publish(files, {**metrics, **built.counts, "seconds": _seconds(start)})


def train(context: StageContext, *, training: TrainingConfig, launch: LaunchConfig, seed: int) -> Manifest:
    """Write the job down, launch it, and accept only what its manifest says it finished."""
    from dice_core.launch.launch import launch_training
    from dice_core.training.job import TrainingJob

    pairs = context.inputs["pairs"]
    job = TrainingJob(
        output_uri=context.uri,
        policy_uri=context.inputs["policy"].uri,
        # A file of the user's is named whole; a pair stage by its place, whose manifest the trainer checks.
        pairs_uri=layout.join(pairs.uri, pairs.tables()[0]) if pairs.is_users_file else pairs.uri,
        training=training,
        seed=seed,
        manifest_fields=context.manifest_fields,
    )
    pairs.require_same("policy", context.inputs["policy"])
    launch_training(job.write(), launch)
    manifest = require_manifest(context.uri)
    if manifest.fingerprint != context.fingerprint:
        raise StorageError(f"{context.uri}: another training published here while this one ran: take a new run name")
    return manifest


def evaluate(
    context: StageContext,
    *,
    evaluation: EvaluationConfig,
    generation: GenerationConfig,
    chat: ChatConfig,
    seed: int,
    iteration: int,
    promoted_uri: str,
) -> Manifest:
    """Measure the new policy, decide, and point to it where people look for the last good one."""
    from dice_core.evaluation.measuring import evaluate_policy
    from dice_core.models.cache import fetch_model

    if _EVALUATION not in context.parts:
        start = time.monotonic()
        held_out = read_input(context, context.inputs["data"], records.PREFERENCES, "held_out")
        folders = [fetch_model(context.inputs[name].uri) for name in ("policy", "previous", "base_reference")]
        result = evaluate_policy(*folders, held_out, evaluation=evaluation, chat=chat, generation=generation, seed=seed)
        values = {**result.to_dict(), "promotable": result.promotable, "seconds": _seconds(start)}
        # Stored before the pointer moves: another attempt finds this decision, and does not measure again.
        context.publish_part(_EVALUATION, context.write_json(values, _EVALUATION))
    key = context.parts[_EVALUATION].key
    values = json.loads(context.stored.fetch(context.folder / "part", [key])[key].read_text())
    policy = context.inputs["policy"]
    if promoted_uri and values["promotable"]:
        promote(
            promoted_uri,
            policy.uri,
            policy.manifest.content_digest,
            evaluated=context.uri,
            iteration=iteration,
            reference_uri=context.inputs["previous"].uri,
        )
    return context.publish({}, {**values["metrics"], "seconds": values["seconds"]})


def report(run_uri: str, output_uri: str, *, num_iterations: int, allow_empty: bool) -> StageReport:
    """Write the page and the numbers of a run as it is now."""
    from dice_core.report.page import build_report, collect
    from dice_core.report.summary import summary

    if present := read_manifest(output_uri):
        require_stage(present, "report", output_uri)
    data = collect(run_uri, num_iterations)
    if data.is_empty and not allow_empty:
        raise StorageError(
            f"{run_uri}: no stage of a run has finished there: give the run's own place, ROOT/runs/NAME, or pass "
            "--allow-empty for a page that says so"
        )
    with tempfile.TemporaryDirectory(prefix="dice-") as folder:
        page, numbers = Path(folder) / "report.html", Path(folder) / "summary.json"
        page.write_text(build_report(data))
        numbers.write_text(json.dumps(summary(data), indent=1))
        manifest = Manifest(stage="report", fingerprint="", files={}, inputs={"run": run_uri})
        publish_files(output_uri, {page.name: page, numbers.name: numbers}, manifest)
    return StageReport(output_uri, "completed", {})


def _seconds(start: float) -> float:
    return round(time.monotonic() - start, 1)
