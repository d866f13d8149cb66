"""One sampled answer of a model to each held-out prompt, by vLLM, as responses to train on are sampled.

The random numbers of an answer depend on the run and the prompt alone, not on the iteration: a prompt can be followed
through a run, and what one evaluation has sampled from a model the next one need not sample again.
"""

from pathlib import Path

import pyarrow as pa

from dice_core.data.records import PROMPTS, RESPONSES
from dice_core.data.settings import ChatConfig
from dice_core.evaluation.result import Answer
from dice_core.evaluation.settings import EvaluationConfig
from dice_core.generation.settings import GenerationConfig
from dice_core.progress import Progress, log


def sampling(generation: GenerationConfig, evaluation: EvaluationConfig, num_prompts: int) -> GenerationConfig:
    """Return how answers are sampled: one to a prompt, all in one part, otherwise as in generate.

    Args:
        generation: of the run.
        evaluation: max_new_tokens, where it is given, takes the place of generation's.
        num_prompts: to answer.
    """
    limit = evaluation.max_new_tokens or generation.max_new_tokens
    # A copy is not validated: num_responses is 2 at least where responses become pairs.
    return generation.model_copy(
        update={"num_responses": 1, "max_new_tokens": limit, "prompts_per_part": max(1, num_prompts)}
    )


def prompts_to_answer(held_out: pa.Table, num_prompts: int) -> pa.Table:
    """Return the first distinct prompts of the held-out pairs, whose order is random already.

    Args:
        held_out: records.PREFERENCES.
        num_prompts: at most.

    Returns:
        records.PROMPTS.
    """
    first: dict[str, str] = {}
    for prompt_id, prompt in zip(held_out["prompt_id"].to_pylist(), held_out["prompt"].to_pylist(), strict=True):
        first.setdefault(prompt_id, prompt)
    rows = list(first.items())[:num_prompts]
    return pa.table({"prompt_id": [row[0] for row in rows], "prompt": [row[1] for row in rows]}, schema=PROMPTS)


def sample_answers(
    model_folder: Path, prompts: pa.Table, config: GenerationConfig, chat: ChatConfig, *, seed: int, role: str
) -> pa.Table:
    """Sample one answer to each prompt, in order. When this returns, nothing of the engine is left.

    Args:
        model_folder: in safetensors with its tokenizer.
        prompts: records.PROMPTS.
        config: see `sampling`.
        chat: how a prompt becomes token ids.
        seed: of the run.
        role: of the model, for the log.

    Returns:
        records.RESPONSES.

    Raises:
        PromptTooLongError: a prompt exceeds chat.max_prompt_tokens.
        GenerationError: vLLM failed to start.
    """
    from dice_core.generation.responses import generate_parts

    if not prompts.num_rows:
        return RESPONSES.empty_table()
    log(f"evaluate: answers to {prompts.num_rows} held-out prompts, {role}")
    progress = Progress(f"evaluate: answers, {role}", "prompts", tells_end=False)
    parts = generate_parts(
        model_folder,
        prompts,
        config=config,
        chat=chat,
        seed=seed,
        parts=[0],
        on_progress=lambda num_done, num_all, _: progress(num_done, num_all),
    )
    return pa.concat_tables([table for _, table in parts])


def answers_of(responses: pa.Table, rewards: list[float | None]) -> list[Answer]:
    """Return sampled responses as answers, in order.

    Args:
        responses: records.RESPONSES, one to a prompt.
        rewards: of each; None: not known.
    """
    columns = (responses[name].to_pylist() for name in ("response", "finish_reason", "response_token_ids"))
    return [
        Answer(text, reason == "length", len(ids), reward)
        for text, reason, ids, reward in zip(*columns, rewards, strict=True)
    ]
