"""The manifests: every overlay renders without a network, fits Kubernetes' schemas and gives no right beyond use."""

import os
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from dice_core.launch.settings import LaunchConfig
from dice_core.launch.trainjob import TRAIN_JOB, runtime_faults
from dice_core.settings.quantities import quantity
from dice_core.stages.table import EVALUATE
from pipelines.cluster import config as cluster
from pipelines.cluster import resources
from pipelines.cluster.pools import POOLS
from pipelines.cluster.training_pods import training_pods
from pipelines.demo import object_store
from tests.rendered import MANIFESTS, OVERLAYS, Object, find, images_of, of_kind, overlay, render, selects, strings

CLUSTER_SCOPED = {"ResourceFlavor", "ClusterQueue"}
KUBERNETES_VERSION = "1.32"
TRAINER_ACCOUNT = cluster.ClusterConfig().trainer_service_account


@pytest.mark.parametrize("name", ["base", *(f"overlays/{name}" for name in OVERLAYS)])
def test_every_object_fits_the_schema_of_its_kind_with_no_field_too_many(name: str) -> None:
    objects = [item for item in render(name) if "kueue.x-k8s.io" not in item["apiVersion"]]  # not part of Kubernetes
    for item in objects:
        kubernetes_validate.validate(item, KUBERNETES_VERSION, strict=True)
    assert {"Role", "RoleBinding", "ServiceAccount"} <= {item["kind"] for item in objects}


def test_the_schemas_refuse_a_misspelt_field() -> None:
    role = find(render("base"), "Role", "dice-training")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(role | {"rule": []}, KUBERNETES_VERSION, strict=True)


def test_the_base_carries_no_namespace_and_no_image() -> None:
    objects = render("base")
    assert [o["metadata"]["name"] for o in objects if "namespace" in o["metadata"]] == []
    assert images_of(objects) == []


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_is_of_one_namespace(name: str) -> None:
    objects = overlay(name)
    namespaced = {o["metadata"].get("namespace") for o in objects if o["kind"] not in CLUSTER_SCOPED}
    assert namespaced == {"kubeflow"}
    assert [o["kind"] for o in objects if o["kind"] in CLUSTER_SCOPED and "namespace" in o["metadata"]] == []


@pytest.mark.parametrize("name", OVERLAYS)
def test_no_two_objects_have_one_name(name: str) -> None:
    names = [(o["kind"], o["metadata"]["name"]) for o in overlay(name)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_object_says_that_it_belongs_to_the_suite(name: str) -> None:
    for item in overlay(name):
        assert item["metadata"]["labels"]["app.kubernetes.io/part-of"] == "dice-suite", item["metadata"]["name"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_images_have_a_tag_that_does_not_move(name: str) -> None:
    for image in images_of(overlay(name)):
        tag = image.rpartition("/")[2].partition(":")[2]
        assert tag not in {"", "latest"}, image


def test_no_secret_is_in_git() -> None:
    assert [o for name in OVERLAYS for o in of_kind(overlay(name), "Secret")] == []
    assert [path for path in MANIFESTS.rglob("*") if path.suffix in {".env", ".key", ".pem"}] == []


# ---- rights


@pytest.mark.parametrize("name", OVERLAYS)
def test_no_right_is_given_by_a_wildcard_or_for_the_whole_cluster(name: str) -> None:
    objects = overlay(name)
    assert [o["kind"] for o in objects if o["kind"].startswith("ClusterRole")] == []
    for role in of_kind(objects, "Role"):
        assert not any("*" in text for text in strings(role["rules"])), role["metadata"]["name"]


def _rights(objects: list[Object], account: str) -> dict[str, list[str]]:
    """Return what the account may do: resource (with names, where a rule has them) -> sorted verbs."""
    rights: dict[str, list[str]] = {}
    for binding in of_kind(objects, "RoleBinding"):
        if account in [subject["name"] for subject in binding["subjects"]]:
            for rule in find(objects, "Role", binding["roleRef"]["name"])["rules"]:
                for resource in rule["resources"]:
                    name = "/".join([*filter(None, rule["apiGroups"]), resource, *rule.get("resourceNames", [])])
                    rights[name] = sorted(rule["verbs"])
    return rights


def test_the_pipeline_account_has_the_rights_that_a_run_uses_and_no_other() -> None:
    assert _rights(render("base"), cluster.PIPELINE_ACCOUNT) == {
        "kubeflow.org/pytorchjobs": ["create", "delete", "get", "patch"],
        "trainer.kubeflow.org/trainjobs": ["create", "delete", "get", "patch"],
        "kueue.x-k8s.io/workloads": ["list"],
        "pods": ["get", "list"],
        "pods/log": ["get"],
        "events": ["list"],
        "argoproj.io/workflows": ["get"],
        "argoproj.io/workflowtaskresults": ["create", "patch"],
        "argoproj.io/workflowtasksets": ["get", "list", "watch"],
        "argoproj.io/workflowtasksets/status": ["patch", "update"],
        "configmaps/kfp-launcher": ["get"],
    }


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_adds_one_secret_by_name_to_these_rights_and_nothing_else(name: str) -> None:
    added = _rights(overlay(name), cluster.PIPELINE_ACCOUNT)
    for resource in _rights(render("base"), cluster.PIPELINE_ACCOUNT):
        del added[resource]
    assert added == {"secrets/mlpipeline-minio-artifact": ["get"]}


@pytest.mark.parametrize("name", OVERLAYS)
def test_training_pods_have_no_right_and_no_token(name: str) -> None:
    objects = overlay(name)
    assert _rights(objects, TRAINER_ACCOUNT) == {}
    assert find(objects, "ServiceAccount", TRAINER_ACCOUNT)["automountServiceAccountToken"] is False


# ---- names that pipelines rely on


@pytest.mark.parametrize("name", OVERLAYS)
def test_what_a_compiled_pipeline_names_is_there(name: str) -> None:
    objects = overlay(name)
    for account in (cluster.PIPELINE_ACCOUNT, TRAINER_ACCOUNT):
        assert find(objects, "ServiceAccount", account)
    assert set(cluster.CONFIG_KEYS) <= set(find(objects, "ConfigMap", cluster.CONFIG_MAP)["data"])
    assert find(objects, "PersistentVolumeClaim", cluster.ClusterConfig().model_cache_claim)


def test_the_gpu_pool_of_the_presets_is_the_pool_of_the_queue() -> None:
    pool = POOLS["p4d"]()
    flavor = find(overlay("kueue"), "ResourceFlavor", "dice-a100")["spec"]
    assert flavor["nodeLabels"] == pool.gpu_node_selector
    assert flavor["tolerations"] == list(pool.gpu_tolerations)


def _requested(pool: cluster.ClusterConfig) -> set[str]:
    """Return what a training pod of the pool requests, its disk too, which training asks for by the model's size."""
    launch = LaunchConfig.parse({"backend": "trainjob"}, "launch")
    pods = training_pods(launch, pool)
    assert pods is not None
    body = TRAIN_JOB.body("x", "s3://b/j", launch, pods.model_copy(update={"disk": "100Gi"}), environment={})
    return set(body["spec"]["trainer"]["resourcesPerNode"]["requests"])


def test_the_queue_covers_what_a_training_pod_requests() -> None:
    objects, pool = overlay("kueue"), POOLS["p4d"]()
    queue = find(objects, "ClusterQueue", "dice")["spec"]
    (group,) = queue["resourceGroups"]
    (flavor,) = group["flavors"]
    quotas = {r["name"]: quantity(r["nominalQuota"]) for r in flavor["resources"]}
    assert sorted(quotas) == sorted(group["coveredResources"])
    assert set(quotas) == _requested(pool)
    assert quotas["cpu"] >= quantity(pool.trainer_cpu)
    assert quotas["memory"] >= quantity(pool.trainer_memory)
    assert quotas[pool.gpu_resource] == 8
    assert flavor["name"] in [o["metadata"]["name"] for o in of_kind(objects, "ResourceFlavor")]


def test_an_overlay_with_the_runtime_has_what_train_jobs_name(tmp_path: Path) -> None:
    path = MANIFESTS / "overlays" / "kind"
    lines = ["resources:", f"  - {relative(path, tmp_path)}", "components:"]
    component = MANIFESTS / "components" / "training-runtime"
    (tmp_path / "kustomization.yaml").write_text("\n".join([*lines, f"  - {relative(component, tmp_path)}", ""]))
    runtime = find(render(str(tmp_path)), "TrainingRuntime", cluster.ClusterConfig().training_runtime)
    assert runtime_faults(runtime) == []


def relative(path: Path, start: Path) -> str:
    return os.path.relpath(path, start.resolve())


def test_the_local_queue_leads_to_the_cluster_queue_which_takes_its_namespace() -> None:
    objects = overlay("kueue")
    local = find(objects, "LocalQueue", "dice")
    queue = find(objects, "ClusterQueue", local["spec"]["clusterQueue"])
    namespace = local["metadata"]["namespace"]
    assert queue["spec"]["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": namespace}


@pytest.mark.parametrize(("name", "num_gpus"), [("kind", "0"), ("a100", "8"), ("kueue", "8")])
def test_the_quota_bounds_gpus_and_nothing_that_other_pods_or_ended_jobs_would_need(name: str, num_gpus: str) -> None:
    hard = find(overlay(name), "ResourceQuota", "dice-gpus")["spec"]["hard"]
    assert hard == {"requests.nvidia.com/gpu": num_gpus}


def test_on_aws_no_endpoint_is_set_and_both_accounts_take_the_role() -> None:
    objects = overlay("a100")
    assert find(objects, "ConfigMap", "dice-config")["data"]["AWS_ENDPOINT_URL"] == ""
    for account in of_kind(objects, "ServiceAccount"):
        assert account["metadata"]["annotations"]["eks.amazonaws.com/role-arn"].startswith("arn:aws:iam::")


# ---- network policies, read as a network plugin reads them

TASK = dict(resources.PART_OF)
TRAINER = TASK | {"app.kubernetes.io/component": "training"}
OBJECT_STORE = {"app.kubernetes.io/name": "dice-object-store"}
STRANGER = {"app": "something-else"}


def _admits(rule: Object, side: str, peer: dict[str, str], port: int) -> bool:
    peers, ports = rule.get(side), rule.get("ports")
    peer_fits = peers is None or any("podSelector" in p and selects(p["podSelector"], peer) for p in peers)
    return peer_fits and (ports is None or any(p["protocol"] == "TCP" and p["port"] == port for p in ports))


def _may_connect(objects: list[Object], source: dict[str, str], target: dict[str, str], port: int) -> bool:
    """Return whether a pod of the namespace may connect to another one: policies add up, and none is no restriction."""
    for labels, peer, direction, side in ((source, target, "Egress", "to"), (target, source, "Ingress", "from")):
        policies = [
            policy["spec"]
            for policy in of_kind(objects, "NetworkPolicy")
            if direction in policy["spec"]["policyTypes"] and selects(policy["spec"]["podSelector"], labels)
        ]
        rules = [rule for spec in policies for rule in spec.get(direction.lower(), [])]
        if policies and not any(_admits(rule, side, peer, port) for rule in rules):
            return False
    return True


def test_training_pods_reach_each_other_on_any_port() -> None:
    assert _may_connect(overlay("a100"), TRAINER, TRAINER, 23456)
    assert _may_connect(overlay("a100"), TRAINER, TRAINER, 51873)


@pytest.mark.parametrize("source", [STRANGER, TASK])
def test_nothing_else_reaches_a_training_pod_or_a_task(source: dict[str, str]) -> None:
    assert not _may_connect(overlay("a100"), source, TRAINER, 23456)
    assert not _may_connect(overlay("a100"), source, TASK, 8080)


@pytest.mark.parametrize("source", [TASK, TRAINER])
def test_tasks_and_training_reach_the_services_of_their_namespace(source: dict[str, str]) -> None:
    assert _may_connect(overlay("kind"), source, {"app": "metadata-grpc-server"}, 8080)
    assert _may_connect(overlay("kind"), source, OBJECT_STORE, 8333)


def test_the_memory_of_the_object_store_of_kind_is_bounded_as_that_of_the_demo() -> None:
    deployment = find(overlay("kind"), "Deployment", "dice-object-store")
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    assert set(object_store.MEMORY_FLAGS) <= set(container["args"])
    assert object_store.MEMORY_VARIABLES.items() <= variables.items()
    # Twice what Go is told to keep to: what is uploaded at this moment comes on top.
    assert quantity(container["resources"]["limits"]["memory"]) >= 2 * quantity(variables["GOMEMLIMIT"].rstrip("B"))


def test_the_object_store_of_kind_takes_s3_alone() -> None:
    assert not _may_connect(overlay("kind"), TASK, OBJECT_STORE, 9333)


def test_the_way_out_is_dns_and_tls_without_the_metadata_service_of_the_node() -> None:
    rules = find(render("base"), "NetworkPolicy", "dice-egress")["spec"]["egress"]
    peers = [(peer, rule["ports"]) for rule in rules for peer in rule["to"] if "ipBlock" in peer]
    ways = [(peer["ipBlock"], sorted({port["port"] for port in ports})) for peer, ports in peers]
    assert ways == [
        ({"cidr": "169.254.20.10/32"}, [53]),
        ({"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]}, [443, 6443]),
    ]


def test_the_way_to_a_judge_in_the_cluster_is_open_to_those_who_ask_it_and_to_no_other_pod() -> None:
    policy = find(render("components/judge-endpoint"), "NetworkPolicy", "dice-egress-judge-endpoint")
    kubernetes_validate.validate(policy, KUBERNETES_VERSION, strict=True)
    [rule] = policy["spec"]["egress"]
    assert policy["spec"]["policyTypes"] == ["Egress"] and rule["ports"] == [{"protocol": "TCP", "port": 8000}]
    [expression] = policy["spec"]["podSelector"]["matchExpressions"]
    assert policy["spec"]["podSelector"]["matchLabels"] == TASK
    assert expression["key"] == "app.kubernetes.io/component" and EVALUATE.name in expression["values"]


# ---- the files themselves


def _kustomizations() -> list[Path]:
    return sorted(MANIFESTS.rglob("kustomization.yaml"))


def test_every_file_belongs_to_a_kustomization() -> None:
    named: set[Path] = set()
    for path in _kustomizations():
        content = yaml.safe_load(path.read_text())
        patches = [patch["path"] for patch in content.get("patches", [])]
        named |= {(path.parent / name).resolve() for name in [*content.get("resources", []), *patches]}
    # kubectl patches what Kubeflow Pipelines has installed by these; tests/test_make.py reads who names them.
    named |= set((MANIFESTS / "kubeflow-pipelines").resolve().glob("*.yaml"))
    files = {path.resolve() for path in MANIFESTS.rglob("*.yaml")} - {path.resolve() for path in _kustomizations()}
    assert files - named == set()


def test_kustomizations_name_local_files_only() -> None:
    for path in _kustomizations():
        content = yaml.safe_load(path.read_text())
        assert not [name for name in content.get("resources", []) if "://" in name or "?" in name]
