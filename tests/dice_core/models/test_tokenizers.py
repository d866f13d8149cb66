"""Tokenizers are told apart by what they do to text, and not by how their files are written."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dice_core.models.loading import load_tokenizer, load_tokenizer_files
from dice_core.models.tokenizers import disagreement, text_digests

pytestmark = pytest.mark.slow


def edit(folder: Path, change: Any) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    change(values)
    (folder / "tokenizer.json").write_text(json.dumps(values))


def swap_two_ids(values: dict[str, Any]) -> None:
    vocab = values["model"]["vocab"]
    vocab["hello"], vocab["world"] = vocab["world"], vocab["hello"]


def lower_all_letters(values: dict[str, Any]) -> None:
    values["normalizer"] = {"type": "Lowercase"}


def test_a_tokenizer_that_is_saved_again_has_the_same_digests(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.save_pretrained(tmp_path)
    assert text_digests(load_tokenizer_files(tmp_path, False)) == text_digests(tokenizer)


def test_the_digests_are_those_of_text_to_ids_and_of_prompt_to_text(model_copy: Path) -> None:
    before = text_digests(load_tokenizer(model_copy))
    (model_copy / "chat_template.jinja").write_text("{{ messages[0].content }}")
    other_template = text_digests(load_tokenizer(model_copy))
    assert other_template["tokenizer"] == before["tokenizer"]
    assert other_template["chat_template"] != before["chat_template"]
    edit(model_copy, swap_two_ids)
    assert text_digests(load_tokenizer(model_copy))["tokenizer"] != before["tokenizer"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (swap_two_ids, "token .* is '(hello|world)' in it and '(hello|world)' in the policy's"),
        (lower_all_letters, "it splits .* into other tokens than the policy's"),
        (lambda v: v["added_tokens"].append({**v["added_tokens"][-1], "id": 49152, "content": "<more>"}), "^$"),
    ],
    ids=["ids shifted", "other pieces", "one token more"],
)
def test_where_another_tokenizer_disagrees_is_named(
    tiny_model: Path, model_copy: Path, change: Any, reason: str
) -> None:
    edit(model_copy, change)
    found = disagreement(load_tokenizer(tiny_model), load_tokenizer(model_copy))
    assert re.search(reason, found), found


def test_a_token_that_the_other_lacks_is_named_unless_it_only_pads(tiny_model: Path, model_copy: Path) -> None:
    policy, reference = load_tokenizer(model_copy), load_tokenizer(tiny_model)
    policy.add_special_tokens({"pad_token": "<pad>"})
    assert disagreement(policy, reference) == ""
    policy.add_special_tokens({"eos_token": "<end>"})
    assert disagreement(policy, reference) == "it has no token 49153, the policy's '<end>'"
