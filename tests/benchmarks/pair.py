"""Pairing: upstream's pandas sweep (tests/upstream_pairing.py) and ours, on the same scores."""

import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.benchmarks.measure import Comparison, Timed, Values, stopwatch
from tests.benchmarks.work import Work

if TYPE_CHECKING:
    from tests.upstream_pairing import PandasPairing

_NUM_SHARDS, _PROMPTS_PER_PART = 8, 256


def _num_prompts(work: Work, num_prompts: str) -> int:
    return int(num_prompts) if num_prompts else work.size.num_pairing_prompts


def ours(folder: Path, num_prompts: str = "") -> Timed:
    """Find upstream's penalty and select the pairs; the table is in memory, grouping it counts."""
    from dice_core.preferences.length_penalty import choose_length_penalty
    from dice_core.preferences.selection import group_scores, select_pairs
    from dice_core.preferences.settings import PairingConfig

    work = Work(folder)
    config = PairingConfig(length_penalty="grid")
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
    from dice_core.preferences.length_penalty import choose_length_penalty
    from dice_core.preferences.selection import group_scores, select_pairs
    from dice_core.preferences.settings import PairingConfig

    work = Work(folder)
    config = PairingConfig()
    file = pq.ParquetFile(work.scores(_num_prompts(work, num_prompts)))
    with stopwatch() as watch:
        parts = (pa.Table.from_batches([batch]) for batch in file.iter_batches(1 << 20))
        grouped = group_scores(parts, config)
        penalty = choose_length_penalty(grouped, config)
        selection = select_pairs(grouped, penalty.value, config)
    return Timed.of(watch, {"penalty": penalty.value, "num_pairs": len(selection.prompt_id)})


def ours_with_texts(folder: Path) -> Timed:
    """Do what `ours` does and join the pairs with their texts and token ids, from a table in memory."""
    from dice_core.data.records import PREFERENCES, PROMPTS, RESPONSES, conform
    from dice_core.preferences.length_penalty import choose_length_penalty
    from dice_core.preferences.pairs import build_pairs
    from dice_core.preferences.selection import group_scores, select_pairs
    from dice_core.preferences.settings import PairingConfig

    work = Work(folder)
    config = PairingConfig(length_penalty="grid", replay_ratio=0, num_eval_pairs=0)
    table = pq.read_table(work.scores(work.size.num_pairing_prompts))
    prompt_ids, texts = pa.array([[1]] * table.num_rows, pa.list_(pa.int32())), _texts(table)
    # Pairs of the same token ids would be dropped.
    ids = pa.array([[index] for index in table["sample_index"].to_pylist()], pa.list_(pa.int32()))
    columns = [table["prompt_id"], table["sample_index"], prompt_ids, ids, pa.array(texts), ["stop"] * table.num_rows]
    responses = conform(pa.table(columns, RESPONSES.names[: len(columns)]), RESPONSES, "responses")
    names = table["prompt_id"].unique()
    prompts = pa.Table.from_arrays([names, names], schema=PROMPTS)
    with tempfile.TemporaryDirectory() as scratch, stopwatch() as watch:
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
            folder=Path(scratch),
        )
        pairs = pa.concat_tables(made.tables)
    indices = [[int(text[:2]) for text in pairs[side].to_pylist()] for side in ("chosen", "rejected")]
    return Timed.of(watch, {"penalty": penalty.value, "pairs": _digest(pairs["prompt_id"], *indices)})


def ours_stage(
    folder: Path, num_prompts: str = "", length_penalty: str = "grid", selection: str = "best-worst"
) -> Timed:
    """Run the stage itself: parts of 256 prompts in 8 shards on storage, texts joined, pairs written and published."""
    from dice_core.data.records import PAIRS, read_table
    from dice_core.stages.pair import pair

    work = Work(folder)
    place = _stage_inputs(work, _num_prompts(work, num_prompts))
    uris = {
        f"{kind}_uris": [str(place / f"{kind}-{i}") for i in range(_NUM_SHARDS)] for kind in ("scores", "responses")
    }
    pairing = {"length_penalty": length_penalty, "selection": selection, "replay_ratio": 0, "num_eval_pairs": 0}
    with tempfile.TemporaryDirectory(dir=place) as out:
        with stopwatch() as watch:
            report = pair(str(place / "data"), str(place / "policy"), out, pairing=pairing, **uris)
        pairs = read_table(Path(out) / "pairs.parquet", PAIRS, ["prompt_id", "chosen", "rejected"])
        indices = [[int(text[:2]) for text in pairs[side].to_pylist()] for side in ("chosen", "rejected")]
    values = {"penalty": report.metrics["length_penalty"], "pairs": _digest(pairs["prompt_id"], *indices)}
    values |= {name: report.metrics[f"length_{name}"] for name in ("gap", "gap_unpenalised")}
    return Timed.of(watch, values)


def ours_stage_exact(folder: Path) -> Timed:
    """Run the stage with the exact penalty of best-worst."""
    return ours_stage(folder, length_penalty="exact")


def ours_stage_mu_2sigma(folder: Path) -> Timed:
    """Run the stage with selection `mu-2sigma`, whose penalty is searched for."""
    return ours_stage(folder, length_penalty="exact", selection="mu-2sigma")


def ours_stage_margin(folder: Path) -> Timed:
    """Run the stage with selection `margin`, whose penalty is searched for."""
    return ours_stage(folder, length_penalty="exact", selection="margin")


def _stage_inputs(work: Work, num_prompts: int) -> Path:
    """Make the places that the stage reads, or take the ones that are there.

    Texts are of 400 characters and 100 tokens, one for each sample index: files stay small, what is read does not.
    """
    from dice_core.data.records import PREFERENCES, PROMPTS, RESPONSES, SCORES, write_table
    from dice_core.storage.manifest import Manifest, publish_files

    place = work.folder / f"pair-stage-{num_prompts}"
    if (place / "complete").is_file():
        return place
    shutil.rmtree(place, ignore_errors=True)
    scratch = place / "scratch"
    scratch.mkdir(parents=True)
    makers = {"scores": "score", "responses": "generate", "data": "prepare-data", "policy": "import-model"}
    made = {name: Manifest(stage=stage, fingerprint="", files={}) for name, stage in makers.items()}
    names: list[pa.Array] = []
    parts: dict[str, list[Path]] = {"scores": [], "responses": []}
    for number, scores in enumerate(_parts_of(work, num_prompts)):
        names.append(scores["prompt_id"].unique())
        for kind, table, schema in (("scores", scores, SCORES), ("responses", _responses(scores), RESPONSES)):
            parts[kind].append(scratch / f"{kind}-{number:05d}.parquet")
            write_table(table, schema, parts[kind][-1])
    for kind, paths in parts.items():
        for shard in range(_NUM_SHARDS):
            chosen = paths[shard * len(paths) // _NUM_SHARDS : (shard + 1) * len(paths) // _NUM_SHARDS]
            publish_files(str(place / f"{kind}-{shard}"), {path.name: path for path in chosen}, made[kind])
    ids = pa.chunked_array(names)
    data = {"prompts": pa.Table.from_arrays([ids, ids], schema=PROMPTS), "preferences": PREFERENCES.empty_table()}
    for name, table in data.items():
        write_table(table, table.schema, scratch / f"{name}.parquet")
    publish_files(str(place / "data"), {f"{name}.parquet": scratch / f"{name}.parquet" for name in data}, made["data"])
    tokenizer = {path.name: path for path in work.policy.iterdir() if path.suffix in (".json", ".jinja", ".txt")}
    publish_files(str(place / "policy"), tokenizer, made["policy"])
    shutil.rmtree(scratch)
    (place / "complete").touch()
    return place


def _parts_of(work: Work, num_prompts: int) -> Iterator[pa.Table]:
    rows = _PROMPTS_PER_PART * work.size.num_responses
    for group in range((file := pq.ParquetFile(work.scores(num_prompts))).num_row_groups):
        table = file.read_row_group(group).combine_chunks()
        yield from (table.slice(start, rows) for start in range(0, table.num_rows, rows))


def _responses(scores: pa.Table) -> pa.Table:
    from dice_core.data.records import RESPONSES, conform

    samples = scores["sample_index"].combine_chunks()
    num_samples = int(samples.to_numpy().max()) + 1
    texts = pa.array([f"{k:02d}".ljust(400, "x") for k in range(num_samples)])
    ids = pa.array([[k] * 100 for k in range(num_samples)], pa.list_(pa.int32()))
    columns = [scores["prompt_id"], samples, ids.take(samples), ids.take(samples), texts.take(samples)]
    columns += [pa.array(["stop"] * len(samples))]
    return conform(pa.table(columns, RESPONSES.names[: len(columns)]), RESPONSES, "responses")


def ours_penalty(folder: Path, num_prompts: str = "") -> Timed:
    """Find the exact length penalty alone; the scores are grouped."""
    from dice_core.preferences.length_penalty import exact_length_penalty, gap_steps
    from dice_core.preferences.selection import group_scores
    from dice_core.preferences.settings import PairingConfig

    work = Work(folder)
    file = pq.ParquetFile(work.scores(_num_prompts(work, num_prompts)))
    parts = (pa.Table.from_batches([batch]) for batch in file.iter_batches(1 << 20))
    grouped = group_scores(parts, PairingConfig())
    with stopwatch() as watch:
        penalty = exact_length_penalty(grouped, gap_steps(grouped))
    print(f"pair: the exact length penalty in {1000 * watch.seconds:.1f} ms", file=sys.stderr)
    return Timed.of(watch, {"penalty": penalty, "gap": grouped.mean_length_gap(penalty)})


def upstream_penalty(folder: Path) -> Timed:
    """Sweep the grid alone; the frames are in memory."""
    from tests.upstream_pairing import sweep

    work = Work(folder)
    pairing = _pandas_pairing(work, work.size.num_pairing_prompts)
    with stopwatch() as watch:
        penalty, gaps = sweep(pairing.mean_gap)
    return Timed.of(watch, {"penalty": penalty, "gap": min(gaps, key=abs)})


def ours_small(folder: Path) -> Timed:
    """Pair the prompts of one small iteration."""
    return ours(folder, str(Work(folder).size.num_prompts))


def upstream_small(folder: Path) -> Timed:
    """Pair the prompts of one small iteration as upstream does."""
    return upstream(folder, str(Work(folder).size.num_prompts))


def upstream(folder: Path, num_prompts: str = "") -> Timed:
    """Sweep the grid with a pandas pairing at each point, and pair at the best; the frames are in memory."""
    from tests.upstream_pairing import sweep

    work = Work(folder)
    pairing = _pandas_pairing(work, _num_prompts(work, num_prompts))
    with stopwatch() as watch:
        penalty, _ = sweep(pairing.mean_gap)
        pairs = pairing.pairs(penalty).sort_values("prompt")
    indices = [[int(text[:2]) for text in pairs[side]] for side in ("chosen", "rejected")]
    return Timed.of(watch, {"penalty": penalty, "pairs": _digest(pairs["prompt"], *indices)})


def _pandas_pairing(work: Work, num_prompts: int) -> "PandasPairing":
    import pandas as pd

    from tests.upstream_pairing import PandasPairing

    table = pq.read_table(work.scores(num_prompts))
    scores, texts = table.to_pandas(), _texts(table)
    frame = pd.DataFrame({"prompt": scores["prompt_id"], "response": texts, "score": scores["policy_logps"]})
    frames = [frame[scores["sample_index"] == k].reset_index(drop=True) for k in range(work.size.num_responses)]
    return PandasPairing(frames, num_least_scores=2)


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


def balanced_lengths(mine: Sequence[Values], peer: Sequence[Values]) -> str:
    """Say whether the penalty of either leaves a larger gap of lengths than none would."""
    gaps = [abs(values["gap"]) - abs(values["gap_unpenalised"]) for values in (*mine, *peer)]
    return "" if max(gaps) <= 0 else "a gap of lengths larger than without a penalty"


def no_worse_penalty(mine: Sequence[Values], peer: Sequence[Values]) -> str:
    """Say whether our penalty leaves a larger gap of lengths than the grid's."""
    (first,), (second,) = mine, peer
    return "" if abs(first["gap"]) <= abs(second["gap"]) else f"length gap {first['gap']} against {second['gap']}"


COMPARISONS = [
    Comparison(
        "pair",
        "upstream's pandas sweep over the grid, frames in memory; ours the whole stage, parts and pairs on storage",
        ours=("pair:ours_stage",),
        peer=("pair:upstream",),
        clock="part",
        check=same_pairs,
    ),
    Comparison(
        "pair",
        "upstream's search of the length penalty alone; ours finds the exact one",
        ours=("pair:ours_penalty",),
        peer=("pair:upstream_penalty",),
        clock="part",
        check=no_worse_penalty,
    ),
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
    *(
        Comparison(
            "pair",
            f"the whole stage with best-worst; with selection {rule}",
            ours=(f"pair:ours_stage_{rule.replace('-', '_')}",),
            peer=("pair:ours_stage_exact",),
            clock="part",
            check=balanced_lengths,
            least_ratio=0.5,
        )
        for rule in ("mu-2sigma", "margin")
    ),
]
