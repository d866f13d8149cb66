"""The DPO loss against numbers worked by hand, and what its gradient does."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dice_core.training.loss import chosen_nll, dpo_loss, pair_metrics, reward_accuracies

# Log-ratios: chosen -10 - -12 = 2, rejected -20 - -17 = -3; so the logits are 5, and with beta 0.1 the margin 0.5.
POLICY_CHOSEN, POLICY_REJECTED = torch.tensor([-10.0]), torch.tensor([-20.0])
REFERENCE_CHOSEN, REFERENCE_REJECTED = torch.tensor([-12.0]), torch.tensor([-17.0])
PAIR = (POLICY_CHOSEN, POLICY_REJECTED, REFERENCE_CHOSEN, REFERENCE_REJECTED)


def test_sigmoid_loss_is_minus_log_sigmoid_of_the_margin() -> None:
    losses, chosen, rejected = dpo_loss(*PAIR, beta=0.1)
    # -log(1 / (1 + e^-0.5)) = log(1 + 0.6065) = 0.4741
    assert losses.tolist() == pytest.approx([0.474077], abs=1e-6)
    assert chosen.tolist() == pytest.approx([0.2])
    assert rejected.tolist() == pytest.approx([-0.3])


def test_label_smoothing_weighs_the_loss_of_the_swapped_pair() -> None:
    losses, _, _ = dpo_loss(*PAIR, beta=0.1, label_smoothing=0.1)
    # 0.9 x 0.474077 + 0.1 x (0.474077 + 0.5)
    assert losses.tolist() == pytest.approx([0.524077], abs=1e-6)


@pytest.mark.parametrize(("beta", "expected"), [(0.1, 0.5), (0.4, 0.0)])
def test_hinge_loss_is_one_minus_the_margin_and_never_negative(beta: float, expected: float) -> None:
    losses, _, _ = dpo_loss(*PAIR, beta=beta, loss="hinge")
    assert losses.tolist() == pytest.approx([expected])


def test_ipo_loss_takes_log_ratios_per_token() -> None:
    tokens = {"num_chosen_tokens": torch.tensor([4.0]), "num_rejected_tokens": torch.tensor([6.0])}
    losses, chosen, _ = dpo_loss(*PAIR, beta=0.5, loss="ipo", **tokens)
    # 2 / 4 - -3 / 6 = 1, the target is 1 / (2 x 0.5) = 1; rewards stay those of the sums.
    assert losses.tolist() == pytest.approx([0.0])
    assert chosen.tolist() == pytest.approx([1.0])
    losses, _, _ = dpo_loss(*PAIR, beta=0.1, loss="ipo", **tokens)
    assert losses.tolist() == pytest.approx([16.0])  # (1 - 5) squared


def test_ipo_without_token_counts_and_unknown_losses_are_refused() -> None:
    with pytest.raises(ValueError, match="needs num_chosen_tokens"):
        dpo_loss(*PAIR, beta=0.1, loss="ipo")
    with pytest.raises(ValueError, match="'sigmoid', 'hinge' or 'ipo', got 'orpo'"):
        dpo_loss(*PAIR, beta=0.1, loss="orpo")  # type: ignore[arg-type]


def test_the_gradient_raises_chosen_and_lowers_rejected_by_beta_times_the_error() -> None:
    chosen, rejected = POLICY_CHOSEN.clone().requires_grad_(), POLICY_REJECTED.clone().requires_grad_()
    dpo_loss(chosen, rejected, REFERENCE_CHOSEN, REFERENCE_REJECTED, beta=0.1)[0].sum().backward()
    # DPO's gradient: beta x sigmoid(-margin) = 0.1 x (1 - 0.622459)
    assert chosen.grad is not None and rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(-0.0377541, abs=1e-6)
    assert rejected.grad.item() == pytest.approx(0.0377541, abs=1e-6)


def test_rewards_carry_no_gradient() -> None:
    _, chosen, rejected = dpo_loss(POLICY_CHOSEN.clone().requires_grad_(), *PAIR[1:], beta=0.1)
    assert not chosen.requires_grad
    assert not rejected.requires_grad


@given(st.lists(st.floats(-500, 0), min_size=2, max_size=2), st.floats(0.01, 1))
def test_the_loss_is_ln_2_where_policy_is_reference(logps: list[float], beta: float) -> None:
    values = [torch.tensor([value], dtype=torch.float64) for value in logps]
    losses, _, _ = dpo_loss(*values, *values, beta=beta)
    assert losses.item() == pytest.approx(math.log(2))


@given(st.lists(st.floats(-500, 0), min_size=4, max_size=4))
def test_a_common_shift_of_a_response_under_both_models_changes_nothing(logps: list[float]) -> None:
    def loss(shift: float) -> Tensor:
        chosen, rejected, reference_chosen, reference_rejected = (
            torch.tensor([value], dtype=torch.float64) for value in logps
        )
        return dpo_loss(chosen + shift, rejected, reference_chosen + shift, reference_rejected, beta=0.1)[0]

    assert loss(7.0).item() == pytest.approx(loss(0.0).item(), rel=1e-9)


def test_a_tie_counts_as_half_an_accuracy() -> None:
    assert reward_accuracies(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 1.0, 2.0])).tolist() == [1.0, 0.0, 0.5]


def test_metrics_have_trls_names() -> None:
    metrics = pair_metrics(torch.tensor([0.2]), torch.tensor([-0.3]), POLICY_CHOSEN, POLICY_REJECTED)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        {
            "rewards/chosen": 0.2,
            "rewards/rejected": -0.3,
            "rewards/accuracies": 1.0,
            "rewards/margins": 0.5,
            "logps/chosen": -10.0,
            "logps/rejected": -20.0,
        }
    )


def test_the_sft_term_is_the_likelihood_per_token_of_the_chosen_response() -> None:
    assert chosen_nll(POLICY_CHOSEN, torch.tensor([4.0])).tolist() == [2.5]
