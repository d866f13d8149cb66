"""Verdicts of a judge as a table: what an evaluation asks for, and what it keeps of the answers."""

from collections.abc import Sequence
from dataclasses import replace

import pyarrow as pa

from dice_core.evaluation.result import Sample
from dice_core.judges.verdicts import Comparison, Verdict

VERDICTS = pa.schema(
    [
        pa.field("prompt_id", pa.string(), False),
        # Preference for the candidate in each order of the answers; null: missing.
        pa.field("candidate_first", pa.float64()),
        pa.field("candidate_second", pa.float64()),
    ]
)


def comparisons_of(samples: Sequence[Sample]) -> list[Comparison]:
    """Return what a judge is asked, in order."""
    return [
        Comparison(sample.prompt_id, sample.prompt, candidate=sample.policy.text, incumbent=sample.incumbent.text)
        for sample in samples
    ]


def verdict_table(samples: Sequence[Sample], verdicts: Sequence[Verdict]) -> pa.Table:
    """Return the VERDICTS on samples, in their order."""
    columns = {
        "prompt_id": [sample.prompt_id for sample in samples],
        "candidate_first": [verdict.candidate_first for verdict in verdicts],
        "candidate_second": [verdict.candidate_second for verdict in verdicts],
    }
    return pa.table(columns, schema=VERDICTS)


def with_verdicts(samples: Sequence[Sample], table: pa.Table) -> list[Sample]:
    """Return the samples with their verdicts, which are in the same order."""
    columns = (table[name].to_pylist() for name in ("candidate_first", "candidate_second"))
    return [
        replace(sample, verdict=Verdict(first, second)) for sample, first, second in zip(samples, *columns, strict=True)
    ]
