"""What surrounds an attempt of a stage: the reason that a failed one leaves, and what the next one makes of it.

Kubeflow Pipelines retries a failed task whatever the reason. An error that every attempt would meet ends the later ones
of a task at once with the same reason, before anything is loaded. A person who retries the run begins again at the
first attempt, and is not held up by it. Killed and stopped attempts leave nothing.
"""

import inspect
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Literal, ParamSpec

from dice_core.launch.backend import FinalError
from dice_core.models.files import ModelError
from dice_core.progress import log, never_silent, one_line
from dice_core.stages.runner import StageReport
from dice_core.stages.table import EVALUATE, Stage
from dice_core.storage import layout
from dice_core.storage.contract import StorageError, UnfitError
from dice_core.storage.failures import StageFailure, attempt_number, delete_failure, read_failure, write_failure

Arguments = ParamSpec("Arguments")

POD_VARIABLE, NODE_VARIABLE = "KFP_POD_NAME", "ARGO_NODE_NAME"
"""What a pod is told of itself: its name (by KFP), and Argo's name of the attempt (pipelines/cluster/config.py)."""
_OUR_PACKAGE = __name__.partition(".")[0]


class RepeatError(RuntimeError):
    """An earlier attempt of the same task met an error that this one would meet too, so that it was not made."""


def leaves_reason(
    stage: Stage,
) -> Callable[[Callable[Arguments, StageReport]], Callable[Arguments, StageReport]]:
    """Return a decorator of a stage's function: each call of it is an attempt at its `output_uri`.

    The page of the run is brought up to date when a policy was measured and when a stage failed.
    """

    def decorate(function: Callable[Arguments, StageReport]) -> Callable[Arguments, StageReport]:
        signature = inspect.signature(function)

        @wraps(function)
        def attempted(*args: Arguments.args, **kwargs: Arguments.kwargs) -> StageReport:
            uri = str(signature.bind(*args, **kwargs).arguments["output_uri"])
            with attempt(stage, uri):
                report = function(*args, **kwargs)
            if stage is EVALUATE and layout.run_of(uri):
                _update_page(uri, "all")
            return report

        return attempted

    return decorate


@contextmanager
def attempt(stage: Stage, uri: str) -> Iterator[None]:
    """Surround an attempt of a stage: it is never silent for long, and one that belongs to a run leaves why it failed.

    Args:
        stage: its row of the table.
        uri: its place; one that is in no run leaves no reason: whoever called sees the error.

    Raises:
        RepeatError: this attempt need not be made.
    """
    with never_silent(stage.name):
        if layout.run_of(uri):
            with _reason_left(stage, uri):
                yield
        else:
            yield


@contextmanager
def _reason_left(stage: Stage, uri: str) -> Iterator[None]:
    before = read_failure(uri)
    if before:
        _refuse_repeat(stage, before)
        _take_back(stage, uri)
    try:
        yield
    except Exception as error:
        leave_reason(stage, uri, error)
        raise
    # An older attempt, whose pod lived on, may have failed meanwhile.
    _take_back(stage, uri)


def _update_page(uri: str, details: Literal["small", "all"]) -> None:
    """Write the page of the run that an address belongs to; a page that fails is a line in the log."""
    # Loaded when needed: a stage that is complete already returns at once.
    from dice_core.stages.report import update_report

    try:
        update_report(layout.run_uri_of(uri), details=details)
    except Exception as error:
        log(f"report: the page of the run was not brought up to date: {one_line(error)}")


def is_final(error: BaseException) -> bool:
    """Return whether every other attempt would meet this error too.

    Settings, data, models and results that do not fit are; the network, credentials, disks, memory and pods may be well
    the next time. What a library raises is not known, and tried again.
    """
    if isinstance(error, ModelError):
        # The Hub, a disk or an accelerator that failed while a model was read.
        return not isinstance(error.__context__, OSError) and type(error.__context__) is not RuntimeError
    is_our_value = isinstance(error, ValueError) and type(error).__module__.partition(".")[0] == _OUR_PACKAGE
    return is_our_value or isinstance(error, FinalError | UnfitError | ImportError)


def _refuse_repeat(stage: Stage, before: StageFailure) -> None:
    node = os.environ.get(NODE_VARIABLE, "")
    is_later = before.workflow and node and _is_later(node, before.node)
    if before.is_final and is_later:
        log(f"{stage.name}: not tried again: attempt {before.attempt or '?'} met what every other one would meet")
        raise RepeatError(
            f"{before.reason} (said by {before.where or 'an earlier attempt'}; not tried again: correct it, then "
            "make retry or make submit)"
        )


def _is_later(node: str, other: str) -> bool:
    """Return whether an attempt came after another of the same task, without a person's retry in between.

    Kubeflow's RetryRun deletes the nodes of failed tasks (seen with 2.17.0), and Argo numbers the new ones from 0.
    """
    without = [tuple(part.partition("(")[0] for part in name.split(".")) for name in (node, other)]
    return without[0] == without[1] and attempt_number(node) > attempt_number(other)


def _take_back(stage: Stage, uri: str) -> None:
    try:
        delete_failure(uri)
    except StorageError as problem:
        log(f"{stage.name}: what an earlier attempt said of its failure stays: {problem}")


def leave_reason(stage: Stage, uri: str, error: Exception) -> None:
    """Say at the place of a stage why its attempt failed, and on the page of its run."""
    failure = StageFailure(
        stage=stage.name,
        reason=one_line(error),
        is_final=is_final(error),
        time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        pod=os.environ.get(POD_VARIABLE, ""),
        node=os.environ.get(NODE_VARIABLE, ""),
    )
    try:
        write_failure(uri, failure)
    except Exception as problem:
        # The stage's own error is the one to see.
        log(f"{stage.name}: why it failed could not be stored: {one_line(problem)}")
        return
    _update_page(uri, "small")
