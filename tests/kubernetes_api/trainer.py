"""What Kubeflow Trainer (2.3), JobSet (0.12) and the Job controller do, played on the store of the stand-in API server.

Names, labels, environment, states and conditions are those of the recorded answers in tests/data/trainer-2.3.0, and
test_trainer.py compares them; patches of a runtime, suspension and deadlines follow Trainer's source. Left out:
services, and Jobs and JobSets that restart.
"""

import time
import uuid
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from tests.kubernetes_api.controllers import Controllers
from tests.kubernetes_api.server import ApiServer, make_event
from tests.kubernetes_api.store import (
    BATCH_JOB,
    EVENT,
    JOB_SET,
    POD,
    TRAIN_JOB,
    TRAINING_RUNTIME,
    Kind,
    Object,
    StatusError,
    Store,
    now,
)

RUNTIME_FILE = Path(__file__).parents[2] / "manifests" / "components" / "training-runtime" / "training-runtime.yaml"
_ENDED = ("Complete", "Failed")
_MERGED_BY = {"containers": "name", "volumes": "name", "env": "name", "volumeMounts": "mountPath"}
_STATES = ("active", "failed", "ready", "succeeded", "suspended")


class Trainer(Controllers):
    """Trainer, JobSet, the Job controller and one node behind an API server; a context manager."""

    def __init__(self, api: ApiServer, variables: Mapping[str, str] | None = None, *, period: float = 0.03) -> None:
        """See Controllers. Deploys the suite's own runtime."""
        super().__init__(api, variables, period=period)
        deploy(self._store)

    def _reconcile_all(self) -> None:
        for job in self._store.find(TRAIN_JOB, ""):
            if not job["metadata"].get("deletionTimestamp"):
                self._reconcile(job)

    def _reconcile(self, job: Object) -> None:
        conditions = {found["type"]: found["status"] for found in job.get("status", {}).get("conditions", [])}
        if any(conditions.get(kind) == "True" for kind in _ENDED):
            return
        if job["spec"].get("suspend"):
            self._suspend(job, conditions)
            return
        if conditions.get("Suspended") == "True":
            job = self._set_condition(job, "Suspended", "Resumed", "TrainJob is resumed", status="False")
        if self._is_overdue(job):
            self._set_condition(job, "Failed", "DeadlineExceeded", "TrainJob exceeded its active deadline")
            for job_set in self._of(JOB_SET, job):
                self._delete(JOB_SET, job_set)
            return
        self._sync(job, self._job_of(job))

    def _suspend(self, job: Object, conditions: Mapping[str, str]) -> None:
        if conditions.get("Suspended") != "True":
            self._set_condition(job, "Suspended", "Suspended", "TrainJob is suspended")
        for found in self._of(JOB_SET, job):
            self._delete(JOB_SET, found, in_foreground=True)

    def _is_overdue(self, job: Object) -> bool:
        resumed = [found for found in job.get("status", {}).get("conditions", []) if found["type"] == "Suspended"]
        start = resumed[0]["lastTransitionTime"] if resumed else job["metadata"]["creationTimestamp"]
        passed = time.time() - datetime.fromisoformat(start).timestamp()
        return passed >= job["spec"].get("activeDeadlineSeconds", passed + 1)

    def _job_of(self, job: Object) -> Object | None:
        """Return the Job of a TrainJob, made if it is not there; None: one of an earlier TrainJob has its name."""
        name = job["metadata"]["name"]
        job_set = self._make(JOB_SET, name, job, TRAIN_JOB)
        return job_set and self._make(BATCH_JOB, f"{name}-node-0", job_set, JOB_SET)

    def _make(self, kind: Kind, name: str, owner: Object, owner_kind: Kind) -> Object | None:
        namespace = owner["metadata"]["namespace"]
        metadata = {"name": name, "ownerReferences": [reference(owner, owner_kind)]}
        try:
            found = self._store.get(kind, namespace, name)
        except StatusError:
            return self._store.create(kind, namespace, {"metadata": metadata, "spec": {}})
        is_ours = found["metadata"]["ownerReferences"][0]["uid"] == owner["metadata"]["uid"]
        return found if is_ours and not found["metadata"].get("deletionTimestamp") else None

    def _of(self, kind: Kind, owner: Object) -> list[Object]:
        uid = owner["metadata"]["uid"]
        found = self._store.find(kind, owner["metadata"]["namespace"])
        return [item for item in found if uid in [one["uid"] for one in item["metadata"].get("ownerReferences", [])]]

    def _sync(self, job: Object, batch_job: Object | None) -> None:
        if batch_job is None:
            return
        pods = {pod["metadata"]["labels"][INDEX_LABEL]: pod for pod in self._of(POD, batch_job)}
        phases = [pod["status"]["phase"] for pod in pods.values()]
        num_nodes = job["spec"]["trainer"]["numNodes"]
        is_started = batch_job.get("status", {}).get("isStarted")
        # A pod that is there no more, or is being deleted, has failed: backoffLimit is 0.
        going = [pod for pod in pods.values() if pod["metadata"].get("deletionTimestamp")]
        if "Failed" in phases or (is_started and (going or len(pods) < num_nodes)):
            self._fail(job, pods)
        elif phases == ["Succeeded"] * num_nodes:
            self._set_condition(job, "Complete", "AllJobsCompleted", "jobset completed successfully", succeeded=1)
        elif not is_started:
            for index in range(num_nodes):
                self._create_pod(job, batch_job, str(index))
            self._patch_status(BATCH_JOB, batch_job, {"isStarted": True})
        else:
            is_ready = all(phase in ("Running", "Succeeded") for phase in phases)
            self._patch_status(TRAIN_JOB, job, {"jobsStatus": jobs_status(active=1, ready=int(is_ready))})

    def _fail(self, job: Object, pods: Mapping[str, Object]) -> None:
        for pod in pods.values():
            if pod["status"]["phase"] != "Failed":
                self._delete(POD, pod)
        name = f"{job['metadata']['name']}-node-0"
        message = f"jobset failed due to one or more job failures (first failed job: {name})"
        self._set_condition(job, "Failed", "FailedJobs", message, failed=1)

    def _create_pod(self, job: Object, batch_job: Object, index: str) -> None:
        pod = pod_of(job, runtime_of(self._store, job), index, self._port_of(job))
        pod["metadata"]["ownerReferences"] = [reference(batch_job, BATCH_JOB)]
        created = self._store.create(POD, job["metadata"]["namespace"], pod)
        event = make_event(batch_job, "SuccessfulCreate", f"Created pod: {created['metadata']['name']}", "Normal")
        self._store.create(EVENT, job["metadata"]["namespace"], event)

    def _set_condition(
        self, job: Object, kind: str, reason: str, message: str, *, status: str = "True", **numbers: int
    ) -> Object:
        others = [found for found in job.get("status", {}).get("conditions", []) if found["type"] != kind]
        condition = {"lastTransitionTime": now(), "message": message, "reason": reason, "status": status, "type": kind}
        jobs = {"jobsStatus": jobs_status(**numbers)} if numbers else {}
        return self._patch_status(TRAIN_JOB, job, {"conditions": [*others, condition], **jobs})


INDEX_LABEL = "batch.kubernetes.io/job-completion-index"


def deploy(store: Store) -> None:
    """Deploy the suite's runtime, and the webhook that looks at TrainJobs."""
    store.create(TRAINING_RUNTIME, "default", yaml.safe_load(RUNTIME_FILE.read_text()))

    def validate(kind: Kind, namespace: str, job: Object) -> None:
        if kind is TRAIN_JOB:
            _validate(store, job | {"metadata": job["metadata"] | {"namespace": namespace}})

    store.admission.append(validate)


def runtime_of(store: Store, job: Object) -> Object:
    return store.get(TRAINING_RUNTIME, job["metadata"]["namespace"], job["spec"]["runtimeRef"]["name"])


def pod_of(job: Object, runtime: Object, index: str, port: str = "29500") -> Object:
    """Return a pod of a TrainJob, without its owner."""
    name = job["metadata"]["name"]
    labels = {
        INDEX_LABEL: index,
        "batch.kubernetes.io/job-name": f"{name}-node-0",
        "job-name": f"{name}-node-0",
        "jobset.sigs.k8s.io/jobset-name": name,
        "jobset.sigs.k8s.io/replicatedjob-name": "node",
        "jobset.sigs.k8s.io/restart-attempt": "0",
    }
    template = pod_template(job, runtime, port)
    metadata = {
        "name": f"{name}-node-0-{index}-{uuid.uuid4().hex[:5]}",
        "labels": {**template["metadata"]["labels"], **labels},
        "annotations": {**template["metadata"]["annotations"], INDEX_LABEL: index},
    }
    return {"metadata": metadata, "spec": template["spec"]}


def pod_template(job: Object, runtime: Object, port: str = "29500") -> Object:
    """Return what Trainer makes of a runtime: its patches first, and then what spec.trainer says."""
    [node] = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    template = node["template"]
    for patch in job["spec"].get("runtimePatches", ()):
        for of_job in patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]:
            assert of_job["name"] == node["name"]
            template = merged(template, of_job["template"])
    trainer, pod = job["spec"]["trainer"], template["spec"]["template"]
    [container] = pod["spec"]["containers"]
    peers = {
        "PET_NNODES": {"value": str(trainer["numNodes"])},
        "PET_NPROC_PER_NODE": {"value": str(trainer["numProcPerNode"])},
        "PET_NODE_RANK": {"valueFrom": {"fieldRef": {"fieldPath": f"metadata.annotations['{INDEX_LABEL}']"}}},
        # One machine stands for all nodes.
        "PET_MASTER_ADDR": {"value": "127.0.0.1"},
        "PET_MASTER_PORT": {"value": port},
    }
    container = container | {
        "image": trainer["image"],
        "command": trainer["command"],
        "env": [*trainer["env"], *({"name": name, **value} for name, value in peers.items())],
        "resources": trainer["resourcesPerNode"],
    }
    return pod | {"spec": pod["spec"] | {"containers": [container]}}


def merged(old: Any, patch: Any, key: str = "") -> Any:
    """Apply a strategic merge patch, as far as pods have lists that are merged."""
    if isinstance(old, dict) and isinstance(patch, dict):
        return old | {name: merged(old.get(name), value, name) for name, value in patch.items()}
    if isinstance(old, list) and key in _MERGED_BY:
        name, found = _MERGED_BY[key], {item[_MERGED_BY[key]]: item for item in old}
        return list((found | {item[name]: merged(found.get(item[name]), item) for item in patch}).values())
    return patch


def reference(owner: Object, kind: Kind) -> Object:
    return {
        "apiVersion": kind.api_version,
        "kind": kind.kind,
        "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


def jobs_status(**numbers: int) -> list[Object]:
    """Return status.jobsStatus: how many of the one child Job are in which state."""
    return [{"name": "node", **{state: numbers.get(state, 0) for state in _STATES}}]


def _validate(store: Store, job: Object) -> None:
    denied = 'admission webhook "validator.trainjob.trainer.kubeflow.org" denied the request: spec.'
    try:
        runtime = runtime_of(store, job)
    except StatusError as error:
        said = f"runtimeRef: Invalid value: {error}: specified trainingRuntime must be created before the TrainJob"
        raise StatusError(403, denied + said) from None
    names = [node["name"] for node in runtime["spec"]["template"]["spec"]["replicatedJobs"]]
    for patch in job["spec"].get("runtimePatches", ()):
        for of_job in patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]:
            containers = of_job["template"]["spec"]["template"]["spec"].get("containers", ())
            if of_job["name"] not in names or any("env" in found for found in containers):
                raise StatusError(403, f"{denied}runtimePatches: Invalid value: {of_job['name']}")
