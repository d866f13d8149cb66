"""What a kind of training job on a cluster has to say, for one launcher to start, follow and judge all kinds alike.

Pure. pytorchjob.py and trainjob.py are the kinds; jobs, pods and events are the plain dicts of the Kubernetes API.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from dice_core.launch.job_spec import job_metadata
from dice_core.launch.pod_spec import command_of, container_of
from dice_core.launch.settings import LaunchConfig, PodConfig

Object = Mapping[str, Any]
Outcome = Literal["Succeeded", "Failed", ""]


class JobKind(ABC):
    """A kind of job, and whoever controls the jobs of that kind."""

    name: ClassVar[str]
    group: ClassVar[str]
    version: ClassVar[str]
    plural: ClassVar[str]
    operator: ClassVar[str]
    """What people call who controls its jobs."""
    container: ClassVar[str]
    """Of its pods: the one that trains. The controller demands this name."""
    longest_name: ClassVar[int]
    """Characters of a job's name, to which the controller adds those of the pods. A label has 63."""
    deletion: ClassVar[Literal["Foreground", "Background"]]
    """Whether a job that is deleted stays until its pods are gone."""
    is_restarted: ClassVar[bool]
    """Whether the controller starts pods again that have failed or gone; else whoever launches makes the job anew."""

    def body(
        self,
        name: str,
        job_uri: str,
        launch: LaunchConfig,
        pods: PodConfig,
        *,
        environment: Mapping[str, str],
        owner: Object | None = None,
        command: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Return the job to create.

        Args:
            name: from job_name.
            job_uri: what the processes are given.
            launch: which processes the pods run.
            pods: what the pods look like.
            environment: the launcher's own; what pods must know of S3 and trackers is taken from it.
            owner: an ownerReference: deleting that object deletes the job.
            command: instead of torchrun with the training module; the job's URI is added.
        """
        runs = command_of(launch, job_uri, command)
        container = container_of(self.container, runs, launch.processes_per_node, pods, environment)
        metadata = job_metadata(name, job_uri, launch, pods, environment, owner)
        metadata["labels"] |= self.own_labels()
        return {
            "apiVersion": f"{self.group}/{self.version}",
            "kind": self.name,
            "metadata": metadata,
            "spec": self.spec(launch, pods, container, metadata["labels"]),
        }

    def own_labels(self) -> dict[str, str]:
        """Return labels that tell a job that is made now from all others."""
        return {}

    @abstractmethod
    def spec(
        self, launch: LaunchConfig, pods: PodConfig, container: Object, labels: Mapping[str, str]
    ) -> dict[str, Any]:
        """Return the specification of a job.

        Args:
            launch: which processes the pods run.
            pods: what the pods look like.
            container: of the pods: the one that trains.
            labels: of the job.
        """

    def unfit(self, created: Object) -> str:
        """Return why a job, as the cluster has taken it, would not train as it was asked to; empty: it would."""
        return ""

    @abstractmethod
    def outcome(self, job: Object) -> Outcome:
        """Return how the job has ended; empty: it has not."""

    @abstractmethod
    def is_running(self, job: Object) -> bool:
        """Return whether the controller has seen its pods run, and has not seen them end since."""

    @abstractmethod
    def is_suspended(self, job: Object) -> bool:
        """Return whether the job waits in a queue, by its own will or by Kueue's."""

    @abstractmethod
    def num_nodes(self, job: Object) -> int:
        """Return how many pods the job has."""

    @abstractmethod
    def processes_per_node(self, job: Object) -> int:
        """Return how many processes each of its pods runs."""

    @abstractmethod
    def pod_selector(self, job: Object) -> str:
        """Return the label selector of its pods."""

    @abstractmethod
    def owns(self, job: Object, pod: Object) -> bool:
        """Return whether a pod that the selector finds is this job's, and not of one before it that had its name."""

    @abstractmethod
    def node_rank(self, pod: Object) -> int:
        """Return a pod's number among the nodes of its job."""

    @abstractmethod
    def event_selectors(self, job: Object) -> list[str]:
        """Return the field selectors of events about the job, and about what stands between it and its pods."""


def run_limits(pods: PodConfig) -> dict[str, Any]:
    """Return when a job may run, in fields that all kinds call the same."""
    # The controllers count from when a job was made or let go, the wait for nodes too; the launcher counts better.
    limits: dict[str, Any] = {"activeDeadlineSeconds": pods.active_deadline_seconds + pods.pending_deadline_seconds}
    if pods.queue_name:
        # Kueue takes the job out of suspension when it admits it.
        limits["suspend"] = True
    return limits


def true_conditions(job: Object) -> list[Object]:
    """Return the conditions of a job that hold."""
    conditions = (job.get("status") or {}).get("conditions") or []
    return [condition for condition in conditions if condition["status"] == "True"]
