"""Stage generate: sample the responses of a shard."""

from functools import partial
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from dice_core.accelerator import require_promised_gpu
from dice_core.data import records
from dice_core.data.settings import ChatConfig
from dice_core.generation.settings import GenerationConfig
from dice_core.progress import Progress
from dice_core.settings.base import Values
from dice_core.stages.attempts import leaves_reason
from dice_core.stages.parts import part_name, published_behind, read_data, stored_parts
from dice_core.stages.run_settings import Task
from dice_core.stages.runner import StageContext, StageReport, run_stage
from dice_core.stages.table import GENERATE
from dice_core.storage import layout
from dice_core.storage.manifest import Manifest

if TYPE_CHECKING:
    from dice_core.data.chat import ChatFormat

_COUNTS = ("num_responses", "num_response_tokens", "num_cut_responses", "num_duplicate_responses")


@leaves_reason(GENERATE)
def generate(
    policy_uri: str,
    data_uri: str,
    output_uri: str,
    *,
    iteration: int = 1,
    shard: int = 0,
    num_shards: int = 1,
    gate_uri: str = "",
    generation: Values = None,
    chat: Values = None,
    seed: int = 0,
    overwrite: bool = False,
) -> StageReport:
    """Sample K responses to each prompt of a shard with the policy.

    Args:
        policy_uri: the model that answers.
        data_uri: prepare-data's output, or a Parquet file with prompt_id and prompt.
        output_uri: where the responses go, as part-00000-DIGEST.parquet and so on.
        iteration: number of the iteration, from 1; with the seed it decides the random numbers.
        shard: number of this shard, from 0.
        num_shards: how many shards there are.
        gate_uri: evaluation of the iteration before. If it refused its policy, this stage and all after it skip.
        generation: settings, see GenerationConfig.
        chat: settings, see ChatConfig.
        seed: seed of the run.
        overwrite: first delete what this stage left at its output.
    """
    layout.check_count(iteration, "iteration")
    layout.check_shard(shard, num_shards)
    generation_config, chat_config = GenerationConfig.parse(generation, "generation"), ChatConfig.parse(chat, "chat")
    inputs = {"policy": policy_uri, "data": data_uri} | ({"gate": gate_uri} if gate_uri else {})
    return run_stage(
        GENERATE,
        output_uri,
        partial(
            _sample_parts,
            shard=shard,
            num_shards=num_shards,
            seed=GENERATE.seed(seed, iteration),
            generation=generation_config,
            chat=chat_config,
        ),
        settings={"generation": generation_config, "chat": chat_config},
        arguments={"seed": seed, "iteration": iteration, "shard": shard, "num_shards": num_shards},
        overwrite=overwrite,
        inputs=inputs,
    )


def _sample_parts(
    context: StageContext, *, shard: int, num_shards: int, seed: int, generation: GenerationConfig, chat: ChatConfig
) -> Manifest:
    """Sample the responses of the parts that are not stored yet."""
    from dice_core.generation.responses import generate_parts, num_parts, shard_rows
    from dice_core.models.cache import fetch_model
    from dice_core.models.weights import check_finite

    if refused := context.refused_policy():
        return context.skip(refused)
    prompts, cleaned = read_data(context, records.PROMPTS, "prompts", lambda: _template(context, chat))
    if not prompts.num_rows:
        raise records.RecordError(f"{context.inputs['data'].uri}: the prompts table is empty, nothing to generate")
    rows = shard_rows(prompts.num_rows, shard, num_shards)
    prompts = prompts.slice(rows.start, len(rows))
    wanted = [i for i in range(num_parts(prompts.num_rows, generation)) if part_name(i) not in context.parts]
    counts = dict.fromkeys(_COUNTS, 0)
    for _, table in stored_parts(context, records.RESPONSES):
        _count_responses(counts, "", table)
    context.ran_by |= {"runner": "vllm", "tensor_parallel_size": generation.tensor_parallel_size}
    if wanted:
        require_promised_gpu()
        policy = fetch_model(context.inputs["policy"].uri)
        # vLLM would sample from what are no numbers, without a word.
        check_finite(policy)
        progress = Progress(f"generate shard {shard + 1}/{num_shards}", "prompts", num_all=prompts.num_rows)
        with published_behind(context, records.RESPONSES, partial(_count_responses, counts)) as publish:
            for index, table in generate_parts(
                policy, prompts, config=generation, chat=chat, seed=seed, parts=wanted, on_progress=progress
            ):
                publish(index, table)
    return context.publish({}, {"num_prompts": prompts.num_rows, **cleaned, **counts, "seconds": context.seconds()})


def _template(context: StageContext, chat: ChatConfig) -> "ChatFormat":
    from dice_core.data.chat import chat_format
    from dice_core.models.loading import load_tokenizer

    return chat_format(load_tokenizer(context.fetch_tokenizer("policy")), chat)


def _count_responses(counts: dict[str, int], _: str, table: pa.Table) -> None:
    from dice_core.generation.responses import num_duplicate_responses

    counts["num_responses"] += table.num_rows
    counts["num_response_tokens"] += pc.sum(pc.list_value_length(table["response_token_ids"])).as_py() or 0
    counts["num_cut_responses"] += pc.sum(pc.equal(table["finish_reason"], "length")).as_py() or 0
    counts["num_duplicate_responses"] += num_duplicate_responses(table)


def generate_in_run(task: Task) -> StageReport:
    """Generate a shard's responses at their place in a run; see generate."""
    return generate(
        task.policy_uri(task.iteration - 1),
        task.data_uri,
        task.uri,
        iteration=task.iteration,
        shard=task.place.shard or 0,
        num_shards=task.place.num_shards,
        gate_uri=task.gate_uri,
        seed=task.plan["seed"],
        **task.settings(GENERATE),
    )
