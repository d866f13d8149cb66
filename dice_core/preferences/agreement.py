"""How far two rewards rank the responses of a prompt alike: Kendall's tau-b, a prompt at a time. Pure.

1: the same order; 0: as good as unrelated; -1: the reverse. Ties, which a judge's few grades make often, are taken out
of the number of pairs that could agree (tau-b): a judge with six grades can still reach 1.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Cells of one array of pairs of responses.
_CELLS = 1 << 22


class Agreement(NamedTuple):
    """The mean over prompts.

    Attributes:
        tau: Kendall's tau-b; None where no prompt has one.
        num_prompts: that have one: two responses or more, not all alike under either reward.
    """

    tau: float | None
    num_prompts: int


def kendall_tau_b(first: Floats, second: Floats) -> Floats:
    """Return Kendall's tau-b of each row; NaN where one of the two has only equal values.

    Args:
        first: [prompts, responses] rewards.
        second: [prompts, responses] others of the same responses.

    Returns:
        [prompts] from -1 to 1.
    """
    one, other = np.triu_indices(first.shape[1], k=1)
    order = np.sign(first[:, one] - first[:, other])  # (prompts, pairs of responses)
    order_too = np.sign(second[:, one] - second[:, other])
    agreed = np.einsum("pr,pr->p", order, order_too)
    untied = (order != 0).sum(axis=1) * (order_too != 0).sum(axis=1).astype(np.float64)
    return np.asarray(np.divide(agreed, np.sqrt(untied), out=np.full(len(agreed), np.nan), where=untied > 0))


def taus_by_prompt(prompts: Ints, first: Floats, second: Floats) -> Floats:
    """Return Kendall's tau-b of each prompt that has one.

    Args:
        prompts: [rows] a number for each row's prompt.
        first: [rows] finite rewards.
        second: [rows] others of the same responses.

    Returns:
        [prompts with a tau-b], in no order that means anything.
    """
    order = np.argsort(prompts, kind="stable")
    starts = np.flatnonzero(np.diff(prompts[order], prepend=-1))
    sizes = np.diff(starts, append=len(order))
    found = [np.empty(0)]
    for size in np.unique(sizes[sizes > 1]):
        of_size = starts[sizes == size]
        step = max(1, _CELLS // int(size * size))
        for begin in range(0, len(of_size), step):
            rows = order[of_size[begin : begin + step, None] + np.arange(size)]
            found.append(kendall_tau_b(first[rows], second[rows]))
    taus = np.concatenate(found)
    return np.asarray(taus[~np.isnan(taus)])


def mean_agreement(taus: Floats) -> Agreement:
    """Return the mean of the prompts' tau-b. taus: [prompts]."""
    return Agreement(float(taus.mean()) if len(taus) else None, len(taus))
