"""Training in the pods of a job on a cluster: start or adopt the job, follow it, and end as it ends.

The launcher holds nothing that it could lose. The job's name follows from what it trains, so that a launcher started
again finds the job of the one before: a running job is adopted, also with other settings; one that waits is adopted if
it was made with the same ones; one that has succeeded is the result, if what it made is still there. All others are
deleted and made anew, because whoever starts a launcher again wants another try, and training resumes from its newest
checkpoint. Only Succeeded is success. What failed for good is a launch.FinalError: whoever calls need not try it again.
What failed otherwise, and whoever controls the job does not start again, is made anew here, as often as settings say.

The job belongs to the run that launched it last: an ownerReference to the launcher pod's controller (the Argo Workflow)
deletes it with that run. A launcher told to stop deletes it at once where that run is being stopped (cancellation.py);
else the job goes on for the next attempt. In an Argo pod the process is killed about a second after it is told, so that
takes two calls and nothing else. Loads no torch.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dice_core.launch.backend import LaunchError, PassingError
from dice_core.launch.cancellation import why_job_goes_on
from dice_core.launch.failure_report import failure_report
from dice_core.launch.follower import JobFollower
from dice_core.launch.job_kinds import JOB_KINDS
from dice_core.launch.job_spec import RESTARTS_ANNOTATION, differing_settings, job_name
from dice_core.launch.jobs import TrainingJobs
from dice_core.launch.kubernetes import JobPatience, KubernetesApi, KubernetesError, own_pod
from dice_core.launch.settings import LaunchConfig, PodConfig
from dice_core.progress import log
from dice_core.settings.base import ConfigError
from dice_core.storage.manifest import read_manifest
from dice_core.tracking.variables import left_behind
from dice_core.training.job import TrainingJob

_CALL_SECONDS = 60.0
_FORBIDDEN = 403
# Of the deletion, which acts once it is sent.
_DELETE_SECONDS = 2.0


class _Stopped(BaseException):
    """A signal told this process to stop. No Exception: nothing on the way up may take it for a failed call."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class ClusterBackend:
    """Pods of a cluster, in a job of the kind that the settings name. See launch.Backend."""

    def __init__(self, pods: PodConfig, command: Sequence[str] = (), patience: JobPatience | None = None) -> None:
        """Take what the pods look like, what each runs instead of torchrun, and how long to wait for what."""
        self._pods, self._command, self._patience = pods, command, patience or JobPatience()

    def run(self, job_uri: str, launch: LaunchConfig) -> None:
        """Run the job in pods and return when it has succeeded.

        Raises:
            LaunchError: it failed, was deleted, or did not start or end in time; or the cluster refused or went away.
            FinalError: it failed, and would fail again.
            ConfigError: no cluster to talk to.
            StorageError: there is no job at that place.
        """
        training, kind = TrainingJob.read(job_uri), JOB_KINDS[launch.backend]
        name = job_name(job_uri, training.fingerprint, kind.longest_name)
        try:
            jobs = TrainingJobs(KubernetesApi(patience=self._patience, timeout=_CALL_SECONDS), kind)
        except KubernetesError as error:
            raise ConfigError(f"launch.backend {launch.backend!r}: {error}") from None
        _tell_left_behind(self._pods)
        received, owner = 0, None
        current = _Job(name)
        with _signals_raised():
            try:
                owner = _owner(jobs)
                _refuse_other_kinds(jobs, training, job_uri)
                self._run(jobs, current, training.output_uri, job_uri, launch, owner)
            except KubernetesError as error:
                raise LaunchError(f"training failed: {error} (job {jobs.namespace}/{name})") from None
            except _Stopped as stopped:
                received = stopped.number
                _give_up(jobs, current, launch, owner, self._patience.stop)
        if received:
            # What stopped us goes on to stop the caller, by its own handler.
            signal.raise_signal(received)

    def _run(
        self,
        jobs: TrainingJobs,
        current: "_Job",
        output_uri: str,
        job_uri: str,
        launch: LaunchConfig,
        owner: Mapping[str, Any] | None,
    ) -> None:
        """Follow the job to its success, through jobs that are made anew."""
        num_restarts, seconds_trained = 0, 0.0
        while True:
            body = jobs.kind.body(
                current.name, job_uri, launch, self._pods, environment=os.environ, owner=owner, command=self._command
            )
            if num_restarts:
                body["metadata"]["annotations"][RESTARTS_ANNOTATION] = str(num_restarts)
            job = _start_or_adopt(jobs, current.name, body, output_uri, self._patience)
            current.uid = job["metadata"]["uid"]
            if jobs.kind.outcome(job) == "Succeeded":
                return
            # An adopted job may be the third already.
            num_restarts = int((job["metadata"].get("annotations") or {}).get(RESTARTS_ANNOTATION, 0))
            follower = JobFollower(jobs, job, self._pods, self._patience, seconds_trained)
            try:
                return follower.follow()
            except PassingError as error:
                if launch.restart_policy == "Never" or num_restarts >= launch.backoff_limit:
                    raise
                num_restarts, seconds_trained = num_restarts + 1, follower.seconds_trained
                cause = str(error).partition(" (job ")[0]
                log(f"train: {cause}; restart {num_restarts} of {launch.backoff_limit}, from the newest checkpoint")
            time.sleep(self._patience.before_restart(num_restarts))
            jobs.delete(current.name, current.uid)
            # The uid of the next one is known when the answer is there; told to stop before, whoever has the name goes.
            current.uid = ""


@dataclass
class _Job:
    """The job that stands for the training now."""

    name: str
    uid: str = ""


def _refuse_other_kinds(jobs: TrainingJobs, training: TrainingJob, job_uri: str) -> None:
    """Refuse to train beside a job of another kind, from before the settings were changed: both would write there.

    Raises:
        KubernetesError: there is one that has not ended.
    """
    for kind in JOB_KINDS.values():
        if kind is jobs.kind:
            continue
        others = TrainingJobs(jobs.api, kind)
        name = job_name(job_uri, training.fingerprint, kind.longest_name)
        try:
            found = others.get(name)
        except KubernetesError as error:
            if error.status != _FORBIDDEN:
                raise
            # Whoever may not even look at that kind has made none: roles from before know one.
            continue
        if found is not None and not kind.outcome(found):
            raise KubernetesError(
                f"{kind.name} {name} of an earlier attempt still trains this: set launch.backend back, or "
                f"kubectl delete {kind.plural} {name}"
            )


def _tell_left_behind(pods: PodConfig) -> None:
    """Say which variables of a tracker the training pods will not have: this pod holds them as plain text."""
    given = {*pods.env, *(pods.tracking_secret_keys if pods.tracking_secret else ())}
    if missing := [name for name in left_behind(os.environ) if name not in given]:
        log(
            f"train: the training pods do not get {', '.join(missing)}, which a job would show to whoever may read it: "
            "name their secret in cluster.tracking_secret"
        )


def _start_or_adopt(
    jobs: TrainingJobs, name: str, body: dict[str, Any], output_uri: str, patience: JobPatience
) -> dict[str, Any]:
    """Return the job of this name: the one that is there and can still be the result, or a new one."""
    start, pauses = time.monotonic(), patience.pauses()
    while True:
        job = jobs.get(name)
        if job is None:
            created = jobs.create(body)
            if created is not None:
                if fault := jobs.kind.unfit(created):
                    jobs.delete(name, created["metadata"]["uid"])
                    raise KubernetesError(fault)
                log(f"train: created {jobs.kind.name} {jobs.namespace}/{name}")
                return created
        elif job["metadata"].get("deletionTimestamp"):
            log(f"train: waiting until the {jobs.kind.name} {name} of an earlier attempt is deleted")
        else:
            fault = _fault(jobs, job, body, output_uri)
            if not fault:
                _adopt(jobs, job, body)
                return job
            log(f"train: {fault}")
            jobs.delete(name, job["metadata"]["uid"])
        if time.monotonic() - start > patience.give_up:
            raise KubernetesError(
                f"the job of an earlier attempt is still there: kubectl delete {jobs.kind.plural} {name}"
            )
        time.sleep(next(pauses))


def _adopt(jobs: TrainingJobs, job: dict[str, Any], body: dict[str, Any]) -> None:
    """Say what is adopted, and make it belong to this run: deleting an older one must not delete it."""
    metadata, name = job["metadata"], f"{jobs.namespace}/{job['metadata']['name']}"
    log(f"train: adopting {jobs.kind.name} {name} ({jobs.kind.outcome(job) or 'not finished'})")
    if differing := differing_settings(job, body):
        log(f"train: it keeps the launch settings that it was made with; changed since: {', '.join(differing)}")
    owners = body["metadata"].get("ownerReferences")
    if not owners or owners == metadata.get("ownerReferences"):
        return
    try:
        fault = "" if jobs.set_owner(metadata["name"], metadata["uid"], owners[0]) else "it has changed meanwhile"
    except KubernetesError as error:
        fault = error.detail
    if fault:
        log(f"train: {jobs.kind.name} {name} still belongs to an earlier run, and is deleted with that one: {fault}")


def _fault(jobs: TrainingJobs, job: dict[str, Any], body: dict[str, Any], output_uri: str) -> str:
    """Return why the job of an earlier attempt has to be made anew; empty if it can be adopted."""
    outcome = jobs.kind.outcome(job)
    if outcome == "Failed":
        why = failure_report(job, jobs.pods(job), {}, {}).partition(" (job ")[0]
        return f"an earlier attempt is started again from its newest checkpoint; it ended with: {why}"
    # A finished job stays for a day, longer than a result that somebody deletes to have it made again.
    if outcome == "Succeeded" and read_manifest(output_uri) is None:
        return f"an earlier attempt succeeded, but its result is gone from {output_uri}: training again"
    differing = differing_settings(job, body)
    if not outcome and differing and not jobs.kind.is_running(job):
        return f"an earlier attempt waits with other launch settings ({', '.join(differing)}): it is made anew"
    return ""


def _owner(jobs: TrainingJobs) -> dict[str, Any] | None:
    """Return a reference to what the job belongs to: this pod's controller, else this pod; None outside a cluster."""
    pod = own_pod()
    if pod is None:
        return None
    name, namespace = pod
    if namespace != jobs.namespace:
        # An owner counts in its own namespace only: elsewhere the cluster would take it for gone, and the job with it.
        log(f"train: the job in {jobs.namespace} is not deleted with this run, which is in {namespace}")
        return None
    try:
        own, fault = jobs.api.get(jobs.api.path("pods", name, namespace=namespace)), "it is not there"
    except KubernetesError as error:
        own, fault = None, error.detail
    if own is None:
        log(f"train: the job is not deleted with this run: its pod {name} cannot be read: {fault}")
        return None
    metadata = own["metadata"]
    itself = {"apiVersion": "v1", "kind": "Pod", **metadata}
    controllers = [owner for owner in metadata.get("ownerReferences") or [] if owner.get("controller")]
    # Without blockOwnerDeletion, which needs rights on the owner; nor are we its controller.
    return {key: [*controllers, itself][0][key] for key in ("apiVersion", "kind", "name", "uid")}


def _give_up(
    jobs: TrainingJobs, job: _Job, launch: LaunchConfig, owner: Mapping[str, Any] | None, seconds: float
) -> None:
    """Delete the job, or leave it, before this process ends by a signal."""
    named = f"{jobs.kind.name} {job.name}"
    why = "launch.on_cancel is 'leave'" if launch.on_cancel == "leave" else why_job_goes_on(jobs.api, owner)
    if why:
        log(f"train: told to stop; {why}: {named} goes on, and the next attempt takes it over")
        return
    try:
        jobs.api.hurry(_DELETE_SECONDS, give_up=seconds)
        jobs.delete(job.name, job.uid)
        log(f"train: told to stop, and so is its run: {named} is deleted")
    except KubernetesError as error:
        log(f"train: told to stop; {named} may still run: {error}")


@contextmanager
def _signals_raised() -> Iterator[None]:
    """Raise _Stopped in the main thread at the first SIGTERM or SIGINT; later ones wait for the end."""
    is_stopping = False

    def stop(number: int, _: object) -> None:
        nonlocal is_stopping
        if not is_stopping:
            is_stopping = True
            raise _Stopped(number)

    # Python delivers signals to the main thread alone; a launcher in another thread is stopped by its own caller.
    numbers = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    previous = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
