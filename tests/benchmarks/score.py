"""Scoring: upstream's way and ours, the forward alone and the whole stage.

Upstream (generate_dpo_scores.py): for each of the K response files and each of the two models a process that loads the
model and runs batches of one response, with the row of a dummy response padded beside it and float32 logits of the
whole vocabulary. Left out in its favour: it also loads a TinyLlama that it does not use.
"""

import sys
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc

from tests.benchmarks.measure import Comparison, Timed, Values, run_way, stopwatch
from tests.benchmarks.work import Work

if TYPE_CHECKING:
    import torch

TOLERANCE_NATS = 1e-3

# A response: the ids of its prompt, and its own.
Response = tuple[list[int], list[int]]


def _responses(work: Work) -> list[Response]:
    table = work.responses()
    return list(zip(table["prompt_token_ids"].to_pylist(), table["response_token_ids"].to_pylist(), strict=True))


def full_logits_logps(model: Any, rows: Sequence[Response], pad_id: int) -> "torch.Tensor":
    """Return the summed log-probs of the responses of padded rows, from all logits in float32, as TRL made them then.

    Shape: (rows,), nats.
    """
    import torch

    lengths = [len(prompt) + len(response) for prompt, response in rows]
    ids = torch.full((len(rows), max(lengths)), pad_id)
    is_input, is_response = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (prompt, response) in enumerate(rows):
        ids[row, : lengths[row]] = torch.tensor([*prompt, *response])
        is_input[row, : lengths[row]] = 1
        is_response[row, len(prompt) : lengths[row]] = 1
    ids, is_input, is_response = (tensor.to(model.device) for tensor in (ids, is_input, is_response))
    logits = model(input_ids=ids, attention_mask=is_input, use_cache=False).logits.float()
    logps = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    return (logps * is_response[:, 1:]).sum(1)


def one_by_one(model: Any, responses: Sequence[Response], dummy_ids: list[int]) -> list[float]:
    """Return the log-prob of each response, each beside a dummy row. Nats."""
    import torch

    with torch.no_grad():
        return [
            float(full_logits_logps(model, [(prompt, ids), (prompt, dummy_ids)], pad_id=0)[0])
            for prompt, ids in responses
        ]


def touch(models: Sequence[Any]) -> None:
    """Read all weights: they are mapped from a file, and would count as memory that the work adds."""
    for model in models:
        for weight in model.parameters():
            weight.detach().sum()


def ours_forward(folder: Path, num_responses: str = "") -> Timed:
    """Score with prompt groups; both models loaded before. `num_responses`: of the first prompt alone."""
    from dice_core.logprobs.forward import PromptGroup, group_logps
    from dice_core.models.loading import load_model
    from dice_core.preferences.settings import ScoringConfig

    work = Work(folder)
    by_prompt: dict[tuple[int, ...], list[list[int]]] = {}
    for prompt, response in _responses(work)[: int(num_responses) if num_responses else None]:
        by_prompt.setdefault(tuple(prompt), []).append(response)
    groups = [PromptGroup(prompt, responses) for prompt, responses in by_prompt.items()]
    models = [load_model(path, "float32") for path in (work.policy, work.reference)]
    tokens = ScoringConfig().tokens_per_batch
    touch(models)
    with stopwatch() as watch:
        logps = [list(chain.from_iterable(group_logps(model, groups, tokens_per_batch=tokens))) for model in models]
    return Timed.of(watch, _scores(*logps))


def upstream_forward(folder: Path, num_responses: str = "") -> Timed:
    """Score one by one; both models loaded before."""
    from dice_core.models.loading import load_model

    work = Work(folder)
    responses = _responses(work)[: int(num_responses) if num_responses else None]
    models = [load_model(path, "float32") for path in (work.policy, work.reference)]
    touch(models)
    with stopwatch() as watch:
        logps = [one_by_one(model, responses, work.dummy_ids) for model in models]
    return Timed.of(watch, _scores(*logps))


def ours_stage(folder: Path) -> Timed:
    """Run what the stage runs: filter, load each model once, score; from Parquet to a table."""
    from dice_core.preferences.scoring import filter_responses, score_parts
    from dice_core.preferences.settings import ScoringConfig

    work = Work(folder)
    config = ScoringConfig(dtype="float32", min_valid_responses=2)
    with stopwatch() as watch:
        kept = filter_responses(work.responses(), config)
        ((_, scores),) = score_parts(work.policy, work.reference, [(0, kept.responses)], config)
    return Timed.of(watch, _scores(*(scores[f"{model}_logps"].to_pylist() for model in ("policy", "reference"))))


def upstream_files(folder: Path) -> Timed:
    """Score each response file in two processes, one for each model."""
    work = Work(folder)
    num_files = work.size.num_responses
    with stopwatch() as watch:
        runs = [
            [run_way("score:upstream_file", folder, model, file) for file in range(num_files)]
            for model in ("policy", "reference")
        ]
    logps = [np.stack([run.values["logps"] for run in of_model], axis=1).ravel().tolist() for of_model in runs]
    peak = max(run.peak_bytes for of_model in runs for run in of_model)
    seconds = sum(run.seconds for of_model in runs for run in of_model)
    print(f"score: {seconds:.1f} s of {watch.seconds:.1f} s are forward passes", file=sys.stderr)
    return Timed.of(watch, _scores(*logps), peak)


def upstream_file(folder: Path, model: str, file: str) -> Timed:
    """Score one response file: the sample with this index of every prompt."""
    from dice_core.models.loading import load_model

    work = Work(folder)
    is_of_file = pc.equal(work.responses()["sample_index"], int(file)).to_pylist()
    responses = [response for response, taken in zip(_responses(work), is_of_file, strict=True) if taken]
    loaded = load_model(folder / model, "float32")
    with stopwatch() as watch:
        logps = one_by_one(loaded, responses, work.dummy_ids)
    return Timed.of(watch, {"logps": logps})


def _scores(policy_logps: Sequence[float], reference_logps: Sequence[float]) -> Values:
    scores = [policy - reference for policy, reference in zip(policy_logps, reference_logps, strict=True)]
    return {"scores": scores, "logps": [*policy_logps, *reference_logps]}


def same_scores(ours: Sequence[Values], peer: Sequence[Values]) -> str:
    """Say whether a score, or a log-prob it is made of, differs by more than the tolerance, in nats."""
    for what in ("scores", "logps"):
        mine, theirs = (np.asarray(values[0][what]) for values in (ours, peer))
        if mine.shape != theirs.shape:
            return f"{len(mine)} {what} against {len(theirs)}"
        farthest = float(np.abs(mine - theirs).max())
        if not farthest <= TOLERANCE_NATS:
            return f"{what} differ by up to {farthest:.2g} nats"
    return ""


COMPARISONS = [
    Comparison(
        "score",
        "upstream's forward: batch 1, a dummy row, all logits in float32",
        ours=("score:ours_forward",),
        peer=("score:upstream_forward",),
        clock="part",
        check=same_scores,
        least_ratio=3,
        most_memory=0.4,
    ),
    Comparison(
        "score",
        "upstream's stage: a process and a model load for each response file and model",
        ours=("score:ours_stage",),
        peer=("score:upstream_files",),
        clock="process",
        check=same_scores,
        least_ratio=6,
    ),
]
