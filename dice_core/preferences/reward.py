"""The implicit reward of a DPO-tuned policy, and its length-regularised form.

Two scales are in use and they differ by DPO's beta:

- the paper (DICE, arXiv 2406.09760, Eq. 5) rewards beta * (log pi - log pi_ref) - alpha * |y|;
- upstream's code (sail-sg/dice, generate_dpo_scores.py and generate_lc_paired_set.py) leaves beta out of the score and
  penalises (log pi - log pi_ref) - alpha * |y|.

Dividing Eq. 5 by beta ranks the responses alike, so paper alpha = beta * code alpha. Everything in this package
(settings, tables, reports) is on the code's scale: nats, and nats per unit of length. `paper_length_penalty` converts.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def implicit_reward(policy_logps: ArrayLike, reference_logps: ArrayLike) -> Floats:
    """Return log pi(y|x) - log pi_ref(y|x) in nats, without beta.

    Args:
        policy_logps: [...] log-probs summed over the response tokens, end-of-turn token included, nats.
        reference_logps: the same under the policy one iteration older; broadcast against policy_logps.

    Returns:
        [...] float64; not finite where an input is not (inf - inf is nan).
    """
    with np.errstate(invalid="ignore"):
        return np.asarray(np.subtract(policy_logps, reference_logps, dtype=np.float64))


def length_regularised_reward(reward: ArrayLike, lengths: ArrayLike, length_penalty: float) -> Floats:
    """Return reward - length_penalty * length (DICE Eq. 5, divided by beta).

    Args:
        reward: [...] implicit rewards without beta, nats.
        lengths: [...] lengths of the responses, in characters of the stripped text or in tokens.
        length_penalty: nats per unit of length; negative rewards length.

    Returns:
        [...] float64, rounded in the same two operations as upstream's, so that both rank the same numbers.
    """
    return np.asarray(np.subtract(reward, length_penalty * np.asarray(lengths, dtype=np.float64), dtype=np.float64))


def paper_length_penalty(length_penalty: float, beta: float) -> float:
    """Return alpha as the paper writes it (DICE Eq. 5 and 6): beta times the length penalty of the code.

    Args:
        length_penalty: nats per unit of length, of rewards without beta.
        beta: DPO's beta.
    """
    return beta * length_penalty
