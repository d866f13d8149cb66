"""Generation: ours, upstream's K launches of n=1, and one raw LLM.generate with the very same requests.

Upstream (generate_responses.py, pipeline.sh) starts vLLM K times, once for each sample. Done in its favour here: one
batch a launch, the engine settings that start fastest. Left out: its queue, drained every few prompts. Raw vLLM has its
own limits and cache blocks: on a CPU these hold 128 tokens, of which a short prompt fills none, and ours 32.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.benchmarks.measure import Comparison, Timed, Values, run_way, stopwatch
from tests.benchmarks.work import Work

SEED = 5
# Responses to the same requests with the same seeds; a float32 sum may still fall the other way in another batch.
LEAST_SAME = 0.9


def _settings(work: Work) -> tuple[Any, Any]:
    from dice_core.data.settings import ChatConfig
    from dice_core.generation.settings import GenerationConfig

    size = work.size
    config = GenerationConfig(
        num_responses=size.num_responses, max_new_tokens=size.max_new_tokens, dtype="float32", prompts_per_part=8
    )
    return config, ChatConfig(max_prompt_tokens=256)


def ours(folder: Path) -> Timed:
    """Generate as a stage does: prompts to tables of responses."""
    return _ours(Work(folder), Work(folder).size.num_prompts)


def ours_many(folder: Path, num_prompts: str = "") -> Timed:
    """Generate for the prompts of the comparison with raw vLLM."""
    return _ours(Work(folder), int(num_prompts or Work(folder).size.num_raw_prompts))


def _ours(work: Work, num_prompts: int) -> Timed:
    import pyarrow as pa

    from dice_core.generation.responses import generate_parts, num_parts

    config, chat = _settings(work)
    prompts = work.prompts(num_prompts)
    parts = range(num_parts(prompts.num_rows, config))
    tables, seconds = {}, 0.0
    with _since_engine_start() as elapsed:
        for part, table in generate_parts(work.policy, prompts, config=config, chat=chat, seed=SEED, parts=parts):
            tables[part] = table
            # Up to the last part: taking the engine down is in the whole process's time, here and in raw vLLM.
            seconds = elapsed()
    responses = pa.concat_tables(tables[part] for part in parts)["response_token_ids"].to_pylist()
    return Timed(seconds, {"responses": responses})


def launches(folder: Path) -> Timed:
    """Start vLLM once for each sample."""
    with stopwatch() as watch:
        runs = [run_way("generate:one_launch", folder, k) for k in range(Work(folder).size.num_responses)]
    responses = [response for run in runs for response in run.values["responses"]]
    return Timed.of(watch, {"responses": responses}, max(run.peak_bytes for run in runs))


def one_launch(folder: Path, sample: str) -> Timed:
    """Answer every prompt once."""
    work = Work(folder)
    return _raw(work, work.size.num_prompts, num_samples=1, first_seed=int(sample), prefix_caching=False)


def raw_many(folder: Path, num_prompts: str = "") -> Timed:
    """Give our requests to LLM.generate at once."""
    work = Work(folder)
    return _raw(
        work, int(num_prompts or work.size.num_raw_prompts), work.size.num_responses, first_seed=0, prefix_caching=True
    )


def _raw(work: Work, num_prompts: int, num_samples: int, first_seed: int, prefix_caching: bool) -> Timed:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    if on_cpu:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from dice_core.data.chat import chat_format
    from dice_core.generation.responses import request_seed
    from dice_core.models.loading import load_tokenizer

    config, chat = _settings(work)
    prompts = work.prompts(num_prompts).to_pylist()
    template = chat_format(load_tokenizer(work.policy), chat)
    requests: Any = [{"prompt_token_ids": template.prompt_token_ids(row["prompt"])} for row in prompts]
    params = [
        SamplingParams(
            n=num_samples,
            temperature=config.temperature,
            max_tokens=config.max_new_tokens,
            stop_token_ids=list(template.stop_token_ids),
            seed=request_seed(SEED, row["prompt_id"], config.num_responses) + first_seed,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        for row in prompts
    ]
    settings: dict[str, Any] = {"gpu_memory_utilization": config.gpu_memory_utilization}
    if on_cpu:
        memory = config.cpu_kv_cache_gib << 30
        settings = {"enforce_eager": True, "enable_chunked_prefill": False, "kv_cache_memory_bytes": memory}
    engine = LLM(
        model=str(work.policy),
        dtype=config.dtype,
        max_model_len=chat.max_prompt_tokens + config.max_new_tokens,
        enable_prefix_caching=prefix_caching,
        use_tqdm_on_load=False,
        **settings,
    )
    with stopwatch() as watch:
        outputs = engine.generate(requests, params, use_tqdm=False)
    return Timed.of(watch, {"responses": [list(one.token_ids) for out in outputs for one in out.outputs]})


@contextmanager
def _since_engine_start() -> Iterator[Callable[[], float]]:
    """Yield a clock that starts when vLLM's engine is ready: what our loop costs must not drown in the start."""
    from vllm import LLMEngine

    make_engine, ready = LLMEngine.from_engine_args, [0.0]

    def timed(*arguments: Any, **settings: Any) -> LLMEngine:
        engine = make_engine(*arguments, **settings)
        ready[0] = time.perf_counter()
        return engine

    LLMEngine.from_engine_args = timed  # type: ignore[method-assign]
    try:
        yield lambda: time.perf_counter() - ready[0]
    finally:
        LLMEngine.from_engine_args = make_engine  # type: ignore[method-assign]


def same_number(ours: Sequence[Values], peer: Sequence[Values]) -> str:
    """Say whether one made more responses; their texts are drawn with other seeds."""
    mine, theirs = (len(values[0]["responses"]) for values in (ours, peer))
    return "" if mine == theirs else f"{mine} responses against {theirs}"


def same_responses(ours: Sequence[Values], peer: Sequence[Values]) -> str:
    """Say whether fewer responses than nearly all are the same, token for token."""
    mine, theirs = (values[0]["responses"] for values in (ours, peer))
    if len(mine) != len(theirs):
        return f"{len(mine)} responses against {len(theirs)}"
    share = sum(a == b for a, b in zip(mine, theirs, strict=True)) / len(mine)
    return "" if share >= LEAST_SAME else f"only {share:.0%} of the responses are the same"


COMPARISONS = [
    Comparison(
        "generate",
        "upstream's K launches of n=1, end to end",
        ours=("generate:ours",),
        peer=("generate:launches",),
        clock="process",
        check=same_number,
        least_ratio=3,
    ),
    Comparison(
        "generate",
        "the same requests in one raw LLM.generate, from engine start",
        ours=("generate:ours_many",),
        peer=("generate:raw_many",),
        clock="part",
        check=same_responses,
        least_ratio=0.97,
    ),
]
