"""What the tasks of a compiled pipeline ask of a cluster. Read back from the YAML, as a cluster reads it."""

import json
from pathlib import Path
from typing import Any

import pytest

from components import images
from dice_core.accelerator import GPU_VARIABLE
from dice_core.settings.base import ConfigError
from dice_core.stages.table import STAGES
from pipelines.cluster.config import STAYS_ON_ITS_NODE
from pipelines.overrides import apply_overrides
from pipelines.presets import PRESETS, on_this_machine
from tests.compiled_pipeline import Compiled, Executor

pytestmark = pytest.mark.slow

GPU_STAGES = [stage.name for stage in STAGES.values() if stage.pod == "gpu" and stage.is_task]
CPU_STAGES = [stage.name for stage in STAGES.values() if stage.pod != "gpu" and stage.is_task]
TINY = ["iterations=1", "num_shards=2"]


@pytest.fixture(scope="module")
def zephyr(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return Compiled(apply_overrides(PRESETS["zephyr"](), TINY), tmp_path_factory.mktemp("zephyr"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    return Compiled(PRESETS["demo"](), tmp_path_factory.mktemp("demo"))


def compiled(folder: Path, *assignments: str) -> Compiled:
    return Compiled(apply_overrides(PRESETS["zephyr"](), [*TINY, *assignments]), folder)


def resources(executor: Executor) -> dict[str, str]:
    found = executor.container["resources"]
    return {name: found[f"resource{name}"] for name in ("CpuRequest", "MemoryRequest", "MemoryLimit")}


def mounts(executor: Executor) -> dict[str, dict[str, Any]]:
    return {entry["mountPath"]: entry for entry in executor.platform["emptyDirMounts"]}


def test_tasks_that_compute_on_a_gpu_hold_one_on_the_pool(zephyr: Compiled) -> None:
    for executor in zephyr.executors(*GPU_STAGES):
        accelerator = executor.container["resources"]["accelerator"]
        assert (accelerator["resourceType"], accelerator["resourceCount"]) == ("nvidia.com/gpu", "1")
        assert executor.platform["nodeSelector"]["labels"] == {"node.kubernetes.io/instance-type": "p4d.24xlarge"}
        assert executor.platform["tolerations"] == [
            {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        ]
        assert resources(executor) == {"CpuRequest": "10", "MemoryRequest": "80Gi", "MemoryLimit": "80Gi"}


def variables(executor: Executor) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in executor.container.get("env", ())}


def test_pods_that_ask_for_gpus_are_told_so_and_no_others(zephyr: Compiled, demo: Compiled, tmp_path: Path) -> None:
    assert all(variables(executor).get(GPU_VARIABLE) == "1" for executor in zephyr.executors(*GPU_STAGES))
    # The launcher of training among them: the pods that it starts hold the GPUs.
    assert all(GPU_VARIABLE not in variables(executor) for executor in zephyr.executors(*CPU_STAGES))
    assert all(GPU_VARIABLE not in variables(executor) for executor in demo.executors())
    without = compiled(tmp_path, "cluster.gpu_resource=")
    assert all(GPU_VARIABLE not in variables(executor) for executor in without.executors())


def test_a_toleration_may_have_an_end(tmp_path: Path) -> None:
    toleration = {"key": "x", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}
    changed = compiled(tmp_path, f"cluster.gpu_tolerations={json.dumps([toleration])}")
    assert changed.executors("generate-and-score")[0].platform["tolerations"] == [
        toleration | {"tolerationSeconds": "300"}
    ]


def test_no_other_task_holds_a_gpu_or_sits_on_its_nodes(zephyr: Compiled) -> None:
    for executor in zephyr.executors(*CPU_STAGES):
        assert "accelerator" not in executor.container["resources"]
        assert "nodeSelector" not in executor.platform and "tolerations" not in executor.platform


def test_the_launcher_of_training_is_small_and_runs_in_the_image_without_cuda(zephyr: Compiled) -> None:
    (launcher,) = zephyr.executors("train")
    assert launcher.container["image"] == images.CORE
    assert resources(launcher) == {"CpuRequest": "500m", "MemoryRequest": "2Gi", "MemoryLimit": "2Gi"}


def test_the_other_images_are_those_of_the_stages(zephyr: Compiled) -> None:
    with_vllm = zephyr.executors("generate-and-score", "evaluate")
    assert {executor.container["image"] for executor in with_vllm} == {images.GENERATE}
    # An import builds the model without values, which takes torch and no GPU.
    assert {executor.container["image"] for executor in zephyr.executors("import-model")} == {images.TRAIN}
    assert {executor.container["image"] for executor in zephyr.executors("prepare-data", "pair")} == {images.CORE}


def test_gpu_tasks_have_shared_memory_and_all_have_room_for_temporary_files(zephyr: Compiled) -> None:
    for executor in zephyr.executors(*GPU_STAGES):
        shm = mounts(executor)["/dev/shm"]
        assert (shm["medium"], shm["sizeLimit"], shm["volumeName"]) == ("Memory", "16Gi", "dshm")
    assert all("/dev/shm" not in mounts(executor) for executor in zephyr.executors(*CPU_STAGES))
    assert all("/tmp" in mounts(executor) for executor in zephyr.executors())


def test_models_are_kept_on_the_claim_by_the_tasks_that_load_or_import_them(zephyr: Compiled, tmp_path: Path) -> None:
    for executor in zephyr.executors("import-model", *GPU_STAGES):
        assert [(mount["constant"], mount["mountPath"]) for mount in executor.platform["pvcMount"]] == [
            ("dice-model-cache", "/cache")
        ]
    others = [stage for stage in CPU_STAGES if stage != "import-model"]
    assert all("pvcMount" not in executor.platform for executor in zephyr.executors(*others))
    without = compiled(tmp_path, "cluster.model_cache_claim=")
    assert all("pvcMount" not in executor.platform for executor in without.executors())
    assert all("/cache" in mounts(executor) for executor in without.executors())


def test_every_task_has_a_timeout(zephyr: Compiled) -> None:
    stages = ("generate-and-score", "pair")
    seconds = {stage: zephyr.executors(stage)[0].platform["activeDeadlineSeconds"] for stage in stages}
    # Of both stages together.
    assert seconds == {"generate-and-score": str((12 + 6) * 3600), "pair": str(6 * 3600)}
    assert all(int(executor.platform["activeDeadlineSeconds"]) > 0 for executor in zephyr.executors())


def test_the_launcher_outlives_the_job_and_its_wait_for_nodes_and_in_a_queue(zephyr: Compiled, tmp_path: Path) -> None:
    (launcher,) = zephyr.executors("train")
    assert int(launcher.platform["activeDeadlineSeconds"]) == (1 + 3 + 30) * 24 * 3600
    chosen = compiled(tmp_path, "cluster.pending_timeout=2h", "cluster.train_timeout=1h", "cluster.queue_timeout=1d")
    assert chosen.executors("train")[0].platform["activeDeadlineSeconds"] == str((2 + 1 + 24) * 3600)


def test_retries_go_on_longer_than_all_attempts_can_take(zephyr: Compiled) -> None:
    """KFP stops at an hour after the start of the first attempt unless it is told otherwise."""
    for stage, task in zephyr.tasks():
        timeout = int(zephyr.executors(stage)[0].platform["activeDeadlineSeconds"])
        policy = task["retryPolicy"]
        assert policy["maxRetryCount"] == 2
        assert int(policy["backoffMaxDuration"].removesuffix("s")) > 3 * timeout + 60 + 120


def test_a_preset_without_retries_compiles_none(demo: Compiled) -> None:
    assert [task for _, task in demo.tasks() if "retryPolicy" in task] == []


def test_every_pod_is_one_of_the_suite_and_has_no_sidecar(zephyr: Compiled, tmp_path: Path) -> None:
    for executor in zephyr.executors():
        metadata = executor.platform["podMetadata"]
        assert metadata["labels"]["app.kubernetes.io/part-of"] == "dice-suite"
        assert metadata["labels"]["app.kubernetes.io/component"] in (*GPU_STAGES, *CPU_STAGES)
        assert metadata["labels"]["sidecar.istio.io/inject"] == "false"
        assert metadata["annotations"]["sidecar.istio.io/inject"] == "false"
    marked = compiled(tmp_path, 'cluster.labels={"team":"a"}', 'cluster.annotations={"note":"b"}')
    metadata = marked.executors("pair")[0].platform["podMetadata"]
    assert metadata["labels"]["team"] == "a" and metadata["annotations"]["note"] == "b"
    assert (marked.pods["labels"], marked.pods["annotations"]) == ({"team": "a"}, {**STAYS_ON_ITS_NODE, "note": "b"})


def test_no_autoscaler_tidies_a_pod_away_that_works_for_hours(zephyr: Compiled) -> None:
    for executor in zephyr.executors():
        annotations = executor.platform["podMetadata"]["annotations"]
        works_long = executor.platform["podMetadata"]["labels"]["app.kubernetes.io/component"] in (*GPU_STAGES, "train")
        assert (STAYS_ON_ITS_NODE.items() <= annotations.items()) == works_long
    assert zephyr.pods["annotations"] == {
        "karpenter.sh/do-not-disrupt": "true",
        "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
    }


@pytest.mark.parametrize(
    ("pool", "instance_type", "cpus"),
    [("p4de", "p4de.24xlarge", "80"), ("a2-ultragpu", "a2-ultragpu-8g", "80"), ("p5", "p5.48xlarge", "176")],
)
def test_a_pool_is_chosen_by_its_name(pool: str, instance_type: str, cpus: str, tmp_path: Path) -> None:
    chosen = compiled(tmp_path, "cluster.trainer_memory=300Gi", f"pool={pool}")
    assert chosen.pods["node_selector"] == {"node.kubernetes.io/instance-type": instance_type}
    assert (chosen.pods["cpu"], chosen.pods["memory"]) == (cpus, "300Gi")


def gpus(compiled: Compiled, *stages: str) -> list[str]:
    return [executor.container["resources"]["accelerator"]["resourceCount"] for executor in compiled.executors(*stages)]


def test_a_task_asks_for_the_gpus_that_vllm_spreads_a_model_over(tmp_path: Path) -> None:
    four = compiled(tmp_path, "generation.tensor_parallel_size=4", "judging.tensor_parallel_size=8")
    assert gpus(four, "generate-and-score") == ["4", "4"]
    assert gpus(four, "evaluate") == ["8"]
    with pytest.raises(ConfigError, match="must be 1, 2, 4 or 8"):
        apply_overrides(PRESETS["zephyr"](), ["generation.tensor_parallel_size=3"])


def test_zero2_asks_for_more_memory_where_nobody_chose(tmp_path: Path) -> None:
    assert compiled(tmp_path, "training.deepspeed=zero2").pods["memory"] == "600Gi"
    assert compiled(tmp_path, "training.deepspeed=zero2", "cluster.trainer_memory=450Gi").pods["memory"] == "450Gi"


def test_a_pool_that_is_not_there_is_refused_with_the_names_of_those_that_are() -> None:
    names = r"did you mean 'p4d'\? allowed: p4d, p4de, a2-ultragpu, p5, kind"
    with pytest.raises(ConfigError, match=f"pool: unknown name 'p4', {names}"):
        apply_overrides(PRESETS["zephyr"](), ["pool=p4"])
    with pytest.raises(ConfigError, match="pool: a run on this machine has no nodes to choose"):
        apply_overrides(on_this_machine(PRESETS["zephyr"]()), ["pool=p4d"])


def test_no_pod_runs_as_root(zephyr: Compiled, tmp_path: Path) -> None:
    for executor in zephyr.executors():
        assert executor.platform["securityContext"] == {
            "runAsUser": "10001",
            "runAsGroup": "10001",
            "runAsNonRoot": True,
        }
    chosen = compiled(tmp_path, "cluster.run_as_user=0")
    assert chosen.executors("pair")[0].platform["securityContext"] == {"runAsNonRoot": True}
    assert (zephyr.pods["run_as_user"], chosen.pods["run_as_user"]) == (10001, 0)


def test_the_place_of_s3_comes_from_the_config_map(zephyr: Compiled) -> None:
    for executor in zephyr.executors():
        (config,) = executor.platform["configMapAsEnv"]
        assert config["configMapName"] == "dice-config"
        assert {entry["envVar"] for entry in config["keyToEnv"]} == {"AWS_ENDPOINT_URL", "AWS_REGION"}


def test_credentials_are_the_service_accounts_or_a_secrets(zephyr: Compiled, demo: Compiled) -> None:
    assert all("secretAsEnv" not in executor.platform for executor in zephyr.executors())
    for executor in demo.executors():
        (secret,) = executor.platform["secretAsEnv"]
        assert secret["secretName"] == "dice-s3"
        assert {entry["envVar"] for entry in secret["keyToEnv"]} == {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}


def test_variables_of_the_site_reach_every_task_and_the_training_pods(tmp_path: Path) -> None:
    changed = compiled(tmp_path, 'cluster.env={"HF_ENDPOINT":"https://hub","NCCL_DEBUG":"INFO"}')
    for executor in changed.executors():
        given = {name: value for name, value in variables(executor).items() if name != GPU_VARIABLE}
        assert given == {"HF_ENDPOINT": "https://hub", "NCCL_DEBUG": "INFO"}
    assert changed.pods["env"] == {"HF_ENDPOINT": "https://hub", "NCCL_DEBUG": "INFO"}


def test_keys_of_a_secret_become_variables_of_every_task(tmp_path: Path) -> None:
    changed = compiled(tmp_path, "cluster.env_secret=hub", 'cluster.env_secret_keys=["HF_TOKEN","PROXY"]')
    for executor in changed.executors():
        (secret,) = executor.platform["secretAsEnv"]
        assert secret["secretName"] == "hub"
        assert {entry["secretKey"]: entry["envVar"] for entry in secret["keyToEnv"]} == {
            "HF_TOKEN": "HF_TOKEN",
            "PROXY": "PROXY",
        }


def test_what_trackers_ask_for_reaches_tasks_and_training_pods_by_reference(tmp_path: Path) -> None:
    keys = ["MLFLOW_TRACKING_TOKEN", "WANDB_API_KEY"]
    changed = compiled(
        tmp_path,
        "cluster.tracking_secret=trackers",
        f"cluster.tracking_secret_keys={json.dumps(keys)}",
        'cluster.env={"MLFLOW_TRACKING_URI":"https://mlflow"}',
    )
    for executor in changed.executors():
        (secret,) = executor.platform["secretAsEnv"]
        assert secret["secretName"] == "trackers"
        assert [entry["envVar"] for entry in secret["keyToEnv"]] == keys
    pods = changed.pods
    assert (pods["tracking_secret"], pods["tracking_secret_keys"]) == ("trackers", keys)
    assert pods["env"] == {"MLFLOW_TRACKING_URI": "https://mlflow"}


def test_images_are_pulled_with_the_named_secrets(tmp_path: Path) -> None:
    for executor in compiled(tmp_path, 'cluster.image_pull_secrets=["registry"]').executors():
        assert [entry["secretName"] for entry in executor.platform["imagePullSecret"]] == ["registry"]


def test_a_cluster_without_gpus_gets_tasks_without_them(demo: Compiled) -> None:
    for executor in demo.executors():
        assert "accelerator" not in executor.container["resources"]
        assert "nodeSelector" not in executor.platform and "tolerations" not in executor.platform


def test_training_in_the_tasks_own_pod_takes_the_gpus_of_a_node(tmp_path: Path) -> None:
    changed = compiled(tmp_path, "launch.backend=torchrun")
    (trainer,) = changed.executors("train")
    assert (changed.section("launch")["backend"], changed.pods) == ("torchrun", {})
    assert trainer.container["image"] == images.TRAIN
    assert trainer.container["resources"]["accelerator"]["resourceCount"] == "8"
    assert resources(trainer)["MemoryLimit"] == "400Gi"
    assert mounts(trainer)["/dev/shm"]["sizeLimit"] == "64Gi"
    assert trainer.platform["nodeSelector"]["labels"] == {"node.kubernetes.io/instance-type": "p4d.24xlarge"}


def test_training_pods_get_the_pool_of_the_cluster_section(zephyr: Compiled) -> None:
    launch, pods = zephyr.section("launch"), zephyr.pods
    assert (launch["backend"], launch["num_nodes"], launch["processes_per_node"]) == ("pytorchjob", 1.0, 8.0)
    wanted = {
        "image": images.TRAIN,
        "service_account": "dice-trainer",
        "gpu_resource": "nvidia.com/gpu",
        "cpu": "80",
        "memory": "400Gi",
        "shm_size": "64Gi",
        "node_selector": {"node.kubernetes.io/instance-type": "p4d.24xlarge"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
        "credentials_secret": "",
        "model_cache_claim": "dice-model-cache",
        "pending_deadline_seconds": 3 * 24 * 3600.0,
        "active_deadline_seconds": 24 * 3600.0,
    }
    assert {name: pods[name] for name in wanted} == wanted


def test_training_pods_wait_and_train_for_as_long_as_the_cluster_section_says(tmp_path: Path) -> None:
    changed = compiled(tmp_path, "cluster.pending_timeout=2h", "cluster.train_timeout=1h")
    pods = changed.pods
    assert (pods["pending_deadline_seconds"], pods["active_deadline_seconds"]) == (2 * 3600, 3600)


def test_training_pods_ask_for_no_gpu_where_there_is_none(demo: Compiled) -> None:
    pods = demo.pods
    assert (pods["gpu_resource"], pods["credentials_secret"], pods["memory"]) == ("", "dice-s3", "6Gi")


def test_a_run_on_this_machine_asks_for_nothing_of_a_cluster(tmp_path: Path) -> None:
    local = Compiled(on_this_machine(PRESETS["demo"]()), tmp_path)
    assert local.platform == {}
    assert (local.section("launch")["backend"], local.pods) == ("torchrun", {})


def queue_of(executor: Executor) -> str:
    return str(executor.platform["podMetadata"]["labels"].get("kueue.x-k8s.io/queue-name", ""))


def test_tasks_with_gpus_wait_in_the_queue_of_training_and_no_other_task_does(zephyr: Compiled, tmp_path: Path) -> None:
    assert {queue_of(executor) for executor in zephyr.executors(*GPU_STAGES, *CPU_STAGES)} == {""}
    queued = compiled(tmp_path, "cluster.queue_name=dice", "cluster.queue_timeout=7d")
    assert {queue_of(executor) for executor in queued.executors(*GPU_STAGES)} == {"dice"}
    # The job that the launcher starts waits for itself.
    assert {queue_of(executor) for executor in queued.executors(*CPU_STAGES)} == {""}
    # Waiting counts in the time in which a task is retried, not in its attempts.
    windows = [
        int(task["retryPolicy"]["backoffMaxDuration"].removesuffix("s"))
        for pipeline in (zephyr, queued)
        for stage, task in pipeline.tasks()
        if stage == "evaluate"
    ]
    assert windows[1] - windows[0] == 7 * 86_400
    apart = compiled(tmp_path, "cluster.queue_name=dice", "launch.backend=torchrun")
    assert {queue_of(executor) for executor in apart.executors("train")} == {"dice"}
