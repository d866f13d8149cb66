"""What the rest of the suite calls: a stage, a training or a run is tracked where the trackers' variables say so.

| who calls | MLflow | TensorBoard, W&B |
|---|---|---|
| check-settings | begins the parent run, with the plan as its params | |
| every stage that works | begins and ends a run below it: settings, numbers at the end, the machine | |
| rank 0 of a training | adds the curves to the run of its stage | curves |
| the report | ends the parent run | |

Nothing here raises, and nothing waits for a tracker for longer than the seconds of feed.py. Loads no heavy package.
"""

import math
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dice_core import __version__
from dice_core.progress import log
from dice_core.storage import layout
from dice_core.tracking import wandb_run
from dice_core.tracking.feed import Feed, Line, Status
from dice_core.tracking.mlflow_api import MlflowApi, MlflowError
from dice_core.tracking.mlflow_run import FINGERPRINT_TAG, URI_TAG, MlflowEnd, MlflowRun, MlflowRuns, RunKey
from dice_core.tracking.system_metrics import sampled
from dice_core.tracking.tensorboard import TensorBoardFile

_KFP_VARIABLES = {"kfp.run_id": "KFP_RUN_ID", "kfp.pod": "KFP_POD_NAME", "kfp.mlflow_run_id": "MLFLOW_RUN_ID"}
# Of a process that is told to stop: in an Argo pod it is killed about a second later.
_STOP_SECONDS = 1.0


@dataclass
class Tracked:
    """Work that is being tracked."""

    feeds: list[Feed] = field(default_factory=list)
    summary: dict[str, float] = field(default_factory=dict)
    """The numbers that describe the work, once they are known."""

    def put(self, step: int, values: Mapping[str, Any]) -> None:
        """Add the numbers of a step; what is no finite number is left out."""
        if numbers := finite(values):
            self.put_line(Line(step, numbers))

    def put_line(self, line: Line) -> None:
        """Add a line to every tracker."""
        for feed in self.feeds:
            feed.put(line)

    def describe(self, metrics: Mapping[str, Any]) -> None:
        """Take the numbers that describe the finished work."""
        self.summary = finite(metrics)

    def end(self, status: Status, **options: Any) -> None:
        """End at every tracker; see Feed.end."""
        for feed in self.feeds:
            feed.end(status, self.summary, **options)


@contextmanager
def tracked_stage(
    stage: str, uri: str, fingerprint: str, settings: Mapping[str, Any], *, measures_machine: bool = True
) -> Iterator[Tracked]:
    """Track a stage at work: in MLflow, where MLFLOW_TRACKING_URI is set.

    Args:
        stage: its name.
        uri: its place.
        fingerprint: of its result; another attempt at the same goes on with the same run.
        settings: that it was made with, nested.
        measures_machine: whether the work is done in this process, and not in others that it starts.
    """
    runs = _mlflow()
    if runs is None:
        yield Tracked()
        return
    place = uri.removeprefix(layout.run_uri_of(uri)).strip("/")
    iteration = layout.iteration_of(place) if layout.run_of(uri) else None
    is_shard = "/shard-" in place
    run = MlflowRun(
        runs,
        _stage_key(uri, fingerprint),
        params=settings,
        tags={"dice.stage": stage, **_tags()},
        parent_summary={} if is_shard else {f"{stage}/": iteration or 0},
    )
    tracked = Tracked([Feed(run)])
    with _ended(tracked), sampled(tracked.put_line) if measures_machine else ExitStack():
        yield tracked


@contextmanager
def tracked_training(uri: str, fingerprint: str, settings: Mapping[str, Any], folder: Path) -> Iterator[Tracked]:
    """Track the curves of a training, in rank 0: TensorBoard always, MLflow and W&B where their variables say so.

    Args:
        uri: the training's place.
        fingerprint: of its result.
        settings: that it was made with, nested.
        folder: of this machine, for the trackers' files.
    """
    tracked = Tracked([Feed(TensorBoardFile(uri, folder / "tensorboard"))])
    runs = _mlflow()
    with ExitStack() as stack:
        if runs is not None:
            to_mlflow = Feed(MlflowRun(runs, _stage_key(uri, fingerprint), is_owner=False))
            tracked.feeds.append(to_mlflow)
            stack.enter_context(sampled(to_mlflow.put))
        if wandb_run.is_wanted():
            name = uri.removeprefix(layout.run_uri_of(uri)).strip("/") or uri
            identity = f"{uri}\n{fingerprint}"
            tracked.feeds.append(
                Feed(wandb_run.WandbRun(layout.run_of(uri), name, identity, settings, folder / "wandb"))
            )
        stack.enter_context(_ended(tracked, stops_on_signal=False))
        yield tracked


def begin_run(run_uri: str, plan: Mapping[str, Any]) -> None:
    """Begin a run of ours at MLflow, where that is set: check-settings does, before the first of its stages works."""
    runs = _mlflow()
    if runs is not None:
        # Left running: the report ends it.
        feed = Feed(
            _BegunRun(runs, _run_key(run_uri), params=plan, tags={"dice.run": layout.run_of(run_uri), **_tags()})
        )
        feed.end("FINISHED")


def end_run(run_uri: str, status: Status) -> None:
    """End a run of ours at MLflow, where that is set, and with it the stages that ended without a word."""
    runs = _mlflow()
    if runs is not None:
        Feed(MlflowEnd(runs, _run_key(run_uri), _tags())).end(status)


class _BegunRun(MlflowRun):
    """A run that goes on when this process ends."""

    def end(self, status: Status, summary: Mapping[str, float]) -> None:
        """Leave it running."""


def finite(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the values that are finite numbers, True and False among them."""
    return {
        name: float(value) for name, value in values.items() if isinstance(value, int | float) and math.isfinite(value)
    }


@contextmanager
def _ended(tracked: Tracked, *, stops_on_signal: bool = True) -> Iterator[None]:
    """Tell the trackers how the block ends."""
    status: Status = "FINISHED"
    with _killed_on_sigterm(tracked) if stops_on_signal else ExitStack():
        try:
            yield
        except Exception:
            status = "FAILED"
            raise
        except BaseException:
            status = "KILLED"
            raise
        finally:
            tracked.end(status)


@contextmanager
def _killed_on_sigterm(tracked: Tracked) -> Iterator[None]:
    """Let a process that SIGTERM ends say so first, where nobody else looks after that signal."""
    is_ours = (
        threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    )
    if not is_ours:
        yield
        return

    def stop(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        # No line of the log: one may be half written.
        tracked.end("KILLED", seconds=_STOP_SECONDS, tells=False)
        os.kill(os.getpid(), number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is stop:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _mlflow() -> MlflowRuns | None:
    try:
        api = MlflowApi.from_environment()
    except MlflowError as error:
        log(str(error))
        return None
    return MlflowRuns(api, os.environ) if api else None


def _run_key(run_uri: str) -> RunKey:
    return RunKey(layout.run_of(run_uri) or run_uri, {URI_TAG: run_uri})


def _stage_key(uri: str, fingerprint: str) -> RunKey:
    run_uri = layout.run_uri_of(uri)
    name = uri.removeprefix(run_uri).strip("/") if run_uri else uri
    return RunKey(name, {URI_TAG: uri, FINGERPRINT_TAG: fingerprint}, _run_key(run_uri) if run_uri else None)


def _tags() -> dict[str, str]:
    found = {tag: os.environ.get(name, "") for tag, name in _KFP_VARIABLES.items()}
    return {"dice.version": __version__, "mlflow.source.type": "JOB", **{tag: v for tag, v in found.items() if v}}
