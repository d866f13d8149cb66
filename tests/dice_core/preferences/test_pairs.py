"""Training pairs: texts and token ids joined to the selection, replay, counts and errors."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from dice_core.data.records import PAIRS, PREFERENCES, PROMPTS, RESPONSES, SCORES, conform, prompt_id
from dice_core.preferences.pairs import build_pairs, offline_pairs
from dice_core.preferences.selection import PairError, select_pairs
from dice_core.preferences.settings import PairingConfig

K = 3


def ids(text: str) -> list[int]:
    """Tokenise to one token a character."""
    return [ord(character) for character in text]


def ended(text: str) -> list[int]:
    return [*ids(text), 0]


TOKENISE = {"tokenise_prompt": ids, "tokenise_response": ended}


def prompts_table(num_prompts: int) -> pa.Table:
    texts = [f"question {index}" for index in range(num_prompts)]
    return pa.table({"prompt_id": [prompt_id(text) for text in texts], "prompt": texts}, schema=PROMPTS)


def response_text(prompt: str, sample: int) -> str:
    return f"answer {sample} to {prompt}" + "!" * sample


def responses_table(prompts: pa.Table, text=response_text) -> pa.Table:
    rows = [
        {
            "prompt_id": row["prompt_id"],
            "sample_index": sample,
            "prompt_token_ids": [1, *ids(row["prompt"])],  # a BOS, which the ids of replayed prompts lack here
            "response_token_ids": ended(text(row["prompt"], sample)),
            "response": text(row["prompt"], sample),
            "finish_reason": "stop",
        }
        for row in prompts.to_pylist()
        for sample in range(K)
    ]
    return pa.Table.from_pylist(rows, schema=RESPONSES)


def scores_table(responses: pa.Table) -> pa.Table:
    """Score sample 1 best, 2 worst: rewards 0, 5, -5."""
    sample = responses["sample_index"].to_numpy()
    reward = np.array([0.0, 5.0, -5.0])[sample]
    policy_logps = -10.0 - np.arange(len(sample))
    columns = [
        responses["prompt_id"],
        responses["sample_index"],
        pa.array(policy_logps),
        pa.array(policy_logps - reward),
        pc.utf8_length(responses["response"]),
        pc.cast(pc.list_value_length(responses["response_token_ids"]), pa.int32()),
    ]
    return conform(pa.Table.from_arrays(columns, names=SCORES.names[:-1]), SCORES, "scores")


def preferences_table(prompts: pa.Table) -> pa.Table:
    texts = prompts["prompt"].to_pylist()
    columns = {"chosen": [f"good {text}" for text in texts], "rejected": [f"bad {text}" for text in texts]}
    return pa.table({**{name: prompts[name] for name in PROMPTS.names}, **columns}, schema=PREFERENCES)


class Built(NamedTuple):
    pairs: pa.Table
    counts: dict[str, int]


def all_at_once(*arguments, **settings) -> Built:
    with tempfile.TemporaryDirectory() as folder:
        built = build_pairs(*arguments, **settings, folder=Path(folder))
        return Built(pa.concat_tables(built.tables), built.counts)


def all_offline(*arguments, **settings) -> Built:
    built = offline_pairs(*arguments, **settings)
    return Built(pa.concat_tables(built.tables), built.counts)


def build(num_prompts: int = 40, seed: int = 1, shuffle: int | None = None, text=response_text, **settings) -> Built:
    config = PairingConfig(**{"length_penalty": 0.0, **settings})
    prompts = prompts_table(num_prompts)
    responses = responses_table(prompts, text)
    selection = select_pairs(scores_table(responses), 0.0, config)
    preferences = preferences_table(prompts)
    if shuffle is not None:
        rng = np.random.default_rng(shuffle)
        prompts, responses, preferences = (
            table.take(rng.permutation(table.num_rows)) for table in (prompts, responses, preferences)
        )
    return all_at_once(selection, responses, preferences, prompts=prompts, config=config, seed=seed, **TOKENISE)


def of_source(built: Built, source: str) -> list[dict]:
    return built.pairs.filter(pc.equal(built.pairs["source"], source)).to_pylist()


def test_pairs_have_the_schema_and_the_counts():
    built = build(num_prompts=40, num_eval_pairs=3)
    assert conform(built.pairs, PAIRS, "pairs").equals(built.pairs)
    assert built.counts == {
        "num_generated_pairs": 20,
        "num_replayed_pairs": 20,
        "num_train_pairs": 37,
        "num_eval_pairs": 3,
        "num_identical_pairs": 0,
        "num_identical_offline_pairs": 0,
        "num_unused_generated_pairs": 20,
        "num_missing_replayed_pairs": 0,
        "num_scores": 120,
        "num_non_finite_scores": 0,
        "num_few_responses_prompts": 0,
        "num_small_margin_prompts": 0,
        "num_tied_prompts": 0,
    }
    assert built.pairs["split"].to_pylist().count("eval") == 3


def test_generated_pair_has_the_texts_ids_rewards_and_policy_logps_of_its_responses():
    """Prompt p has rows 3p .. 3p + 2; policy log-probs are -10 - row; sample 1 is best, 2 is worst."""
    for row in of_source(build(replay_ratio=0.0), "generated"):
        number = int(row["prompt"].split()[1])
        chosen, rejected = response_text(row["prompt"], 1), response_text(row["prompt"], 2)
        assert row["prompt_id"] == prompt_id(row["prompt"])
        assert (row["chosen"], row["rejected"]) == (chosen, rejected)
        assert row["prompt_token_ids"] == [1, *ids(row["prompt"])]
        assert (row["chosen_token_ids"], row["rejected_token_ids"]) == (ended(chosen), ended(rejected))
        assert (row["chosen_reward"], row["rejected_reward"]) == (5.0, -5.0)
        assert row["chosen_reference_logps"] == -10.0 - (3 * number + 1)
        assert row["rejected_reference_logps"] == -10.0 - (3 * number + 2)


def test_replayed_pair_is_tokenised_and_has_no_rewards():
    for row in of_source(build(), "replayed"):
        assert (row["chosen"], row["rejected"]) == (f"good {row['prompt']}", f"bad {row['prompt']}")
        assert row["prompt_token_ids"] == ids(row["prompt"])
        assert (row["chosen_token_ids"], row["rejected_token_ids"]) == (ended(row["chosen"]), ended(row["rejected"]))
        assert {row[f"{side}_{what}"] for side in ("chosen", "rejected") for what in ("reward", "reference_logps")} == {
            None
        }


@pytest.mark.parametrize(
    ("replay_ratio", "generated", "replayed"), [(0.0, 40, 0), (0.5, 20, 20), (0.9, 3, 27), (1.0, 0, 40)]
)
def test_mix_follows_the_ratio_and_prompts_stay_apart(replay_ratio, generated, replayed):
    """At 0.9, int(40 * 0.09999999999999998) is 3, and int(0.9 * 3 / 0.09999999999999998) is 27."""
    built = build(replay_ratio=replay_ratio)
    sides = [{row["prompt_id"] for row in of_source(built, source)} for source in ("generated", "replayed")]
    assert len(sides[0]) == generated
    assert len(sides[1]) == replayed
    assert not sides[0] & sides[1]


def test_same_seed_gives_the_same_pairs_whatever_the_row_order():
    assert build(shuffle=5).pairs.equals(build(shuffle=6).pairs)


def test_other_seed_gives_other_pairs():
    drawn = [{row["prompt_id"] for row in of_source(build(seed=seed), "generated")} for seed in (1, 2)]
    assert drawn[0] != drawn[1]


def test_responses_may_come_part_by_part():
    config = PairingConfig()
    prompts = prompts_table(40)
    responses = responses_table(prompts)
    selection = select_pairs(scores_table(responses), 0.0, config)
    parts = (responses.slice(start, 7) for start in range(0, responses.num_rows, 7))
    built = all_at_once(
        selection, parts, preferences_table(prompts), prompts=prompts, config=config, seed=1, **TOKENISE
    )
    assert built.pairs.equals(build(num_prompts=40).pairs)


def test_identical_texts_are_dropped_counted_and_replaced():
    """Every other prompt has three equal texts: 20 of 40 prompts can be paired, and all of those are."""

    def text(prompt: str, sample: int) -> str:
        return response_text(prompt, sample) if int(prompt.split()[1]) % 2 else "the same"

    built = build(text=text)
    assert built.counts["num_generated_pairs"] == built.counts["num_replayed_pairs"] == 20
    assert all(row["chosen"] != row["rejected"] for row in built.pairs.to_pylist())
    assert 0 < built.counts["num_identical_pairs"] <= 20
    assert built.counts["num_unused_generated_pairs"] == 40 - 20 - built.counts["num_identical_pairs"]
    without_replay = build(text=text, replay_ratio=0.0).counts
    assert (without_replay["num_identical_pairs"], without_replay["num_unused_generated_pairs"]) == (20, 0)


def test_pairs_that_differ_as_text_and_not_as_token_ids_are_dropped_and_counted():
    """Offline ones by their ids of a tokenizer without case, generated ones by the ids that their table has."""
    prompts = prompts_table(10)
    preferences = preferences_table(prompts).to_pylist()
    preferences[3]["chosen"], preferences[3]["rejected"] = "Yes.", "YES."
    table = pa.Table.from_pylist(preferences, schema=PREFERENCES)
    lower = {"tokenise_prompt": ids, "tokenise_response": lambda text: ended(text.lower())}
    built = all_offline(table, config=PairingConfig(), seed=1, **lower)
    assert (built.counts["num_replayed_pairs"], built.counts["num_identical_offline_pairs"]) == (9, 1)

    responses = responses_table(prompts).to_pylist()
    for row in responses[:K]:
        row["response_token_ids"] = ended("the same")
    responses = pa.Table.from_pylist(responses, schema=RESPONSES)
    config = PairingConfig(replay_ratio=0.0)
    selection = select_pairs(scores_table(responses), 0.0, config)
    built = all_at_once(selection, responses, table, prompts=prompts, config=config, seed=1, **TOKENISE)
    assert (built.counts["num_generated_pairs"], built.counts["num_identical_pairs"]) == (9, 1)


def test_identical_offline_texts_are_dropped_and_counted():
    prompts = prompts_table(10)
    preferences = preferences_table(prompts).to_pylist()
    preferences[3]["chosen"] = preferences[3]["rejected"]
    table = pa.Table.from_pylist(preferences, schema=PREFERENCES)
    built = all_offline(table, config=PairingConfig(), seed=1, **TOKENISE)
    assert (built.counts["num_replayed_pairs"], built.counts["num_identical_offline_pairs"]) == (9, 1)


def test_offline_pairs_are_all_pairs_and_nothing_else():
    built = all_offline(preferences_table(prompts_table(50)), config=PairingConfig(), seed=1, **TOKENISE)
    assert conform(built.pairs, PAIRS, "pairs").equals(built.pairs)
    assert built.counts["num_replayed_pairs"] == 50
    assert (built.counts["num_train_pairs"], built.counts["num_eval_pairs"]) == (45, 5)
    assert set(built.pairs["source"].to_pylist()) == {"replayed"}


def test_several_offline_pairs_of_one_prompt_stay_in_one_split():
    preferences = preferences_table(prompts_table(20))
    others = preferences.set_column(2, PREFERENCES.field("chosen"), pa.array(["other"] * 20))
    twice = pa.concat_tables([preferences, others])
    built = all_offline(twice, config=PairingConfig(), seed=1, **TOKENISE)
    splits = {row["prompt_id"]: set() for row in built.pairs.to_pylist()}
    for row in built.pairs.to_pylist():
        splits[row["prompt_id"]].add(row["split"])
    assert built.counts["num_eval_pairs"] == 4
    assert all(len(split) == 1 for split in splits.values())


def test_replay_that_falls_short_is_counted():
    """All 40 offline pairs are of one prompt, which has a generated pair: none of the 20 can be replayed."""
    prompts = prompts_table(40)
    config = PairingConfig(length_penalty=0.0)
    responses = responses_table(prompts)
    selection = select_pairs(scores_table(responses), 0.0, config)
    taken = build().pairs.filter(pc.equal(build().pairs["source"], "generated"))["prompt_id"][0].as_py()
    prompt = prompts.filter(pc.equal(prompts["prompt_id"], taken))["prompt"][0].as_py()
    rows = [{"prompt_id": taken, "prompt": prompt, "chosen": f"good {n}", "rejected": "bad"} for n in range(40)]
    preferences = pa.Table.from_pylist(rows, schema=PREFERENCES)
    built = all_at_once(selection, responses, preferences, prompts=prompts, config=config, seed=1, **TOKENISE)
    assert built.counts["num_replayed_pairs"] == 0
    assert built.counts["num_missing_replayed_pairs"] == 20


def small(num_prompts: int = 4) -> dict:
    prompts = prompts_table(num_prompts)
    responses = responses_table(prompts)
    config = PairingConfig(length_penalty=0.0)
    return {
        "selection": select_pairs(scores_table(responses), 0.0, config),
        "responses": responses,
        "preferences": preferences_table(prompts),
        "prompts": prompts,
        "config": config,
        "seed": 1,
        **TOKENISE,
    }


def test_missing_response_is_an_error_that_names_its_prompt():
    arguments = small()
    arguments["responses"] = arguments["responses"].slice(0, 0)
    with pytest.raises(PairError, match=r"^pair: 2 of 2 selected responses .* prompt_id [0-9a-f]{32}, is missing"):
        all_at_once(**arguments)


def test_response_given_twice_is_an_error():
    arguments = small()
    arguments["responses"] = [arguments["responses"]] * 2
    with pytest.raises(PairError, match="is in the responses more than once"):
        all_at_once(**arguments)


def test_prompt_that_is_not_in_the_prompts_is_an_error():
    arguments = small()
    arguments["prompts"] = arguments["prompts"].slice(0, 0)
    with pytest.raises(PairError, match=r"^pair: 2 of 2 selected prompts are not in the prompts"):
        all_at_once(**arguments)


def test_replay_without_offline_pairs_is_an_error_that_says_what_to_set():
    arguments = small()
    arguments["preferences"] = PREFERENCES.empty_table()
    with pytest.raises(
        PairError, match=r"replay_ratio 0.5 needs offline preference pairs .* set pairing.replay_ratio to 0"
    ):
        all_at_once(**arguments)


def test_generated_pairs_alone_need_no_offline_pairs():
    arguments = small()
    config = arguments["config"].model_copy(update={"replay_ratio": 0.0})
    built = all_at_once(**arguments | {"preferences": PREFERENCES.empty_table(), "config": config})
    assert built.counts["num_generated_pairs"] == 4


def test_offline_pairs_alone_need_no_responses_and_no_prompts():
    arguments = small()
    config = arguments["config"].model_copy(update={"replay_ratio": 1.0})
    empty = {"responses": [], "prompts": PROMPTS.empty_table(), "config": config}
    assert all_at_once(**arguments | empty).counts["num_replayed_pairs"] == 4


def test_mix_that_comes_to_nothing_is_an_error_with_the_counts():
    """One offline pair at 0.5: int(0.5) generated pairs, so none of either."""
    arguments = small()
    arguments["preferences"] = arguments["preferences"].slice(0, 1)
    with pytest.raises(PairError, match=r"^pair: no pair is left to train on, of 1 offline and 0 generated pairs at"):
        all_at_once(**arguments)


def test_no_offline_pairs_at_all_are_an_error():
    with pytest.raises(PairError, match=r"^pair: no pair is left to train on, of 0 offline pairs"):
        all_offline(PREFERENCES.empty_table(), config=PairingConfig(), seed=1, **TOKENISE)


def test_only_responses_that_may_be_used_need_be_at_hand():
    """Texts of different lengths differ for sure: with 4 offline pairs at 0.5 those of 2 of 4 prompts are enough."""
    arguments = small()
    lengths = replace(arguments["selection"], chosen_length=np.arange(4, dtype=np.int32) + 100)
    built = all_at_once(**arguments | {"selection": lengths})
    kept = {row["prompt_id"] for row in of_source(built, "generated")}
    rows = pc.is_in(arguments["responses"]["prompt_id"], value_set=pa.array(sorted(kept)))
    again = all_at_once(**arguments | {"selection": lengths, "responses": arguments["responses"].filter(rows)})
    assert again.pairs.equals(built.pairs)


@pytest.mark.slow
def test_prompts_and_offline_pairs_may_be_more_than_two_gibibytes():
    """One chunk of 64 MiB, 33 times: an Arrow array of `string` holds 2 GiB."""
    chunk = pa.array([f"{number:02d}" + "x" * (2**20 - 2) for number in range(64)])
    texts = pa.chunked_array([chunk] * 33)
    arguments = small()
    first = arguments["prompts"]["prompt_id"].to_pylist()
    names = pa.array([*first, *(f"other {number}" for number in range(len(texts) - len(first)))])
    arguments["prompts"] = pa.Table.from_arrays([names, texts], schema=PROMPTS)
    short = pa.array([f"{number}" for number in range(len(texts))])
    arguments["preferences"] = pa.Table.from_arrays([names, short, texts, short], schema=PREFERENCES)
    built = all_at_once(**arguments)
    assert [row["prompt"][:2] for row in of_source(built, "generated")] == [
        f"{first.index(row['prompt_id']):02d}" for row in of_source(built, "generated")
    ]
    assert {row["chosen"][:2] == f"{int(row['prompt']) % 64:02d}" for row in of_source(built, "replayed")} == {True}
    assert built.counts["num_replayed_pairs"] == 4


def test_pairs_are_the_same_in_pieces_of_any_size():
    arguments = small(num_prompts=100)
    whole = all_at_once(**arguments)
    assert all_at_once(**arguments, bucket_rows=16).pairs.equals(whole.pairs)
    with tempfile.TemporaryDirectory() as folder:
        built = build_pairs(**arguments, folder=Path(folder), bucket_rows=16)
        assert [table.num_rows for table in built.tables] == [16] * 6 + [4]


def test_responses_of_other_prompts_alone_are_an_error_that_names_the_prompt():
    arguments = small()
    others = arguments["responses"]["prompt_id"].to_pylist()
    arguments["responses"] = arguments["responses"].set_column(
        0, RESPONSES.field(0), pa.array([f"x{i}" for i in others])
    )
    with pytest.raises(PairError, match=r"^pair: 2 of 2 selected responses .* prompt_id [0-9a-f]{32}, is missing"):
        all_at_once(**arguments)
