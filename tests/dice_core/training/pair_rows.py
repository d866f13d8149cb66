"""Pairs to train a tiny model on, as the contract of pairs has them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dice_core.data import records
from dice_core.models.loading import load_tokenizer


def make_rows(num_train: int = 12, num_eval: int = 0) -> list[dict[str, Any]]:
    """Return pairs of random tokens: prompts of 2 to 8, responses of 2 to 12."""
    rng = np.random.default_rng(5)

    def tokens(low: int, high: int) -> list[int]:
        return [int(token) for token in rng.integers(100, 2000, rng.integers(low, high))]

    return [
        {
            "prompt_id": f"prompt-{i}",
            "prompt": "a question",
            "chosen": "a good answer",
            "rejected": "a bad answer",
            "prompt_token_ids": tokens(2, 9),
            "chosen_token_ids": tokens(2, 13),
            "rejected_token_ids": tokens(2, 13),
            "source": "generated",
            "split": "train" if i < num_train else "eval",
        }
        for i in range(num_train + num_eval)
    ]


def as_own_pairs(rows: list[dict[str, Any]], model: Path) -> list[dict[str, Any]]:
    """Return pairs as a user's own have to be: each answer is what its ids say, and ends its turn."""
    tokenizer = load_tokenizer(model)
    for row in rows:
        for side in ("chosen", "rejected"):
            row[side] = tokenizer.decode(row[f"{side}_token_ids"])
            row[f"{side}_token_ids"].append(tokenizer.eos_token_id)
    return rows


def write_rows(rows: list[dict[str, Any]], path: Path) -> str:
    records.write_table(pa.Table.from_pylist(rows, records.PAIRS), records.PAIRS, path)
    return str(path)
