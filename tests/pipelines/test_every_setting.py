"""Every setting of every section, typed as a person types it, is seen in the compiled pipeline: also its own default.

Settings are typed together, as few compilations take them; each is looked up alone, so that a failure names it.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from dice_core.launch.job_spec import QUEUE_LABEL
from dice_core.settings.base import ConfigError, Settings
from dice_core.settings.durations import to_seconds
from pipelines.cluster.config import STAYS_ON_ITS_NODE
from pipelines.kfp.submit import shape_of
from pipelines.overrides import apply_overrides
from pipelines.presets import Preset, demo, zephyr
from tests.compiled_pipeline import Compiled, Executor

pytestmark = pytest.mark.slow

# With a warm start, so that its training is a section too.
BASE = apply_overrides(zephyr(), ["reference_source=", "iterations=1"])
SECTIONS: dict[str, type[Settings]] = {name: type(section) for name, section in BASE.sections().items()}
FIELDS = [(section, name) for section, kind in SECTIONS.items() for name in kind.model_fields]
BY_NAME = [pytest.param(*field, id=".".join(field)) for field in FIELDS]

_TRAINING = {
    "loss": "ipo",
    "beta": "0.2",
    "label_smoothing": "0.1",
    "sft_weight": "0.5",
    "learning_rate": "1e-6",
    "lr_scheduler": "cosine",
    "warmup_steps": "5",
    "max_steps": "7",
    "global_batch_size": "64",
    "max_length": "128",
    "weight_decay": "0.1",
    "max_grad_norm": "2",
    "precision": "float32",
    "saved_dtype": "float32",
    "ema_decay": "0.9",
    "reference": "base",
    "reference_logps": "recompute",
    "lora_rank": "16",
    "lora_alpha": "8",
    "lora_dropout": "0.1",
    "lora_target_modules": '["q_proj"]',
    "quantize_base": "nf4",
    "gradient_checkpointing": "false",
    "per_device_batch_size": "2",
    "deepspeed": "zero3",
    "offload_optimizer": "cpu",
    "eval_steps": "21",
    "save_minutes": "12.5",
    "save_steps": "51",
    "logging_steps": "2",
}
OTHER = {
    "chat": {
        "prompt_format": "llama3",
        "system_prompt": "Be brief.",
        "max_prompt_tokens": "100",
        "date": "2026-01-31",
        "enable_thinking": "true",
    },
    "data": {
        "num_held_out": "10",
        "max_prompts": "11",
        "max_preferences": "12",
        "max_response_characters": "13",
        "system_prompts": "ignore",
        "repeated_prompts": "keep",
        "control_tokens": "keep",
        "decontamination_words": "14",
    },
    "generation": {
        "num_responses": "20",
        "temperature": "1.5",
        "top_p": "0.5",
        "repetition_penalty": "1.1",
        "max_new_tokens": "64",
        "stop_token_ids": "[1,2]",
        "dtype": "float32",
        "prompts_per_part": "8",
        "tensor_parallel_size": "2",
        "gpu_memory_utilization": "0.5",
        "max_concurrent_sequences": "9",
        "cpu_kv_cache_gib": "2",
    },
    "scoring": {
        "reward": "judge",
        "min_characters": "5",
        "max_characters": "50",
        "min_valid_responses": "4",
        "dtype": "float32",
        "tokens_per_batch": "512",
    },
    "grading": {
        "dtype": "float32",
        "tensor_parallel_size": "2",
        "gpu_memory_utilization": "0.5",
        "max_concurrent_sequences": "9",
        "cpu_kv_cache_gib": "2",
        "max_length": "4096",
        "endpoint_url": "https://b.example/v1",
        "endpoint_model": "grader",
        "endpoint_key_variable": "",
        "endpoint_concurrency": "3",
        "endpoint_timeout": "30",
        "endpoint_retries": "2",
        "endpoint_input_price": "2.5",
        "endpoint_output_price": "10",
        "endpoint_max_cost": "20",
        "num_grades": "5",
        "min_grades": "2",
        "temperature": "0.5",
        "max_new_tokens": "256",
    },
    "pairing": {
        "selection": "margin",
        "margin_share": "0.5",
        "length_penalty": "0.02",
        "length_unit": "tokens",
        "replay_ratio": "0",
        "num_eval_pairs": "0",
    },
    "training": _TRAINING,
    "warm_start_training": _TRAINING,
    "evaluation": {
        "dtype": "float32",
        "num_sample_prompts": "3",
        "num_shown_samples": "2",
        "max_new_tokens": "32",
        "wanted_difference": "0.02",
        "num_candidates": "3",
        "max_cut_growth": "0.1",
        "max_drift_per_token": "1",
        "min_parsed_verdicts": "0.9",
        "max_length_growth": "1",
        "max_accuracy_drop": "0",
        "tokens_per_batch": "512",
        "promote": "manual",
        "registered_model": "aligned-zephyr",
    },
    "judging": {
        "judge": "reward-model",
        "dtype": "float32",
        "tensor_parallel_size": "2",
        "gpu_memory_utilization": "0.5",
        "max_concurrent_sequences": "9",
        "cpu_kv_cache_gib": "2",
        "max_length": "4096",
        "endpoint_url": "https://a.example/v1",
        "endpoint_model": "judge",
        "endpoint_key_variable": "",
        "endpoint_concurrency": "3",
        "endpoint_timeout": "30",
        "endpoint_retries": "2",
        "endpoint_input_price": "2.5",
        "endpoint_output_price": "10",
        "endpoint_max_cost": "20",
        "min_label_mass": "0.1",
    },
    "launch": {
        "backend": "pytorchjob",
        "num_nodes": "2",
        "processes_per_node": "4",
        "restart_policy": "Never",
        "backoff_limit": "0",
        "on_cancel": "leave",
    },
    "cluster": {
        "gpu_resource": "amd.com/gpu",
        "gpu_hour_price": "2.5",
        "gpu_node_selector": '{"pool":"gpu"}',
        "gpu_tolerations": '[{"key":"gpu","operator":"Exists"}]',
        "cpu_node_selector": '{"pool":"cpu"}',
        "cpu_tolerations": '[{"key":"cpu","operator":"Exists"}]',
        "gpu_task_cpu": "3",
        "gpu_task_memory": "30Gi",
        "gpu_task_shm_size": "3Gi",
        "cpu_task_cpu": "100m",
        "cpu_task_memory": "1Gi",
        "import_memory": "5Gi",
        "launcher_cpu": "200m",
        "launcher_memory": "1500Mi",
        "trainer_cpu": "40",
        "trainer_memory": "500Gi",
        "trainer_disk": "200Gi",
        "trainer_extra_resources": '{"vpc.amazonaws.com/efa":"4"}',
        "trainer_capabilities": '["IPC_LOCK"]',
        "trainer_volumes": '[{"name":"huge","mount_path":"/huge","source":{"emptyDir":{"medium":"HugePages"}}}]',
        "trainer_scratch_volume": '{"hostPath":{"path":"/mnt/nvme"}}',
        "trainer_shm_size": "40Gi",
        "trainer_service_account": "trainer",
        "trainer_priority_class": "high",
        "training_runtime": "dice-high",
        "queue_name": "queue",
        "clean_pod_policy": "All",
        "job_ttl": "2h",
        "cpu_task_timeout": "10m",
        "generate_timeout": "20m",
        "score_timeout": "30m",
        "train_timeout": "40m",
        "evaluate_timeout": "50m",
        "pending_timeout": "60m",
        "queue_timeout": "70m",
        "credentials_secret": "s3",
        "env": '{"HTTPS_PROXY":"http://proxy"}',
        "env_secret": "hub",
        "env_secret_keys": '["TOKEN"]',
        "tracking_secret": "trackers",
        "tracking_secret_keys": '["WANDB_API_KEY"]',
        "image_pull_secrets": '["registry"]',
        "model_cache_claim": "models",
        "scratch_size": "9Gi",
        "run_as_user": "1234",
        "labels": '{"team":"a"}',
        "annotations": '{"note":"b"}',
    },
}
"""Another valid value of each setting than its class's default, as it is typed."""

EMPTY = {
    "gpu_resource": "",
    "gpu_task_shm_size": "",
    "trainer_shm_size": "",
    "trainer_service_account": "",
    "env_secret_keys": "[]",
    "tracking_secret_keys": "[]",
    "model_cache_claim": "",
    "run_as_user": "0",
}
"""Settings of the cluster that say something and may be told to say nothing."""

# What does not go with the other values of its section, and goes with the defaults.
OTHER_APART = [("chat", "prompt_format")]
_APART_IN_TRAINING = ["loss", "ema_decay", "reference_logps", "quantize_base"]
_APART_IN_TRAINING += [name for name in _TRAINING if name.startswith("lora_")]
OTHER_APART += [(section, name) for section in ("training", "warm_start_training") for name in _APART_IN_TRAINING]
# With torchrun there are no pods to be seen; keys without a secret are not seen.
DEFAULT_APART = [("launch", "backend"), ("cluster", "env_secret_keys"), ("cluster", "tracking_secret_keys")]


def typed(section: str, name: str, text: str) -> str:
    return f"{section}.{name}={text}"


def default(section: str, name: str) -> str:
    value = SECTIONS[section]().to_dict()[name]
    return value if isinstance(value, str) else json.dumps(value)


def other(section: str, name: str) -> str:
    return OTHER[section].get(name, default(section, name))


def others() -> list[str]:
    return [typed(*field, (default if field in OTHER_APART else other)(*field)) for field in FIELDS]


def defaults() -> list[str]:
    return [typed(*field, default(*field)) for field in FIELDS]


IN_PODS = "launch.backend=pytorchjob"
BATCHES: dict[str, Callable[[], list[str]]] = {
    "other": others,
    "other apart": lambda: [*defaults(), IN_PODS, *(typed(*field, other(*field)) for field in OTHER_APART)],
    "default": lambda: [*defaults(), IN_PODS],
    "default apart": lambda: [*defaults(), "cluster.env_secret=hub", "cluster.tracking_secret=trackers"],
    "empty": lambda: [*others(), *(typed("cluster", name, text) for name, text in EMPTY.items())],
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Preset, Compiled]]:
    """Return a function that types a batch of settings over other values, and compiles the preset once."""

    @cache
    def compile_batch(batch: str) -> tuple[Preset, Compiled]:
        preset = apply_overrides(apply_overrides(BASE, others()), BATCHES[batch]())
        return preset, Compiled(preset, tmp_path_factory.mktemp(batch.replace(" ", "-")))

    return compile_batch


_OF_ONE_TASK = ("generate_timeout", "score_timeout")
"""One task runs both stages, and may take both times."""

View = Callable[[Compiled], Any]


def of(stage: str, look: Callable[[Executor], Any]) -> View:
    """Look at the pods of a stage's tasks, which are alike."""

    def view(compiled: Compiled) -> Any:
        first, *rest = [look(executor) for executor in compiled.executors(stage)]
        assert all(value == first for value in rest)
        return first

    return view


def of_pods(name: str) -> View:
    """Look at the training pods."""
    return lambda compiled: compiled.pods[name]


def resource(name: str) -> Callable[[Executor], Any]:
    return lambda executor: executor.container["resources"][f"resource{name}"]


def accelerator(name: str, otherwise: str) -> Callable[[Executor], Any]:
    return lambda executor: executor.container["resources"].get("accelerator", {}).get(f"resource{name}", otherwise)


def mount(path: str) -> Callable[[Executor], Any]:
    def look(executor: Executor) -> Any:
        found = [
            entry.get("sizeLimit", "") for entry in executor.platform["emptyDirMounts"] if entry["mountPath"] == path
        ]
        return found[0] if found else ""

    return look


def claim(executor: Executor) -> str:
    found = [entry["constant"] for entry in executor.platform.get("pvcMount", ()) if entry["mountPath"] == "/cache"]
    return found[0] if found else ""


def seconds(executor: Executor) -> int:
    return int(executor.platform["activeDeadlineSeconds"])


def selector(executor: Executor) -> Any:
    return executor.platform.get("nodeSelector", {}).get("labels", {})


def tolerations(executor: Executor) -> Any:
    return executor.platform.get("tolerations", [])


def variables(executor: Executor) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in executor.container.get("env", ())}


def secret(number: int) -> Callable[[Executor], tuple[str, list[str]]]:
    """Look at a secret of a task: of S3 (maybe not there), of the site, of trackers, in this order."""

    def look(executor: Executor) -> tuple[str, list[str]]:
        found = [
            (entry["secretName"], [key["envVar"] for key in entry.get("keyToEnv", ())])
            for entry in executor.platform.get("secretAsEnv", ())
        ]
        is_s3 = [name for name, keys in found if "AWS_ACCESS_KEY_ID" in keys]
        places = found if is_s3 else [("", []), *found]
        return places[number] if number < len(places) else ("", [])

    return look


def chosen(kind: str) -> Callable[[Executor], Any]:
    """Look at labels or annotations without the suite's own."""
    own = ("app.kubernetes.io/", "sidecar.istio.io/")
    return lambda executor: {
        name: value for name, value in executor.platform["podMetadata"][kind].items() if not name.startswith(own)
    }


def pull_secrets(executor: Executor) -> list[str]:
    return [entry["secretName"] for entry in executor.platform.get("imagePullSecret", ())]


VIEWS: dict[str, list[View]] = {
    "gpu_resource": [of("generate-and-score", accelerator("Type", "")), of_pods("gpu_resource")],
    "gpu_hour_price": [lambda compiled: compiled.planned("gpu_hour_price")],
    "gpu_node_selector": [of("generate-and-score", selector), of_pods("node_selector")],
    "gpu_tolerations": [of("generate-and-score", tolerations), of_pods("tolerations")],
    "cpu_node_selector": [of("pair", selector), of("train", selector)],
    "cpu_tolerations": [of("pair", tolerations), of("train", tolerations)],
    "gpu_task_cpu": [of("evaluate", resource("CpuRequest"))],
    "gpu_task_memory": [of("evaluate", resource("MemoryRequest")), of("evaluate", resource("MemoryLimit"))],
    "gpu_task_shm_size": [of("evaluate", mount("/dev/shm"))],
    "cpu_task_cpu": [of("pair", resource("CpuRequest"))],
    "cpu_task_memory": [of("pair", resource("MemoryRequest")), of("pair", resource("MemoryLimit"))],
    "import_memory": [of("import-model", resource("MemoryRequest")), of("import-model", resource("MemoryLimit"))],
    "launcher_cpu": [of("train", resource("CpuRequest"))],
    "launcher_memory": [of("train", resource("MemoryRequest")), of("train", resource("MemoryLimit"))],
    "trainer_cpu": [of_pods("cpu")],
    "trainer_memory": [of_pods("memory")],
    "trainer_disk": [of_pods("disk")],
    "trainer_extra_resources": [of_pods("extra_resources")],
    "trainer_capabilities": [of_pods("capabilities")],
    "trainer_volumes": [of_pods("volumes")],
    "trainer_scratch_volume": [of_pods("scratch_volume")],
    "trainer_shm_size": [of_pods("shm_size")],
    "trainer_service_account": [of_pods("service_account")],
    "trainer_priority_class": [of_pods("priority_class")],
    "training_runtime": [of_pods("training_runtime")],
    "queue_name": [
        of_pods("queue_name"),
        of("generate-and-score", lambda executor: executor.platform["podMetadata"]["labels"].get(QUEUE_LABEL, "")),
    ],
    "clean_pod_policy": [of_pods("clean_pod_policy")],
    "job_ttl": [of_pods("ttl_seconds_after_finished")],
    "cpu_task_timeout": [of("pair", seconds), of("report", seconds)],
    "generate_timeout": [of("generate-and-score", seconds)],
    "score_timeout": [of("generate-and-score", seconds)],
    "train_timeout": [of_pods("active_deadline_seconds")],
    "evaluate_timeout": [of("evaluate", seconds)],
    "pending_timeout": [of_pods("pending_deadline_seconds")],
    "queue_timeout": [
        lambda compiled: (
            of("train", seconds)(compiled)
            - sum(compiled.pods[name] for name in ("pending_deadline_seconds", "active_deadline_seconds"))
        )
    ],
    "credentials_secret": [
        of("pair", lambda executor: secret(0)(executor)[0]),
        of_pods("credentials_secret"),
    ],
    "env": [of("pair", variables), of_pods("env")],
    "env_secret": [of("pair", lambda executor: secret(1)(executor)[0])],
    "env_secret_keys": [of("pair", lambda executor: secret(1)(executor)[1])],
    "tracking_secret": [of("pair", lambda executor: secret(2)(executor)[0]), of_pods("tracking_secret")],
    "tracking_secret_keys": [of("pair", lambda executor: secret(2)(executor)[1])],
    "image_pull_secrets": [of("pair", pull_secrets), of_pods("image_pull_secrets")],
    "model_cache_claim": [of("generate-and-score", claim), of("import-model", claim), of_pods("model_cache_claim")],
    "scratch_size": [of("pair", mount("/tmp"))],
    "run_as_user": [
        of("pair", lambda executor: int(executor.platform["securityContext"].get("runAsUser", 0))),
        of_pods("run_as_user"),
    ],
    "labels": [of("pair", chosen("labels")), of_pods("labels")],
    "annotations": [
        of("pair", chosen("annotations")),
        lambda compiled: {
            name: value for name, value in of_pods("annotations")(compiled).items() if name not in STAYS_ON_ITS_NODE
        },
    ],
}
"""Where each setting of the cluster ends up."""


def seen(section: str, name: str, compiled: Compiled) -> list[Any]:
    """Return what the compiled pipeline has of a setting: a parameter's default, or what VIEWS look at."""
    if section != "cluster":
        return [compiled.section(section)[name]]
    return [view(compiled) for view in VIEWS[name]]


def expected(preset: Preset, section: str, name: str) -> Any:
    values = preset.sections()[section].to_dict()
    if section == "cluster" and name in _OF_ONE_TASK:
        return sum(to_seconds(values[name]) for name in _OF_ONE_TASK)
    value = values[name]
    return to_seconds(value) if section == "cluster" and name.endswith(("_timeout", "_ttl")) else value


@pytest.mark.parametrize(("section", "name"), BY_NAME)
def test_another_value_than_the_default_is_seen(section: str, name: str, compiled: Any) -> None:
    assert name in OTHER[section], "give it another value"
    preset, pipeline = compiled("other apart" if (section, name) in OTHER_APART else "other")
    value = expected(preset, section, name)
    assert preset.sections()[section].to_dict()[name] != SECTIONS[section]().to_dict()[name]
    assert all(found == value for found in seen(section, name, pipeline)), seen(section, name, pipeline)


@pytest.mark.parametrize(("section", "name"), BY_NAME)
def test_the_default_is_seen_where_it_is_typed(section: str, name: str, compiled: Any) -> None:
    """Before, a value that equalled the default of its class was taken for not chosen."""
    preset, pipeline = compiled("default apart" if (section, name) in DEFAULT_APART else "default")
    assert preset.sections()[section].to_dict()[name] == SECTIONS[section]().to_dict()[name]
    value = expected(preset, section, name)
    assert all(found == value for found in seen(section, name, pipeline)), seen(section, name, pipeline)


@pytest.mark.parametrize("name", EMPTY)
def test_what_is_told_to_say_nothing_says_nothing(name: str, compiled: Any) -> None:
    preset, pipeline = compiled("empty")
    value = expected(preset, "cluster", name)
    assert not value
    assert all(found == value for found in seen("cluster", name, pipeline)), seen("cluster", name, pipeline)


def test_the_tables_name_no_setting_that_is_not_there() -> None:
    assert {(section, name) for section in OTHER for name in OTHER[section]} == set(FIELDS)
    assert VIEWS.keys() == SECTIONS["cluster"].model_fields.keys() > EMPTY.keys()


def test_every_setting_that_may_be_empty_is_tried_empty() -> None:
    for section, kind in SECTIONS.items():
        for name, value in kind().to_dict().items():
            if value and isinstance(value, str | list | dict) and accepts(kind, name, type(value)()):
                is_tried = name in EMPTY if section == "cluster" else not OTHER[section][name]
                assert is_tried, f"{section}.{name}"


def accepts(kind: type[Settings], name: str, value: Any) -> bool:
    try:
        kind.parse({name: value}, "")
    except ConfigError:
        return False
    return True


def without_parameters(compiled: Compiled) -> Any:
    """Return what is compiled, less what a run may bring: the values of parameters, and what the UI says of them."""
    spec = json.loads(json.dumps([compiled.spec, compiled.platform]))
    spec[0]["pipelineInfo"].pop("description")
    spec[0]["root"]["inputDefinitions"]["parameters"] = sorted(spec[0]["root"]["inputDefinitions"]["parameters"])
    return spec


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        (BASE, others()),
        (BASE, ["judge_source=", "judging.judge=none", "reward_source=org/reward", "scoring.reward=reward-model"]),
        (BASE, ["pairing.replay_ratio=1"]),
        (demo(), ["reference_source=org/sft", "judge_source=org/judge", "judging.judge=reward-model"]),
    ],
    ids=["other", "other models", "offline", "demo"],
)
def test_what_is_sent_has_the_graph_and_the_pods_of_all_settings_and_shares_the_rest(
    preset: Preset, changes: list[str], tmp_path: Path
) -> None:
    """Runs of a preset share a pipeline version: its parameters have the preset's own values."""
    changed = apply_overrides(preset, changes)
    sent = Compiled(shape_of(changed), tmp_path)
    assert without_parameters(sent) == without_parameters(Compiled(changed, tmp_path))
