"""TrainJobs: what is asked for, what is made of the recorded answers of Trainer 2.3.0, and whether the stand-in fits.

The fields that a TrainJob may have are in tests/data/trainer-2.3.0/trainjob-fields.yaml.
"""

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from dice_core.launch.failure_report import failure_report, is_late, waiting_reasons
from dice_core.launch.job_spec import job_name
from dice_core.launch.pytorchjob import PYTORCH_JOB
from dice_core.launch.settings import LaunchConfig, PodConfig
from dice_core.launch.trainjob import TRAIN_JOB, runtime_faults
from tests.dice_core.launch.test_job_spec import OWNER, PODS, URI, pruned
from tests.kubernetes_api.by_hand import wait_until
from tests.kubernetes_api.server import ApiServer
from tests.kubernetes_api.store import POD, Object
from tests.kubernetes_api.store import TRAIN_JOB as STORED
from tests.kubernetes_api.trainer import RUNTIME_FILE, Trainer, pod_of, pod_template

_RECORDED = Path(__file__).parents[2] / "data" / "trainer-2.3.0"
_LAUNCH = LaunchConfig.parse({"backend": "trainjob", "num_nodes": 3, "processes_per_node": 8}, "launch")
_MORE = {
    "extra_resources": {"vpc.amazonaws.com/efa": "4"},
    "capabilities": ["IPC_LOCK"],
    "disk": "250Gi",
    "volumes": [{"name": "huge", "mount_path": "/huge", "source": {"emptyDir": {"medium": "HugePages"}}}],
    "scratch_volume": {"hostPath": {"path": "/mnt/nvme"}},
}


def recorded(kind: str, state: str) -> Any:
    found = json.loads((_RECORDED / f"{kind}-{state}.json").read_text())
    return {pod["metadata"]["name"]: pod for pod in found["items"]} if kind == "pods" else found


def runtime() -> Object:
    return dict(yaml.safe_load(RUNTIME_FILE.read_text()))


def bodies(**settings: Any) -> tuple[Object, Object]:
    """Return a TrainJob and a PyTorchJob of the same settings."""
    values = {name: value for name, value in (PODS | _MORE | settings).items() if name != "priority_class"}
    pods = PodConfig.parse(values, "pods")
    arguments = ("dice-x", URI, _LAUNCH, pods)
    return tuple(
        kind.body(*arguments, environment={"AWS_REGION": "r"}, owner=OWNER) for kind in (TRAIN_JOB, PYTORCH_JOB)
    )  # type: ignore[return-value]


# ---- what is asked for


def test_its_pods_are_those_of_a_pytorchjob() -> None:
    train_job, pytorch_job = bodies()
    theirs, ours = pod_template(train_job, runtime()), pytorch_job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    [container], [other] = theirs["spec"].pop("containers"), ours["spec"].pop("containers")
    peers = {variable["name"] for variable in container["env"]} - {variable["name"] for variable in other["env"]}
    assert peers == {"PET_NNODES", "PET_NPROC_PER_NODE", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT"}
    container["env"] = [variable for variable in container["env"] if variable["name"] not in peers]
    assert container | {"name": "pytorch"} == other
    # Of a PyTorchJob it is a field of the replica.
    assert theirs["spec"].pop("restartPolicy") == "Never"
    assert theirs["spec"] == ours["spec"]
    made = theirs["metadata"]["labels"].pop("dice-suite/made")
    assert theirs["metadata"] == ours["metadata"]
    assert train_job["metadata"]["labels"]["dice-suite/made"] == made


def test_it_is_named_and_marked_as_a_pytorchjob_is_and_waits_in_the_same_queue() -> None:
    train_job, pytorch_job = bodies()
    del train_job["metadata"]["labels"]["dice-suite/made"]
    for job in (train_job, pytorch_job):
        del job["metadata"]["annotations"]["dice-suite/launch"]
    assert train_job["metadata"] == pytorch_job["metadata"]
    assert train_job["spec"]["suspend"] is True
    assert "suspend" not in bodies(queue_name="")[0]["spec"]
    assert train_job["spec"]["activeDeadlineSeconds"] == 172_800 + 1800


def test_it_has_the_fields_and_types_of_trainers_api_and_no_other() -> None:
    schema = yaml.safe_load((_RECORDED / "trainjob-fields.yaml").read_text())
    train_job, pytorch_job = bodies()
    jsonschema.validate(train_job, schema)
    assert pruned(train_job["spec"], schema["properties"]["spec"], "spec") == []
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(pytorch_job, schema)
    misspelt = copy.deepcopy(train_job)
    misspelt["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["podSpec"] = {}
    assert pruned(misspelt["spec"], schema["properties"]["spec"], "spec") == [
        "spec.runtimePatches[].trainingRuntimeSpec.podSpec"
    ]


def test_its_pod_fits_the_schema_of_kubernetes() -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", **pod_of(bodies()[0], runtime(), "1")}
    kubernetes_validate.validate(pod, "1.30", strict=True)
    pod["spec"]["containers"][0]["volumeMount"] = []
    with pytest.raises(kubernetes_validate.ValidationError, match="volumeMount"):
        kubernetes_validate.validate(pod, "1.30", strict=True)


def test_the_names_that_jobset_makes_of_its_name_are_labels() -> None:
    name = job_name(f"s3://bucket/{'long-' * 30}/iteration-1/train/job.json", "f1", TRAIN_JOB.longest_name)
    assert len(f"{name}-node-0-999-abcde") <= 63


def test_each_that_is_made_has_pods_of_its_own() -> None:
    one, other = bodies()[0], bodies()[0]
    assert TRAIN_JOB.pod_selector(one) != TRAIN_JOB.pod_selector(other)


# ---- the runtime


def test_the_suites_runtime_has_what_a_train_job_relies_on() -> None:
    assert runtime_faults(runtime()) == []


@pytest.mark.parametrize(
    ("path", "value", "fault"),
    [
        ("mlPolicy", {"numNodes": 1}, "spec.mlPolicy has no torch, which gives torchrun its peers"),
        (
            "template.spec.ttlSecondsAfterFinished",
            60,
            "its JobSet has ttlSecondsAfterFinished, after which Trainer starts",
        ),
        ("template.spec.replicatedJobs", [], "its replicatedJobs are none, one called node is wanted"),
        ("template.spec.replicatedJobs.0.name", "main", "its replicatedJobs are main, one called node is wanted"),
        (
            "template.spec.replicatedJobs.0.template.metadata.labels",
            {},
            "its Job lacks the label trainer.kubeflow.org/",
        ),
        ("template.spec.replicatedJobs.0.template.spec.backoffLimit", 3, "its Job's backoffLimit is 3, 0 is wanted"),
        (
            "template.spec.replicatedJobs.0.template.spec.template.spec.restartPolicy",
            "OnFailure",
            "its pod's restartPolicy is 'OnFailure', 'Never' is wanted",
        ),
        (
            "template.spec.replicatedJobs.0.template.spec.template.spec.terminationGracePeriodSeconds",
            30,
            "its pod's terminationGracePeriodSeconds is 30, 120 is wanted",
        ),
        (
            "template.spec.replicatedJobs.0.template.spec.template.spec.containers.0.terminationMessagePolicy",
            "File",
            "its container's terminationMessagePolicy is 'File', 'FallbackToLogsOnError' is wanted",
        ),
        (
            "template.spec.replicatedJobs.0.template.spec.template.spec.containers.0.name",
            "pytorch",
            "its pod has no container node",
        ),
    ],
)
def test_a_runtime_that_would_train_otherwise_is_told_by_what_differs(path: str, value: Any, fault: str) -> None:
    changed = runtime()
    *parents, last = path.split(".")
    place: Any = changed["spec"]
    for name in parents:
        place = place[int(name)] if isinstance(place, list) else place[name]
    place[last] = value
    [found] = runtime_faults(changed)
    assert found.startswith(fault)


# ---- what is made of the recorded answers


@pytest.mark.parametrize(
    ("state", "outcome"),
    [
        ("running", ""),
        ("complete", "Succeeded"),
        ("failed", "Failed"),
        ("oom", "Failed"),
        ("evicted", "Failed"),
        ("pod-deleted", "Failed"),
    ],
)
def test_how_it_has_ended_is_read_from_its_conditions(state: str, outcome: str) -> None:
    job = recorded("trainjob", state)
    assert TRAIN_JOB.outcome(job) == outcome
    assert TRAIN_JOB.is_running(job) == (state == "running")
    assert not TRAIN_JOB.is_suspended(job) and not is_late(job)
    assert (TRAIN_JOB.num_nodes(job), TRAIN_JOB.processes_per_node(job)) == (2, 1)


def test_a_condition_that_is_older_than_the_job_is_not_its_own() -> None:
    job = recorded("trainjob", "failed")
    job["metadata"]["creationTimestamp"] = "2026-11-29T00:54:55Z"
    assert TRAIN_JOB.outcome(job) == ""


def test_its_pods_tell_whether_it_waits_and_which_node_each_is() -> None:
    pods = recorded("pods", "running")
    assert sorted(TRAIN_JOB.node_rank(pod) for pod in pods.values()) == [0, 1]
    assert waiting_reasons(pods, {}, 2, "Kubeflow Trainer") == []
    name, pod = next(iter(pods.items()))
    pod["status"] = {"phase": "Pending"}
    assert waiting_reasons(pods, {}, 2, "Kubeflow Trainer") == [f"{name}: Pending"]


@pytest.mark.parametrize(
    ("state", "cause"),
    [
        ("oom", "training failed, exit code 1 in dice-tj-two-node-0-0-ljfqr: OOMKilled (job"),
        (
            "evicted",
            "training failed, exit code 1 in dice-tj-three-node-0-0-lsqjp: dice-tj-three-node-0-0-lsqjp Evicted: The "
            "node was low on resource: ephemeral-storage. Threshold",
        ),
        ("failed", "training failed, exit code 1 in dice-tj-one-node-0-0-4j72d: jobset failed due to one or more job"),
        ("pod-deleted", "training failed: a, b went while it ran: deleted, preempted, or with its node (job"),
    ],
)
def test_why_it_has_failed_is_read_from_its_pods(state: str, cause: str) -> None:
    pods = recorded("pods", state)
    gone = () if pods else ("a", "b")
    assert failure_report(recorded("trainjob", state), pods, {}, {}, gone=gone).startswith(cause)


# ---- the stand-in

_WAITS = ("python", "-c", "import time; time.sleep(300)", "-")
_ENDS: dict[str, tuple[str, ...]] = {
    "complete": ("python", "-c", "pass", "-"),
    "failed": ("python", "-c", "import time; time.sleep(0.2); raise SystemExit(1)", "-"),
}


@pytest.fixture
def trainer(tmp_path: Path) -> Any:
    with ApiServer(tmp_path) as server, Trainer(server) as trainer:
        yield trainer, server


def start(server: ApiServer, command: tuple[str, ...]) -> str:
    launch = LaunchConfig.parse({"backend": "trainjob", "num_nodes": 2}, "launch")
    pods = PodConfig.parse({"image": "train:1", "gpu_resource": ""}, "pods")
    body = TRAIN_JOB.body("dice-x", URI, launch, pods, environment={}, command=command[:-1])
    return str(server.store.create(STORED, "default", body)["metadata"]["name"])


def without_times(status: Any) -> Any:
    if isinstance(status, list):
        return [without_times(item) for item in status]
    if not isinstance(status, dict):
        return status
    return {
        name: without_times(value) for name, value in status.items() if name not in ("lastTransitionTime", "message")
    }


@pytest.mark.slow
@pytest.mark.parametrize("state", ["running", "complete", "failed", "pod-deleted"])
def test_the_stand_in_answers_as_trainer_did(trainer: Any, state: str) -> None:
    _, server = trainer
    name = start(server, _ENDS.get(state, _WAITS))
    want = recorded("trainjob", state)["status"]
    if state == "pod-deleted":
        wait_until(lambda: [pod["status"]["phase"] for pod in server.store.find(POD, "default")] == ["Running"] * 2)
        first = server.store.find(POD, "default")[0]["metadata"]["name"]
        server.store.delete(POD, "default", first, gracefully=True)

    def status() -> Any:
        return server.store.get(STORED, "default", name).get("status")

    wait_until(lambda: without_times(status()) == without_times(want), 30)
    if state in ("complete", "failed"):
        assert status()["conditions"][0]["message"].replace("dice-x", "*") == want["conditions"][0]["message"].replace(
            recorded("trainjob", state)["metadata"]["name"], "*"
        )
    pods, theirs = server.store.find(POD, "default"), recorded("pods", state)
    if state == "pod-deleted":
        wait_until(lambda: not server.store.find(POD, "default"))
        assert not theirs
        return
    like = next(iter(theirs.values()))
    for pod in pods:
        own = {label for label in pod["metadata"]["labels"] if label.startswith(("dice-suite/", "sidecar", "app.kub"))}
        assert pod["metadata"]["labels"].keys() - own <= like["metadata"]["labels"].keys()
        [container], [other] = pod["spec"]["containers"], like["spec"]["containers"]
        peers = [entry["name"] for entry in container["env"] if entry["name"].startswith("PET_")]
        assert peers == [entry["name"] for entry in other["env"] if entry["name"].startswith("PET_")]
        assert (container["name"], pod["status"]["phase"]) == (other["name"], like["status"]["phase"])
        assert pod["metadata"]["ownerReferences"][0]["kind"] == like["metadata"]["ownerReferences"][0]["kind"] == "Job"
