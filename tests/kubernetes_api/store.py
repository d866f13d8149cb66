"""What an API server keeps and checks: objects with versions, errors as metav1.Status."""

import copy
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Object = dict[str, Any]
_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
FOREGROUND = "foregroundDeletion"
_REASONS = {400: "BadRequest", 403: "Forbidden", 404: "NotFound", 409: "Conflict", 410: "Expired", 422: "Invalid"}


class StatusError(Exception):
    """An answer that is an error: its HTTP code and its metav1.Status."""

    def __init__(self, code: int, message: str, *, reason: str = "", details: Object | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.body: Object = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": reason or _REASONS[code],
            "details": details or {},
            "code": code,
        }


@dataclass(frozen=True)
class Kind:
    """A resource that is served."""

    group: str
    version: str
    plural: str
    kind: str
    is_namespaced: bool = True
    has_status: bool = False
    required: tuple[str, ...] = ()
    """Dotted paths without which an object is invalid."""

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def qualified(self) -> str:
        return f"{self.plural}.{self.group}" if self.group else self.plural


JOB = Kind("kubeflow.org", "v1", "pytorchjobs", "PyTorchJob", has_status=True, required=("spec.pytorchReplicaSpecs",))
TRAIN_JOB = Kind(
    "trainer.kubeflow.org", "v1alpha1", "trainjobs", "TrainJob", has_status=True, required=("spec.runtimeRef",)
)
TRAINING_RUNTIME = Kind("trainer.kubeflow.org", "v1alpha1", "trainingruntimes", "TrainingRuntime")
JOB_SET = Kind("jobset.x-k8s.io", "v1alpha2", "jobsets", "JobSet", has_status=True)
BATCH_JOB = Kind("batch", "v1", "jobs", "Job", has_status=True)
POD = Kind("", "v1", "pods", "Pod", has_status=True, required=("spec.containers",))
EVENT = Kind("", "v1", "events", "Event", required=("involvedObject",))
SECRET = Kind("", "v1", "secrets", "Secret")
NODE = Kind("", "v1", "nodes", "Node", is_namespaced=False, has_status=True)
NAMESPACE = Kind("", "v1", "namespaces", "Namespace", is_namespaced=False, has_status=True)
SERVICE_ACCOUNT = Kind("", "v1", "serviceaccounts", "ServiceAccount")
WORKFLOW = Kind("argoproj.io", "v1alpha1", "workflows", "Workflow")
WORKLOAD = Kind("kueue.x-k8s.io", "v1beta2", "workloads", "Workload", has_status=True)
DEFINITION = Kind(
    "apiextensions.k8s.io", "v1", "customresourcedefinitions", "CustomResourceDefinition", is_namespaced=False
)
KINDS = (
    JOB,
    TRAIN_JOB,
    TRAINING_RUNTIME,
    JOB_SET,
    BATCH_JOB,
    POD,
    EVENT,
    SECRET,
    NODE,
    NAMESPACE,
    SERVICE_ACCOUNT,
    WORKFLOW,
    WORKLOAD,
    DEFINITION,
)


class Store:
    """The objects of a cluster. Every method may be called from any thread."""

    def __init__(self) -> None:
        self.changed = threading.RLock()
        self._objects: dict[tuple[str, str, str], Object] = {}
        self._version = 1000
        self.admission: list[Callable[[Kind, str, Object], None]] = []
        """Webhooks: given the kind, the namespace and the new object, they raise a StatusError to deny it."""
        self.create(NAMESPACE, "", {"metadata": {"name": "default"}})

    @property
    def version(self) -> int:
        with self.changed:
            return self._version

    def create(self, kind: Kind, namespace: str, body: Object) -> Object:
        with self.changed:
            item = copy.deepcopy(body)
            metadata = item.setdefault("metadata", {})
            if not metadata.get("name") and metadata.get("generateName"):
                metadata["name"] = metadata["generateName"] + uuid.uuid4().hex[:5]
            self._check(kind, namespace, item)
            for validate in self.admission:
                validate(kind, namespace, item)
            key = (kind.qualified, namespace, metadata["name"])
            if key in self._objects:
                message = f'{kind.qualified} "{metadata["name"]}" already exists'
                raise StatusError(409, message, reason="AlreadyExists", details=_details(kind, metadata["name"]))
            metadata |= {"uid": str(uuid.uuid4()), "creationTimestamp": now(), "generation": 1}
            if kind.is_namespaced:
                metadata["namespace"] = namespace
            if kind.has_status:
                item.pop("status", None)
            if kind is POD:
                item["status"] = {"phase": "Pending", "qosClass": "BestEffort"}
            if kind is DEFINITION:
                item["status"] = {"conditions": [{"type": "Established", "status": "True"}]}
            item |= {"apiVersion": kind.api_version, "kind": kind.kind}
            return self._put(key, item)

    def get(self, kind: Kind, namespace: str, name: str) -> Object:
        with self.changed:
            found = self._objects.get((kind.qualified, namespace, name))
            if found is None:
                raise StatusError(404, f'{kind.qualified} "{name}" not found', details=_details(kind, name))
            return copy.deepcopy(found)

    def find(self, kind: Kind, namespace: str, matches: Callable[[Object], bool] = lambda _: True) -> list[Object]:
        with self.changed:
            found = [
                item
                for (qualified, where, _), item in sorted(self._objects.items())
                if qualified == kind.qualified and (not namespace or where == namespace)
            ]
            return [copy.deepcopy(item) for item in found if matches(item)]

    def replace(self, kind: Kind, namespace: str, name: str, body: Object, *, only_status: bool = False) -> Object:
        """Replace an object: its status and nothing else, or all but its status."""
        with self.changed:
            old = self.get(kind, namespace, name)
            version = body.get("metadata", {}).get("resourceVersion")
            if version and version != old["metadata"]["resourceVersion"]:
                message = (
                    f'Operation cannot be fulfilled on {kind.qualified} "{name}": the object has been modified; '
                    "please apply your changes to the latest version and try again"
                )
                raise StatusError(409, message, details=_details(kind, name))
            new = copy.deepcopy(old if only_status else body)
            source = body if only_status else old
            if kind.has_status:
                new.pop("status", None)
                if "status" in source:
                    new["status"] = copy.deepcopy(source["status"])
            for field in ("uid", "creationTimestamp", "resourceVersion", "namespace", "deletionTimestamp"):
                if field in old["metadata"]:
                    new["metadata"][field] = old["metadata"][field]
            if new == old:
                return old
            key = (kind.qualified, namespace, name)
            return self._put(key, new)

    def patch(self, kind: Kind, namespace: str, name: str, patch: Object, *, only_status: bool = False) -> Object:
        """Apply a JSON merge patch."""
        with self.changed:
            merged = _merge(self.get(kind, namespace, name), patch)
            return self.replace(kind, namespace, name, merged, only_status=only_status)

    def delete(
        self,
        kind: Kind,
        namespace: str,
        name: str,
        uid: str = "",
        *,
        gracefully: bool = False,
        in_foreground: bool = False,
    ) -> Object:
        """Delete an object; gracefully: mark it only, for the kubelet to delete when its processes have ended.

        In the foreground: mark it only, for the garbage collector to delete when what it owns is gone.
        """
        with self.changed:
            found = self.get(kind, namespace, name)
            actual = found["metadata"]["uid"]
            if uid and uid != actual:
                message = (
                    f'Operation cannot be fulfilled on {kind.qualified} "{name}": Precondition failed: '
                    f"UID in precondition: {uid}, UID in object meta: {actual}"
                )
                raise StatusError(409, message, details=_details(kind, name))
            key = (kind.qualified, namespace, name)
            if in_foreground:
                found["metadata"]["finalizers"] = [FOREGROUND]
            if gracefully or found["metadata"].get("finalizers"):
                found["metadata"].setdefault("deletionTimestamp", now())
                return self._put(key, found)
            del self._objects[key]
            return self._record(found)

    def finalize(self, kind: Kind, item: Object) -> None:
        """Delete an object that waited for its finalizers."""
        with self.changed:
            metadata = item["metadata"]
            self._objects.pop((kind.qualified, metadata.get("namespace", ""), metadata["name"]), None)

    def _put(self, key: tuple[str, str, str], item: Object) -> Object:
        item = self._record(item)
        self._objects[key] = item
        return copy.deepcopy(item)

    def _record(self, item: Object) -> Object:
        self._version += 1
        item = {**item, "metadata": {**item["metadata"], "resourceVersion": str(self._version)}}
        return item

    def _check(self, kind: Kind, namespace: str, item: Object) -> None:
        metadata = item["metadata"]
        if item.get("kind", kind.kind) != kind.kind or item.get("apiVersion", kind.api_version) != kind.api_version:
            raise StatusError(400, f"the object provided is unrecognized, {kind.kind} ({kind.api_version}) is wanted")
        if metadata.get("namespace", namespace) != namespace:
            raise StatusError(400, "the namespace of the provided object does not match the namespace sent")
        if kind.is_namespaced and (NAMESPACE.qualified, "", namespace) not in self._objects:
            raise StatusError(404, f'namespaces "{namespace}" not found', details=_details(NAMESPACE, namespace))
        causes = list(_faults(kind, item))
        if causes:
            details = {**_details(kind, str(metadata.get("name"))), "causes": causes}
            text = ", ".join(f"{cause['field']}: {cause['message']}" for cause in causes)
            raise StatusError(422, f'{kind.kind} "{metadata.get("name")}" is invalid: {text}', details=details)


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _faults(kind: Kind, item: Object) -> Iterator[Object]:
    def fault(field: str, message: str, why: str = "FieldValueRequired") -> Object:
        return {"reason": why, "message": message, "field": field}

    name = item["metadata"].get("name")
    if not name:
        yield fault("metadata.name", "Required value: name or generateName is required")
    elif not _NAME.fullmatch(name) or len(name) > 253:
        yield fault("metadata.name", f'Invalid value: "{name}": a lowercase RFC 1123 subdomain', "FieldValueInvalid")
    for path in kind.required:
        value: Any = item
        for part in path.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if not value:
            yield fault(path, "Required value")
    owners = item["metadata"].get("ownerReferences") or []
    for i, owner in enumerate(owners):
        for field in ("apiVersion", "kind", "name", "uid"):
            if not owner.get(field):
                yield fault(f"metadata.ownerReferences[{i}].{field}", "Invalid value: must not be empty")
    if sum(bool(owner.get("controller")) for owner in owners) > 1:
        yield fault("metadata.ownerReferences", "Only one reference can have Controller set to true")


def _details(kind: Kind, name: str) -> Object:
    return {"name": name, "group": kind.group, "kind": kind.plural}


def _merge(old: Any, patch: Any) -> Any:
    """Apply RFC 7386."""
    if not isinstance(patch, Mapping):
        return copy.deepcopy(patch)
    merged = dict(old) if isinstance(old, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = _merge(merged.get(key), value)
    return merged
