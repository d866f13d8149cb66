"""Bounds stay bounds under arithmetic."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.planning.ranges import Range, as_range, exactly

numbers = st.floats(0.001, 1e9)
ranges = st.tuples(numbers, numbers).map(lambda pair: Range(min(pair), max(pair)))


@given(ranges, ranges, st.floats(0, 1), st.floats(0, 1))
def test_what_lies_within_the_bounds_of_two_numbers_lies_within_those_of_their_sum_product_and_quotient(
    one: Range, other: Range, share: float, other_share: float
) -> None:
    first, second = (r.low + s * (r.high - r.low) for r, s in ((one, share), (other, other_share)))
    for result, value in (
        (one + other, first + second),
        (one * other, first * second),
        (one / other, first / second),
    ):
        assert result.low * (1 - 1e-9) <= value <= result.high * (1 + 1e-9)


def test_a_number_is_a_range_of_equal_bounds() -> None:
    assert exactly(3) == Range(3, 3) == as_range(3) == as_range(Range(3, 3))
    assert (Range(1, 2) + 1, Range(1, 2) * 2, Range(1, 2) / 2) == (Range(2, 3), Range(2, 4), Range(0.5, 1))


@pytest.mark.parametrize("bounds", [(2, 1), (-1, 1)])
def test_bounds_that_are_none_are_refused(bounds: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="from a low to a high bound"):
        Range(*bounds)
