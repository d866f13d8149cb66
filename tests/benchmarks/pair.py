"""Pairing: upstream's pandas sweep (tests/upstream_pairing.py) and ours, on the same scores."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.benchmarks.measure import Comparison, Timed, Values, stopwatch
from tests.benchmarks.work import Work


def _num_prompts(work: Work, num_prompts: str) -> int:
    return int(num_prompts) if num_prompts else work.size.num_pairing_prompts


def ours(folder: Path, num_prompts: str = "") -> Timed:
    """Find upstream's penalty and select the pairs; the table is in memory, grouping it counts."""
    from dice_core.config import PairingConfig
    from dice_core.pairs import choose_length_penalty, group_scores, select_pairs

    work = Work(folder)
    config = PairingConfig(length_penalty="grid", min_valid_responses=2)
    path = work.scores(_num_prompts(work, num_prompts))
    table = pq.read_table(path)
    with stopwatch() as watch:
        grouped = group_scores(table, config)
        penalty = choose_length_penalty(grouped, config)
        selection = select_pairs(grouped, penalty.value, config)
    indices = [selection.chosen_index.tolist(), selection.rejected_index.tolist()]
    return Timed.of(watch, {"penalty": penalty.value, "pairs": _digest(selection.prompt_id, *indices)})


def ours_exact(folder: Path, num_prompts: str = "") -> Timed:
    """Find the exact penalty from Parquet, which upstream cannot, and select the pairs: what a run does."""
    from dice_core.config import PairingConfig
    from dice_core.pairs import choose_length_penalty, group_scores, select_pairs

    work = Work(folder)
    config = PairingConfig(min_valid_responses=2)
    file = pq.ParquetFile(work.scores(_num_prompts(work, num_prompts)))
    with stopwatch() as watch:
        parts = (pa.Table.from_batches([batch]) for batch in file.iter_batches(1 << 20))
        grouped = group_scores(parts, config)
        penalty = choose_length_penalty(grouped, config)
        selection = select_pairs(grouped, penalty.value, config)
    return Timed.of(watch, {"penalty": penalty.value, "num_pairs": len(selection.prompt_id)})


def ours_with_texts(folder: Path) -> Timed:
    """Do what `ours` does and join the pairs with their texts and token ids, from a table in memory."""
    from dice_core.config import PairingConfig
    from dice_core.pairs import build_pairs, choose_length_penalty, group_scores, select_pairs
    from dice_core.records import PREFERENCES, PROMPTS, RESPONSES

    work = Work(folder)
    config = PairingConfig(length_penalty="grid", min_valid_responses=2, replay_ratio=0, num_eval_pairs=0)
    table = pq.read_table(work.scores(work.size.num_pairing_prompts))
    ids, texts = pa.array([[1]] * table.num_rows, pa.list_(pa.int32())), _texts(table)
    columns = [table["prompt_id"], table["sample_index"], ids, ids, pa.array(texts), ["stop"] * table.num_rows]
    responses = pa.Table.from_arrays([pa.array(c) if isinstance(c, list) else c for c in columns], schema=RESPONSES)
    names = table["prompt_id"].unique()
    prompts = pa.Table.from_arrays([names, names], schema=PROMPTS)
    with stopwatch() as watch:
        grouped = group_scores(table, config)
        penalty = choose_length_penalty(grouped, config)
        made = build_pairs(
            select_pairs(grouped, penalty.value, config),
            responses,
            PREFERENCES.empty_table(),
            prompts=prompts,
            config=config,
            seed=0,
            tokenise_prompt=lambda _: [1],
            tokenise_response=lambda _: [1],
        )
    pairs = made.pairs.sort_by("prompt_id")
    indices = [[int(text[:2]) for text in pairs[side].to_pylist()] for side in ("chosen", "rejected")]
    return Timed.of(watch, {"penalty": penalty.value, "pairs": _digest(pairs["prompt_id"], *indices)})


def ours_small(folder: Path) -> Timed:
    """Pair the prompts of one small iteration."""
    return ours(folder, str(Work(folder).size.num_prompts))


def upstream_small(folder: Path) -> Timed:
    """Pair the prompts of one small iteration as upstream does."""
    return upstream(folder, str(Work(folder).size.num_prompts))


def upstream(folder: Path, num_prompts: str = "") -> Timed:
    """Sweep the grid with a pandas pairing at each point, and pair at the best; the frames are in memory."""
    import pandas as pd

    from tests.upstream_pairing import PandasPairing, sweep

    work = Work(folder)
    table = pq.read_table(work.scores(_num_prompts(work, num_prompts)))
    scores, texts = table.to_pandas(), _texts(table)
    frame = pd.DataFrame({"prompt": scores["prompt_id"], "response": texts, "score": scores["policy_logps"]})
    frames = [frame[scores["sample_index"] == k].reset_index(drop=True) for k in range(work.size.num_responses)]
    with stopwatch() as watch:
        pairing = PandasPairing(frames, num_least_scores=2)
        penalty, _ = sweep(pairing.mean_gap)
        pairs = pairing.pairs(penalty).sort_values("prompt")
    indices = [[int(text[:2]) for text in pairs[side]] for side in ("chosen", "rejected")]
    return Timed.of(watch, {"penalty": penalty, "pairs": _digest(pairs["prompt"], *indices)})


def _texts(scores: pa.Table) -> list[str]:
    """Return texts that start with the number of the response, so that pairs can be compared, and are of its length."""
    numbers = zip(scores["sample_index"].to_pylist(), scores["num_chars"].to_pylist(), strict=True)
    return [f"{k:02d}".ljust(n, "x") for k, n in numbers]


def _digest(prompts: Sequence[str], chosen: Sequence[int], rejected: Sequence[int]) -> list[int]:
    """Return chosen and rejected of each prompt as one number, in the prompts' order (both ways sort by prompt)."""
    if len(prompts) != len(chosen):
        raise ValueError(f"{len(prompts)} prompts and {len(chosen)} pairs")
    return (np.asarray(chosen) * 100 + np.asarray(rejected)).tolist()


def same_pairs(mine: Sequence[Values], peer: Sequence[Values]) -> str:
    """Say whether the penalty or a pair differs."""
    (first,), (second,) = mine, peer
    if first["penalty"] != second["penalty"]:
        return f"length penalty {first['penalty']} against {second['penalty']}"
    return "" if first["pairs"] == second["pairs"] else "other pairs"


COMPARISONS = [
    Comparison(
        "pair",
        "upstream's pandas sweep over the grid; ours joined with texts and token ids",
        ours=("pair:ours_with_texts",),
        peer=("pair:upstream",),
        clock="part",
        check=same_pairs,
    ),
    Comparison(
        "pair",
        "upstream's pandas sweep over the grid",
        ours=("pair:ours",),
        peer=("pair:upstream",),
        clock="part",
        check=same_pairs,
        least_ratio=1000,
    ),
]
