"""The promoted pointer: one winner, and the way back."""

import json

import pytest

from dice_core.storage.contract import StorageError
from dice_core.storage.promotion import promote, read_promotion, require_promotable


@pytest.fixture
def uri(tmp_path):
    return str(tmp_path / "promoted" / "zephyr.json")


def test_nothing_was_promoted_at_first(uri):
    assert read_promotion(uri) is None


def test_the_pointer_names_the_policy_and_the_one_it_replaced(uri):
    promote(uri, "runs/a/train", "1", evaluated="runs/a/evaluate", iteration=1)
    promote(uri, "runs/b/train", "2", evaluated="runs/b/evaluate", iteration=2)
    found = read_promotion(uri)
    assert (found.policy_uri, found.replaces, found.iteration) == ("runs/b/train", "runs/a/train", 2)


def test_the_pointer_names_what_the_policy_was_trained_from(uri):
    promote(uri, "runs/a/train", "1", evaluated="runs/a/evaluate", iteration=1, reference_uri="runs/a/before")
    assert read_promotion(uri).reference_uri == "runs/a/before"


def test_promoting_the_same_policy_again_changes_nothing(uri):
    promote(uri, "runs/a/train", "1", evaluated="runs/a/evaluate", iteration=1)
    promote(uri, "runs/b/train", "2", evaluated="runs/b/evaluate", iteration=2)
    assert promote(uri, "runs/b/train", "2", evaluated="again", iteration=2).replaces == "runs/a/train"


def test_a_pointer_somebody_wrote_by_hand_is_refused(uri, tmp_path):
    (tmp_path / "promoted").mkdir()
    (tmp_path / "promoted" / "zephyr.json").write_text("s3://bucket/my-model")
    with pytest.raises(StorageError, match=r"zephyr.json: not a pointer to a promoted policy"):
        promote(uri, "runs/a/train", "1", evaluated="runs/a/evaluate", iteration=1)


def test_a_pointer_of_a_later_version_is_read(uri, tmp_path):
    promote(uri, "runs/a/train", "1", evaluated="runs/a/evaluate", iteration=1)
    path = tmp_path / "promoted" / "zephyr.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"win_rate": 0.6}))
    assert read_promotion(uri).policy_uri == "runs/a/train"


def test_a_pointer_that_cannot_be_moved_is_known_before_the_work_that_decides_on_it(uri, tmp_path):
    require_promotable(uri)
    assert not (tmp_path / "promoted").exists()
    promote(uri, "runs/a/train", "1", evaluated="runs/a/evaluate", iteration=1)
    require_promotable(uri)
    (tmp_path / "promoted" / "zephyr.json").write_text("s3://bucket/my-model")
    with pytest.raises(StorageError, match="not a pointer to a promoted policy"):
        require_promotable(uri)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="a file is where a folder is needed"):
        require_promotable(str(tmp_path / "file" / "zephyr.json"))
