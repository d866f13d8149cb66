"""A pod of another service account than the suite's is told so, and refused where it certainly cannot train."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from dice_core.settings.base import ConfigError
from dice_core.stages.check_settings import check_run
from dice_core.stages.service_account import account_remedy, own_account
from dice_core.storage.contract import NoAccessError
from tests.cluster_objects import OWN_REVIEWS, ClusterObjects, running_cluster


def write_token(folder: Path, subject: object) -> Path:
    """Write a token as the kubelet mounts it: three parts of base64url without padding."""
    parts = [{"alg": "RS256"}, {"iss": "https://kubernetes.default.svc", "sub": subject}, {"signed": True}]
    encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in parts]
    (folder / "token").write_text(".".join(encoded))
    return folder / "token"


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ClusterObjects]:
    with running_cluster({}) as cluster:
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig(tmp_path)))
        yield cluster


# Of every length modulo 4, since the padding differs.
@pytest.mark.parametrize("name", ["pipeline-runner", "default", "dice-pipeline", "a", "ab", "abc"])
def test_the_account_is_the_one_that_the_token_names(tmp_path: Path, name: str) -> None:
    assert own_account(write_token(tmp_path, f"system:serviceaccount:kubeflow:{name}")) == name


@pytest.mark.parametrize("text", ["", "no token", "a.b.c", "e30.e30.e30", "W10.W10.W10"])
def test_what_does_not_name_an_account_names_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "token").write_text(text)
    assert own_account(tmp_path / "token") == ""
    assert own_account(tmp_path / "nothing") == own_account(write_token(tmp_path, "a person")) == ""


def test_another_account_is_a_warning_that_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    token = write_token(tmp_path, "system:serviceaccount:kubeflow:pipeline-runner")
    remedy = account_remedy("dice-pipeline", token)
    assert remedy.startswith(
        "this run has service account pipeline-runner: clone it with service account dice-pipeline"
    )
    [line] = capsys.readouterr().err.splitlines()
    assert "WARNING: pipeline-runner may lack rights and access that dice-pipeline has; " + remedy in line


@pytest.mark.parametrize("expected", ["dice-pipeline", ""])
def test_the_suites_own_account_and_a_run_that_asks_for_none_are_not_spoken_of(
    tmp_path: Path, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    token = write_token(tmp_path, "system:serviceaccount:kubeflow:dice-pipeline")
    assert account_remedy(expected, token) == account_remedy("dice-pipeline", tmp_path / "no-pod") == ""
    assert capsys.readouterr().err == ""


def check(root: str, token: Path, backend: str = "pytorchjob") -> None:
    sections = {"launch": {"backend": backend}, "pods": {"image": "train:1"} if backend == "pytorchjob" else {}}
    sources = {"policy_source": "org/policy", "reference_source": "org/sft", "preferences_source": "org/pairs"}
    others = {"num_iterations": 1, "num_shards": 1, "seed": 0, "promote_as": "", "prompts_source": ""}
    check_run(root, "r", sections, service_account="dice-pipeline", token=token, **sources, **others, exclude_source="")


def test_an_account_that_may_not_create_training_jobs_is_refused_where_training_needs_them(
    tmp_path: Path, cluster: ClusterObjects
) -> None:
    token = write_token(tmp_path, "system:serviceaccount:kubeflow:default")
    check(str(tmp_path), token)
    cluster.refused.add("create pytorchjobs")
    with pytest.raises(ConfigError, match=r"no right to create pytorchjobs, .*: this run has service account default"):
        check(str(tmp_path), token)
    check(str(tmp_path), token, backend="torchrun")
    check(str(tmp_path), write_token(tmp_path, "system:serviceaccount:kubeflow:dice-pipeline"))


def test_a_cluster_that_does_not_say_refuses_nothing(tmp_path: Path, cluster: ClusterObjects) -> None:
    cluster.forbidden.add(OWN_REVIEWS)
    check(str(tmp_path), write_token(tmp_path, "system:serviceaccount:kubeflow:default"))


@pytest.mark.slow
def test_an_account_without_access_to_storage_is_told_with_what_to_do(
    tmp_path: Path, cluster: ClusterObjects, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with IRSA, where another account has no credentials at all."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    token = write_token(tmp_path, "system:serviceaccount:kubeflow:default")
    with pytest.raises(NoAccessError, match=r"no credentials: .*; this run has service account default: clone it with"):
        check(s3, token)
