"""Follow a training job to its end: show its pods' states and logs, and say why it does not start or why it failed.

Looks every few seconds: a job trains for hours, and a look costs two calls and one a pod.
"""

import time
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

from dice_core.launch.backend import FinalError, LaunchError, PassingError
from dice_core.launch.failure_report import (
    Events,
    failure_report,
    has_failed,
    is_late,
    queue_reasons,
    restarts,
    stuck_reasons,
    waiting_reasons,
)
from dice_core.launch.jobs import TrainingJobs
from dice_core.launch.kubernetes import JobPatience, KubernetesError
from dice_core.launch.pod_logs import PodLogs
from dice_core.launch.settings import PodConfig
from dice_core.progress import Throttle, log

Objects = dict[str, dict[str, Any]]


class JobFollower:
    """One job, from where it is now to its end."""

    def __init__(
        self,
        jobs: TrainingJobs,
        job: Mapping[str, Any],
        limits: PodConfig,
        patience: JobPatience,
        seconds_before: float = 0.0,
    ) -> None:
        """Take a job that exists and has not succeeded, and how long jobs that it takes the place of have trained."""
        self._jobs, self._job, self._limits, self._patience = jobs, job, limits, patience
        self._kind = jobs.kind
        self._name, self._uid = job["metadata"]["name"], job["metadata"]["uid"]
        self._pods: Objects = {}
        self._pods_ever: Objects = {}
        self._states: dict[str, str] = {}
        self._said = ""
        # One of two clocks runs: pods are waited for, or all of them train.
        self._waiting_since = time.monotonic()
        self._training_since, self._seconds_before = 0.0, seconds_before
        self._failing_since = 0.0
        self._reminder = Throttle(patience.reminder)
        # What the job was made with counts: an adopted one may be older than the settings.
        self._num_expected = self._kind.num_nodes(job)
        self._logs = PodLogs(jobs.api, self._kind, self._kind.processes_per_node(job))

    @property
    def seconds_trained(self) -> float:
        """For how long pods have trained, those before this job too."""
        return self._seconds_before + (time.monotonic() - self._training_since if self._training_since else 0.0)

    def follow(self) -> None:
        """Return when the job has succeeded.

        Raises:
            LaunchError: it failed, was deleted, or its pods did not start or end in time; a FinalError if another try
                would fail too: the job has ended then, or is deleted; a PassingError if the job failed and nobody has
                tried again.
            KubernetesError: the API cannot be followed.
        """
        while not self._has_succeeded():
            self._check_final_error()
            self._check_time()
            time.sleep(min(self._patience.poll, self._seconds_left()))
        log(f"train: {self._kind.name} {self._name} succeeded")

    def _has_succeeded(self) -> bool:
        """Look at the job, and then at its pods and logs: what ended before the job has said all by then."""
        job = self._jobs.get(self._name)
        self._read_pods()
        if job is None or job["metadata"]["uid"] != self._uid or job["metadata"].get("deletionTimestamp"):
            raise LaunchError(
                f"training failed: {self._kind.name} {self._jobs.namespace}/{self._name} was deleted while it ran; "
                "started again, the stage goes on from the newest checkpoint"
            )
        self._job = job
        outcome = self._kind.outcome(job)
        if outcome == "Failed":
            report = self._report()
            raise self._failure()(report)
        return outcome == "Succeeded"

    def _failure(self) -> type[LaunchError]:
        """Return what the end of a failed job means."""
        if self._logs.final_error:
            return FinalError
        return LaunchError if self._kind.is_restarted or is_late(self._job) else PassingError

    def _read_pods(self) -> None:
        self._pods = self._jobs.pods(self._job)
        self._pods_ever |= self._pods
        self._show_states()
        self._logs.read(self._pods.values())

    def _check_final_error(self) -> None:
        """End a job that would fail again: its processes would be started anew, on all their GPUs."""
        if not self._logs.final_error:
            return
        self._failing_since = self._failing_since or time.monotonic()
        # The process ends soon, and its exit code belongs into the report.
        if has_failed(self._pods) or time.monotonic() - self._failing_since >= self._patience.drain:
            self._end(FinalError, self._logs.final_error)

    def _end(self, error: type[LaunchError], cause: str) -> NoReturn:
        """Delete the job, which would go on, and raise the error with its report."""
        report = self._report(cause)
        self._jobs.delete(self._name, self._uid)
        raise error(report)

    def _show_states(self) -> None:
        for name, pod in sorted(self._pods.items()):
            node = pod["spec"].get("nodeName")
            state = pod["status"].get("phase", "Pending") + (f" on {node}" if node else "")
            state += f", {restarts(pod)} restarts" if restarts(pod) else ""
            if self._states.get(pod["metadata"]["uid"]) != state:
                self._states[pod["metadata"]["uid"]] = state
                log(f"train: pod {name}: {state}")
        for name in sorted(self._pods_ever.keys() - self._pods.keys()):
            uid = self._pods_ever[name]["metadata"]["uid"]
            if self._states.get(uid) != "gone":
                self._states[uid] = "gone"
                log(f"train: pod {name} is gone")

    def _seconds_left(self) -> float:
        """Return for how long the clock that runs may go on."""
        if self._waiting_since:
            left = self._limits.pending_deadline_seconds - (time.monotonic() - self._waiting_since)
        else:
            left = self._limits.active_deadline_seconds - self.seconds_trained
        return max(0.01, left)

    def _check_time(self) -> None:
        """Say why the job does not train, and give up when that, or the training, has taken longer than it may."""
        reasons = self._waiting({})
        if not reasons and not self._kind.is_suspended(self._job):
            self._check_training()
            return
        self._seconds_before, self._training_since = self.seconds_trained, 0.0
        if self._kind.is_suspended(self._job):
            # Whoever waits in a queue is not late; the time counts from the admission.
            self._waiting_since = time.monotonic()
            self._show_queue()
        else:
            self._check_start(reasons)

    def _waiting(self, events: Events) -> list[str]:
        return waiting_reasons(self._pods, events, self._num_expected, self._kind.operator)

    def _show_queue(self) -> None:
        """Say that the job waits in a queue, and once in a while why: a queue's name may be wrong."""
        text = f"is suspended until Kueue admits it (pods.queue_name = {self._limits.queue_name!r})"
        if self._reminder.is_due():
            events = self._events().get(self._name, [])
            reasons = queue_reasons(self._jobs.workloads(self._uid), events, self._kind.name)
            self._say("; ".join([text, *reasons]), again=True)
        elif not self._said.startswith(text):
            self._say(text)

    def _check_training(self) -> None:
        """Give up when pods have trained for longer than they may."""
        self._waiting_since, limit = 0.0, self._limits.active_deadline_seconds
        if not self._training_since:
            # An adopted job may have trained for hours already.
            before = 0.0 if self._seconds_before else _seconds_running(self._pods)
            self._training_since = time.monotonic() - before
        if self.seconds_trained < limit:
            return
        cause = f"it did not end within pods.active_deadline_seconds = {limit} of training; "
        self._end(LaunchError, f"{cause}started again, the stage goes on from the newest checkpoint")

    def _check_start(self, reasons: list[str]) -> None:
        """Say why pods do not start, and give up when the deadline has passed."""
        self._waiting_since = self._waiting_since or time.monotonic()
        passed, deadline = time.monotonic() - self._waiting_since, self._limits.pending_deadline_seconds
        is_over, is_reminder = passed >= deadline, self._reminder.is_due()
        if is_over or is_reminder:
            reasons = self._waiting(self._events())
        if is_over and reasons:
            self._jobs.delete(self._name, self._uid)
            first = f"training did not start within pods.pending_deadline_seconds = {deadline}: {reasons[0]}"
            first += f" (job {self._jobs.namespace}/{self._name} is deleted)"
            raise LaunchError("\n".join([first, *reasons[1:]]))
        shown = reasons if is_reminder else stuck_reasons(self._pods)
        if shown:
            self._say(f"waits for its pods: {'; '.join(shown)}", again=is_reminder)

    def _say(self, text: str, *, again: bool = False) -> None:
        if again or text != self._said:
            self._said = text
            log(f"train: {self._kind.name} {self._name} {text}")

    def _report(self, cause: str = "") -> str:
        try:
            self._read_pods()
        except KubernetesError as error:
            log(f"train: the pods' last states cannot be read: {error.detail}")
        gone = self._pods_ever.keys() - self._pods.keys()
        return failure_report(self._job, self._pods_ever, self._events(), self._logs.last_lines(), cause, gone)

    def _events(self) -> Events:
        try:
            of_pods = {name: self._jobs.pod_events(pod) for name, pod in self._pods_ever.items()}
            return {self._name: self._jobs.events(self._job), **of_pods}
        except KubernetesError as error:
            log(f"train: events cannot be read: {error.detail}")
            return {}


def _seconds_running(pods: Objects) -> float:
    """Return for how long all pods have run, by the clock of the node whose pod started last."""
    statuses = [status for pod in pods.values() for status in pod["status"].get("containerStatuses") or []]
    running = [(status.get("state") or {}).get("running") or {} for status in statuses]
    starts = [datetime.fromisoformat(state["startedAt"]).timestamp() for state in running if state.get("startedAt")]
    return max(0.0, time.time() - max(starts)) if starts else 0.0
