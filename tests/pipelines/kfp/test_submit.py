"""`make submit` against a stand-in of KFP's API, with kfp's own client in between."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from components import images
from dice_core.settings.base import ConfigError
from pipelines.cli import main
from pipelines.kfp.api import Connection, KfpApi, KfpError
from pipelines.kfp.submit import check_images
from pipelines.overrides import find_preset
from tests.cluster_objects import NAMESPACE, running_cluster
from tests.kfp_api import KfpServer, name_a_registry, running_kfp_server

pytestmark = pytest.mark.slow

SMALL = ["iterations=1", "num_shards=1"]
ROOT = "s3://bucket/dice"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[KfpServer]:
    with running_kfp_server() as server:
        monkeypatch.setenv("KFP_HOST", server.host)
        monkeypatch.setenv("DICE_ROOT", ROOT)
        for name in ("KFP_TOKEN", "KFP_COOKIES", "KFP_UI_HOST", "DICE_NAMESPACE"):
            monkeypatch.delenv(name, raising=False)
        name_a_registry(monkeypatch)
        yield server


def submit(*arguments: str) -> int:
    """Run the command with options, and settings (what has a `=`)."""
    settings = [argument for argument in arguments if "=" in argument]
    options = [argument for argument in arguments if argument not in settings]
    return main(["submit", "--preset", "zephyr", *options, "--set", *SMALL, *settings])


def run_command(*words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run a command in a process of its own: the names of images are read when their module is loaded."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DICE_")}
    command = [sys.executable, "-m", "pipelines", *words]
    return subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=False)


def test_a_run_is_started_with_its_parameters_and_service_account(
    server: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit("--run", "first", "training.beta=0.2") == 0
    (run,), (version,) = server.posted("/runs"), server.versions
    assert run["display_name"] == "first"
    assert run["service_account"] == "dice-pipeline"
    assert run["pipeline_version_reference"]["pipeline_version_id"] == version["pipeline_version_id"]
    parameters = run["runtime_config"]["parameters"]
    assert (parameters["root"], parameters["run"]) == (ROOT, "first")
    assert parameters["training"]["beta"] == 0.2
    assert parameters["launch"]["backend"] == "pytorchjob"
    assert "cluster" not in parameters
    assert [row["display_name"] for row in server.experiments] == ["dice-zephyr"]
    assert f"{server.host}/#/runs/details/{server.runs[0]['run_id']}" in capsys.readouterr().out


def test_what_is_uploaded_is_the_pipeline_with_its_platform_part(server: KfpServer) -> None:
    assert submit() == 0
    spec = server.versions[0]["pipeline_spec"]
    assert spec["pipeline_spec"]["pipelineInfo"]["name"] == "dice-zephyr"
    executors = spec["platform_spec"]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert "exec-iteration-1-generate-and-score-1" in executors


def test_a_version_is_uploaded_once_for_each_content(server: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    """Settings are parameters: runs that differ in them alone share a version. What shapes the graph makes another."""
    assert submit("--run", "a") == submit("--run", "b", "training.beta=0.2", "seed=7") == 0
    assert [row["display_name"] for row in server.pipelines] == ["dice-zephyr"]
    assert len(server.versions) == 1 and len(server.runs) == 2
    assert "is there already" in capsys.readouterr().out
    assert submit("--run", "c", "cluster.gpu_task_memory=64Gi") == submit("--run", "d", "num_shards=2") == 0
    assert len({row["display_name"] for row in server.versions}) == 3
    assert len(server.pipelines) == len(server.experiments) == 1


def test_a_version_has_the_same_name_in_every_process() -> None:
    """The comments of a compiled pipeline list nested defaults in the order of the process's hash seed."""
    command = [sys.executable, "-m", "pipelines", "submit", "--preset", "zephyr", "--root", ROOT, "--dry-run"]
    shown = [
        subprocess.run(
            [*command, "--run", "x", "--set", *SMALL],
            env=os.environ | {"PYTHONHASHSEED": seed, "DICE_REGISTRY": "registry.example.com/dice"},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2", "3")
    ]
    assert len(set(shown)) == 1 and "version:         dice-zephyr-" in shown[0]


def test_a_run_without_a_name_gets_a_new_one(server: KfpServer) -> None:
    assert submit() == 0
    name = server.runs[0]["display_name"]
    assert name.startswith("zephyr-20") and name == server.runs[0]["runtime_config"]["parameters"]["run"]


def test_the_same_name_continues_a_run_that_ended_and_is_refused_while_it_runs(
    server: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit("--run", "twice") == 0
    assert submit("--run", "twice") == 1
    assert "run 'twice' is PENDING already" in capsys.readouterr().err
    server.runs[0]["state"] = "FAILED"
    assert submit("--run", "twice") == 0
    assert [row["display_name"] for row in server.runs] == ["twice", "twice"]


def test_a_name_of_a_run_of_another_preset_is_refused(server: KfpServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit("--run", "x") == 0
    server.runs[0]["state"] = "FAILED"
    assert main(["submit", "--preset", "llama3", "--run", "x", "--set", *SMALL]) == 1
    assert "run 'x' is one of dice-zephyr and not of dice-llama3: give its PRESET=" in capsys.readouterr().err
    assert len(server.runs) == 1


@pytest.mark.parametrize("name", ["weekly-3f2a9c1b", "run-of-weekly"])
def test_a_name_of_a_recurring_run_is_refused_with_what_continues_it(
    server: KfpServer, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its name in S3 too, which is not KFP's: submit would train there from the preset's own sources."""
    parameters = {"root": ROOT, "run": "weekly"}
    identity = {"run_id": "3f2a9c1b-77aa-4000-8000-000000000000", "recurring_run_id": "r", "state": "FAILED"}
    run = {"display_name": "run-of-weekly", "created_at": "2026-01-01T00:00:00Z", **identity}
    server.runs.append({**run, "runtime_config": {"parameters": parameters}})
    assert submit("--run", name) == 1
    assert f"run {name!r} is a recurring one, with inputs that it chose itself: make retry RUN={name}" in (
        capsys.readouterr().err
    )
    assert len(server.runs) == 1


@pytest.mark.parametrize(
    "words",
    [["submit"], ["submit", "--dry-run"], ["schedule", "--every", "7d"], ["schedule", "--every", "7d", "--dry-run"]],
)
def test_images_without_a_registry_are_refused_where_nodes_would_ask_docker_hub(
    server: KfpServer, words: list[str]
) -> None:
    """By a dry run too, which ends as the real one would."""
    variables = {"DICE_REGISTRY": "registry.example.com/dice", "DICE_GENERATE_IMAGE": "dice-suite/dice-generate:1"}
    words = [*words, "--preset", "zephyr", "--root", ROOT, "--set", *SMALL]
    result = run_command(*words, KFP_HOST=server.host, **variables)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "images: dice-suite/dice-generate:1 names no registry" in result.stderr
    assert server.requests == []
    if "--dry-run" in words:
        assert "dice-suite/dice-generate:1 (names no registry)" in result.stdout


def test_kind_has_its_images_loaded_and_needs_no_registry(server: KfpServer) -> None:
    check_images(find_preset("demo"), ["dice-suite/dice-core:1"])
    with pytest.raises(ConfigError, match="dice-suite/dice-core:1 names no registry"):
        check_images(find_preset("zephyr"), ["dice-suite/dice-core:1"])


def test_compile_warns_of_images_that_nodes_would_ask_docker_hub_for(tmp_path: Path) -> None:
    words = ["compile", "-o", str(tmp_path / "x.yaml"), "--set", *SMALL]
    result = run_command(*words)
    assert result.returncode == 0 and (tmp_path / "x.yaml").is_file()
    assert "pipelines: warning: images: dice-suite/dice-core:" in result.stderr and result.stderr.count("\n") == 1
    assert run_command(*words, DICE_REGISTRY="registry.example.com/dice").stderr == ""
    assert run_command(*words, "--preset", "demo").stderr == ""


@pytest.mark.parametrize(
    ("image", "names"),
    [
        ("registry.example.com/dice-core:1", True),
        ("localhost/dice-core:1", True),
        ("mirror:5000/dice-core:1", True),
        ("dice-suite/dice-core:1.2", False),
        ("dice-core:1.2", False),
    ],
)
def test_the_first_part_of_a_name_is_a_registry_by_a_dot_or_a_port(image: str, names: bool) -> None:
    assert images.names_a_registry(image) is names


def test_a_dry_run_shows_what_would_be_sent_and_sends_nothing(
    server: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit("--dry-run", "--run", "x", "training.beta=0.2") == 0
    shown = capsys.readouterr().out
    assert server.requests == []
    assert f'root: "{ROOT}"' in shown and '"beta": 0.2' in shown and "service account: dice-pipeline" in shown
    assert shown.endswith("a dry run: nothing was sent\n")
    assert submit("--run", "x", "training.beta=0.2") == 0
    assert server.versions[0]["display_name"] in shown


def test_a_dry_run_shows_graph_images_resources_and_what_differs_from_the_preset() -> None:
    changes = ["iterations=3", "num_shards=4", "launch.num_nodes=2", "cluster.gpu_task_memory=64Gi"]
    words = ["submit", "--root", ROOT, "--dry-run", "--set", *changes]
    result = run_command(*words, DICE_REGISTRY="registry.example.com/dice", DICE_TAG="1")
    assert result.returncode == 0, result.stderr
    lines = [line.strip() for line in result.stdout.splitlines()]
    # check-settings, three imports (one is a judge), prepare-data, the report; per iteration 4 shards, pair, train and
    # evaluate.
    assert f"graph:           3 iterations, 4 shards, {6 + 3 * (4 + 3)} tasks" in lines
    image = "registry.example.com/dice/dice-{}:1"
    assert [line for line in lines if line.startswith("registry")] == [
        image.format(name) for name in ("core", "generate", "train")
    ]
    on_gpu = f"cpu 10, memory 64Gi, 1 nvidia.com/gpu; {image.format('generate')}"
    assert f"12 x generate-and-score, 3 x evaluate: {on_gpu}" in lines
    asked = f"cpu 80, memory 400Gi, 8 nvidia.com/gpu; {image.format('train')}"
    training = f"6 x training pod of a PyTorchJob, 2 at a time: {asked}"
    assert training in lines
    assert lines[lines.index("settings that differ from preset zephyr:") + 1 : lines.index("parameters:")] == [
        "iterations=3 (preset: 2)",
        "num_shards=4 (preset: 8)",
        "launch.num_nodes=2 (preset: 1)",
        "cluster.gpu_task_memory=64Gi (preset: 80Gi)",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["training.bta=1"], "did you mean 'beta'"),
        (["cluster.gpu_task_cpus=1"], "did you mean 'gpu_task_cpu'"),
        (["launch.processes_per_node=3"], "must be a multiple of per_device_batch_size x processes = 2 x 3"),
        (["policy_source=/home/me/model"], "policy_source: pods do not see the files of this machine"),
        (["policy_source=model.gguf"], "policy_source: pods import no GGUF file, got 'model.gguf': dice import-model"),
        (["policy_source=s3://b/m.gguf"], "policy_source: pods import no GGUF file"),
        (["policy_source=s3:/bucket/x"], "policy_source: no address on S3, write s3://bucket/prefix, got"),
        (["policy_source="], "policy_source: is empty, a run needs one: s3://bucket/prefix, or owner/name on the Hub"),
        (["prompts_source=https://example.com/p"], "prompts_source: no address on S3, write s3://bucket/prefix"),
        (["reference_source=s3://"], "reference_source: no address on S3, write s3://bucket/prefix"),
        (["--run", "My Run"], "got 'My Run'"),
        (["--root", "/data"], "root: no address on S3, write s3://bucket/prefix, got '/data'"),
        (["--root", "s3://"], "root: no address on S3, write s3://bucket/prefix, got 's3://'"),
        (["--root", "s3:///x"], "root: no address on S3, write s3://bucket/prefix, got 's3:///x'"),
        (["cluster.trainer_cpu=lots"], "cluster.trainer_cpu: must be a Kubernetes quantity"),
        (['cluster.gpu_tolerations=[{"kei":"x"}]'], "cluster.gpu_tolerations: a toleration has the keys"),
        ([f"generation.stop_token_ids={json.dumps(list(range(9000)))}"], "KFP takes 10000"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_sent(
    server: KfpServer, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(*arguments) == 1
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1
    assert server.requests == []


def test_a_missing_root_is_asked_of_the_cluster_or_named(
    server: KfpServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DICE_ROOT")
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    assert submit() == 1
    assert "root: not set: where runs keep their data, such as DICE_ROOT=s3://bucket" in capsys.readouterr().err
    deployed = {f"{NAMESPACE}/configmaps/dice-config": {"data": {"DICE_ROOT": "s3://deployed/dice"}}}
    with running_cluster(deployed) as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig(tmp_path)))
        assert submit() == 0
    assert server.runs[0]["runtime_config"]["parameters"]["root"] == "s3://deployed/dice"


def test_without_a_host_the_end_of_a_port_forward_is_tried(server: KfpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KFP_HOST")
    assert Connection.from_environment().host == "http://localhost:8080"
    assert KfpApi(Connection.from_environment(forwarded=server.host)).runs() == []
    with pytest.raises(KfpError, match="kubectl --namespace kubeflow port-forward service/ml-pipeline-ui 8080:80"):
        KfpApi(Connection.from_environment(forwarded="http://127.0.0.1:9"))


def test_a_host_that_does_not_answer_is_one_line(
    server: KfpServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        host = f"http://127.0.0.1:{unused.getsockname()[1]}"
    assert submit("--host", host) == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"pipelines: error: {host}: cannot be reached (Connection refused)")
    assert printed.count("\n") == 1


@pytest.mark.parametrize(("status", "words"), [(401, "set KFP_TOKEN"), (403, "not allowed"), (404, "2.15 or newer")])
@pytest.mark.parametrize("num_served", [0, 2])
def test_a_refusal_at_any_call_is_one_line_with_what_to_do(
    server: KfpServer, status: int, words: str, num_served: int, capsys: pytest.CaptureFixture[str]
) -> None:
    server.faults = [None] * num_served + [status]
    assert submit() == 1
    printed = capsys.readouterr().err
    assert f"HTTP {status}" in printed and words in printed and printed.count("\n") == 1


def test_a_token_is_sent(server: KfpServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.token = "secret"
    monkeypatch.setenv("KFP_TOKEN", "secret")
    assert submit() == 0


def test_something_else_at_the_address_is_told_from_kubeflow_pipelines(
    object_store: object, server: KfpServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit("--host", object_store.endpoint) == 1  # type: ignore[attr-defined]
    assert capsys.readouterr().err.count("\n") == 1


def test_with_several_users_all_goes_to_the_namespace(server: KfpServer) -> None:
    server.multi_user = True
    assert submit("--namespace", "team-a") == 0
    assert [row["namespace"] for row in (*server.experiments, *server.pipelines)] == ["team-a", "team-a"]


def test_with_one_user_the_namespace_is_that_of_the_cluster_alone(server: KfpServer) -> None:
    assert submit("--namespace", "team-a") == 0
    assert not server.experiments[0].get("namespace")
