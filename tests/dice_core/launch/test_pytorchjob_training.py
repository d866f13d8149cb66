"""A PyTorchJob of two replicas really trains by ZeRO-3: torchrun in each, one rendezvous, the result published once."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from dice_core.data import records
from dice_core.models.importing import import_model
from dice_core.storage import manifest
from dice_core.training.job import TrainingJob
from dice_core.training.settings import TrainingConfig
from tests.kubernetes_api.by_hand import wait_until
from tests.kubernetes_api.server import ApiServer
from tests.kubernetes_api.store import POD, StatusError
from tests.kubernetes_api.training_operator import TrainingOperator
from tests.launchers import Launcher, start_process

pytestmark = pytest.mark.slow


def training_job(folder: Path, model: Path) -> TrainingJob:
    """Return a job of a few steps on pairs of random tokens."""
    rng = np.random.default_rng(5)
    rows = [
        {
            "prompt_id": f"prompt-{i}",
            "prompt": "a question",
            "chosen": "a good answer",
            "rejected": "a bad answer",
            **{f"{name}_token_ids": rng.integers(100, 2000, 6).tolist() for name in ("prompt", "chosen", "rejected")},
            "source": "generated",
            "split": "train",
        }
        for i in range(4)
    ]
    folder.mkdir()
    records.write_table(pa.Table.from_pylist(rows, records.PAIRS), records.PAIRS, folder / "pairs.parquet")
    import_model(str(model), str(folder / "policy"))
    settings = {"max_steps": 3, "global_batch_size": 2, "deepspeed": "zero3", "gradient_checkpointing": False}
    training = TrainingConfig.parse(settings, "training")
    fields = {"stage": "train", "fingerprint": training.fingerprint()}
    places = (str(folder / "train"), str(folder / "policy"), str(folder / "pairs.parquet"))
    return TrainingJob(*places, training, seed=1, manifest_fields=fields)


def master_log(server: ApiServer) -> bytes:
    names = [pod["metadata"]["name"] for pod in server.store.find(POD, "default")]
    try:
        return b"".join(b"".join(server.logs("default", name, {"container": "pytorch"})) for name in names[:1])
    except StatusError:
        return b""  # not started


def test_two_replicas_train_and_a_launcher_killed_on_the_way_is_replaced(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = training_job(tmp_path / "run", tiny_model)
    job_uri = job.write()
    settings = {"num_nodes": 2, "gpu_resource": ""}
    variables = {"DICE_CACHE": str(tmp_path / "cache"), "DICE_SCRATCH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    with ApiServer(tmp_path) as server, TrainingOperator(server, variables):
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig))
        killed = start_process(job_uri, **settings)
        wait_until(lambda: b"3 steps" in master_log(server), 300)
        killed.kill()
        killed.wait()
        Launcher(job_uri, **settings).result(300)
        assert server.count("POST", "/pytorchjobs") == 1
    published = manifest.require_manifest(job.output_uri)
    assert published.fingerprint == job.fingerprint
    assert (published.metrics["num_processes"], published.metrics["num_steps"]) == (2, 3)
