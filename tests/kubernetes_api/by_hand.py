"""A cluster whose controllers are the test itself: it creates pods and writes statuses through the API.

Works on the stand-in and on a real API server alike, where neither operator nor kubelet runs.
"""

import json
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from kubernetes import client, config

from dice_core.launch.job_kinds import JOB_KINDS
from tests.kubernetes_api import trainer
from tests.kubernetes_api.controllers import ForegroundDeletion
from tests.kubernetes_api.server import ApiServer

_DEFINITIONS = {"pytorchjob": "DICE_TEST_CRD", "trainjob": "DICE_TEST_TRAINER_CRD"}
_TRAINER_TYPES = {"Succeeded": ("Complete", "AllJobsCompleted"), "Failed": ("Failed", "FailedJobs")}
# Servers before 1.24 want a token for every pod that may mount one, and no controller makes any.
_NO_TOKEN = {"automountServiceAccountToken": False}


class HandOperated:
    """One namespace of a cluster, and the hands that move its objects."""

    def __init__(self, kubeconfig: Path, folder: Path, backend: str = "pytorchjob", definition: str = "") -> None:
        """Make a namespace to work in.

        Args:
            kubeconfig: leads to the API server.
            folder: for a kubeconfig that leads to the namespace.
            backend: that makes the jobs.
            definition: file of the definition of the jobs' kind to apply first; empty: it is there.
        """
        self.kind = JOB_KINDS[backend]
        self._place = (self.kind.group, self.kind.version)
        self.namespace = f"dice-{uuid.uuid4().hex[:8]}"
        settings = client.Configuration()
        config.load_kube_config(str(kubeconfig), client_configuration=settings)
        api_client = client.ApiClient(settings)
        self.core, self.custom = client.CoreV1Api(api_client), client.CustomObjectsApi(api_client)
        if definition:
            _apply_definition(client.ApiextensionsV1Api(api_client), definition)
            wait_until(lambda: _answers(self.jobs))
        self.core.create_namespace({"metadata": {"name": self.namespace}})
        # Pods need it, and no controller makes it.
        account = {"metadata": {"name": "default"}}
        _unless(409, lambda: self.core.create_namespaced_service_account(self.namespace, account))
        self.kubeconfig = folder / f"kubeconfig-{self.namespace}"
        self.kubeconfig.write_text(yaml.safe_dump(_moved(kubeconfig, self.namespace)))

    def jobs(self) -> list[dict[str, Any]]:
        """Return all training jobs of the namespace."""
        listed = self.custom.list_namespaced_custom_object(*self._place, self.namespace, self.kind.plural)
        return [dict(item) for item in listed["items"]]

    def the_job(self, seconds: float = 20) -> dict[str, Any]:
        """Wait for a job that is not being deleted, and return it."""
        wait_until(lambda: bool(self.jobs()), seconds)
        return self.jobs()[0]

    def set_condition(self, kind: str, message: str = "") -> None:
        """Make a condition of the job true, as the operator does, or what a TrainJob that runs has instead."""
        if self.kind.is_restarted:
            reason, message = f"PyTorchJob{kind}", message or f"PyTorchJob is {kind.lower()}."
            condition = {"type": kind, "status": "True", "reason": reason, "message": message}
        elif kind in ("Created", "Running"):
            jobs_status = trainer.jobs_status(active=1, ready=int(kind == "Running"))
            return self._change_job_status(lambda status: status.update(jobsStatus=jobs_status))
        else:
            theirs, reason = _TRAINER_TYPES[kind]
            condition = {"type": theirs, "status": "True", "reason": reason, "message": message or "jobset ended"}
            condition["lastTransitionTime"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._change_job_status(lambda status: status.setdefault("conditions", []).append(condition))

    def pod_template(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the pods of a job are made by."""
        if self.kind.is_restarted:
            return dict(job["spec"]["pytorchReplicaSpecs"]["Master"]["template"])
        return trainer.pod_template(dict(job), yaml.safe_load(trainer.RUNTIME_FILE.read_text()))

    def admit(self) -> None:
        """End the job's suspension, as Kueue does."""
        job = self.the_job()
        job["spec"].get("runPolicy", job["spec"])["suspend"] = False
        name = job["metadata"]["name"]
        self.custom.replace_namespaced_custom_object(*self._place, self.namespace, self.kind.plural, name, job)

    def delete_job(self) -> None:
        """Delete the job, as a person does."""
        name = self.the_job()["metadata"]["name"]
        self.custom.delete_namespaced_custom_object(*self._place, self.namespace, self.kind.plural, name)

    def create_pod(self, role: str = "master", index: int = 0) -> str:
        """Create a replica of the job, as the operator does, and return its name."""
        job = self.the_job()
        template = self.pod_template(job)
        if self.kind.is_restarted:
            name = f"{job['metadata']['name']}-{role}-{index}"
            labels = {
                "training.kubeflow.org/job-name": job["metadata"]["name"],
                "training.kubeflow.org/replica-type": role,
                "training.kubeflow.org/replica-index": str(index),
            }
        else:
            node = str(index + (role == "worker"))
            name = f"{job['metadata']['name']}-node-0-{node}-{uuid.uuid4().hex[:5]}"
            labels = {**template["metadata"]["labels"], trainer.INDEX_LABEL: node}
        owner = {
            "apiVersion": job["apiVersion"],
            "kind": job["kind"],
            "name": job["metadata"]["name"],
            "uid": job["metadata"]["uid"],
            "controller": True,
        }
        spec = {
            "containers": [{"name": self.kind.container, "image": template["spec"]["containers"][0]["image"]}],
            **_NO_TOKEN,
        }
        metadata = {"name": name, "labels": labels, "ownerReferences": [owner]}
        self.core.create_namespaced_pod(self.namespace, {"metadata": metadata, "spec": spec})
        return name

    def set_pod(self, name: str, phase: str, *, state: Mapping[str, Any] | None = None, **status: Any) -> None:
        """Write a pod's status, as the kubelet does."""
        containers = [
            {
                "name": self.kind.container,
                "image": "training:1",
                "imageID": "",
                "ready": phase == "Running",
                "restartCount": 0,
                "state": dict(state or {}),
            }
        ]
        value = {"phase": phase, **status, **({"containerStatuses": containers} if state else {})}

        def write() -> None:
            pod = self.core.read_namespaced_pod(name, self.namespace)
            version = pod.metadata.resource_version
            body = {"metadata": {"name": name, "resourceVersion": version}, "status": value}
            self.core.patch_namespaced_pod_status(name, self.namespace, body)

        _retry_conflicts(write)

    def add_event(self, about: str, reason: str, message: str) -> None:
        """Report a warning about a pod."""
        pod = self.core.read_namespaced_pod(about, self.namespace)
        reference = {
            "apiVersion": "v1",
            "kind": "Pod",
            "name": about,
            "namespace": self.namespace,
            "uid": pod.metadata.uid,
        }
        time_now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        event = {
            "metadata": {"generateName": f"{about}.", "namespace": self.namespace},
            "involvedObject": reference,
            "reason": reason,
            "message": message,
            "type": "Warning",
            "count": 1,
            "firstTimestamp": time_now,
            "lastTimestamp": time_now,
        }
        self.core.create_namespaced_event(self.namespace, event)

    def create_launcher_pod(self, owner: Mapping[str, Any] | None = None) -> str:
        """Create the pod that a launcher believes to run in, and return its uid."""
        metadata: dict[str, Any] = {"name": "launcher"}
        if owner:
            metadata["ownerReferences"] = [dict(owner)]
        spec = {"containers": [{"name": "main", "image": "core:1"}], **_NO_TOKEN}
        created = self.core.create_namespaced_pod(self.namespace, {"metadata": metadata, "spec": spec})
        return str(created.metadata.uid)

    def _change_job_status(self, change: Callable[[dict[str, Any]], Any]) -> None:
        def write() -> None:
            job = self.the_job()
            change(job.setdefault("status", {}))
            name = job["metadata"]["name"]
            self.custom.replace_namespaced_custom_object_status(
                *self._place, self.namespace, self.kind.plural, name, job
            )

        _retry_conflicts(write)


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Wait for something to become true. Only a failure takes all the seconds: a loaded machine gets them."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.02)


@contextmanager
def hand_operated(folder: Path, backend: str = "pytorchjob") -> Iterator[HandOperated]:
    """Yield a namespace of the real API server that DICE_TEST_KUBECONFIG leads to, or else of the stand-in."""
    kubeconfig = os.environ.get("DICE_TEST_KUBECONFIG", "")
    if kubeconfig:
        yield HandOperated(Path(kubeconfig), folder, backend, os.environ.get(_DEFINITIONS[backend], ""))
        return
    with ApiServer(folder) as server, ForegroundDeletion(server):
        yield HandOperated(server.kubeconfig, folder, backend)


def _moved(kubeconfig: Path, namespace: str) -> dict[str, Any]:
    """Return a kubeconfig for a namespace, whose files are found from any folder."""
    values: dict[str, Any] = yaml.safe_load(kubeconfig.read_text())
    for context in values["contexts"]:
        context["context"]["namespace"] = namespace
    entries = [entry["cluster"] for entry in values["clusters"]] + [entry["user"] for entry in values["users"]]
    for entry in entries:
        for key in ("certificate-authority", "client-certificate", "client-key", "tokenFile"):
            if key in entry:
                entry[key] = str((kubeconfig.parent / entry[key]).resolve())
    return values


def _apply_definition(api: client.ApiextensionsV1Api, path: str) -> None:
    definition = yaml.safe_load(Path(path).read_text())
    # As plain JSON: the client's classes take seconds for a schema of this size.
    _unless(409, lambda: api.create_custom_resource_definition(definition, _preload_content=False))

    def is_established() -> bool:
        answer = api.read_custom_resource_definition(definition["metadata"]["name"], _preload_content=False)
        conditions = json.loads(answer.data).get("status", {}).get("conditions") or []
        return any(found["type"] == "Established" and found["status"] == "True" for found in conditions)

    wait_until(is_established)


def _answers(call: Callable[[], Any]) -> bool:
    """Return whether a resource is served; a new one is not at once."""
    try:
        call()
    except client.ApiException as error:
        if error.status != 404:
            raise
        return False
    return True


def _unless(code: int, call: Callable[[], Any]) -> None:
    try:
        call()
    except client.ApiException as error:
        if error.status != code:
            raise


def _retry_conflicts(write: Callable[[], None]) -> None:
    for _ in range(10):
        try:
            return write()
        except client.ApiException as error:
            if error.status != 409:
                raise
    raise AssertionError("ten conflicts in a row")
