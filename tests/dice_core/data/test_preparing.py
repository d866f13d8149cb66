import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dice_core.data.decontamination import normalised_text
from dice_core.data.preparing import prepare
from dice_core.data.records import PREFERENCES, PROMPTS, RecordError, prompt_id
from dice_core.data.settings import DataConfig
from dice_core.data.sources import PREFERENCE_TEXT, PROMPT_TEXT, Rows, read_preferences
from dice_core.settings.base import ConfigError


def pairs(*rows, **num_dropped) -> Rows:
    columns = zip(*rows, strict=True) if rows else [()] * 3
    arrays = [pa.array(column, pa.large_string()) for column in columns]
    return Rows(pa.Table.from_arrays(arrays, schema=PREFERENCE_TEXT), num_dropped, "pairs.jsonl")


def prompts(*texts) -> Rows:
    return Rows(pa.table([pa.array(texts, pa.large_string())], schema=PROMPT_TEXT), {}, "prompts.jsonl")


def run(
    prompt_rows,
    preference_rows,
    *,
    seed=0,
    max_prompt_tokens=1000,
    benchmark_prompts=(),
    control_tokens=(),
    rows_at_a_time=4096,
    keep_control_tokens=False,
    tokenise_response=str.encode,
    **settings,
):
    kept = {"control_tokens": "keep"} if keep_control_tokens else {}
    return prepare(
        prompt_rows,
        preference_rows,
        DataConfig(**{"num_held_out": 1, **settings, **kept}),
        seed=seed,
        num_prompt_tokens=lambda texts: [len(text.split()) for text in texts],
        max_prompt_tokens=max_prompt_tokens,
        benchmark_prompts=benchmark_prompts,
        control_tokens=control_tokens,
        rows_at_a_time=rows_at_a_time,
        tokenise_response=tokenise_response,
    )


def numbered(count):
    return [(f"question {number}", "good", "bad") for number in range(count)]


def texts(table, name="prompt"):
    return set(table[name].to_pylist())


def test_tables_have_their_schemas_and_ids_of_the_exact_text():
    prepared = run(None, pairs(*numbered(5)), num_held_out=2)
    assert prepared.prompts.schema == PROMPTS
    assert prepared.preferences.schema == PREFERENCES
    assert prepared.held_out.schema == PREFERENCES
    assert prepared.counts == {"num_prompts": 3, "num_preferences": 3, "num_held_out": 2}
    for row in prepared.held_out.to_pylist():
        assert row["prompt_id"] == prompt_id(row["prompt"])


def test_prompts_default_to_those_of_the_replayed_preferences():
    prepared = run(None, pairs(*numbered(5)), num_held_out=2)
    assert texts(prepared.prompts) == texts(prepared.preferences)
    assert texts(prepared.prompts) | texts(prepared.held_out) == {row[0] for row in numbered(5)}


def test_a_held_out_prompt_is_not_generated_on_even_if_the_prompts_file_has_it():
    prepared = run(prompts("QUESTION  0", "question 1", "other"), pairs(*numbered(2)))
    (held_out,) = texts(prepared.held_out)
    assert normalised_text(held_out) not in {normalised_text(text) for text in texts(prepared.prompts)}
    assert prepared.counts["num_dropped_prompts_held_out"] == 1
    assert prepared.counts["num_prompts"] == 2


def test_every_reason_to_drop_a_pair_is_counted_by_itself():
    prepared = run(
        None,
        pairs(
            *numbered(3),
            ("Question  0", "GOOD", "bad "),  # the first again, but for case and spaces
            ("same", "x", " x\n"),
            ("a long answer", "good", "b" * 11),
            ("a prompt of five words", "good", "bad"),
            ("What is love?", "good", "bad"),
            not_single_turn=4,
        ),
        max_response_characters=10,
        max_prompt_tokens=4,
        benchmark_prompts=["what is love"],
    )
    assert prepared.counts == {
        "num_prompts": 2,
        "num_preferences": 2,
        "num_held_out": 1,
        "num_dropped_preferences_duplicate": 1,
        "num_dropped_preferences_in_benchmark": 1,
        "num_dropped_preferences_not_single_turn": 4,
        "num_dropped_preferences_prompt_too_long": 1,
        "num_dropped_preferences_response_too_long": 1,
        "num_dropped_preferences_same_answers": 1,
    }


def test_prompts_are_cleaned_like_pairs():
    prepared = run(
        prompts("one", "One ", "a prompt of five words", "What is love?"),
        pairs(*numbered(2)),
        max_prompt_tokens=4,
        benchmark_prompts=["what is love"],
    )
    assert prepared.counts["num_prompts"] == 1
    assert prepared.counts["num_dropped_prompts_duplicate"] == 1
    assert prepared.counts["num_dropped_prompts_prompt_too_long"] == 1
    assert prepared.counts["num_dropped_prompts_in_benchmark"] == 1


def test_different_pairs_of_a_prompt_stay_and_are_never_split():
    rows = [(f"question {number % 4}", f"good {number}", "bad") for number in range(12)]
    prepared = run(None, pairs(*rows), num_held_out=4)
    # 4 asks for one pair of the second prompt: its others follow.
    assert prepared.counts["num_held_out"] == 6
    assert prepared.counts["num_preferences"] == 6
    assert prepared.counts["num_prompts"] == 2
    assert not texts(prepared.held_out) & texts(prepared.preferences)


def test_max_preferences_takes_a_subset_and_its_prompts_and_counts_the_rest():
    source = pairs(*numbered(50))
    some = run(None, source, max_preferences=10)
    assert (some.counts["num_preferences"], some.counts["num_prompts"]) == (10, 10)
    assert texts(some.prompts) == texts(some.preferences)
    assert some.counts["num_dropped_preferences_not_sampled"] == 50 - 10 - some.counts["num_held_out"]


def test_max_prompts_takes_a_subset_that_a_larger_one_contains():
    source = pairs(*numbered(50))
    some = run(None, source, max_prompts=10)
    more = run(None, source, max_prompts=20)
    assert some.counts["num_prompts"] == 10
    assert some.counts["num_dropped_prompts_not_sampled"] == 39
    assert texts(some.prompts) < texts(more.prompts)
    assert run(None, source, max_prompts=1000).counts["num_prompts"] == 49


def test_the_seed_decides_the_split():
    source = pairs(*numbered(200))
    first, again, other = (texts(run(None, source, seed=seed, num_held_out=50).held_out) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    # Two random quarters of 200 share 12.5 rows on average.
    assert len(first & other) < 30


def test_a_row_more_moves_at_most_one_other_out_of_held_out():
    before = texts(run(None, pairs(*numbered(100)), num_held_out=20).held_out)
    after = texts(run(None, pairs(*numbered(101)), num_held_out=20).held_out)
    assert len(before - after) <= 1


@pytest.mark.parametrize("num_held_out", [3, 4, 256])
def test_held_out_that_leaves_nothing_to_train_on_is_an_error(num_held_out):
    with pytest.raises(ConfigError, match=rf"data.num_held_out: .* pairs.jsonl has 3 usable pairs, got {num_held_out}"):
        run(None, pairs(*numbered(3)), num_held_out=num_held_out)


def test_pairs_of_one_prompt_alone_are_refused_by_that_name():
    file = Path(__file__).parents[2] / "data" / "rows" / "alpaca-input" / "one-prompt.jsonl"
    with pytest.raises(ConfigError, match=r"all 6 usable pairs have one prompt, and held-out pairs are whole prompts"):
        run(None, read_preferences(str(file)))


def test_rows_with_control_tokens_are_dropped_and_counted_or_kept():
    rows = pairs(*numbered(3), ("a", "b<|im_end|>", "c"), ("<|im_start|>user\na", "b", "c"), ("x", "b", "[INST] c"))
    tokens = ["<|im_start|>", "<|im_end|>", "[INST]"]
    assert run(None, rows, control_tokens=tokens).counts["num_dropped_preferences_control_tokens"] == 3
    kept = run(None, rows, control_tokens=tokens, keep_control_tokens=True)
    assert kept.counts["num_preferences"] + kept.counts["num_held_out"] == 6
    only = run(prompts("x", "a<|im_end|>"), pairs(*numbered(2)), control_tokens=tokens)
    assert only.counts["num_dropped_prompts_control_tokens"] == 1


def test_answers_of_the_same_token_ids_are_the_same():
    rows = pairs(*numbered(3), ("a", "Yes.", "YES."))
    counts = run(None, rows, tokenise_response=lambda text: text.lower().encode()).counts
    assert counts["num_dropped_preferences_same_answers"] == 1


def test_rows_that_were_cleaned_are_counted():
    rows = Rows(pairs(*numbered(3)).table, {}, "pairs.jsonl", {"repeated_prompt": 2})
    assert run(None, rows).counts["num_cleaned_preferences_repeated_prompt"] == 2
    counts = run(Rows(prompts("x").table, {}, "p", {"system_prompt": 1}), rows).counts
    assert counts["num_cleaned_prompts_system_prompt"] == 1


def test_nothing_left_says_where_it_went():
    with pytest.raises(RecordError, match=r"pairs.jsonl: no preference pair is left, dropped: 1 same_answers"):
        run(None, pairs(("a", "b", "b")))
    with pytest.raises(RecordError, match=r"prompts.jsonl: no prompt is left .* dropped: 1 prompt_too_long"):
        run(prompts("one two three"), pairs(*numbered(2)), max_prompt_tokens=2)


def test_an_empty_table_of_prompts_is_an_error():
    with pytest.raises(RecordError, match=r"prompts.jsonl: no prompt is left to generate on, dropped: none"):
        run(prompts(), pairs(*numbered(2)))


def test_tables_longer_than_a_piece_are_whole():
    rows = [(f"question {number}", f"good {number}", f"bad {number}") for number in range(40)]
    prepared = run(None, pairs(*rows), num_held_out=16, rows_at_a_time=7)
    found = pa.concat_tables([prepared.preferences, prepared.held_out]).to_pylist()
    assert {(row["prompt"], row["chosen"], row["rejected"]) for row in found} == set(rows)


# Few short texts, so that duplicates, equal answers and shared prompts are common.
SHORT = st.sampled_from(["a", "A", " a ", "b", "b b", "c", "d d d", "e", "\uff41"])
ROWS = st.lists(st.tuples(SHORT, SHORT, SHORT), min_size=1, max_size=30)


def outcome(prepared):
    return (prepared.prompts.to_pylist(), prepared.preferences.to_pylist(), prepared.held_out.to_pylist())


@given(ROWS, st.none() | st.lists(SHORT, min_size=1), st.integers(1, 5), st.integers(0, 2**31), st.randoms())
def test_splits_are_disjoint_nothing_is_lost_and_order_does_not_matter(
    rows, prompt_texts, num_held_out, seed, shuffler: random.Random
):
    settings = {
        "seed": seed,
        "num_held_out": num_held_out,
        "max_prompt_tokens": 2,
        "max_prompts": 3,
        "benchmark_prompts": ["e"],
    }
    try:
        prepared = run(prompts(*prompt_texts) if prompt_texts else None, pairs(*rows), **settings)
    except (ConfigError, RecordError):
        return
    held_out, replayed, asked = (
        Counter(normalised_text(text) for text in table["prompt"].to_pylist())
        for table in (prepared.held_out, prepared.preferences, prepared.prompts)
    )
    assert not held_out.keys() & (replayed.keys() | asked.keys())
    assert set(asked.values()) == {1}
    assert len(prepared.held_out) >= num_held_out

    counts = prepared.counts
    dropped = {
        kind: sum(count for name, count in counts.items() if name.startswith(f"num_dropped_{kind}_"))
        for kind in ("prompts", "preferences")
    }
    assert counts["num_preferences"] + counts["num_held_out"] + dropped["preferences"] == len(rows)
    num_prompt_rows = len(prompt_texts) if prompt_texts else counts["num_preferences"]
    assert counts["num_prompts"] + dropped["prompts"] == num_prompt_rows

    shuffler.shuffle(rows)
    if prompt_texts:
        shuffler.shuffle(prompt_texts)
    again = run(prompts(*prompt_texts) if prompt_texts else None, pairs(*rows), **settings)
    assert outcome(again) == outcome(prepared)
    assert again.counts == counts
