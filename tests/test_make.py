"""What the Makefile makes of its variables: what the project's commands get, with a stand-in for Python or Docker."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from components import images
from tests.make_venv import PRINTS_ITS_ARGUMENTS, make_venv

PROJECT = Path(__file__).parents[1]
DEFAULTS = PROJECT / "manifests" / "kubeflow-pipelines" / "workflow-defaults.yaml"
Make = Callable[..., list[str]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Run a target with a Python that prints its arguments, and return these."""
    venv = make_venv(tmp_path / "venv", PRINTS_ITS_ARGUMENTS)

    def run(*arguments: str) -> list[str]:
        command = ["make", "--silent", venv, *arguments]
        return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout.splitlines()

    return run


@pytest.mark.parametrize("target", ["demo", "compile", "plan", "preflight", "submit", "schedule"])
def test_settings_reach_a_command_as_they_were_written(make: Make, target: str) -> None:
    settings = ['cluster.env={"A":"1","B":"2"}', "generation.stop_token_ids=[1,2]", "seed=7"]
    found = make(target, f"SET={' '.join(settings)}")
    start = found.index("--set") + 1
    assert found[start : start + 3] == settings


def test_a_file_may_have_a_space_in_its_name(make: Make) -> None:
    found = make("compile", "OUT=a b.yaml")
    assert found[found.index("-o") + 1] == "a b.yaml"


def test_what_a_plan_is_told_reaches_it(make: Make) -> None:
    given = ["PRICE=2.5", "RUN=one", "MODEL_CONFIG=a b/config.json", "RESPONSE_TOKENS=250-400", "JSON=1"]
    found = make("plan", "PRESET=llama3", *given)
    options = ["--price", "2.5", "--run", "one", "--model-config", "a b/config.json", "--response-tokens", "250-400"]
    assert found[found.index("--price") :] == [*options, "--json"]


@pytest.mark.parametrize(
    ("target", "variable", "option"),
    [
        ("demo", "KEEP_S3", "--keep-s3"),
        ("submit", "DRY_RUN", "--dry-run"),
        ("submit", "WAIT", "--wait"),
        ("retry", "WAIT", "--wait"),
        ("schedule", "DRY_RUN", "--dry-run"),
        ("unschedule", "FORCE", "--force"),
        ("logs", "RAW", "--raw"),
    ],
)
def test_a_switch_is_on_by_1_and_off_by_0(make: Make, target: str, variable: str, option: str) -> None:
    assert option in make(target, f"{variable}=1")
    assert option not in make(target, f"{variable}=0")
    assert option not in make(target, f"{variable}=")


def push(tag: str, registry: str) -> subprocess.CompletedProcess[str]:
    """Run the target with `echo` in place of docker."""
    command = ["make", "--silent", "push", f"TAG={tag}", f"REGISTRY={registry}", "BUILDER=echo"]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("tag", ["latest", "untracked", "0123456789ab-dirty"])
def test_a_tag_that_does_not_say_what_is_in_the_images_is_not_pushed(tag: str) -> None:
    """Sources without git are `untracked`, whatever is in them."""
    result = push(tag, "registry.example.com/dice")
    assert result.returncode != 0 and result.stdout == ""
    assert f"TAG={tag} does not say what is in the images" in result.stderr


@pytest.mark.parametrize("registry", ["dice-suite", "team/dice", ""])
def test_a_registry_without_a_host_is_not_pushed_to(registry: str) -> None:
    """Docker would take it for a name on Docker Hub, where anybody may have it."""
    result = push("1", registry)
    assert result.returncode != 0 and result.stdout == ""
    assert f"REGISTRY={registry} names no host" in result.stderr


@pytest.mark.parametrize("registry", ["registry.example.com/team/dice", "localhost/dice", "mirror:5000"])
def test_each_image_is_pushed_to_a_registry(registry: str) -> None:
    names = [f"{registry}/dice-{name}:1" for name in ("core", "generate", "train")]
    assert all(images.names_a_registry(name) for name in names)
    assert push("1", registry).stdout.splitlines() == [f"push {name}" for name in names]


def test_kind_up_sets_what_a_stock_kubeflow_pipelines_lacks() -> None:
    """Retries that happen, finished runs that stay for a week, and no pause of ten seconds between steps."""
    command = ["make", "--dry-run", "kind-up"]
    planned = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True).stdout.splitlines()
    settings = [line.partition(" --namespace kubeflow ")[2] for line in planned if "patch" in line or "set env" in line]
    assert settings == [
        f"patch configmap workflow-controller-configmap --patch-file {DEFAULTS.relative_to(PROJECT)}",
        "set env deployment/workflow-controller DEFAULT_REQUEUE_TIME=1s",
        "set env deployment/ml-pipeline-persistenceagent TTL_SECONDS_AFTER_WORKFLOW_FINISH=604800",
    ]
    assert DEFAULTS.read_text().count("604800") == 3
    readme = (PROJECT / "manifests" / "README.md").read_text()
    assert [setting for setting in settings if f"kubectl --namespace kubeflow {setting}\n" not in readme] == []
