"""What a recurring run chooses to work on."""

from dataclasses import replace
from pathlib import Path

import pytest

from dice_core.stages.choose_inputs import Inputs, choose_inputs, newest_prompts
from dice_core.stages.recurring_name import given_or_new, run_name
from dice_core.storage import layout
from dice_core.storage.address import open_storage
from dice_core.storage.contract import StorageError
from dice_core.storage.manifest import Manifest, publish_files
from dice_core.storage.promotion import promote, read_promotion, roll_back

JOB = "3f2a9c1b-77aa-4e0e-9d5c-1c2b3a4d5e6f"


def choose(root: str, **changes: str) -> Inputs:
    values = {"promote_as": "zephyr", "policy_source": "org/dpo", "reference_source": "org/sft", "prompts_source": ""}
    return choose_inputs(root, "nightly", JOB, **{**values, **changes})


def promoted(root: str, folder: Path, text: str = "weights") -> tuple[str, str]:
    """Store a model, promote it, and return its address and its reference's."""
    run = layout.run(root, "first")
    policy, reference = layout.stage(run, 2, "train"), layout.stage(run, 1, "train")
    weights = folder / "weights"
    weights.write_text(text)
    manifest = publish_files(policy, {"weights": weights}, Manifest(stage="train", fingerprint="f", files={}))
    pointer = layout.promoted(root, "zephyr")
    promote(pointer, policy, manifest.content_digest, evaluated="e", iteration=2, reference_uri=reference)
    return policy, reference


def test_without_a_promoted_policy_a_run_starts_as_the_preset_says(tmp_path: Path) -> None:
    assert choose(str(tmp_path)) == Inputs("nightly-3f2a9c1b", "org/dpo", "org/sft", "")


def test_a_run_starts_from_the_last_promoted_policy_and_its_reference(s3: str, tmp_path: Path) -> None:
    root = f"{s3}/recurring"
    policy, reference = promoted(root, tmp_path)
    chosen = choose(root)
    assert (chosen.policy_source, chosen.reference_source) == (policy, reference)
    assert layout.imported_model(root, policy) == policy, "a promoted policy is used where it is"


def test_a_run_that_is_started_anew_keeps_its_name_and_what_it_chose(tmp_path: Path) -> None:
    """`make retry` of a recurring run that KFP cannot retry: the pointer may have moved on since."""
    root = str(tmp_path)
    before = choose(root)
    promoted(root, tmp_path)
    assert (
        choose_inputs(
            root,
            before.run,
            "another-id",
            promote_as="zephyr",
            policy_source="",
            reference_source="",
            prompts_source="",
        )
        == before
    )
    assert choose(root) == before


def test_a_schedule_whose_name_ends_like_a_runs_starts_runs_of_its_own(tmp_path: Path) -> None:
    values = {"promote_as": "", "policy_source": "org/dpo", "reference_source": "org/sft", "prompts_source": ""}
    assert choose_inputs(str(tmp_path), "nightly-00000000", JOB, **values).run == "nightly-00000000-3f2a9c1b"


def test_a_preset_with_a_warm_start_needs_a_promoted_policy(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"promoted/zephyr\.json: no policy is promoted yet.*make submit once"):
        choose(str(tmp_path), reference_source="")
    policy, _ = promoted(str(tmp_path), tmp_path)
    assert choose(str(tmp_path), reference_source="").policy_source == policy


def test_without_a_pointer_a_run_always_starts_as_the_preset_says(tmp_path: Path) -> None:
    promoted(str(tmp_path), tmp_path)
    assert choose(str(tmp_path), promote_as="").policy_source == "org/dpo"


def test_a_promoted_policy_that_was_changed_or_deleted_is_refused(tmp_path: Path) -> None:
    policy, _ = promoted(str(tmp_path), tmp_path)
    weights = tmp_path / "weights"
    weights.write_text("others")
    publish_files(policy, {"weights": weights}, Manifest(stage="train", fingerprint="g", files={}))
    with pytest.raises(StorageError, match="not the policy that was promoted"):
        choose(str(tmp_path))
    open_storage(policy).delete("")
    with pytest.raises(StorageError, match=r"no manifest\.json there"):
        choose(str(tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"policy_uri": "s3://b/m", "content_di',
        '{"policy_uri": "", "content_digest": "", "evaluated": "", "iteration": 1}',
    ],
)
def test_a_pointer_that_is_half_written_or_names_nothing_is_refused(text: str, tmp_path: Path) -> None:
    promoted(str(tmp_path), tmp_path)
    Path(layout.promoted(str(tmp_path), "zephyr")).write_text(text)
    with pytest.raises(StorageError, match=r"zephyr\.json: not a pointer to a promoted policy") as error:
        choose(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_run_starts_from_what_was_gone_back_to(tmp_path: Path) -> None:
    policy, _ = promoted(str(tmp_path), tmp_path)
    pointer = layout.promoted(str(tmp_path), "zephyr")
    promote(pointer, "another", "77", evaluated="e", iteration=1, reference_uri="r")
    roll_back(pointer)
    assert choose(str(tmp_path)).policy_source == policy


def test_a_pointer_of_an_older_version_is_refused_by_name(tmp_path: Path) -> None:
    promoted(str(tmp_path), tmp_path)
    pointer = layout.promoted(str(tmp_path), "zephyr")
    found = read_promotion(pointer)
    assert found is not None
    Path(pointer).unlink()
    promote(pointer, found.policy_uri, found.content_digest, evaluated="e", iteration=2)
    assert read_promotion(pointer) == replace(found, reference_uri="")
    with pytest.raises(StorageError, match="it names no reference"):
        choose(str(tmp_path))


def test_the_newest_prompts_are_the_last_by_name(s3: str) -> None:
    place = f"{s3}/prompts/"
    storage = open_storage(place)
    for key in (
        "2026-01-05.jsonl",
        "2026-01-12.jsonl",
        "2026-01-02.jsonl",
        "_SUCCESS",
        ".tmp/x",
        "2026-01-12x/a.parquet",
    ):
        storage.write_bytes(key, b"{}")
    assert newest_prompts(place) == f"{place}2026-01-12x"
    storage.delete("2026-01-12x/")
    assert newest_prompts(place) == f"{place}2026-01-12.jsonl"


def test_a_source_that_is_no_prefix_is_taken_as_it_is() -> None:
    assert newest_prompts("s3://bucket/prompts.jsonl") == "s3://bucket/prompts.jsonl"
    assert newest_prompts("org/prompts") == "org/prompts" and newest_prompts("") == ""


def test_an_empty_prefix_says_what_to_put_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no prompts are there: put a JSONL or Parquet file below it"):
        newest_prompts(f"{tmp_path}/")


def test_the_same_job_gives_the_same_name_and_another_another() -> None:
    assert run_name("zephyr", JOB) == run_name("zephyr", JOB) == "zephyr-3f2a9c1b" != run_name("zephyr", JOB[::-1])


def test_a_placeholder_that_kfp_left_as_it_is_is_replaced_by_the_pods_label(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFP_RUN_ID", JOB)
    assert run_name("zephyr", "{{$.pipeline_job_uuid}}") == "zephyr-3f2a9c1b"
    monkeypatch.delenv("KFP_RUN_ID")
    with pytest.raises(ValueError, match="KFP_RUN_ID must hold it"):
        run_name("zephyr", "{{$.pipeline_job_uuid}}")


@pytest.mark.parametrize(
    ("run", "promote_as", "name"),
    [
        ("mine", "zephyr", "mine"),
        ("", "zephyr", "zephyr-3f2a9c1b"),
        ("", "", "run-3f2a9c1b"),
        ("", "x" * 63, "x" * 54 + "-3f2a9c1b"),
    ],
)
def test_a_run_by_hand_has_the_name_it_was_given_or_a_fresh_one(run, promote_as, name):
    assert given_or_new(run, promote_as, JOB) == name
