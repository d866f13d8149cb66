"""The card of a model: what the Hub reads of it, what it was made from, and that no reader of the model minds it."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from dice_core.release.evaluated import find_evaluation
from dice_core.release.model_card import CARD, update_card, write_card
from dice_core.storage import layout
from dice_core.storage.address import open_storage
from dice_core.storage.manifest import require_manifest
from tests.finished_run import BETTER, NOT_SHOWN, FinishedRun, digest_of, publish


@pytest.fixture
def run(tmp_path):
    return FinishedRun(str(tmp_path))


def card_of(policy: str) -> ModelCard:
    return ModelCard(open_storage(policy).read_bytes(CARD).decode())


def test_the_hub_reads_the_base_model_and_the_data_and_no_licence_that_nobody_knows(run):
    policy = run.iterate(1, BETTER)
    update_card(policy)
    data = card_of(policy).data
    assert (data.base_model, data.base_model_relation, data.datasets) == (
        "org/zephyr-dpo",
        "finetune",
        ["org/ultrafeedback"],
    )
    assert (data.library_name, data.license) == ("transformers", None)


def test_it_names_the_whole_line_of_models_with_their_digests(run):
    start = run.policy
    first = run.iterate(1, BETTER)
    named = run.policy
    update_card(run.iterate(2, NOT_SHOWN))
    text = card_of(layout.stage(run.uri, 2, "train")).text
    assert f"| trained from, and reference | `{first}` | `{digest_of(named)[:12]}` |" in text
    assert f"| before | `org/zephyr-dpo@0a1b2c` | `{digest_of(start)[:12]}` |" in text
    assert f"| data | `{layout.data(run.uri)}` | `{digest_of(run.data)[:12]}` |" in text
    assert "| max_steps | 300 |" in text and "| seed | 42 |" in text and "| runner | torchrun |" in text
    assert "**accepted, not shown to be better**: win rate 51.0% [47.0, 55.0]" in text and "| win_rate | 0.51 |" in text


def test_before_its_evaluation_it_says_that_there_is_none(run):
    policy = run.iterate(1)
    update_card(policy)
    assert "It has not been evaluated." in card_of(policy).text


def test_the_card_changes_neither_the_manifest_nor_the_digest_of_the_model(run):
    policy = run.iterate(1, BETTER)
    before = require_manifest(policy)
    update_card(policy)
    assert require_manifest(policy) == before and CARD not in before.files


def test_what_was_made_anew_since_ends_the_line(run):
    run.iterate(1, BETTER)
    first, policy = layout.stage(run.uri, 1, "train"), run.iterate(2, BETTER)
    publish(first, "train", run.files(7))
    text = write_card(policy, require_manifest(policy), None)
    assert f"`{first} (gone, or another by now)`" in text and "base_model" not in text


def test_a_card_for_others_holds_no_address_of_ones_own_storage(run):
    run.iterate(1, BETTER)
    policy = run.iterate(2, BETTER)
    text = write_card(policy, require_manifest(policy), find_evaluation(policy), is_public=True)
    assert run.root not in text
    assert "`runs/march/iteration-1/train`" in text and "From `runs/march/iteration-2/evaluate`" in text


def test_a_card_that_cannot_be_written_fails_nothing(run, capsys):
    policy = run.iterate(1, BETTER)
    Path(policy, CARD).mkdir()
    update_card(policy)
    assert "README.md was not brought up to date: " in capsys.readouterr().err
