"""The MLflow server of the tests: that it is a real one, and when its tests are skipped."""

from pathlib import Path

import pytest

from tests.mlflow_server import LOCK, MlflowServer, _make_environment

pytestmark = pytest.mark.slow


def test_the_server_keeps_what_it_is_told(mlflow_server: MlflowServer) -> None:
    experiment = mlflow_server.post("experiments/create", name="of the fixture")["experiment_id"]
    run = mlflow_server.post("runs/create", experiment_id=experiment, run_name="one", start_time=1)["run"]["info"]
    for step, value in ((1, 0.5), (0, 2.0)):
        metric = {"key": "loss", "value": value, "timestamp": 1, "step": step}
        mlflow_server.post("runs/log-batch", run_id=run["run_id"], metrics=[metric])
    assert [found["run_name"] for found in mlflow_server.runs("of the fixture")] == ["one"]
    assert mlflow_server.history(run["run_id"], "loss") == [(0, 2.0), (1, 0.5)]


def test_an_index_that_does_not_answer_skips_the_tests_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("UV_NO_CACHE", "1")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    with pytest.raises(pytest.skip.Exception, match="the package index does not answer"):
        _make_environment(LOCK, tmp_path / "venv", tmp_path / "venv" / "bin" / "python")
