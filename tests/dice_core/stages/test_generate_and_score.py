"""Two stages in one task: who runs where, what is done again, whose failure it is.

Generation itself is replaced by what publishes a manifest, or fails: test_end_to_end.py runs the real one.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dice_core.child_processes import ChildError
from dice_core.settings.base import ConfigError
from dice_core.stages import generate_and_score as task_module
from dice_core.stages.attempts import leaves_reason
from dice_core.stages.generate_and_score import generate_and_score
from dice_core.stages.place import Place
from dice_core.stages.run_settings import Task
from dice_core.stages.runner import StageReport
from dice_core.stages.table import GENERATE
from dice_core.storage import layout
from dice_core.storage.failures import StageFailure, read_failure, write_failure
from dice_core.storage.manifest import Manifest, publish_files, read_manifest

NODE = "dice-demo-x1(0).root(0).iteration-1-generate-and-score-1(0).executor({})"


class Shard:
    """A shard of a run, whose stages are what a test makes of them."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.run, self.monkeypatch = layout.run(str(root), "r"), monkeypatch
        self.responses, self.scores = (layout.shard(self.run, 1, name, 0, 1) for name in ("generate", "score"))
        self.scored: list[str] = []
        monkeypatch.setattr(task_module, "_load_what_scores", lambda: None)
        monkeypatch.setattr(task_module, "score_in_run", self._score)

    def generates(self, work: Callable[[], Any]) -> None:
        @leaves_reason(GENERATE)
        def generate(output_uri: str) -> StageReport:
            work()
            return StageReport(output_uri, "completed", {})

        self.monkeypatch.setattr(task_module, "generate_in_run", lambda task: generate(task.uri))

    def publish(self, skipped: str = "") -> None:
        manifest = Manifest(stage="generate", fingerprint="f", files={}, metrics={"pid": os.getpid()}, skipped=skipped)
        publish_files(self.responses, {}, manifest)

    def _score(self, task: Task, responses_uri: str) -> StageReport:
        self.scored.append(responses_uri)
        return StageReport(task.uri, "completed", {})

    def start(self) -> tuple[StageReport, StageReport]:
        task = Task(self.run, Place.parse("iteration-1/generate-and-score/shard-0-of-1"), {}, {})
        return generate_and_score(task)


@pytest.fixture
def shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shard:
    return Shard(tmp_path, monkeypatch)


def test_responses_are_sampled_in_a_process_of_its_own_and_scored_in_this_one(shard: Shard) -> None:
    shard.generates(shard.publish)
    responses, scores = shard.start()
    assert (responses.uri, responses.status, scores.uri) == (shard.responses, "completed", shard.scores)
    assert responses.metrics["pid"] not in (0, os.getpid())
    assert shard.scored == [shard.responses]


def test_responses_that_are_complete_start_no_process(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of an older version, in which two tasks did it, left them at the same place."""
    shard.publish()
    ran_in: list[int] = []
    shard.generates(lambda: ran_in.append(os.getpid()))
    shard.start()
    assert ran_in == [os.getpid()] and shard.scored == [shard.responses]


def test_a_shard_that_is_skipped_after_a_refused_gate_is_handed_on(shard: Shard) -> None:
    shard.generates(lambda: shard.publish(skipped="the policy was refused"))
    responses, _ = shard.start()
    assert (responses.status, responses.message) == ("skipped", "the policy was refused")
    assert shard.scored == [shard.responses]


def test_an_error_of_generation_is_left_at_its_own_place_and_nothing_is_scored(shard: Shard) -> None:
    def refuse() -> None:
        raise ConfigError("generation.max_new_tokens: too many")

    shard.generates(refuse)
    with pytest.raises(ChildError, match=r"^generation.max_new_tokens: too many$"):
        shard.start()
    failure = read_failure(shard.responses)
    assert failure and failure.is_final and failure.reason == "generation.max_new_tokens: too many"
    assert read_failure(shard.scores) is None and shard.scored == []


def test_a_final_error_of_generation_is_not_met_again_by_the_next_attempt(
    shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = {"stage": "generate", "reason": "wrong", "is_final": True, "time": "t", "node": NODE.format(0)}
    write_failure(shard.responses, StageFailure(**failed))
    shard.generates(shard.publish)
    monkeypatch.setenv("ARGO_NODE_NAME", NODE.format(1))
    with pytest.raises(ChildError, match="not tried again"):
        shard.start()
    assert read_manifest(shard.responses) is None


def test_a_killed_generation_leaves_its_reason_and_ends_the_task_by_its_signal(shard: Shard) -> None:
    shard.generates(lambda: os.kill(os.getpid(), signal.SIGKILL))
    pid = os.fork()
    if not pid:
        shard.start()
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    failure = read_failure(shard.responses)
    assert failure and not failure.is_final
    assert failure.reason.startswith("its process was ended by SIGKILL, perhaps for want of memory")
