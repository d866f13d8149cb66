"""Starts vLLM and ends it: for responses to train on, for answers to compare, and for judges.

vLLM is imported when an engine is asked for, never with this module. What is sampled is responses.py's.
"""

import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dice_core.generation.settings import EngineConfig
from dice_core.progress import doing, log

if TYPE_CHECKING:
    from vllm import LLMEngine

_CPU_BLOCK_TOKENS = 32


class GenerationError(RuntimeError):
    """vLLM could not start, or gave no usable answer. The message is one line."""


@contextmanager
def started_engine(
    model_folder: Path, config: EngineConfig, max_model_len: int, *, section: str = "generation"
) -> Iterator["LLMEngine"]:
    """Start vLLM, and leave this process as it was: no engine process, no distributed state, threads as before.

    Args:
        model_folder: in safetensors with its tokenizer.
        config: precision and memory.
        max_model_len: most tokens of a prompt and its response together.
        section: whose settings these are, for messages.

    Raises:
        GenerationError: vLLM failed to start.
    """
    start = time.monotonic()
    on_cpu = _prepare_vllm()
    import torch
    from vllm import EngineArgs, LLMEngine
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.usage.usage_lib import UsageContext

    from dice_core.models.files import trusts_remote_code

    settings: dict[str, Any] = {"gpu_memory_utilization": config.gpu_memory_utilization}
    if on_cpu:
        # Chunked prefill: vLLM's sampler fails on CPU when it meets a request that has a seed and a partial prompt.
        memory = config.cpu_kv_cache_gib << 30
        settings = {"enforce_eager": True, "enable_chunked_prefill": False, "kv_cache_memory_bytes": memory}
        # Prefix caching works in whole blocks, and vLLM's 128 tokens are longer than most prompts.
        settings["block_size"] = _CPU_BLOCK_TOKENS
    set_num_threads = torch.set_num_threads
    engine = None
    try:
        try:
            arguments = EngineArgs(
                model=str(model_folder),
                trust_remote_code=trusts_remote_code(model_folder),
                dtype=config.dtype,
                max_model_len=max_model_len,
                max_num_seqs=config.max_concurrent_sequences or None,
                enable_prefix_caching=True,
                disable_log_stats=True,
                use_tqdm_on_load=False,
                **settings,
            )
            # As vLLM's own LLM class: other contexts get smaller batches.
            with doing("starting vLLM"):
                engine = LLMEngine.from_engine_args(arguments, usage_context=UsageContext.LLM_CLASS)
        except (ValueError, RuntimeError) as error:
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
