"""Starts vLLM and ends it: for responses to train on, for answers to compare, and for judges.

vLLM is imported when an engine is asked for, never with this module. What is sampled is responses.py's.
"""

import gc
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dice_core.generation.settings import EngineConfig
from dice_core.progress import doing, log

if TYPE_CHECKING:
    from vllm import LLMEngine, PoolingParams, SamplingParams

_CPU_BLOCK_TOKENS = 32


class GenerationError(RuntimeError):
    """vLLM could not start, or gave no usable answer. The message is one line."""


@contextmanager
def started_engine(
    model_folder: Path, config: EngineConfig, max_model_len: int, *, section: str = "generation", pools: bool = False
) -> Iterator["LLMEngine"]:
    """Start vLLM, and leave this process as it was: no engine process, no distributed state, threads as before.

    Args:
        model_folder: in safetensors with its tokenizer.
        config: precision and memory.
        max_model_len: most tokens of a prompt and its response together.
        section: whose settings these are, for messages.
        pools: the model classifies sequences (a reward model): the engine takes PoolingParams.

    Raises:
        GenerationError: vLLM failed to start, or there are fewer GPUs than are to share the model.
    """
    start = time.monotonic()
    on_cpu = _prepare_vllm()
    import torch
    from vllm import EngineArgs, LLMEngine
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.usage.usage_lib import UsageContext

    from dice_core.models.files import trusts_remote_code

    if on_cpu:
        _share_cores(config.tensor_parallel_size)
    elif torch.cuda.device_count() < config.tensor_parallel_size:
        raise GenerationError(
            f"{section}.tensor_parallel_size: is {config.tensor_parallel_size}, and this process sees "
            f"{torch.cuda.device_count()} GPUs: a pipeline asks for as many when it is compiled, so submit it with "
            f"SET={section}.tensor_parallel_size={config.tensor_parallel_size}, or set fewer"
        )
    settings: dict[str, Any] = {"gpu_memory_utilization": config.gpu_memory_utilization}
    if on_cpu:
        # Chunked prefill: vLLM's sampler fails on CPU when it meets a request that has a seed and a partial prompt.
        memory = config.cpu_kv_cache_gib << 30
        settings = {"enforce_eager": True, "enable_chunked_prefill": False, "kv_cache_memory_bytes": memory}
        # Prefix caching works in whole blocks, and vLLM's 128 tokens are longer than most prompts.
        settings["block_size"] = _CPU_BLOCK_TOKENS
    if pools:
        settings["runner"] = "pooling"
    set_num_threads = torch.set_num_threads
    engine = None
    try:
        try:
            arguments = EngineArgs(
                model=str(model_folder),
                trust_remote_code=trusts_remote_code(model_folder),
                dtype=config.dtype,
                max_model_len=max_model_len,
                tensor_parallel_size=config.tensor_parallel_size,
                max_num_seqs=config.max_concurrent_sequences or None,
                enable_prefix_caching=True,
                disable_log_stats=True,
                use_tqdm_on_load=False,
                **settings,
            )
            # As vLLM's own LLM class: other contexts get smaller batches.
            with doing("starting vLLM"):
                engine = LLMEngine.from_engine_args(arguments, usage_context=UsageContext.LLM_CLASS)
        except (ValueError, RuntimeError, AssertionError) as error:
            raise GenerationError(_start_failure(model_folder, config, section, on_cpu, error)) from error
        log(f"{section}: vLLM is ready ({config.dtype}) after {time.monotonic() - start:.0f} s")
        yield engine
    finally:
        if engine is not None:
            engine.engine_core.shutdown()
        del engine
        # What vLLM's CPU worker leaves behind: a set_num_threads that does nothing, and a variable it warns about.
        torch.set_num_threads = set_num_threads
        os.environ.pop("VLLM_DIST_IDENT", None)
        cleanup_dist_env_and_memory()
        gc.collect()


def answered(
    engine: "LLMEngine",
    requests: Sequence[tuple[Sequence[int], "SamplingParams | PoolingParams"]],
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Any]:
    """Return vLLM's answers to requests, in their order.

    Args:
        engine: of started_engine.
        requests: the token ids of a prompt, and what is asked of it.
        on_progress: called with (requests answered, all requests) after each engine step that answers one.

    Raises:
        GenerationError: the engine died.
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    # Those that begin alike follow one another, while their blocks are in the prefix cache.
    waiting = deque(sorted(range(len(requests)), key=lambda index: list(requests[index][0])))
    num_ahead = 2 * engine.vllm_config.scheduler_config.max_num_seqs
    answers: dict[int, Any] = {}
    num_running = 0
    while waiting or num_running:
        while waiting and num_running < num_ahead:
            index = waiting.popleft()
            (request,) = engine.renderer.render_cmpl([{"prompt_token_ids": list(requests[index][0])}])
            engine.add_request(str(index), request, requests[index][1])
            num_running += 1
        try:
            finished: list[Any] = [output for output in engine.step() if output.finished]
        except EngineDeadError as error:
            raise engine_died() from error
        answers |= {int(output.request_id): output for output in finished}
        num_running -= len(finished)
        if finished and on_progress is not None:
            on_progress(len(answers), len(requests))
    return [answers[index] for index in range(len(requests))]


def engine_died() -> GenerationError:
    """Return what is said when vLLM's engine process is gone."""
    return GenerationError("vLLM's engine process died, its log above says why: start the task again")


def _prepare_vllm() -> bool:
    """Set the environment that vLLM reads, and return whether it runs on the CPU.

    What the person has set stands, but for one: on CPU, an engine process of its own would leave one core idle and
    start later.
    """
    quiet = "VLLM_LOGGING_LEVEL" not in os.environ
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm.platforms import current_platform

    on_cpu = bool(current_platform.is_cpu())
    if on_cpu:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        if quiet:
            # Its CPU warnings are about settings made here on purpose and libraries that are not there.
            os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    return on_cpu


def _share_cores(num_processes: int) -> None:
    """Give each of several processes cores of its own, unless the person has: vLLM would ask for a NUMA node each."""
    cores = sorted(os.sched_getaffinity(0))
    if num_processes > 1 and len(cores) >= num_processes:
        shares = (cores[number::num_processes] for number in range(num_processes))
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(",".join(map(str, share)) for share in shares))


def _start_failure(model_folder: Path, config: EngineConfig, section: str, on_cpu: bool, error: Exception) -> str:
    memory = (
        f"{section}.cpu_kv_cache_gib {config.cpu_kv_cache_gib}"
        if on_cpu
        else f"{section}.gpu_memory_utilization {config.gpu_memory_utilization}"
    )
    return (
        f"vLLM could not start with {model_folder}: {' '.join(str(error).split())[:500]} "
        f"(memory is set by {memory} and {section}.max_concurrent_sequences {config.max_concurrent_sequences})"
    )
