"""Stage pair: the training pairs of an iteration, or offline pairs for the warm start."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from dice_core.data import records
from dice_core.data.settings import ChatConfig
from dice_core.preferences.settings import PairingConfig
from dice_core.progress import Progress
from dice_core.settings.base import ConfigError, Values
from dice_core.stages.attempts import leaves_reason
from dice_core.stages.parts import group_tables, read_data, read_input
from dice_core.stages.place import Artifact, Place, show
from dice_core.stages.run_settings import read_task
from dice_core.stages.runner import StageContext, StageReport, run_stage
from dice_core.stages.table import GENERATE, PAIR, SCORE
from dice_core.storage import layout
from dice_core.storage.contract import UnfitError
from dice_core.storage.manifest import Manifest, Metric

if TYPE_CHECKING:
    from dice_core.data.chat import ChatFormat
    from dice_core.preferences.pairs import PairSet


@leaves_reason(PAIR)
def pair(
    data_uri: str,
    policy_uri: str,
    output_uri: str,
    *,
    scores_uris: Sequence[str] = (),
    responses_uris: Sequence[str] = (),
    iteration: int = 1,
    gate_uri: str = "",
    pairing: Values = None,
    chat: Values = None,
    seed: int = 0,
    overwrite: bool = False,
) -> StageReport:
    """Choose the length penalty, select the best and the worst response of each prompt, mix in offline pairs.

    Args:
        data_uri: prepare-data's output, or a Parquet file of preference pairs.
        policy_uri: the model whose tokenizer turns offline pairs into token ids; its weights are not read.
        output_uri: where pairs.parquet and length_penalty.json go.
        scores_uris: shards of score, or Parquet files (records.SCORES); none makes a set of offline pairs alone.
        responses_uris: the responses of these shards, in the same order.
        iteration: number of the iteration, from 1; 0 is the warm start.
        gate_uri: evaluation of the iteration before, where no response was sampled. If it refused its policy, this
            stage and all after it skip.
        pairing: settings, see PairingConfig.
        chat: settings, see ChatConfig.
        seed: seed of the run.
        overwrite: first delete what this stage left at its output.
    """
    layout.check_count(iteration, "iteration", 0)
    if len(scores_uris) != len(responses_uris):
        raise ConfigError(f"{len(responses_uris)} responses for {len(scores_uris)} scores: give one for each, in order")
    pairing_config, chat_config = PairingConfig.parse(pairing, "pairing"), ChatConfig.parse(chat, "chat")
    shards = {f"scores/{i}": uri for i, uri in enumerate(scores_uris)}
    shards |= {f"responses/{i}": uri for i, uri in enumerate(responses_uris)}
    return run_stage(
        PAIR,
        output_uri,
        partial(_make_pairs, pairing=pairing_config, chat=chat_config, seed=PAIR.seed(seed, iteration)),
        settings={"pairing": pairing_config, "chat": chat_config},
        arguments={"seed": seed, "iteration": iteration},
        overwrite=overwrite,
        inputs={"data": data_uri, "policy": policy_uri, **shards} | ({"gate": gate_uri} if gate_uri else {}),
    )


def _make_pairs(context: StageContext, *, pairing: PairingConfig, chat: ChatConfig, seed: int) -> Manifest:
    """Choose the length penalty, select pairs, mix in offline ones; offline ones alone where there are no scores."""
    from dice_core.data.chat import chat_format
    from dice_core.models.loading import load_tokenizer

    if refused := context.refused_policy():
        return context.skip(refused)
    for scores, responses in zip(context.group("scores"), context.group("responses"), strict=True):
        scores.require_same("responses", responses)
        scores.require_same("policy", context.inputs["policy"])
    template = chat_format(load_tokenizer(context.fetch_tokenizer("policy")), chat)
    make = _mixed_pairs if context.group("scores") else _offline_pairs
    offline, cleaned = read_data(context, records.PREFERENCES, "preferences", lambda: template)
    files, metrics, built = make(context, pairing, template, seed, offline)
    files["pairs.parquet"] = context.write_tables(_counted(built), records.PAIRS, "pairs.parquet")
    return context.publish(files, {**metrics, **cleaned, **built.counts, "seconds": context.seconds()})


def _counted(built: "PairSet") -> Iterator[pa.Table]:
    num_done, num_all = 0, built.counts["num_train_pairs"] + built.counts["num_eval_pairs"]
    progress = Progress("pair", "pairs", tells_end=False)
    for table in built.tables:
        num_done += table.num_rows
        progress(num_done, num_all)
        yield table


def _mixed_pairs(
    context: StageContext, pairing: PairingConfig, template: "ChatFormat", seed: int, offline: pa.Table
) -> "tuple[dict[str, Path], dict[str, Metric], PairSet]":
    from dice_core.preferences.length_penalty import choose_length_penalty
    from dice_core.preferences.pairs import build_pairs
    from dice_core.preferences.selection import group_scores, select_pairs

    prompts = read_input(context, context.inputs["data"], records.PROMPTS, "prompts")
    scores = group_scores(_scores(context), pairing)
    penalty = choose_length_penalty(scores, pairing)
    built = build_pairs(
        select_pairs(scores, penalty.value, pairing),
        _responses(context, prompts, template),
        offline,
        prompts=prompts,
        config=pairing,
        seed=seed,
        tokenise_prompt=template.prompt_token_ids,
        tokenise_response=template.response_token_ids,
        folder=context.folder,
    )
    curve = {"length_penalties": penalty.curve[0].tolist(), "length_gaps": penalty.curve[1].tolist()}
    metrics: dict[str, Metric] = {
        "reward": "implicit" if scores.is_implicit else _given_reward(context),
        "length_penalty": penalty.value,
        "length_gap": penalty.gap,
        "length_gap_unpenalised": penalty.unpenalised_gap,
    }
    return {"length_penalty.json": context.write_json(curve, "length_penalty.json")}, metrics, built


def _given_reward(context: StageContext) -> str:
    """Return which reward the scores bring, by the settings they were made with; ? in tables of nobody's run.

    Raises:
        UnfitError: different ones.
    """
    kinds = {source.manifest.settings.get("scoring", {}).get("reward", "?") for source in context.group("scores")}
    if len(kinds) > 1:
        raise UnfitError(
            f"{context.group('scores')[0].uri}: scores of different rewards ({', '.join(sorted(kinds))}) cannot be "
            "compared: give scores that were made with one scoring.reward"
        )
    return str(kinds.pop())


def _responses(context: StageContext, prompts: pa.Table, template: "ChatFormat") -> Iterator[pa.Table]:
    """Read the responses; where they are no stage's, look at whether their token ids are their texts."""
    from dice_core.preferences.own_responses import checked

    tables = group_tables(context, "responses", records.RESPONSES)
    users = [source for source in context.group("responses") if source.is_users_file]
    return checked(tables, prompts, template, layout.join(users[0].uri, users[0].tables()[0])) if users else tables


def _scores(context: StageContext) -> Iterator[pa.Table]:
    """Read the scores; where they are no stage's, look at whether they can be scores."""
    from dice_core.preferences.own_responses import checked_scores

    tables = group_tables(context, "scores", records.SCORES)
    users = [source for source in context.group("scores") if source.is_users_file]
    return checked_scores(tables, layout.join(users[0].uri, users[0].tables()[0])) if users else tables


def _offline_pairs(
    context: StageContext, pairing: PairingConfig, template: "ChatFormat", seed: int, offline: pa.Table
) -> "tuple[dict[str, Path], dict[str, Metric], PairSet]":
    from dice_core.preferences.pairs import offline_pairs

    built = offline_pairs(
        offline,
        config=pairing,
        seed=seed,
        tokenise_prompt=template.prompt_token_ids,
        tokenise_response=template.response_token_ids,
    )
    return {}, {}, built


def pair_task(settings_uri: str, place: str, metrics: Artifact) -> None:
    """Make the pairs of an iteration from its shards, as a task of a pipeline; see pair.

    A run of offline pairs alone has no shards, and no stage before this one that reads the gate.
    """
    task = read_task(settings_uri, place)
    iteration = task.iteration
    num_shards = task.plan["num_shards"] if iteration else 0
    scores, responses = (
        [
            layout.join(task.run_uri, Place(stage.name, iteration, shard, num_shards).below)
            for shard in range(num_shards)
        ]
        for stage in (SCORE, GENERATE)
    )
    report = pair(
        task.data_uri,
        task.policy_uri(iteration - 1),
        task.uri,
        scores_uris=scores,
        responses_uris=responses,
        iteration=iteration,
        gate_uri="" if scores else task.gate_uri,
        seed=task.plan["seed"],
        **task.settings(PAIR),
    )
    show(report, task.place, metrics)
