"""vLLM with a whole model of 8 billion random weights, started as the generate stage starts it: tokens per second."""

import functools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.gpu.models import NUM_SPECIAL, write_config
from tests.gpu.scale import Scale


def measure(scale: Scale) -> Iterator[dict[str, Any]]:
    """Yield the seconds until vLLM is ready, and then tokens per second of all responses together.

    Raises:
        GenerationError: vLLM failed to start, or died.
        AssertionError: a response is not as long as was asked for.
    """
    import vllm

    from dice_core.generation.engine import answered, started_engine
    from dice_core.generation.settings import GenerationConfig

    num_prompts, num_responses, num_tokens = scale.generation
    # vLLM makes up weights on the GPU: none are written or read.
    vllm.EngineArgs = functools.partial(vllm.EngineArgs, load_format="dummy")  # type: ignore[misc, assignment]
    config = GenerationConfig(dtype="bfloat16" if scale.device == "cuda" else "float32", max_new_tokens=num_tokens)
    requests = _requests(scale)
    prompt_tokens = len(requests[0][0])
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), scale.shape)
        start = time.perf_counter()
        with started_engine(Path(folder), config, prompt_tokens + num_tokens) as engine:
            shown = {f"{scale.shape_name}, seconds until vLLM is ready": time.perf_counter() - start}
            yield shown
            # The first is slower by what is compiled for it.
            answered(engine, requests[:1])
            begun = time.perf_counter()
            answers = answered(engine, requests[1:])
            ended = time.perf_counter()
            memory = _memory_bytes(scale)
    lengths = [len(output.token_ids) for answer in answers for output in answer.outputs]
    assert lengths == [num_tokens] * (num_prompts * num_responses), lengths
    yield {
        **shown,
        f"{num_prompts} prompts of {prompt_tokens} tokens, {num_responses} responses of {num_tokens}, seconds": (
            ended - begun
        ),
        "response tokens per second": sum(lengths) / (ended - begun),
        **memory,
    }


def _requests(scale: Scale) -> list[tuple[list[int], Any]]:
    """Return one request for a start, and those that are measured."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    num_prompts, num_responses, num_tokens = scale.generation
    rng = np.random.default_rng(0)

    def request(seed: int) -> tuple[list[int], Any]:
        ids = rng.integers(NUM_SPECIAL, scale.shape["vocab_size"], scale.speed.prompt_tokens).tolist()
        return ids, SamplingParams(
            n=num_responses,
            temperature=0.7,
            seed=seed,
            max_tokens=num_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    return [request(seed * num_responses) for seed in range(num_prompts + 1)]


def _memory_bytes(scale: Scale) -> dict[str, float]:
    """Return what is taken of the GPU, by every process."""
    if scale.device == "cpu":
        return {}
    import torch

    free, total = torch.cuda.mem_get_info()
    return {"memory taken, GB": (total - free) / 1e9}
