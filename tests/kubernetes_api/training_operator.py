"""What the training operator (v1.9) does, played on the store of the stand-in API server.

Followed from the operator's source: names, labels and environment of the replicas, conditions, backoffLimit,
cleanPodPolicy, suspend, activeDeadlineSeconds (counted from when the operator first saw or resumed the job, whether its
pods run or not). Left out: services, elastic jobs, ttlSecondsAfterFinished.
"""

import time
from collections.abc import Mapping
from datetime import datetime

from tests.kubernetes_api.controllers import Controllers
from tests.kubernetes_api.server import make_event
from tests.kubernetes_api.store import EVENT, JOB, POD, Object, StatusError, now

_GROUP_LABEL = "training.kubeflow.org"


class TrainingOperator(Controllers):
    """The operator and one node behind an API server; a context manager."""

    def _reconcile_all(self) -> None:
        for job in self._store.find(JOB, ""):
            self._reconcile(job)

    def _reconcile(self, job: Object) -> None:
        conditions = {item["type"]: item["status"] for item in job.get("status", {}).get("conditions", [])}
        pods = self._pods(job)
        policy = job["spec"]["runPolicy"]
        if "True" in (conditions.get("Succeeded"), conditions.get("Failed")):
            self._clean(pods, policy.get("cleanPodPolicy", "None"))
        elif policy.get("suspend"):
            self._set_condition(job, "Suspended", f"PyTorchJob {job['metadata']['name']} is suspended.")
            self._clean(pods, "All")
        elif conditions.get("Suspended") == "True":
            self._resume(job)
        elif limit := self._limit_passed(job, pods, policy):
            self._clean(pods, "All")
            self._set_condition(job, "Failed", f"Job {job['metadata']['name']} has failed because it {limit}")
        else:
            self._sync_replicas(job, pods, conditions)

    def _resume(self, job: Object) -> None:
        conditions = job["status"]["conditions"]
        for condition in conditions:
            condition["status"] = "False" if condition["type"] == "Suspended" else condition["status"]
        self._patch_status(JOB, job, {"conditions": conditions, "startTime": now()})

    def _limit_passed(self, job: Object, pods: Mapping[str, Object], policy: Object) -> str:
        start, deadline = job.get("status", {}).get("startTime"), policy.get("activeDeadlineSeconds")
        if self._is_past_backoff(pods, policy):
            return "has reached the specified backoff limit"
        if start and deadline and time.time() - datetime.fromisoformat(start).timestamp() >= deadline:
            return "was active longer than specified deadline"
        return ""

    def _sync_replicas(self, job: Object, pods: dict[str, Object], conditions: Mapping[str, str]) -> None:
        if "Created" not in conditions:
            job = self._set_condition(job, "Created", f"PyTorchJob {job['metadata']['name']} is created.")
        if not job["status"].get("startTime"):
            job = self._patch_status(JOB, job, {"startTime": now()})
        for role, replica in job["spec"]["pytorchReplicaSpecs"].items():
            for index in range(replica.get("replicas", 1)):
                pod = pods.get(f"{job['metadata']['name']}-{role.lower()}-{index}")
                if pod is None:
                    self._create_pod(job, role.lower(), index, replica)
                elif pod["status"]["phase"] == "Failed":
                    self._replica_failed(job, role, pod, replica["restartPolicy"])
        master = pods.get(f"{job['metadata']['name']}-master-0")
        phase = master["status"]["phase"] if master else ""
        if phase == "Succeeded":
            message = f"PyTorchJob {job['metadata']['name']} is successfully completed."
            self._set_condition(job, "Succeeded", message)
        elif phase == "Running" and conditions.get("Running") != "True":
            self._set_condition(job, "Running", f"PyTorchJob {job['metadata']['name']} is running.")

    def _replica_failed(self, job: Object, role: str, pod: Object, policy: str) -> None:
        ended = [status["state"].get("terminated") for status in pod["status"].get("containerStatuses") or []]
        # Without a code, as after an eviction, the operator takes 0xbeef.
        exit_code = next((state["exitCode"] for state in ended if state), 0xBEEF)
        if policy in ("OnFailure", "Always") or (policy == "ExitCode" and exit_code >= 128):
            self._delete(POD, pod)
            message = f"job {job['metadata']['name']} is restarting because {role} replica(s) failed."
            self._set_condition(job, "Restarting", message)
        else:
            message = f"PyTorchJob {job['metadata']['name']} is failed because 1 {role} replica(s) failed."
            self._set_condition(job, "Failed", message)

    def _is_past_backoff(self, pods: Mapping[str, Object], policy: Object) -> bool:
        restarts = sum(
            status["restartCount"]
            for pod in pods.values()
            if pod["status"]["phase"] in ("Running", "Pending") and pod["spec"].get("restartPolicy") == "OnFailure"
            for status in pod["status"].get("containerStatuses") or []
        )
        limit = policy.get("backoffLimit")
        return limit is not None and (restarts > 0 if limit == 0 else restarts >= limit)

    def _create_pod(self, job: Object, role: str, index: int, replica: Object) -> None:
        name = f"{job['metadata']['name']}-{role}-{index}"
        labels = {
            f"{_GROUP_LABEL}/job-name": job["metadata"]["name"],
            f"{_GROUP_LABEL}/operator-name": "pytorchjob-controller",
            f"{_GROUP_LABEL}/replica-type": role,
            f"{_GROUP_LABEL}/replica-index": str(index),
        }
        template = replica["template"]
        container, *others = template["spec"]["containers"]
        variables = [*container.get("env", []), *self._variables(job, role, index)]
        policy = replica["restartPolicy"]
        spec = {
            **template["spec"],
            "containers": [{**container, "env": variables}, *others],
            "restartPolicy": "Never" if policy == "ExitCode" else policy,
        }
        owner = {
            "apiVersion": "kubeflow.org/v1",
            "kind": "PyTorchJob",
            "name": job["metadata"]["name"],
            "uid": job["metadata"]["uid"],
            "controller": True,
            "blockOwnerDeletion": True,
        }
        metadata = {
            "name": name,
            "labels": {**template["metadata"].get("labels", {}), **labels},
            "annotations": template["metadata"].get("annotations", {}),
            "ownerReferences": [owner],
        }
        try:
            self._store.create(POD, job["metadata"]["namespace"], {"metadata": metadata, "spec": spec})
        except StatusError as error:
            # The pod of an earlier job of this name is still ending, or the job's namespace is.
            if error.code not in (404, 409):
                raise
            return
        event = make_event(job, "SuccessfulCreatePod", f"Created pod: {name}", "Normal")
        self._store.create(EVENT, job["metadata"]["namespace"], event)

    def _variables(self, job: Object, role: str, index: int) -> list[Object]:
        replicas = job["spec"]["pytorchReplicaSpecs"].values()
        num_nodes = sum(replica.get("replicas", 1) for replica in replicas)
        per_node = job["spec"].get("nprocPerNode", "auto")
        rank = str(index + 1 if role == "worker" else index)
        port = self._port_of(job)
        values = {
            "PYTHONUNBUFFERED": "1",
            "MASTER_PORT": port,
            "PET_MASTER_PORT": port,
            "MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_ADDR": "127.0.0.1",
            "WORLD_SIZE": str(num_nodes * (int(per_node) if per_node.isdigit() else 1)),
            "RANK": rank,
            "PET_NPROC_PER_NODE": per_node,
            "PET_NODE_RANK": rank,
            "PET_NNODES": str(num_nodes),
        }
        return [{"name": name, "value": value} for name, value in values.items()]

    def _pods(self, job: Object) -> dict[str, Object]:
        uid = job["metadata"]["uid"]
        pods = self._store.find(POD, job["metadata"]["namespace"])
        ours = [pod for pod in pods if uid in [owner["uid"] for owner in pod["metadata"].get("ownerReferences", [])]]
        return {pod["metadata"]["name"]: pod for pod in ours}

    def _clean(self, pods: Mapping[str, Object], policy: str) -> None:
        for pod in pods.values():
            if policy == "All" or (policy == "Running" and pod["status"]["phase"] in ("Running", "Pending")):
                self._delete(POD, pod)

    def _set_condition(self, job: Object, kind: str, message: str) -> Object:
        conditions = [item for item in job.get("status", {}).get("conditions", []) if item["type"] != kind]
        if kind in ("Succeeded", "Failed", "Restarting", "Suspended"):
            for condition in conditions:
                if condition["type"] == "Running":
                    condition["status"] = "False"
        if any(i["type"] == kind and i["status"] == "True" for i in job.get("status", {}).get("conditions", [])):
            return job
        conditions.append(
            {
                "type": kind,
                "status": "True",
                "reason": f"PyTorchJob{kind}",
                "message": message,
                "lastUpdateTime": now(),
                "lastTransitionTime": now(),
            }
        )
        return self._patch_status(JOB, job, {"conditions": conditions})
