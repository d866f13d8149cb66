"""The task of the stages generate and score: a shard's responses and their rewards, in one pod with one GPU.

Each stage has its own place, manifest, resuming and reason of a failure, as when it is run by its command. Generation
runs in a process of its own: what vLLM holds of memory and of the GPU is gone for certain before scoring loads its
models.
"""

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import NoReturn

from dice_core.child_processes import ChildKilledError, run_in_child
from dice_core.progress import log
from dice_core.stages.attempts import leave_reason
from dice_core.stages.generate import generate_in_run
from dice_core.stages.place import Artifact, show_parts
from dice_core.stages.run_settings import Task, read_task
from dice_core.stages.runner import StageReport
from dice_core.stages.score import score_in_run
from dice_core.stages.table import GENERATE, SCORE
from dice_core.storage.contract import StorageError
from dice_core.storage.manifest import read_manifest, require_manifest


def generate_and_score(task: Task) -> tuple[StageReport, StageReport]:
    """Generate the responses of a shard, then score them; see the stages.

    Args:
        task: at a place of both.

    Returns:
        The reports of generate and score.

    Raises:
        ChildError: generate failed, and has left its reason.
    """
    responses = _generated(task.of(GENERATE))
    return responses, score_in_run(task.of(SCORE), responses.uri)


def _generated(task: Task) -> StageReport:
    work = partial(generate_in_run, task)
    if _has_ended(task.uri):
        # Complete or of other settings: either is told without vLLM.
        return work()
    _in_child(work, task.uri)
    manifest = require_manifest(task.uri, "`dice generate`")
    if manifest.skipped:
        return StageReport(task.uri, "skipped", {}, manifest.skipped)
    return StageReport(task.uri, "completed", manifest.metrics)


def _has_ended(uri: str) -> bool:
    try:
        return read_manifest(uri) is not None
    except StorageError:
        # The stage meets it too, and leaves the reason.
        return False


def _in_child(work: Callable[[], StageReport], uri: str) -> None:
    try:
        run_in_child(work, meanwhile=_load_what_scores)
    except ChildKilledError as error:
        # The stage itself could not say it.
        log(f"{GENERATE.name}: {error}")
        leave_reason(GENERATE, uri, _in_words(error))
        _end_by(error.number)


def _load_what_scores() -> None:
    """Import torch and what comes with it while vLLM starts: after generation, the GPU would wait for it."""
    # Where it is missing, the stage says so. It is not imported before the fork: on a GPU that may begin CUDA.
    with suppress(ImportError):
        import transformers.modeling_utils  # noqa: F401


def _in_words(error: ChildKilledError) -> RuntimeError:
    memory = ", perhaps for want of memory (cluster.gpu_task_memory)" if error.number == signal.SIGKILL else ""
    return RuntimeError(f"{error}{memory}: make logs shows its last lines; it goes on from the parts it has stored")


def _end_by(number: int) -> NoReturn:
    """End as the process of generation did: whoever started this one sees the signal."""
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    raise AssertionError(f"signal {number} ends a process")


def generate_and_score_task(settings_uri: str, place: str, metrics: Artifact) -> None:
    """Generate and score a shard's responses, as a task of a pipeline."""
    task = read_task(settings_uri, place)
    responses, scores = generate_and_score(task)
    show_parts([(GENERATE, responses), (SCORE, scores)], task.place, metrics)
