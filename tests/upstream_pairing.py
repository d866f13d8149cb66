"""How sail-sg/dice pairs responses (scripts/data_script/generate_lc_paired_set.py), written anew to compare with.

Two forms of the same behaviour: `PandasPairing` works the way upstream does, one data frame for each of the K response
files, merged and paired row by row anew at every point of the grid: the peer of a benchmark. `plain_mean_gap` does the
arithmetic in plain Python, fast enough for property tests. Both feed `sweep`, upstream's grid with its early stop.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import reduce

import numpy as np
import pandas as pd

Response = tuple[float, int]  # score without beta in nats, length in characters


def sweep(mean_gap: Callable[[float], float]) -> tuple[float, list[float]]:
    """Return upstream's alpha and the gaps it looked at.

    It tries np.arange(0, 1, 0.001) in order, stops at the first gap that is worse than the best so far, in absolute
    value, and takes the first of the best.
    """
    tried: list[float] = []
    grid = np.arange(0.0, 1.0, 0.001)
    for alpha in grid:
        tried.append(abs(mean_gap(float(alpha))))
        if tried[-1] > min(tried):
            break
    return float(grid[int(np.argmin(tried))]), tried


def plain_pair(responses: Sequence[Response], alpha: float) -> tuple[int, int]:
    """Return the indices of the best and the worst response; the first of equals."""
    values = [score - alpha * length for score, length in responses]
    return values.index(max(values)), values.index(min(values))


def plain_mean_gap(prompts: Sequence[Sequence[Response]], alpha: float) -> float:
    """Return the mean of len(chosen) - len(rejected)."""
    gap = 0
    for responses in prompts:
        best, worst = plain_pair(responses, alpha)
        gap += responses[best][1] - responses[worst][1]
    return gap / len(prompts)


class PandasPairing:
    """Upstream's pairing of K files; a frame has the columns prompt, response, score."""

    def __init__(self, frames: Sequence[pd.DataFrame], num_least_scores: int = 8) -> None:
        self.frames = frames
        self.num_least_scores = num_least_scores

    def pairs(self, alpha: float) -> pd.DataFrame:
        """Return prompt, chosen, rejected and their scores: best and worst of score - alpha * len(response)."""
        merged = reduce(
            lambda left, right: left.merge(right, on="prompt", how="outer"),
            [
                self._penalised(frame, alpha).add_suffix(f"_{k}").rename(columns={f"prompt_{k}": "prompt"})
                for k, frame in enumerate(deepcopy(self.frames))
            ],
        )
        columns = {what: [f"{what}_{k}" for k in range(len(self.frames))] for what in ("score", "response")}
        merged = merged[merged[columns["score"]].count(axis=1) >= self.num_least_scores].copy()
        merged["ranking"] = merged[columns["score"]].apply(self._ranking, axis=1)
        merged["best"] = merged["ranking"].apply(lambda ranking: ranking[-1])
        merged["worst"] = merged["ranking"].apply(lambda ranking: ranking[0])
        for what, names in columns.items():
            merged[what] = merged[names].apply(list, axis=1)
        # Row by row over the whole frame, four times: upstream's own way, and most of its time.
        return pd.DataFrame(
            {
                "prompt": merged["prompt"],
                "chosen": merged.apply(lambda row: row["response"][row["best"]], axis=1),
                "rejected": merged.apply(lambda row: row["response"][row["worst"]], axis=1),
                "chosen_score": merged.apply(lambda row: row["score"][row["best"]], axis=1),
                "rejected_score": merged.apply(lambda row: row["score"][row["worst"]], axis=1),
            }
        )

    @staticmethod
    def _penalised(frame: pd.DataFrame, alpha: float) -> pd.DataFrame:
        frame["length"] = frame["response"].apply(len)
        frame["score"] = frame["score"] - alpha * frame["length"]
        return frame

    @staticmethod
    def _ranking(scores: pd.Series) -> list[int]:
        """Return the indices of the scores that are there, lowest first; argsort puts missing ones last."""
        return np.argsort(scores.to_numpy())[: scores.count()].tolist()

    def mean_gap(self, alpha: float) -> float:
        """Return the mean of len(chosen) - len(rejected) in characters."""
        pairs = self.pairs(alpha)
        return float((pairs["chosen"].apply(len) - pairs["rejected"].apply(len)).mean())


def mixed(generated: pd.DataFrame, offline: pd.DataFrame, gamma: float, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the generated and the offline pairs of the mixed set; gamma below 1. Upstream's draws have no seed."""
    num_generated = min(int(len(offline) * (1 - gamma)), len(generated))
    num_offline = int(gamma * num_generated / (1 - gamma))
    taken = generated.sample(num_generated, replace=False, random_state=seed)
    others = offline[~offline["prompt"].isin(taken["prompt"])]
    return taken, others.sample(num_offline, replace=False, random_state=seed)
