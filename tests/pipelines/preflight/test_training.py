"""Whether the cluster trains by Kubeflow Trainer: its API, the fields it knows, the runtime, rights on TrainJobs."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dice_core.launch.job_kinds import JOB_KINDS
from dice_core.launch.kubernetes import KubernetesApi, KubernetesError
from dice_core.launch.settings import LaunchConfig
from pipelines.cluster.config import ClusterConfig
from pipelines.preflight.findings import Line
from pipelines.preflight.preflight import check_rights
from pipelines.preflight.training import controller_lines
from tests.cluster_objects import ClusterObjects, running_cluster
from tests.kubernetes_api.trainer import RUNTIME_FILE

pytestmark = pytest.mark.slow

GROUP, VERSION = "/apis/trainer.kubeflow.org", "/apis/trainer.kubeflow.org/v1alpha1"
RUNTIME = f"{VERSION}/namespaces/kubeflow/trainingruntimes/dice-torch"
DEFINITION = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/trainjobs.trainer.kubeflow.org"


def definition(*fields: str) -> dict[str, Any]:
    schema = {"openAPIV3Schema": {"properties": {"spec": {"properties": {name: {} for name in fields}}}}}
    return {"spec": {"versions": [{"name": "v1alpha1", "schema": schema}]}}


EVERYTHING: dict[str, Any] = {
    GROUP: {"versions": [{"groupVersion": "trainer.kubeflow.org/v1alpha1", "version": "v1alpha1"}]},
    VERSION: {"resources": [{"name": "trainjobs"}, {"name": "trainjobs/status"}, {"name": "trainingruntimes"}]},
    "/apis/jobset.x-k8s.io": {"versions": []},
    DEFINITION: definition("runtimeRef", "trainer", "runtimePatches"),
    RUNTIME: yaml.safe_load(RUNTIME_FILE.read_text()),
}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ClusterObjects]:
    with running_cluster(copy.deepcopy(EVERYTHING)) as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig(tmp_path)))
        yield cluster


def lines() -> dict[str, Line]:
    launch = LaunchConfig.parse({"backend": "trainjob"}, "launch")
    found = controller_lines(KubernetesApi("kubeflow"), JOB_KINDS["trainjob"], launch, ClusterConfig())
    return {line.what: line for line in found}


def test_a_cluster_with_trainer_and_the_runtime_is_ok(cluster: ClusterObjects) -> None:
    assert {what: line.state for what, line in lines().items()} == {
        "Kubeflow Trainer": "ok",
        "fields of TrainJobs": "ok",
        "training runtime dice-torch": "ok",
    }


@pytest.mark.parametrize(
    ("change", "what", "told"),
    [
        (lambda objects: objects.pop(GROUP), "Kubeflow Trainer", "the API knows no TrainJob: install Kubeflow Trainer"),
        (
            lambda objects: objects[GROUP].update(versions=[{"version": "v1beta1"}]),
            "Kubeflow Trainer",
            "the API serves TrainJobs as v1beta1, and the launcher makes v1alpha1",
        ),
        (lambda objects: objects.pop("/apis/jobset.x-k8s.io"), "Kubeflow Trainer", "the API knows no JobSet"),
        (
            lambda objects: objects.update({DEFINITION: definition("runtimeRef", "podTemplateOverrides")}),
            "fields of TrainJobs",
            "the definition of TrainJob has no runtimePatches: Kubeflow Trainer 2.3 or newer is needed",
        ),
        (
            lambda objects: objects.pop(RUNTIME),
            "training runtime dice-torch",
            "there is none in namespace kubeflow: add components/training-runtime to your overlay",
        ),
        (
            lambda objects: objects[RUNTIME]["spec"]["template"]["spec"].update(ttlSecondsAfterFinished=60),
            "training runtime dice-torch",
            "its JobSet has ttlSecondsAfterFinished",
        ),
    ],
)
def test_what_is_missing_is_told_with_what_to_do(cluster: ClusterObjects, change: Any, what: str, told: str) -> None:
    change(cluster.objects)
    line = lines()[what]
    assert line.state == "FAIL" and line.text.startswith(told)


def test_what_one_may_not_look_at_is_not_known(cluster: ClusterObjects) -> None:
    cluster.forbidden |= {DEFINITION, RUNTIME}
    assert [line.state for line in lines().values()] == ["ok", "?", "?"]


def test_the_suites_roles_give_the_rights_on_trainjobs_and_a_role_from_before_is_told(cluster: ClusterObjects) -> None:
    api, kind = KubernetesApi("kubeflow"), JOB_KINDS["trainjob"]
    assert check_rights(api, kind).endswith("create, follow and delete TrainJobs")
    cluster.role_rules = [rule for rule in cluster.role_rules if "trainjobs" not in rule["resources"]]
    with pytest.raises(KubernetesError, match="may not create trainjobs, get trainjobs, patch trainjobs, delete"):
        check_rights(api, kind)
