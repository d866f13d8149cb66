"""AlpacaEval's files: its prompts, the outputs of a model, and what its annotator makes of them (alpaca_eval 0.6.6).

Its prompts and baselines are CC BY-NC: they are read where the user has them, and no text of them is kept.
"""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dice_core.data.records import RecordError
from dice_core.evaluation.length_controlled import fit

# AlpacaEval writes a tie as 0 or as 1.5.
_TIE = 1.5
_COLUMNS = {
    "win_rate_percent": "win_rate",
    "win_rate_percent_se": "standard_error",
    "length_controlled_win_rate_percent": "length_controlled_winrate",
    "length_controlled_win_rate_percent_se": "lc_standard_error",
}
"""Ours by name, and what AlpacaEval calls them."""
# Of a percentage that is written with all its digits.
_SAME_PERCENT = 1e-3


@dataclass(frozen=True)
class AlpacaPrompt:
    """An instruction, with what the user's file says of its baseline."""

    instruction: str
    dataset: str = ""
    baseline_output: str = ""
    baseline: str = ""
    """Generator of that output."""


@dataclass(frozen=True)
class Annotation:
    """What an annotator says of an instruction."""

    instruction: str
    preference: float | None
    """For the model, 0 to 1; None: missing."""
    output: str
    baseline_output: str
    baseline: str
    annotator: str


def read_prompts(path: Path, name: str) -> list[AlpacaPrompt]:
    """Return the prompts of a file of the package, such as that of its baseline's outputs.

    Args:
        path: a JSON list of objects with `instruction`, and perhaps `dataset`, `output` and `generator`.
        name: what messages call it.

    Raises:
        RecordError: it is another file.
    """
    rows = _read_list(path, name)
    prompts = []
    for number, row in enumerate(rows):
        instruction = row.get("instruction")
        if not isinstance(instruction, str) or not instruction.strip():
            raise RecordError(f"{name}: object {number} has no instruction: AlpacaEval's prompts have one each")
        if row.get("input"):
            raise RecordError(f"{name}: object {number} has an input: AlpacaEval's prompts have an instruction alone")
        texts = (str(row.get(field) or "") for field in ("dataset", "output", "generator"))
        prompts.append(AlpacaPrompt(instruction, *texts))
    return prompts


def model_outputs(prompts: Sequence[AlpacaPrompt], answers: Mapping[str, str], generator: str) -> list[dict[str, str]]:
    """Return AlpacaEval's form of a model's answers, in the order of the prompts.

    Args:
        prompts: of the package.
        answers: by instruction.
        generator: what the leaderboard calls the model.
    """
    rows = []
    for prompt in prompts:
        row = {"instruction": prompt.instruction, "output": answers[prompt.instruction], "generator": generator}
        rows.append(row | ({"dataset": prompt.dataset} if prompt.dataset else {}))
    return rows


def read_leaderboard(path: Path, generator: str, name: str) -> dict[str, float]:
    """Return the numbers of a model in AlpacaEval's leaderboard.csv, percent where they are rates.

    Args:
        path: of the file.
        generator: of the model.
        name: what messages call the file.

    Raises:
        RecordError: it is another file, or has no such model.
    """
    with path.open(newline="") as stream:
        rows = {row.pop("", ""): row for row in csv.DictReader(stream)}
    if generator not in rows:
        raise RecordError(f"{name}: has no row of {generator!r}, but of {', '.join(map(repr, rows)) or 'none'}")
    if "win_rate" not in rows[generator]:
        raise RecordError(f"{name}: has no column win_rate: not a leaderboard of AlpacaEval")
    found = {column: _number(value) for column, value in rows[generator].items()}
    return {column: value for column, value in found.items() if value is not None}


def read_annotations(path: Path, name: str) -> list[Annotation]:
    """Return the verdicts in AlpacaEval's annotations.json.

    Raises:
        RecordError: it is another file.
    """
    try:
        return [
            Annotation(
                row["instruction"],
                _preference(row.get("preference")),
                row["output_2"],
                row["output_1"],
                str(row.get("generator_1") or "?"),
                str(row.get("annotator") or "?"),
            )
            for row in _read_list(path, name)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise RecordError(f"{name}: not the annotations of AlpacaEval ({type(error).__name__}: {error})") from None


def score(
    leaderboard: Mapping[str, float], annotations: Sequence[Annotation], outputs: Sequence[Mapping[str, str]], name: str
) -> dict[str, float | int | str]:
    """Return the model's numbers, as AlpacaEval has them and as they follow from the verdicts.

    Args:
        leaderboard: the model's row.
        annotations: of the model's answers.
        outputs: the model's answers, see model_outputs.
        name: what messages call the results.

    Returns:
        `win_rate_percent`, `length_controlled_win_rate_percent` and their standard errors (`_se`), as AlpacaEval
        computes them. `length_controlled_win_rate_percent_by_length` is ours, from the verdicts and the lengths alone:
        the difficulty of an instruction and the gamed baselines, which AlpacaEval's regression knows too, are left out.

    Raises:
        RecordError: the three are not of one evaluation.
    """
    ours = sorted((row["instruction"], row["output"]) for row in outputs)
    if sorted((found.instruction, found.output) for found in annotations) != ours:
        raise RecordError(f"{name}: the annotations are of other outputs than these: annotate these")
    known = [found for found in annotations if found.preference is not None]
    preferences = np.array([found.preference for found in known], dtype=np.float64)  # (known,)
    if not known:
        raise RecordError(f"{name}: no annotation has a preference: the annotator failed, see what it said")
    rate = 100 * float(preferences.mean())
    if not math.isclose(rate, leaderboard["win_rate"], abs_tol=_SAME_PERCENT):
        raise RecordError(
            f"{name}: the leaderboard says {leaderboard['win_rate']:.2f} %, its annotations give {rate:.2f} %: the two "
            "files are not of one evaluation"
        )
    values: dict[str, float | int | str] = {
        ours: leaderboard[theirs] for ours, theirs in _COLUMNS.items() if theirs in leaderboard
    }
    lengths = [(len(found.output), len(found.baseline_output)) for found in known]
    own = fit(preferences, *zip(*lengths, strict=True))
    values["length_controlled_win_rate_percent_by_length"] = 100 * own.win_rate
    values |= {"num_annotated": len(known), "num_missing": len(annotations) - len(known)}
    values |= {"mean_characters": float(np.mean([length for length, _ in lengths]))}
    values |= {"mean_characters_baseline": float(np.mean([length for _, length in lengths]))}
    return values | {"annotator": annotations[0].annotator, "baseline": annotations[0].baseline}


def _preference(value: Any) -> float | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    number = _TIE if value == 0 else float(value)
    if not 1 <= number <= 2:
        raise ValueError(f"a preference of {value}, allowed: 1 to 2, or 0 for a tie")
    return number - 1


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _read_list(path: Path, name: str) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RecordError(f"{name}: cannot be read as JSON: {error}") from None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise RecordError(f"{name}: must be a JSON list of objects, as AlpacaEval's files are")
    return rows
