"""What is said of the change that training made, and the weights that are refused."""

import pytest
import torch

from dice_core.models.files import ModelError
from dice_core.training.trained_model import weight_change

pytestmark = pytest.mark.slow


def test_rounding_loses_a_change_smaller_than_bfloat16_resolves() -> None:
    # Next to 1 the values of bfloat16 are 2^-7 apart: 1 + 2^-10 goes back to 1, and all of the change is lost.
    start, end = {"a": torch.tensor([1.0])}, {"a": torch.tensor([1.0 + 2**-10])}
    change = weight_change(start, end, "bfloat16")
    assert change.rounding_loss == pytest.approx(1.0)
    assert change.relative_update == pytest.approx(2**-10)
    assert weight_change(start, end, "float32").rounding_loss == 0


def test_a_change_that_bfloat16_holds_is_kept() -> None:
    change = weight_change({"a": torch.tensor([1.0])}, {"a": torch.tensor([1.5])}, "bfloat16")
    assert (change.rounding_loss, change.relative_update) == (0.0, 0.5)


def test_weights_that_did_not_move_are_no_division_by_zero() -> None:
    same = {"a": torch.tensor([1.0])}
    assert weight_change(same, same, "bfloat16").relative_update == 0


@pytest.mark.parametrize(
    ("after", "message"),
    [
        ({}, r"a: must have shape \(1,\), got none"),
        ({"a": torch.zeros(0)}, r"must have shape \(1,\), got \(0,\)"),
        ({"a": torch.tensor([float("nan")])}, "not finite"),
    ],
)
def test_empty_missing_and_non_finite_weights_are_refused(after: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        weight_change({"a": torch.tensor([1.0])}, after, "float32")
