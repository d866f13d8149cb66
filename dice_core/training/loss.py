"""The DPO loss and its metrics: pure functions of summed log-probs.

`logprobs` computes the log-probs; nothing here knows a model, a device or a settings object.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Literal["sigmoid", "hinge", "ipo"]


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    loss: Loss = "sigmoid",
    label_smoothing: float = 0.0,
    num_chosen_tokens: Tensor | None = None,
    num_rejected_tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the loss of each pair, and the implicit rewards of both responses.

    Args:
        policy_chosen_logps: log-probs in nats, summed over the response tokens. Shape: (pairs,)
        policy_rejected_logps: the same of the rejected responses. Shape: (pairs,)
        reference_chosen_logps: the same under the reference. Shape: (pairs,)
        reference_rejected_logps: Shape: (pairs,)
        beta: strength of the pull to the reference; IPO calls it tau.
        loss: `sigmoid` is DPO, `hinge` is SLiC's, `ipo` is IPO's.
        label_smoothing: share of pairs taken to be labelled the wrong way round (conservative DPO); `sigmoid` only.
        num_chosen_tokens: response tokens, which `ipo` needs. Shape: (pairs,)
        num_rejected_tokens: Shape: (pairs,)

    Returns:
        Losses with gradient, chosen rewards and rejected rewards without. Shape of each: (pairs,)

    Raises:
        ValueError: `ipo` without token counts, or a loss of another name.
    """
    chosen_logratios = policy_chosen_logps - reference_chosen_logps  # (pairs,)
    rejected_logratios = policy_rejected_logps - reference_rejected_logps  # (pairs,)
    # DPO Eq. 5: the implicit reward, up to a term that depends on the prompt alone.
    rewards = (beta * chosen_logratios).detach(), (beta * rejected_logratios).detach()
    logits = chosen_logratios - rejected_logratios  # (pairs,)
    if loss == "sigmoid":
        # DPO Eq. 7 (arXiv 2305.18290); with label smoothing Eq. 3 of https://ericmitchell.ai/cdpo.pdf.
        losses = -F.logsigmoid(beta * logits) * (1 - label_smoothing) - F.logsigmoid(-beta * logits) * label_smoothing
    elif loss == "hinge":
        # SLiC (arXiv 2305.10425) on DPO's logits, as in RSO (arXiv 2309.06657).
        losses = torch.relu(1 - beta * logits)
    elif loss == "ipo":
        if num_chosen_tokens is None or num_rejected_tokens is None:
            raise ValueError("loss 'ipo' needs num_chosen_tokens and num_rejected_tokens")
        # IPO Eq. 17 (arXiv 2310.12036). Log-ratios are means per token, as IPO's authors advised and TRL does
        # (https://github.com/huggingface/trl/pull/1265): with sums the target 1 / (2 beta) would depend on length.
        mean_logits = chosen_logratios / num_chosen_tokens - rejected_logratios / num_rejected_tokens  # (pairs,)
        losses = (mean_logits - 1 / (2 * beta)) ** 2
    else:
        raise ValueError(f"loss must be 'sigmoid', 'hinge' or 'ipo', got {loss!r}")
    return losses, *rewards


def chosen_nll(policy_chosen_logps: Tensor, num_chosen_tokens: Tensor) -> Tensor:
    """Return the negative log-likelihood per token of each chosen response, nats. Shapes: (pairs,).

    A mean over the tokens of each pair, not of the batch: a step does not depend on its cut into micro-batches.
    """
    return -policy_chosen_logps / num_chosen_tokens


def reward_accuracies(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """Return 1 where the chosen response has the higher reward, 0.5 on a tie, 0 elsewhere. Shapes: (pairs,).

    TRL counts a tie as 0, which shows an accuracy of 0 at step 0, where policy and reference are one model.
    """
    return ((chosen_rewards - rejected_rewards).sign() + 1) / 2


def pair_metrics(
    chosen_rewards: Tensor, rejected_rewards: Tensor, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor
) -> dict[str, Tensor]:
    """Return what is logged of each pair, under TRL's names. Shapes: (pairs,)."""
    return {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": reward_accuracies(chosen_rewards, rejected_rewards),
        "rewards/margins": chosen_rewards - rejected_rewards,
        "logps/chosen": policy_chosen_logps.detach(),
        "logps/rejected": policy_rejected_logps.detach(),
    }
