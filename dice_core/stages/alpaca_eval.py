"""Stage alpaca-eval: a policy's answers to AlpacaEval's prompts, in AlpacaEval's form; no stage of a pipeline.

The answers are sampled as the run samples its responses, one to a prompt. alpaca_scores.py has them judged, which takes
no GPU and perhaps the internet and a key: another machine, another time.
"""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from dice_core.accelerator import require_promised_gpu
from dice_core.data import records
from dice_core.data.settings import ChatConfig
from dice_core.generation.settings import GenerationConfig
from dice_core.progress import Progress, log
from dice_core.settings.base import ConfigError, Values
from dice_core.stages.attempts import leaves_reason
from dice_core.stages.parts import part_name, published_behind, stored_parts
from dice_core.stages.prepare_data import LocalSource, local_sources
from dice_core.stages.runner import StageContext, StageReport, run_stage
from dice_core.stages.table import ALPACA_EVAL
from dice_core.storage import layout
from dice_core.storage.manifest import Manifest, read_manifest

OUTPUTS = "model_outputs.json"
"""What alpaca_eval takes as its model_outputs."""


def alpaca_eval(
    policy_uri: str,
    prompts_source: str,
    output_uri: str,
    *,
    generator: str = "",
    annotator: str = "",
    results_source: str = "",
    scores_uri: str = "",
    generation: Values = None,
    chat: Values = None,
    seed: int = 0,
    overwrite: bool = False,
) -> StageReport:
    """Answer AlpacaEval's prompts, write the file that alpaca_eval takes, and have it judged where that is asked for.

    Settings are those of the policy's run, changed by what is given here.

    Args:
        policy_uri: the model that answers.
        prompts_source: JSON file of the package with its prompts, such as that of the baseline's outputs.
        output_uri: where model_outputs.json goes, such as ROOT/runs/NAME/iteration-2/alpaca-eval.
        generator: what the leaderboard calls the model; by default its place in its run.
        annotator: also run this annotator, such as weighted_alpaca_eval_gpt4_turbo; see `dice alpaca-scores`.
        results_source: also read what alpaca_eval has written there; see `dice alpaca-scores`.
        scores_uri: where scores go; by default alpaca-scores beside the output.
        generation: GenerationConfig: how answers are sampled, one to a prompt.
        chat: settings, see ChatConfig.
        seed: of the answers.
        overwrite: first delete what this stage left at its output.
    """
    from dice_core.stages.alpaca_scores import alpaca_scores, require_judge

    if not prompts_source:
        raise ConfigError("prompts_source: is empty, name the JSON file of AlpacaEval's prompts")
    if annotator or results_source:
        require_judge(annotator, results_source)
    settings = {"generation": generation, "chat": chat}
    report = _answers(
        policy_uri, prompts_source, output_uri, generator or _name_of(policy_uri), settings, seed, overwrite
    )
    if not annotator and not results_source:
        return report
    place = scores_uri or layout.join(output_uri.rstrip("/").rpartition("/")[0] or ".", "alpaca-scores")
    return alpaca_scores(
        output_uri,
        place,
        annotator=annotator,
        results_source=results_source,
        prompts_source=prompts_source,
        overwrite=overwrite,
    )


@leaves_reason(ALPACA_EVAL)
def _answers(
    policy_uri: str,
    prompts_source: str,
    output_uri: str,
    generator: str,
    settings: Mapping[str, Values],
    seed: int,
    overwrite: bool,
) -> StageReport:
    chosen = {name: _settings(policy_uri, name, given) for name, given in settings.items()}
    generation_config = GenerationConfig.parse(chosen["generation"], "generation")
    chat_config = ChatConfig.parse(chosen["chat"], "chat")
    with local_sources({"prompts": prompts_source}) as sources:
        work = partial(
            _answer,
            source=sources["prompts"],
            generator=generator,
            generation=generation_config,
            chat=chat_config,
            seed=ALPACA_EVAL.seed(seed),
        )
        return run_stage(
            ALPACA_EVAL,
            output_uri,
            work,
            settings={"generation": generation_config, "chat": chat_config},
            arguments={"seed": seed, "prompts": sources["prompts"].digest, "generator": generator},
            inputs={"policy": policy_uri},
            overwrite=overwrite,
        )


def _settings(policy_uri: str, section: str, given: Values) -> dict[str, Any]:
    """Return the settings of the run that made a policy, changed by what was given."""
    run_uri = layout.run_uri_of(policy_uri)
    checked = read_manifest(layout.check_settings(run_uri)) if run_uri else None
    own = checked.settings.get(section) if checked else None
    if own is None:
        log(f"alpaca-eval: {policy_uri} is of no run that tells its settings: {section} has defaults and what is given")
    return {**(own or {}), **(given or {})}


def _name_of(policy_uri: str) -> str:
    run = layout.run_uri_of(policy_uri)
    below = policy_uri.removeprefix(run).strip("/").removesuffix("/train").replace("/", "-") if run else ""
    return f"{layout.run_of(policy_uri)}-{below}" if below else policy_uri.rstrip("/").rpartition("/")[2]


def _answer(
    context: StageContext,
    *,
    source: LocalSource,
    generator: str,
    generation: GenerationConfig,
    chat: ChatConfig,
    seed: int,
) -> Manifest:
    """Sample the answers of the parts that are not stored yet, and write them in AlpacaEval's form."""
    from dice_core.evaluation.alpaca import model_outputs, read_prompts
    from dice_core.generation.responses import generate_parts, num_parts
    from dice_core.models.cache import fetch_model
    from dice_core.models.weights import check_finite

    prompts = read_prompts(Path(source.path), source.shown)
    texts = list(dict.fromkeys(prompt.instruction for prompt in prompts))
    table = pa.table(
        {"prompt_id": [records.prompt_id(text) for text in texts], "prompt": texts}, schema=records.PROMPTS
    )
    # A copy is not validated: num_responses is 2 at least where responses become pairs.
    config = generation.model_copy(update={"num_responses": 1})
    answers: dict[str, str] = {}
    cut: list[str] = []

    def use(_: str, part: pa.Table) -> None:
        rows = zip(*(part[name].to_pylist() for name in ("prompt_id", "response", "finish_reason")), strict=True)
        for prompt_id, response, reason in rows:
            answers[prompt_id] = response
            cut.extend([prompt_id] if reason == "length" else [])

    for name, part in stored_parts(context, records.RESPONSES):
        use(name, part)
    wanted = [i for i in range(num_parts(len(texts), config)) if part_name(i) not in context.parts]
    if wanted:
        require_promised_gpu()
        policy = fetch_model(context.inputs["policy"].uri)
        # vLLM would sample from what are no numbers, without a word.
        check_finite(policy)
        progress = Progress("alpaca-eval", "prompts", num_all=len(texts))
        with published_behind(context, records.RESPONSES, use) as publish:
            for index, part in generate_parts(
                policy, table, config=config, chat=chat, seed=seed, parts=wanted, on_progress=progress
            ):
                publish(index, part)
    by_text = {text: answers[records.prompt_id(text)] for text in texts}
    outputs = model_outputs(prompts, by_text, generator)
    path = context.folder / OUTPUTS
    path.write_text(json.dumps(outputs, indent=1, ensure_ascii=False))
    lengths = [len(row["output"]) for row in outputs]
    counts = {"num_prompts": len(prompts), "num_cut_answers": len(cut)}
    metrics = {**counts, "mean_characters": sum(lengths) / len(lengths), "seconds": context.seconds()}
    return context.publish({OUTPUTS: path}, metrics)
