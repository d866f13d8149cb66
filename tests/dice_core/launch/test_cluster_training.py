"""Two pods of a job really train by ZeRO-3: torchrun in each, one rendezvous, the result published once."""

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
from tests.kubernetes_api.trainer import Trainer
from tests.kubernetes_api.training_operator import TrainingOperator
from tests.launchers import Launcher, kind, num_created, start_process

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


def first_log(server: ApiServer) -> bytes:
    names = [pod["metadata"]["name"] for pod in server.store.find(POD, "default")]
    try:
        return b"".join(b"".join(server.logs("default", name, {"container": kind().container})) for name in names[:1])
    except StatusError:
        return b""  # not started


def test_two_pods_train_and_a_launcher_killed_on_the_way_is_replaced(
    backend: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = training_job(tmp_path / "run", tiny_model)
    job_uri = job.write()
    settings = {"num_nodes": 2, "gpu_resource": ""}
    variables = {"DICE_CACHE": str(tmp_path / "cache"), "DICE_SCRATCH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    operator = {"pytorchjob": TrainingOperator, "trainjob": Trainer}[backend]
    with ApiServer(tmp_path) as server, operator(server, variables):
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig))
        killed = start_process(job_uri, **settings)
        wait_until(lambda: b"3 steps" in first_log(server), 300)
        killed.kill()
        killed.wait()
        Launcher(job_uri, **settings).result(300)
        assert num_created(server) == 1
    published = manifest.require_manifest(job.output_uri)
    assert published.fingerprint == job.fingerprint
    assert (published.metrics["num_processes"], published.metrics["num_steps"]) == (2, 3)
