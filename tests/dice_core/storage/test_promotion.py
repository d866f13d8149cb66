"""The promoted pointer: one winner, what led to it, and the way back."""

import json
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest

from dice_core.storage import layout
from dice_core.storage.address import open_storage
from dice_core.storage.contract import ConflictError, StorageError, UnfitError
from dice_core.storage.manifest import Manifest, publish_files
from dice_core.storage.promotion import (
    Evidence,
    MovedError,
    promote,
    propose,
    read_promotion,
    read_promotion_history,
    require_promotable,
    roll_back,
)
from dice_core.storage.promotion_history import Entry, append, digest


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


# ---- history


def model(root: str, run: str, iteration: int, text: str) -> tuple[str, str]:
    """Store what passes for a model, and return its address and its digest."""
    uri = layout.stage(layout.run(root, run), iteration, "train")
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder, "weights")).write_text(text)
        manifest = publish_files(uri, {"weights": path}, Manifest(stage="train", fingerprint="", files={}))
    return uri, manifest.content_digest


def promote_model(pointer: str, root: str, run: str, iteration: int = 1, text: str = "", **more) -> str:
    policy, content = model(root, run, iteration, text or f"{run} {iteration}")
    evaluated = layout.stage(layout.run(root, run), iteration, "evaluate")
    promote(pointer, policy, content, evaluated=evaluated, iteration=iteration, **more)
    return policy


def states(pointer: str) -> list[tuple[str, str]]:
    history = read_promotion_history(pointer)
    return [(entry.how, history.states()[entry.sequence]) for entry in history.entries]


@pytest.fixture(params=["folder", "s3"])
def place(request, tmp_path):
    """A root, in a folder and on the real S3 server, and a pointer below it."""
    root = str(tmp_path) if request.param == "folder" else f"{request.getfixturevalue('s3')}/{tmp_path.name}"
    return root, layout.promoted(root, "zephyr")


def test_each_promotion_leaves_an_entry_that_says_what_by_whom_and_on_what_evidence(place):
    root, pointer = place
    first = promote_model(pointer, root, "a")
    verdict = {"win_rate": 0.61, "win_rate_low": float("nan"), "accepted": 1, "samples": [1]}
    second = promote_model(pointer, root, "b", 2, evidence=Evidence(verdict=verdict))
    one, two = read_promotion_history(pointer).entries
    assert (one.sequence, one.policy_uri, one.replaced_uri, one.before) == (1, first, "", "")
    assert (two.sequence, two.policy_uri, two.replaced_uri) == (2, second, first)
    assert (two.how, two.by, two.run, two.iteration) == ("auto", "run b, iteration 2", "b", 2)
    assert two.verdict == {"win_rate": 0.61, "win_rate_low": None, "accepted": 1}
    assert two.evaluated == f"{root}/runs/b/iteration-2/evaluate"
    assert two.before == digest(one.pointer)
    assert states(pointer) == [("auto", "replaced"), ("auto", "current")]


def test_rolling_back_restores_the_pointer_byte_for_byte_and_says_so(place):
    root, pointer = place
    folder, _, name = pointer.rpartition("/")
    read = lambda: open_storage(folder).read_bytes(name)  # noqa: E731
    promote_model(pointer, root, "a")
    before = read()
    promote_model(pointer, root, "b")
    assert roll_back(pointer, by="me", reason="it rambles").sequence == 1
    assert read() == before
    last = read_promotion_history(pointer).entries[-1]
    assert (last.how, last.by, last.reason, last.sequence) == ("rollback", "me", "it rambles", 3)
    assert states(pointer) == [("auto", "replaced"), ("auto", "replaced"), ("rollback", "current")]
    assert roll_back(pointer, 2).run == "b"
    assert states(pointer)[-1] == ("rollback", "current") and read_promotion(pointer).policy_uri.endswith(
        "b/iteration-1/train"
    )


def test_of_two_that_promote_at_once_one_wins_and_the_other_is_told(s3, monkeypatch, tmp_path):
    """Eight have read the same pointer before the first of them writes, on a real S3 server."""
    root = f"{s3}/{tmp_path.name}"
    pointer = layout.promoted(root, "zephyr")
    promote_model(pointer, root, "first")
    models = [model(root, f"run-{i}", 1, str(i)) for i in range(8)]
    barrier, told = threading.Barrier(8), []
    won = []

    def wait_and_append(uri, entry):
        barrier.wait()
        append(uri, entry)

    monkeypatch.setattr("dice_core.storage.promotion.append", wait_and_append)

    def run(index):
        try:
            promote(pointer, *models[index], evaluated="e", iteration=1)
            won.append(index)
        except ConflictError as error:
            told.append(str(error))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(told) == 7
    assert all("somebody else" in line and "\n" not in line for line in told)
    assert read_promotion(pointer).policy_uri == models[won[0]][0]
    assert states(pointer) == [("auto", "replaced"), ("auto", "current")]


def test_who_is_overtaken_between_entry_and_pointer_is_told_and_was_never_in_effect(s3, monkeypatch, tmp_path):
    root = f"{s3}/{tmp_path.name}"
    pointer = layout.promoted(root, "zephyr")
    promote_model(pointer, root, "a")

    def overtaken(uri, entry):
        append(uri, entry)
        monkeypatch.undo()
        promote_model(pointer, root, "quick")

    monkeypatch.setattr("dice_core.storage.promotion.append", overtaken)
    with pytest.raises(ConflictError, match=r"not moved to .*runs/slow/.*: somebody else moved it at the same moment"):
        promote_model(pointer, root, "slow")
    assert "quick" in read_promotion(pointer).policy_uri
    assert states(pointer) == [("auto", "replaced"), ("auto", "never in effect"), ("auto", "current")]


def killed(monkeypatch, pointer, root, run):
    """Promote a model, and be killed between its entry and the pointer."""
    with monkeypatch.context() as patch:
        patch.setattr("dice_core.storage.folder.FolderStorage.write_if_version", dies_at_the_pointer(pointer))
        with pytest.raises(KeyboardInterrupt):
            promote_model(pointer, root, run)


def dies_at_the_pointer(pointer):
    from dice_core.storage.folder import FolderStorage

    write = FolderStorage.write_if_version

    def dying(self, key, data, version):
        if layout.join(self.uri, key) == pointer:
            raise KeyboardInterrupt
        write(self, key, data, version)

    return dying


def test_a_promotion_that_was_killed_before_its_pointer_is_not_in_effect_and_is_finished_by_its_next_attempt(
    tmp_path, monkeypatch
):
    root, pointer = str(tmp_path), layout.promoted(str(tmp_path), "zephyr")
    first = promote_model(pointer, root, "a")
    killed(monkeypatch, pointer, root, "b")
    assert read_promotion(pointer).policy_uri == first
    assert states(pointer) == [("auto", "current"), ("auto", "never in effect")]
    with pytest.raises(UnfitError, match="entry 2 was never in effect"):
        roll_back(pointer, 2)
    promote_model(pointer, root, "b")
    assert states(pointer) == [("auto", "replaced"), ("auto", "current")]


def test_another_policy_goes_past_a_promotion_that_was_killed(tmp_path, monkeypatch):
    root, pointer = str(tmp_path), layout.promoted(str(tmp_path), "zephyr")
    promote_model(pointer, root, "a")
    killed(monkeypatch, pointer, root, "b")
    promote_model(pointer, root, "c")
    assert states(pointer) == [("auto", "replaced"), ("auto", "never in effect"), ("auto", "current")]
    assert roll_back(pointer).run == "a"


def test_a_pointer_of_a_version_without_history_is_kept_and_can_be_gone_back_to(tmp_path):
    root, pointer = str(tmp_path), layout.promoted(str(tmp_path), "zephyr")
    policy, content = model(root, "old", 1, "old")
    old = {"policy_uri": policy, "content_digest": content, "evaluated": "e", "iteration": 1, "package_version": "0.1"}
    text = json.dumps(old)
    open_storage(f"{root}/promoted").write_bytes("zephyr.json", text.encode())
    history = read_promotion_history(pointer)
    assert (history.entries, history.is_complete) == ((), False)
    promote_model(pointer, root, "new")
    assert states(pointer) == [("found", "replaced"), ("auto", "current")]
    roll_back(pointer)
    assert Path(pointer).read_text() == text


def test_a_pointer_that_was_moved_without_an_entry_is_told_from_what_the_history_knows(tmp_path):
    root, pointer = str(tmp_path), layout.promoted(str(tmp_path), "zephyr")
    promote_model(pointer, root, "a")
    moved = replace(read_promotion(pointer), policy_uri="elsewhere", content_digest="77")
    Path(pointer).write_text(json.dumps(vars(moved)))
    assert not read_promotion_history(pointer).is_complete
    assert states(pointer) == [("auto", "?")]
    promote_model(pointer, root, "b")
    assert states(pointer) == [("auto", "?"), ("found", "replaced"), ("auto", "current")]


def test_a_policy_that_was_measured_against_another_incumbent_is_not_promoted(tmp_path):
    root, pointer = str(tmp_path), layout.promoted(str(tmp_path), "zephyr")
    promote_model(pointer, root, "a", incumbent="")
    with pytest.raises(
        MovedError, match=r"names .*runs/a/iteration-1/train by now, which .*b/iteration-1/train was not"
    ):
        promote_model(pointer, root, "b", incumbent="")
    promote_model(pointer, root, "b", incumbent=read_promotion(pointer).content_digest)


def test_a_proposal_leaves_the_pointer_and_is_open_until_something_else_happens(tmp_path):
    root, pointer = str(tmp_path), layout.promoted(str(tmp_path), "zephyr")
    first = promote_model(pointer, root, "a")
    policy, content = model(root, "b", 1, "b")
    for _ in range(2):
        # Also by another attempt of the same stage.
        propose(pointer, policy, content, evaluated="e", iteration=1)
    assert read_promotion(pointer).policy_uri == first
    assert states(pointer) == [("auto", "current"), ("proposal", "open")]
    assert read_promotion_history(pointer).open_proposal().policy_uri == policy
    promote(pointer, policy, content, evaluated="e", iteration=1, evidence=Evidence(how="manual", by="me"))
    assert states(pointer) == [("auto", "replaced"), ("proposal", "promoted"), ("manual", "current")]
    propose(pointer, *model(root, "c", 1, "c"), evaluated="e", iteration=1)
    promote_model(pointer, root, "d")
    assert states(pointer)[-2:] == [("proposal", "superseded"), ("auto", "current")]
    assert read_promotion_history(pointer).open_proposal() is None


def test_a_proposal_stays_open_when_its_promotion_was_killed(tmp_path, monkeypatch):
    root, pointer = str(tmp_path), layout.promoted(str(tmp_path), "zephyr")
    promote_model(pointer, root, "a")
    propose(pointer, *model(root, "b", 1, "b 1"), evaluated="e", iteration=1)
    killed(monkeypatch, pointer, root, "b")
    assert states(pointer) == [("auto", "current"), ("proposal", "open"), ("auto", "never in effect")]
    promote_model(pointer, root, "b")
    assert states(pointer) == [("auto", "replaced"), ("proposal", "promoted"), ("auto", "current")]


def test_a_policy_that_is_gone_or_was_made_anew_is_not_gone_back_to(tmp_path):
    root, pointer = str(tmp_path), layout.promoted(str(tmp_path), "zephyr")
    policy = promote_model(pointer, root, "a")
    promote_model(pointer, root, "b")
    model(root, "a", 1, "others")
    with pytest.raises(UnfitError, match="not the policy that was promoted"):
        roll_back(pointer)
    open_storage(policy).delete("")
    with pytest.raises(UnfitError, match=r"no manifest\.json there"):
        roll_back(pointer)
    assert states(pointer) == [("auto", "replaced"), ("auto", "current")]


def test_there_is_no_way_back_from_the_first_policy_and_to_what_is_there_already(tmp_path):
    root, pointer = str(tmp_path), layout.promoted(str(tmp_path), "zephyr")
    with pytest.raises(UnfitError, match="knows of nothing before"):
        roll_back(pointer)
    promote_model(pointer, root, "a")
    for sequence, fault in ((None, "knows of nothing before"), (1, "already says"), (7, "it has 1 to 1")):
        with pytest.raises(UnfitError, match=fault):
            roll_back(pointer, sequence)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"sequence": 1}', '{"sequence": 2, "how": "auto"}'])
def test_an_entry_that_somebody_changed_is_refused(text, tmp_path):
    root, pointer = str(tmp_path), layout.promoted(str(tmp_path), "zephyr")
    promote_model(pointer, root, "a")
    (tmp_path / "promoted" / "zephyr.history" / "000001.json").write_text(text)
    with pytest.raises(StorageError, match=r"000001\.json: not an entry"):
        require_promotable(pointer)


def test_an_entry_that_was_copied_to_another_number_is_refused(tmp_path):
    pointer = layout.promoted(str(tmp_path), "zephyr")
    entry = Entry(sequence=1, how="auto", policy_uri="p", content_digest="c")
    open_storage(layout.promotion_history(pointer)).write_bytes("000002.json", entry.to_json())
    with pytest.raises(StorageError, match="holds entry 1"):
        read_promotion_history(pointer)


def test_rolling_back_twice_goes_further_back_and_not_to_what_was_just_left(tmp_path):
    root, pointer = str(tmp_path), layout.promoted(str(tmp_path), "zephyr")
    for name in ("a", "b", "c"):
        promote_model(pointer, root, name)
    assert [roll_back(pointer).run, roll_back(pointer).run] == ["b", "a"]
    with pytest.raises(UnfitError, match="knows of nothing before"):
        roll_back(pointer)
    promote_model(pointer, root, "d")
    assert roll_back(pointer).run == "a"
    assert roll_back(pointer, 3).run == "c"


@pytest.mark.slow
@hypothesis.given(st.lists(st.sampled_from(["promote", "killed", "again", "roll back"]), max_size=9))
@hypothesis.settings(max_examples=25)
def test_whatever_happens_the_history_says_what_the_pointer_says_and_who_never_did(steps):
    """Against a list of the texts that the pointer had, and what each of them took the place of."""
    with tempfile.TemporaryDirectory() as root, pytest.MonkeyPatch.context() as patch:
        pointer = layout.promoted(root, "zephyr")
        texts, before, num_models, was_killed = [""], {}, 0, False
        for step in steps:
            if step == "promote" or (step == "again" and was_killed):
                num_models += step == "promote"
                promote_model(pointer, root, f"run-{num_models}")
                before[Path(pointer).read_text()] = texts[-1]
            elif step == "killed":
                num_models += 1
                killed(patch, pointer, root, f"run-{num_models}")
            elif step == "roll back" and before.get(texts[-1]):
                roll_back(pointer)
                assert Path(pointer).read_text() == before[texts[-1]]
            was_killed = step == "killed"
            now = Path(pointer).read_text() if Path(pointer).exists() else ""
            texts += [now] if now != texts[-1] else []
            history = read_promotion_history(pointer)
            assert [entry.pointer for entry in reversed(history.chain)] == texts[1:]
            assert (history.previous.pointer if history.previous else "") == before.get(now, "")
            found = [state for _, state in states(pointer)]
            assert found.count("current") == bool(now) and found.count("replaced") == len(texts[2:])
            assert [entry.sequence for entry in history.entries] == list(range(1, len(found) + 1))
