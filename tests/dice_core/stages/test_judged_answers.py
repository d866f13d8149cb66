"""What an endpoint has answered is part of a stage: another attempt takes it up."""

from pathlib import Path

import pytest

from dice_core.judges.answer_cache import Reply
from dice_core.stages.judged_answers import answer_cache
from dice_core.stages.runner import StageContext, run_stage
from dice_core.stages.table import EVALUATE
from dice_core.storage.contract import UnfitError
from dice_core.storage.manifest import Manifest, read_manifest


def reply(number: int) -> Reply:
    return Reply(f"A\n{number} ", {"A": -0.5}, 100, 2)


def test_answers_of_a_killed_attempt_are_known_to_the_next(tmp_path: Path) -> None:
    uri = str(tmp_path / "evaluate")

    def killed(context: StageContext) -> Manifest:
        answers = answer_cache(context)
        for number in range(70):
            answers.add(f"key-{number}", reply(number))
        raise KeyboardInterrupt

    def resumed(context: StageContext) -> Manifest:
        answers = answer_cache(context)
        # Of the first attempt those that came after the last part are lost with it.
        assert len(answers) == 64 and answers.num_tokens == (6400, 128)
        assert answers.get("key-3") == reply(3) and answers.get("key-69") is None
        answers.add("key-69", reply(69))
        answers.flush()
        return context.publish({}, {})

    with pytest.raises(KeyboardInterrupt):
        run_stage(EVALUATE, uri, killed, settings={}, arguments={}, inputs={})
    run_stage(EVALUATE, uri, resumed, settings={}, arguments={}, inputs={})
    manifest = read_manifest(uri)
    assert manifest is not None and len(manifest.files) == 2


def test_answers_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    def broken(context: StageContext) -> Manifest:
        path = context.folder / "judge-answers-0.jsonl"
        path.write_text("{")
        context.publish_part(path.name, path)
        answer_cache(context)
        raise AssertionError

    with pytest.raises(UnfitError, match="no answers of a judge"):
        run_stage(EVALUATE, str(tmp_path / "evaluate"), broken, settings={}, arguments={}, inputs={})
