"""A pod of another service account than the suite's is told so, and refused where it certainly cannot train."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from dice_core.settings.base import ConfigError
from dice_core.stages.service_account import check_account, own_account
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


def test_another_account_that_may_train_is_a_warning_that_says_what_to_do(
    tmp_path: Path, cluster: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    token = write_token(tmp_path, "system:serviceaccount:kubeflow:pipeline-runner")
    check_account("dice-pipeline", trains_in_pods=True, token=token)
    [line] = capsys.readouterr().err.splitlines()
    assert "WARNING: this run has service account pipeline-runner, not dice-pipeline" in line
    assert "clone the run with service account dice-pipeline, or use make submit" in line


def test_an_account_that_may_not_create_training_jobs_is_refused(tmp_path: Path, cluster: ClusterObjects) -> None:
    cluster.refused.add("create pytorchjobs")
    token = write_token(tmp_path, "system:serviceaccount:kubeflow:default")
    with pytest.raises(
        ConfigError, match=r"service account default: may not create pytorchjobs, .*: clone the run with"
    ):
        check_account("dice-pipeline", trains_in_pods=True, token=token)
    check_account("dice-pipeline", trains_in_pods=False, token=token)


def test_a_cluster_that_does_not_say_refuses_nothing(
    tmp_path: Path, cluster: ClusterObjects, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.forbidden.add(OWN_REVIEWS)
    token = write_token(tmp_path, "system:serviceaccount:kubeflow:default")
    check_account("dice-pipeline", trains_in_pods=True, token=token)
    assert "WARNING" in capsys.readouterr().err


@pytest.mark.parametrize("expected", ["dice-pipeline", ""])
def test_the_suites_own_account_and_a_run_that_asks_for_none_are_not_spoken_of(
    tmp_path: Path, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    token = write_token(tmp_path, "system:serviceaccount:kubeflow:dice-pipeline")
    check_account(expected, trains_in_pods=True, token=token)
    check_account("dice-pipeline", trains_in_pods=True, token=tmp_path / "no-pod")
    assert capsys.readouterr().err == ""
