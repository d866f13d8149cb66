"""SCORES tables for tests of pairing, from rewards and lengths written down by hand or drawn."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from dice_core.data.records import SCORES

Response = tuple[float, int]  # reward in nats, length in characters


def prompt_name(index: int) -> str:
    return f"prompt-{index:04d}"


def score_table(prompts: Sequence[Sequence[Response]]) -> pa.Table:
    """Build the SCORES of prompts given as lists of (reward, characters); a token is four characters, rounded up."""
    rows = [
        (prompt_name(index), sample, reward, 0.0, length, -(-length // 4), None)
        for index, responses in enumerate(prompts)
        for sample, (reward, length) in enumerate(responses)
    ]
    columns = zip(*rows, strict=True)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SCORES, strict=True)]
    return pa.Table.from_arrays(arrays, schema=SCORES)


def random_prompts(num_prompts: int, num_responses: int, seed: int) -> list[list[Response]]:
    """Draw rewards that grow with length, as an implicit reward's do: 0.02 nats a character and noise."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(5.5, 0.6, (num_prompts, num_responses)), 4, 6699).astype(int)
    rewards = 0.02 * lengths + rng.normal(0, 5, lengths.shape)
    return [list(zip(r.tolist(), n.tolist(), strict=True)) for r, n in zip(rewards, lengths, strict=True)]
