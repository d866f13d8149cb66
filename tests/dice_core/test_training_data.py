"""In which order pairs are trained on, and which are kept."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from dice_core.training_data import step_order


@given(st.integers(1, 20), st.integers(1, 8), st.integers(1, 10), st.integers(0, 3))
def test_pairs_are_used_equally_often_and_each_step_goes_from_long_to_short(
    num_pairs: int, batch: int, num_steps: int, seed: int
) -> None:
    lengths = [(7 * i) % 5 for i in range(num_pairs)]
    order = step_order(lengths, batch, num_steps, seed)
    counts = Counter(order)
    assert len(order) == batch * num_steps
    assert max(counts.values()) - min(counts.get(i, 0) for i in range(num_pairs)) <= 1
    for start in range(0, len(order), batch):
        step = [lengths[i] for i in order[start : start + batch]]
        assert step == sorted(step, reverse=True)


def test_the_order_depends_on_the_seed_alone_and_more_steps_only_add_to_it() -> None:
    lengths = list(range(10))
    assert step_order(lengths, 4, 5, 1) == step_order(lengths, 4, 5, 1)
    assert step_order(lengths, 4, 5, 1) != step_order(lengths, 4, 5, 2)
    assert step_order(lengths, 4, 9, 1)[:20] == step_order(lengths, 4, 5, 1)
