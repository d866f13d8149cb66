"""Samples K responses to each prompt with vLLM: token ids in, token ids out, part by part.

One engine serves all parts of a shard, and new prompts join before old ones end, so that a part's last long response
keeps no device idle. vLLM is imported when the first part is asked for, never with this module. The stage knows which
parts are still wanted and stores them; `preferences/scoring.py` decides which responses are valid.

The seed of a request depends on the run, the iteration and the prompt, and on nothing else: the same prompt draws the
same random numbers in any shard, part or resumed task. The text is then the same as far as the arithmetic is: logits
depend in their last bits on what else is in the batch, in bfloat16 often enough to change a token.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dice_core.data.chat import ChatFormat, chat_format
from dice_core.data.records import PROMPTS, RESPONSES, RecordError, conform
from dice_core.data.settings import ChatConfig
from dice_core.generation.engine import GenerationError, engine_died, started_engine
from dice_core.generation.settings import GenerationConfig
from dice_core.progress import doing
from dice_core.settings.base import ConfigError
from dice_core.settings.seeds import derive_seed
from dice_core.storage import layout

if TYPE_CHECKING:
    from vllm import LLMEngine, RequestOutput

Progress = Callable[[int, int, int], None]
"""Called with the prompts done, all prompts, and the response tokens so far (of this call)."""


def num_parts(num_prompts: int, config: GenerationConfig) -> int:
    """Return how many parts the responses to so many prompts are stored in."""
    return -(-num_prompts // config.prompts_per_part)


def shard_rows(num_prompts: int, shard: int, num_shards: int) -> range:
    """Return the rows of the prompts table that a shard (from 0) answers.

    The shards are contiguous, cover every row once, and differ in size by one at most.

    Raises:
        ValueError: there is no such shard.
    """
    layout.check_shard(shard, num_shards)
    size, extra = divmod(num_prompts, num_shards)
    start = shard * size + min(shard, extra)
    return range(start, start + size + (shard < extra))


def request_seed(seed: int, prompt_id: str, num_responses: int) -> int:
    """Return the seed of a prompt's first sample; sample i draws with this plus i.

    A multiple of num_responses, so that the samples of two prompts share all their seeds (one chance in 2**31 /
    num_responses, and harmless, for the prompts differ) or none. Within 31 bits: PyTorch's CPU generator ignores
    all but the lowest 32.
    """
    return derive_seed(seed, prompt_id) // num_responses * num_responses


def request_order(prompts: Mapping[int, list[int]]) -> list[int]:
    """Order prompts so that those which begin alike follow one another, while their blocks are in the prefix cache.

    Args:
        prompts: row to token ids.

    Returns:
        The rows.
    """
    return sorted(prompts, key=lambda row: prompts[row])


def stop_token_ids(model_folder: Path, template: ChatFormat, config: GenerationConfig) -> tuple[int, ...]:
    """Return the ids that end a response, wherever one is sampled: here and in evaluation.

    Args:
        model_folder: of the policy: the EOS ids of its own generation settings are among them.
        template: its chat format, whose end of turn comes first.
        config: may name more.

    Raises:
        ConfigError: an id that the tokenizer does not have: nothing would ever stop at it.
    """
    from dice_core.models.loading import eos_token_ids

    if unknown := [i for i in config.stop_token_ids if not 0 <= i < len(template.tokenizer)]:
        raise ConfigError(
            f"generation.stop_token_ids: the policy's tokenizer has ids from 0 to {len(template.tokenizer) - 1}, got "
            f"{unknown[0]}: name tokens of this model"
        )
    return tuple(dict.fromkeys([*template.stop_token_ids, *eos_token_ids(model_folder), *config.stop_token_ids]))


def num_duplicate_responses(responses: pa.Table) -> int:
    """Return how many rows repeat the text of another sample of the same prompt (the first one is not counted)."""
    return int(responses.num_rows - responses.group_by(["prompt_id", "response"]).aggregate([]).num_rows)


def generate_parts(
    model_folder: Path,
    prompts: pa.Table,
    *,
    config: GenerationConfig,
    chat: ChatConfig,
    seed: int,
    parts: Sequence[int],
    on_progress: Progress | None = None,
) -> Iterator[tuple[int, pa.Table]]:
    """Yield the responses to the wanted parts of the prompts, each part as soon as its last response ends.

    Args:
        model_folder: the policy, in safetensors with its tokenizer.
        prompts: records.PROMPTS; part i is its rows [i * prompts_per_part, (i + 1) * prompts_per_part).
        config: sampling, and the engine's memory.
        chat: how a prompt becomes token ids.
        seed: of this stage and iteration.
        parts: the indices still wanted, in any order.
        on_progress: called after each engine step that ends a prompt.

    Yields:
        Part index and its records.RESPONSES table: in the prompts' order, num_responses rows a prompt. Parts come in
        the order in which they end. Closing the iterator stops the engine.

    Raises:
        ConfigError: the model's context is too short for these settings, or its tokenizer for this chat format.
        PromptTooLongError: before the engine starts.
        RecordError: a prompt_id is there twice.
        GenerationError: vLLM failed to start, or ended a request for a reason that is none of ours.
    """
    wanted = sorted(set(parts))
    prompts = conform(prompts, PROMPTS, "prompts")
    _check_prompts(prompts, wanted, config)
    if not wanted:
        return
    job = _Job.prepare(model_folder, prompts, wanted, config, chat, seed)
    num_positions = chat.max_prompt_tokens + config.max_new_tokens
    with started_engine(model_folder, config, num_positions) as engine, doing("sampling the first responses"):
        yield from _run(engine, job, on_progress)


@dataclass(frozen=True)
class _Job:
    """The requests of one call, tokenised."""

    prompt_ids: Sequence[str]
    """Of every row of the prompts table."""
    token_ids: dict[int, NDArray[np.int32]]
    """Row to the ids of its prompt, (tokens,): part by part, and within one in the order of the ids."""
    chat: ChatFormat
    stop_token_ids: tuple[int, ...]
    config: GenerationConfig
    seed: int

    @classmethod
    def prepare(
        cls,
        model_folder: Path,
        prompts: pa.Table,
        wanted: Sequence[int],
        config: GenerationConfig,
        chat: ChatConfig,
        seed: int,
    ) -> "_Job":
        """Tokenise, so that a prompt too long or a model that does not fit is known before the engine starts."""
        from dice_core.models.loading import load_tokenizer

        _check_context(model_folder, config, chat)
        template = chat_format(load_tokenizer(model_folder), chat)
        texts = prompts["prompt"]
        token_ids: dict[int, NDArray[np.int32]] = {}
        for part in wanted:
            rows = _part_rows(part, prompts.num_rows, config)
            ids = {row: template.prompt_token_ids(texts[row].as_py()) for row in rows}
            token_ids |= {row: np.array(ids[row], dtype=np.int32) for row in request_order(ids)}
        stops = stop_token_ids(model_folder, template, config)
        return cls(prompts["prompt_id"].to_pylist(), token_ids, template, stops, config, seed)

    def rows_of(self, part: int) -> range:
        """Return the rows of the prompts table that a part answers."""
        return _part_rows(part, len(self.prompt_ids), self.config)


def _part_rows(part: int, num_prompts: int, config: GenerationConfig) -> range:
    start = part * config.prompts_per_part
    return range(start, min(start + config.prompts_per_part, num_prompts))


def _check_prompts(prompts: pa.Table, wanted: Sequence[int], config: GenerationConfig) -> None:
    count = num_parts(prompts.num_rows, config)
    outside = [part for part in wanted if not 0 <= part < count]
    if outside:
        raise ValueError(f"parts must be from 0 to {count - 1} for {prompts.num_rows} prompts, got {outside[0]}")
    ids = prompts["prompt_id"]
    if len(ids.unique()) != len(ids):
        repeated = next(entry["values"] for entry in ids.value_counts().to_pylist() if entry["counts"] > 1)
        raise RecordError(f"prompts: prompt_id {repeated!r} is there more than once, keep one row of it")


def _check_context(model_folder: Path, config: GenerationConfig, chat: ChatConfig) -> None:
    from dice_core.models.loading import context_length, load_config

    context = context_length(load_config(model_folder))
    needed = chat.max_prompt_tokens + config.max_new_tokens
    if needed > context:
        raise ConfigError(
            f"generation.max_new_tokens: chat.max_prompt_tokens {chat.max_prompt_tokens} and {config.max_new_tokens} "
            f"new tokens need a context of {needed} tokens, {model_folder} has one of {context}: lower one of the two"
        )


def _run(engine: "LLMEngine", job: _Job, on_progress: Progress | None) -> Iterator[tuple[int, pa.Table]]:
    """Keep the engine's queue filled across parts, and hand over each part that is complete."""
    from vllm.v1.engine.exceptions import EngineDeadError

    # Enough prompts wait that the engine stays busy while a part is decoded here and stored by the caller.
    num_together = engine.vllm_config.scheduler_config.max_num_seqs // job.config.num_responses + 1
    num_ahead = job.config.prompts_per_part + num_together
    waiting, num_running = deque(job.token_ids), 0
    done: dict[int, dict[int, RequestOutput]] = {}
    num_done = num_tokens = 0
    while waiting or num_running:
        while waiting and num_running < num_ahead:
            _add_request(engine, job, waiting.popleft())
            num_running += 1
        try:
            finished = [output for output in engine.step() if output.finished]
        except EngineDeadError as error:
            raise engine_died() from error
        for output in cast("list[RequestOutput]", finished):
            row = int(output.request_id)
            done.setdefault(row // job.config.prompts_per_part, {})[row] = output
            num_tokens += sum(len(sample.token_ids) for sample in output.outputs)
        num_running -= len(finished)
        num_done += len(finished)
        if finished and on_progress is not None:
            on_progress(num_done, len(job.token_ids), num_tokens)
        for part in [part for part, outputs in done.items() if len(outputs) == len(job.rows_of(part))]:
            yield part, _part_table(job, done.pop(part))


def _add_request(engine: "LLMEngine", job: _Job, row: int) -> None:
    """Queue one prompt with all its samples; the request is named by its row."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    config = job.config
    params = SamplingParams(
        n=config.num_responses,
        temperature=config.temperature,
        top_p=config.top_p,
        repetition_penalty=config.repetition_penalty,
        max_tokens=config.max_new_tokens,
        stop_token_ids=list(job.stop_token_ids),
        # vLLM would add EOS ids that it finds in the model's files: the ids above decide alone.
        ignore_eos=True,
        seed=request_seed(job.seed, job.prompt_ids[row], config.num_responses),
        # Decoding whole responses afterwards is cheaper than vLLM's token by token.
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    (request,) = engine.renderer.render_cmpl([{"prompt_token_ids": job.token_ids[row].tolist()}])
    engine.add_request(str(row), request, params)


def _part_table(job: _Job, outputs: dict[int, "RequestOutput"]) -> pa.Table:
    """Return the RESPONSES of a part, in the order of its prompts and samples."""
    columns: dict[str, list[Any]] = {name: [] for name in RESPONSES.names}
    for row, output in sorted(outputs.items()):
        for sample in output.outputs:
            if sample.finish_reason not in ("stop", "length"):
                raise GenerationError(
                    f"vLLM ended sample {sample.index} of prompt {job.prompt_ids[row]} with "
                    f"{sample.finish_reason!r}, expected 'stop' or 'length': see its log above"
                )
            columns["prompt_id"].append(job.prompt_ids[row])
            columns["sample_index"].append(sample.index)
            columns["prompt_token_ids"].append(job.token_ids[row])
            columns["response_token_ids"].append(list(sample.token_ids))
            columns["response"].append(job.chat.decode_response(sample.token_ids))
            columns["finish_reason"].append(sample.finish_reason)
    return pa.Table.from_pydict(columns, schema=RESPONSES)
