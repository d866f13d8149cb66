"""Which responses are valid, worked by hand, and scores of real (tiny) models."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers

from dice_core.data import records
from dice_core.logprobs.forward import PromptGroup, group_logps
from dice_core.models.files import ModelError
from dice_core.models.loading import load_model
from dice_core.models.placement import parts_of, working_bytes
from dice_core.preferences.scoring import filter_responses, score_parts
from dice_core.preferences.settings import ScoringConfig

pytestmark = pytest.mark.slow

TWO_VALID = ScoringConfig(min_valid_responses=2, dtype="float32", tokens_per_batch=64)


def response(prompt: str = "a", index: int = 0, text: str = "good text", **changes: Any) -> dict[str, Any]:
    tokens = {"prompt_token_ids": [5, 6, ord(prompt[0]) % 50 + 3], "response_token_ids": [7 + index, 8, 9, 1]}
    row = {"prompt_id": prompt, "sample_index": index, **tokens, "response": text, "finish_reason": "stop"}
    return {**row, **changes}


def table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=records.RESPONSES)


def drops(rows: list[dict[str, Any]], config: ScoringConfig = TWO_VALID) -> dict[str, int]:
    """Return the reasons that dropped something."""
    return {reason: count for reason, count in filter_responses(table(rows), config).num_dropped.items() if count}


def test_all_reasons_are_reported_also_when_nothing_is_dropped() -> None:
    filtered = filter_responses(table([response(index=0), response(index=1)]), TWO_VALID)
    assert filtered.responses.num_rows == 2
    reasons = ["length_limit", "empty", "too_short", "too_long", "few_valid_responses"]
    assert filtered.num_dropped == dict.fromkeys(reasons, 0)


@pytest.mark.parametrize(
    ("num_chars", "reason"), [(3, "too_short"), (4, None), (6699, None), (6700, "too_long")], ids=str
)
def test_the_character_limits_are_those_of_upstream(num_chars: int, reason: str | None) -> None:
    rows = [response(index=0), response(index=1), response(index=2, text="x" * num_chars)]
    assert drops(rows) == ({reason: 1} if reason else {})


@pytest.mark.parametrize("text", [" \n\tabc\u00a0\u3000", "abc\x1c", "\u4f60\u597d\u5417", "\U0001f600\U0001f601!"])
def test_characters_are_unicode_and_counted_without_the_white_space_around(text: str) -> None:
    assert len(text.strip()) == 3
    assert drops([response(index=0), response(index=1), response(index=2, text=text)]) == {"too_short": 1}


def test_a_response_that_was_cut_off_is_dropped_and_counts_once() -> None:
    rows = [response(index=0), response(index=1), response(index=2, text="", finish_reason="length")]
    assert drops(rows) == {"length_limit": 1}


def test_a_response_without_tokens_is_empty() -> None:
    rows = [response(index=0), response(index=1), response(index=2, response_token_ids=[], text="")]
    assert drops(rows, ScoringConfig(min_valid_responses=2, min_characters=0)) == {"empty": 1}


def test_a_prompt_keeps_its_responses_with_eight_valid_of_sixteen_and_loses_them_with_seven() -> None:
    def sixteen(prompt: str, num_valid: int) -> list[dict[str, Any]]:
        return [response(prompt, index, text="good" if index < num_valid else "bad") for index in range(16)]

    # Interleaved: the rows of a prompt need not stand together.
    rows = [row for pair in zip(sixteen("a", 8), sixteen("b", 7), strict=True) for row in pair]
    filtered = filter_responses(table(rows), ScoringConfig())
    assert filtered.num_dropped["too_short"] == 8 + 9
    assert filtered.num_dropped["few_valid_responses"] == 7
    assert filtered.responses["prompt_id"].to_pylist() == ["a"] * 8
    assert filtered.responses["sample_index"].to_pylist() == list(range(8))


def test_no_responses_give_no_rows() -> None:
    filtered = filter_responses(table([]), TWO_VALID)
    assert filtered.responses.num_rows == 0
    assert set(filtered.num_dropped.values()) == {0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """Two tiny models with different random weights."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, eos_token_id=1
    )
    for seed, name in enumerate(("policy", "reference")):
        torch.manual_seed(seed)
        transformers.LlamaForCausalLM(config).save_pretrained(root / name)
    yield root / "policy", root / "reference"
    torch.set_num_threads(num_threads)


# Prompts in a mixed order, so that rows must be put back where they were.
ROWS = [
    response(prompt, index, text=f" {'word ' * (index + 1)}", response_token_ids=[3 + index] * (1 + 2 * index) + [1])
    for index in (2, 0, 1)
    for prompt in ("b", "a")
]


def test_scores_are_the_log_probs_of_each_row_under_both_models(folders: tuple[Path, Path], device: str) -> None:
    [(index, scores)] = score_parts(*folders, [(7, table(ROWS))], TWO_VALID)
    assert index == 7
    for column, folder in zip(("policy_logps", "reference_logps"), folders, strict=True):
        model = load_model(folder, "float32")
        groups = [PromptGroup(row["prompt_token_ids"], [row["response_token_ids"]]) for row in ROWS]
        expected = np.concatenate(group_logps(model, groups, tokens_per_batch=1))
        assert scores[column].to_pylist() == pytest.approx(expected.tolist(), abs=1e-3)
    assert scores.schema == records.SCORES
    assert scores["prompt_id"].to_pylist() == [row["prompt_id"] for row in ROWS]
    assert scores["sample_index"].to_pylist() == [row["sample_index"] for row in ROWS]
    assert scores["num_chars"].to_pylist() == [14, 14, 4, 4, 9, 9]
    assert scores["num_tokens"].to_pylist() == [6, 6, 2, 2, 4, 4]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_policy_that_is_its_own_reference_has_rewards_of_exactly_zero(folders: tuple[Path, Path], dtype: str) -> None:
    config = TWO_VALID.model_copy(update={"dtype": dtype})
    done: list[tuple[int, int]] = []
    same_folder = folders[0].parent / "reference" / ".." / "policy"
    parts = score_parts(folders[0], same_folder, [(0, table(ROWS))], config, lambda *counts: done.append(counts))
    [(_, scores)] = parts
    assert scores["policy_logps"].to_pylist() == scores["reference_logps"].to_pylist()
    assert done[-1] == (6, 6)


def test_two_folders_with_the_same_weights_have_rewards_of_exactly_zero(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    load_model(folders[0], "float32").save_pretrained(tmp_path)
    config = TWO_VALID.model_copy(update={"dtype": "bfloat16"})
    [(_, scores)] = score_parts(folders[0], tmp_path, [(0, table(ROWS))], config)
    assert scores["policy_logps"].to_pylist() == scores["reference_logps"].to_pylist()


def test_models_are_loaded_once_and_parts_read_one_at_a_time(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, read = [], []

    def load(folder: Path, dtype: Any) -> Any:
        loaded.append(folder.name)
        return load_model(folder, dtype)

    def parts() -> Iterator[tuple[int, pa.Table]]:
        for index, rows in enumerate(([*ROWS], [], [*ROWS[:4]])):
            read.append(index)
            yield index, table(rows)

    monkeypatch.setattr("dice_core.models.loading.load_model", load)
    scored = score_parts(*folders, parts(), TWO_VALID)
    assert next(scored)[1].num_rows == 6
    assert read == [0]
    assert [(index, scores.num_rows) for index, scores in scored] == [(1, 0), (2, 4)]
    assert loaded == ["policy", "reference"]


@pytest.mark.parametrize(("column", "token_id"), [("prompt_token_ids", 97), ("response_token_ids", -1)])
def test_a_token_id_that_has_no_row_is_refused_before_the_forward(
    folders: tuple[Path, Path], column: str, token_id: int
) -> None:
    """As in responses of a user's own, made with another tokenizer."""
    rows = [*ROWS[:-1], {**ROWS[-1], column: [5, token_id]}]
    with pytest.raises(records.RecordError, match=f"{column} has token id {token_id}, .* embeddings of 97 rows"):
        list(score_parts(*folders, [(0, table(rows))], TWO_VALID))


def test_models_that_take_turns_score_the_same(folders: tuple[Path, Path]) -> None:
    [(_, together)] = score_parts(*folders, [(0, table(ROWS))], TWO_VALID)
    [(_, in_turns)] = score_parts(*folders, [(0, table(ROWS))], TWO_VALID, take_turns=True)
    assert in_turns.equals(together)


def test_models_that_no_device_has_room_for_are_spread_and_take_turns_and_score_the_same(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(folders[0], "float32")
    size, working = sum(parts_of(model).values()), working_bytes(model, TWO_VALID.tokens_per_batch)
    [(_, together)] = score_parts(*folders, [(0, table(ROWS))], TWO_VALID)

    def scored(*shares: float) -> tuple[pa.Table, list[int]]:
        """Score with devices that have room for shares of a model: names of this machine's one CPU."""
        free = {name: working + share * size for name, share in zip(("cpu", "cpu:0"), shares, strict=False)}
        monkeypatch.setattr("dice_core.preferences.scoring.free_bytes", lambda: free)
        placed: list[int] = []
        [(_, scores)] = score_parts(*folders, [(0, table(ROWS))], TWO_VALID, on_placed=placed.append)
        return scores, placed

    assert scored(1, 1) == (together, [1])
    assert scored(1.5) == (together, [1])
    assert scored(0.7, 0.7) == (together, [2])
    with pytest.raises(ModelError, match=r"policy: its weights take 0.0 GiB .* GiB free: give the task more GPUs \("):
        scored(0.9)


def test_rows_that_are_not_finite_are_dropped_and_so_is_a_prompt_left_with_too_few(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    policy = with_a_broken_token(folders[0], tmp_path)
    kept = [row for row in ROWS if (row["prompt_id"], row["sample_index"]) != ("b", 1)]
    rows = [{**row, "prompt_token_ids": [10, 11]} for row in kept]
    # Two in a part of 25: a few odd responses, no broken model.
    others = [response("c", index, prompt_token_ids=[10, 11], response_token_ids=[3, 1]) for index in range(20)]
    [(_, scores)] = score_parts(policy, folders[1], [(0, table([*rows, *others]))], TWO_VALID)
    # Prompt a keeps two of three; of b's two one is left, and a pair needs two.
    found = list(zip(scores["prompt_id"].to_pylist(), scores["sample_index"].to_pylist(), strict=True))
    assert found == [("a", 0), ("a", 1), *(("c", index) for index in range(20))]


def with_a_broken_token(model_folder: Path, folder: Path) -> Path:
    """Return a copy of a model that has no numbers for token 5, which only the responses with index 2 have."""
    model = load_model(model_folder, "float32")
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = math.nan
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("broken", ["policy", "reference"])
def test_a_share_of_log_probs_that_are_not_finite_ends_scoring_with_the_reason(
    folders: tuple[Path, Path], tmp_path: Path, broken: str
) -> None:
    models = {"policy": folders[0], "reference": folders[1]}
    models[broken] = with_a_broken_token(models[broken], tmp_path)
    rows = [{**row, "prompt_token_ids": [10, 11]} for row in ROWS]
    reason = rf"log-probs of 2 of 6 responses under the {broken} are not finite numbers \(33%, allowed are 10%\)"
    with pytest.raises(ModelError, match=reason):
        list(score_parts(models["policy"], models["reference"], [(0, table(rows))], TWO_VALID))


def test_the_share_is_of_all_parts_and_not_of_the_last(folders: tuple[Path, Path], tmp_path: Path) -> None:
    policy = with_a_broken_token(folders[0], tmp_path)
    good = [response("c", index, prompt_token_ids=[10, 11], response_token_ids=[3, 1]) for index in range(20)]
    odd = [{**row, "prompt_token_ids": [10, 11]} for row in ROWS]
    parts = [(0, table(good)), (1, table(odd))]
    assert [scores.num_rows for _, scores in score_parts(policy, folders[1], parts, TWO_VALID)] == [20, 4]
