"""Training against a textbook DPO loop, against itself cut in other ways, and through a kill; on a tiny model.

Runs in this process where one is enough, by torchrun where several are the claim.
"""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from dice_core.data import records
from dice_core.launch.launch import launch_training
from dice_core.launch.settings import LaunchConfig
from dice_core.launch.torchrun import TorchrunBackend
from dice_core.models.cache import fetch_model
from dice_core.models.loading import load_model
from dice_core.settings.base import ConfigError
from dice_core.storage import manifest
from dice_core.storage.contract import StorageError
from dice_core.training.job import TrainingJob, delete_leftovers
from dice_core.training.settings import TrainingConfig
from dice_core.training.trainer import NonFiniteError
from dice_core.training.worker import main, run_training
from tests.dice_core.training.pair_rows import make_rows, write_rows
from tests.partitioned_worker import PERSISTENCE_THRESHOLD

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

SETTINGS = {
    "max_steps": 3,
    "global_batch_size": 4,
    "learning_rate": 1e-3,
    "precision": "float32",
    "saved_dtype": "float32",
    "gradient_checkpointing": False,
}


MEASURED = ("first_loss", "first_reward_accuracy", "step0_loss", "reference_noise_rms", "last_loss")


@dataclass(frozen=True)
class Run:
    """What a finished run left."""

    uri: Path
    metrics: Mapping[str, Any]
    lines: list[dict[str, Any]]
    weights: dict[str, Tensor]

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in self.lines if "loss" in line]


def make_job(uri: Path, policy_uri: str, pairs_uri: str, settings: Mapping[str, Any]) -> TrainingJob:
    training = TrainingConfig.parse({**SETTINGS, **settings}, "training")
    fields = {"stage": "train", "fingerprint": training.fingerprint()}
    return TrainingJob(str(uri), policy_uri, pairs_uri, training, seed=1, manifest_fields=fields)


def finished(uri: Path) -> Run:
    lines = [json.loads(line) for line in (uri / "metrics.jsonl").read_text().splitlines()]
    return Run(uri, manifest.require_manifest(str(uri)).metrics, lines, load_file(uri / "model.safetensors"))


def train(uri: Path, policy_uri: str, pairs_uri: str, **settings: Any) -> Run:
    run_training(make_job(uri, policy_uri, pairs_uri, settings))
    return finished(uri)


def assert_same_weights(one: Run, other: Run, tolerance: float) -> None:
    assert one.weights.keys() == other.weights.keys()
    for name, weight in one.weights.items():
        torch.testing.assert_close(weight, other.weights[name], atol=tolerance, rtol=0)


def textbook_losses(folder: Path, rows: list[dict[str, Any]], order: list[list[int]], beta: float) -> list[float]:
    """Return each step's loss of DPO as the paper writes it: two models, plain forwards of prompt and response."""
    policy, reference = load_model(folder, "float32"), load_model(folder, "float32")
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)

    def logps(model: torch.nn.Module, row: dict[str, Any], response: str) -> Tensor:
        ids = torch.tensor([row["prompt_token_ids"] + row[response]])
        logits = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        token_logps = logits.gather(1, ids[0, 1:, None])[:, 0]
        return token_logps[len(row["prompt_token_ids"]) - 1 :].sum()

    losses = []
    for step in order:
        loss = torch.zeros(())
        for i in step:
            margins = [
                logps(policy, rows[i], name) - logps(reference, rows[i], name).detach()
                for name in ("chosen_token_ids", "rejected_token_ids")
            ]
            loss = loss - F.logsigmoid(beta * (margins[0] - margins[1])) / len(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_20_steps_equal_the_textbook_loop_with_a_second_model(
    policy_uri: str, pairs_uri: str, tmp_path: Path, device: str
) -> None:
    from dice_core.training.batches import step_order

    rows = make_rows()
    lengths = [sum(len(row[f"{part}_token_ids"]) for part in ("prompt", "chosen", "rejected")) for row in rows]
    order = np.reshape(step_order(lengths, 4, 20, seed=1), (20, 4)).tolist()
    run = train(tmp_path, policy_uri, pairs_uri, max_steps=20, eval_steps=100)
    expected = textbook_losses(fetch_model(policy_uri), rows, order, beta=0.1)
    assert run.losses == pytest.approx(expected, abs=1e-3)
    assert run.losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert run.metrics["last_loss"] < 0.5 < math.log(2)
    assert run.metrics["first_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert run.metrics["last_reward_accuracy"] > run.metrics["first_reward_accuracy"] + 0.2
    assert ("mfu" in run.metrics) == (device == "cuda")


@pytest.fixture(scope="module")
def uneven_pairs_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return pairs of which every third is as long as many others: rows of a step hold one pair, or three."""
    rows = make_rows(num_eval=3)
    for row in rows[::3]:
        row["chosen_token_ids"] = row["chosen_token_ids"] * 20
    return write_rows(rows, tmp_path_factory.mktemp("uneven") / "pairs.parquet")


@pytest.mark.parametrize(("size", "checkpointing"), [(2, False), (4, True)])
def test_the_cut_into_micro_batches_does_not_change_a_step(
    size: int, checkpointing: bool, policy_uri: str, uneven_pairs_uri: str, tmp_path: Path
) -> None:
    ones = train(tmp_path / "ones", policy_uri, uneven_pairs_uri, per_device_batch_size=1)
    settings = {"per_device_batch_size": size, "gradient_checkpointing": checkpointing}
    larger = train(tmp_path / "larger", policy_uri, uneven_pairs_uri, **settings)
    assert ones.losses == pytest.approx(larger.losses, abs=1e-5)
    for name in ("rewards/chosen", "rewards/accuracies", "rewards/margins", "logps/rejected", "grad_norm"):
        values = [[line.get(name, 0.0) for line in run.lines] for run in (ones, larger)]
        assert values[0] == pytest.approx(values[1], abs=1e-4, rel=1e-4)
    assert_same_weights(ones, larger, 2e-4)


def test_two_processes_equal_one_with_the_same_global_batch(
    policy_uri: str, uneven_pairs_uri: str, tmp_path: Path
) -> None:
    one = train(tmp_path / "one", policy_uri, uneven_pairs_uri, eval_steps=3)
    # Two pairs a process on the average: one process has the long one, the other three.
    settings = {"eval_steps": 3, "per_device_batch_size": 2}
    job = make_job(tmp_path / "two", policy_uri, uneven_pairs_uri, settings)
    launch_training(job.write(), LaunchConfig(processes_per_node=2))
    two = finished(tmp_path / "two")
    assert two.metrics["num_processes"] == 2
    assert two.losses == pytest.approx(one.losses, abs=1e-5)
    assert two.lines[-1]["eval_loss"] == pytest.approx(one.lines[-1]["eval_loss"], abs=1e-5)
    assert two.metrics["last_loss"] == pytest.approx(one.metrics["last_loss"], abs=1e-5)
    assert_same_weights(one, two, 2e-4)


def test_zero2_in_two_processes_equals_one_process_without_and_compiles_nothing(
    policy_uri: str, pairs_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The lock of a build that was killed: whoever builds waits for it, for ever.
    (tmp_path / "extensions" / "deepspeed_shm_comm").mkdir(parents=True)
    (tmp_path / "extensions" / "deepspeed_shm_comm" / "lock").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    one = train(tmp_path / "one", policy_uri, pairs_uri, max_steps=2)
    job = make_job(tmp_path / "zero", policy_uri, pairs_uri, {"max_steps": 2, "deepspeed": "zero2"})
    launch_training(job.write(), LaunchConfig(processes_per_node=2))
    zero = finished(tmp_path / "zero")
    assert zero.losses == pytest.approx(one.losses, abs=1e-5)
    assert_same_weights(one, zero, 2e-4)


def test_zero3_that_cuts_up_every_matrix_equals_one_process_however_it_saves_memory(
    policy_uri: str, uneven_pairs_uri: str, tmp_path: Path
) -> None:
    """The configuration of real models: their layers are collected for a pass, and again when it is done anew.

    Only the order of float32 sums differs, which moves a loss of about ln 2 by 1e-7: 1e-5 is ample. A weight moves
    by the learning rate, 1e-3, in each step of Adam, and one whose gradient is lost or doubled by sums would end a step
    away: 2e-5 is a fiftieth of one (measured: 2.5e-7). Layers done anew give the same numbers (measured: 0), and so
    do optimizer states that are kept and updated apart from the weights.
    """
    settings: dict[str, Any] = {"max_steps": 3, "eval_steps": 1, "per_device_batch_size": 2}
    one = train(tmp_path / "one", policy_uri, uneven_pairs_uri, **settings)
    runs = []
    for checkpointing, offload in ((False, "none"), (True, "none"), (True, "cpu")):
        changes = {"deepspeed": "zero3", "gradient_checkpointing": checkpointing, "offload_optimizer": offload}
        uri = tmp_path / f"{checkpointing}-{offload}"
        job = make_job(uri, policy_uri, uneven_pairs_uri, settings | changes)
        TorchrunBackend("tests.partitioned_worker").run(job.write(), LaunchConfig(processes_per_node=2))
        runs.append(finished(uri))
        for rank in range(2):
            held = json.loads((uri / f"held-{rank}.json").read_text())
            matrices = {name: sizes for name, sizes in held.items() if sizes[0] > PERSISTENCE_THRESHOLD}
            assert len(matrices) == 1 + 2 * 7
            assert all(held_now == 0 and share == whole / 2 for whole, held_now, share in matrices.values())
    for run in runs:
        assert run.losses == pytest.approx(one.losses, abs=1e-5)
        eval_losses = [[line["eval_loss"] for line in lines if "eval_loss" in line] for lines in (run.lines, one.lines)]
        assert len(eval_losses[0]) == 3
        assert eval_losses[0] == pytest.approx(eval_losses[1], abs=1e-5)
        assert_same_weights(one, run, 2e-5)
        assert_same_weights(runs[0], run, 2e-6)
    assert one.losses[-1] < math.log(2) - 1e-3


@pytest.mark.gpu
def test_zero3_on_a_gpu_takes_the_steps_of_a_process_without(policy_uri: str, pairs_uri: str, tmp_path: Path) -> None:
    one = train(tmp_path / "one", policy_uri, pairs_uri, max_steps=2)
    job = make_job(tmp_path / "zero", policy_uri, pairs_uri, {"max_steps": 2, "deepspeed": "zero3"})
    launch_training(job.write(), LaunchConfig(processes_per_node=1))
    zero = finished(tmp_path / "zero")
    assert zero.losses == pytest.approx(one.losses, abs=1e-4)
    assert_same_weights(one, zero, 2e-4)


@pytest.mark.parametrize(("deepspeed", "offload"), [("zero2", "none"), ("zero3", "none"), ("zero3", "cpu")])
def test_bf16_under_zero_trains_the_exact_float32_weights(
    deepspeed: str, offload: str, policy_uri: str, pairs_uri: str, tmp_path: Path
) -> None:
    """Adam moves a weight by at most the learning rate in a step: rounding to bfloat16 would move it a hundred times
    as far.
    """
    settings = {"max_steps": 2, "deepspeed": deepspeed, "precision": "bf16", "learning_rate": 1e-7}
    settings["offload_optimizer"] = offload
    job = make_job(tmp_path / "zero", policy_uri, pairs_uri, settings)
    launch_training(job.write(), LaunchConfig(processes_per_node=2))
    zero, start = finished(tmp_path / "zero"), load_file(fetch_model(policy_uri) / "model.safetensors")
    moved = max(float((zero.weights[name] - weight).abs().max()) for name, weight in start.items())
    rounding = max(float((weight.bfloat16().float() - weight).abs().max()) for weight in start.values())
    assert 0 < moved < 3e-7 < rounding / 100
    assert zero.losses == pytest.approx([math.log(2)] * 2, abs=1e-2)


def test_what_libraries_do_at_their_end_cannot_fail_a_finished_process(
    policy_uri: str, pairs_uri: str, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import atexit, os\natexit.register(os.abort)")
    job_uri = make_job(tmp_path / "out", policy_uri, pairs_uri, {"max_steps": 1}).write()
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    subprocess.run([sys.executable, "-m", "dice_core.training.worker", job_uri], cwd=root, env=environment, check=True)
    assert finished(tmp_path / "out").metrics["num_steps"] == 1


def test_a_killed_zero3_run_goes_on_elsewhere_from_its_stored_checkpoint(
    policy_uri: str, pairs_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {"max_steps": 60, "save_steps": 4, "eval_steps": 100, "precision": "bf16"}
    one = train(tmp_path / "one", policy_uri, pairs_uri, **settings)
    settings["deepspeed"] = "zero3"
    uri, elsewhere = tmp_path / "killed", tmp_path / "elsewhere"
    monkeypatch.setenv("DICE_SCRATCH", str(tmp_path / "machine-1"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    job_uri = make_job(uri, policy_uri, pairs_uri, settings).write()
    process = subprocess.Popen(
        [*torchrun, "--module", "dice_core.training.worker", job_uri], cwd=Path(__file__).parents[3]
    )
    while not all(list(uri.glob(f"checkpoints/*/rank-{rank}/manifest.json")) for rank in range(2)):
        assert process.poll() is None, "the run ended before its first checkpoint"
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    uri.rename(elsewhere)

    monkeypatch.setenv("DICE_SCRATCH", str(tmp_path / "machine-2"))
    # The machine there has memory for the optimizer's states, and less on its GPUs.
    job_uri = make_job(elsewhere, policy_uri, pairs_uri, settings | {"offload_optimizer": "cpu"}).write()
    launch_training(job_uri, LaunchConfig(processes_per_node=2))
    resumed = finished(elsewhere)
    assert "resuming from checkpoint-" in capfd.readouterr().err
    assert resumed.metrics["num_steps"] == len(resumed.losses) == 60
    # Sums of bfloat16 log-probs differ a little; weights or moments that were lost would show much more.
    assert resumed.losses == pytest.approx(one.losses, abs=3e-2)
    assert one.losses[-1] < math.log(2) - 0.1


def test_a_killed_run_goes_on_from_its_checkpoint_and_ends_with_the_same_weights(
    policy_uri: str,
    pairs_uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = {"max_steps": 120, "save_steps": 5, "ema_decay": 0.9, "eval_steps": 100}
    whole = train(tmp_path / "whole", policy_uri, pairs_uri, **settings)
    monkeypatch.setenv("DICE_SCRATCH", str(tmp_path / "machine-1"))
    uri = tmp_path / "killed"
    job = make_job(uri, policy_uri, pairs_uri, settings)
    process = subprocess.Popen(
        [sys.executable, "-m", "dice_core.training.worker", job.write()], cwd=Path(__file__).parents[3]
    )
    while not list(uri.glob("checkpoints/*/rank-0/manifest.json")):
        assert process.poll() is None, "the run ended before its first checkpoint"
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(uri, elsewhere)

    # On the same machine.
    run_training(job)
    resumed = finished(uri)
    assert "resuming from checkpoint-" in capsys.readouterr().err
    assert resumed.losses == whole.losses
    assert {name: resumed.metrics[name] for name in MEASURED} == {name: whole.metrics[name] for name in MEASURED}
    assert_same_weights(whole, resumed, 0)
    assert not (uri / "checkpoints").exists()
    assert not job.scratch_folder().exists()

    # On another machine, which has the stored checkpoint alone.
    monkeypatch.setenv("DICE_SCRATCH", str(tmp_path / "machine-2"))
    run_training(make_job(elsewhere, policy_uri, pairs_uri, settings))
    assert "fetching checkpoint" in capsys.readouterr().err
    assert_same_weights(whole, finished(elsewhere), 0)


def test_checkpoints_of_other_settings_are_not_resumed_from(tmp_path: Path) -> None:
    from dice_core.training.checkpoint_files import CheckpointOwner
    from dice_core.training.checkpoints import CheckpointStore
    from dice_core.training.copies import Copies

    owner = CheckpointOwner("this", num_processes=1, num_nodes=1, deepspeed="none")
    copies = Copies(tmp_path / "lock")
    store = CheckpointStore(str(tmp_path / "stored/checkpoints"), tmp_path / "local", owner, copies)
    for step in (5, 10, 15):
        (tmp_path / f"local/checkpoint-{step}").mkdir(parents=True)
        (tmp_path / f"local/checkpoint-{step}/weights").write_text(str(step))
        store.save(step)
    store.close()
    (tmp_path / "local/checkpoint-20").mkdir()  # cut off before it was complete
    assert store.newest() == tmp_path / "local/checkpoint-15"
    # Only the newest is kept in storage; another machine fetches it.
    assert [path.name for path in (tmp_path / "stored/checkpoints").iterdir()] == ["checkpoint-15"]
    elsewhere = CheckpointStore(str(tmp_path / "stored/checkpoints"), tmp_path / "other", owner, copies)
    fetched = elsewhere.newest()
    assert fetched is not None and (fetched / "weights").read_text() == "15"
    for changed in (
        CheckpointOwner("that", num_processes=1, num_nodes=1, deepspeed="none"),
        CheckpointOwner("this", num_processes=1, num_nodes=1, deepspeed="zero3"),
    ):
        assert (
            CheckpointStore(str(tmp_path / "stored/checkpoints"), tmp_path / "local", changed, copies).newest() is None
        )
    # Without DeepSpeed's shards the number of processes may change.
    more = CheckpointOwner("this", num_processes=2, num_nodes=1, deepspeed="none")
    assert CheckpointStore(str(tmp_path / "stored/checkpoints"), tmp_path / "local", more, copies).newest() is not None
    store.delete_all()
    assert store.newest() is None


def test_a_run_shorter_than_its_logging_interval_ends_with_its_numbers(
    policy_uri: str, pairs_uri: str, tmp_path: Path
) -> None:
    run = train(tmp_path, policy_uri, pairs_uri, max_steps=1, logging_steps=100, eval_steps=100)
    assert run.metrics["step0_loss"] == pytest.approx(math.log(2), abs=1e-4)


def test_a_run_stopped_before_its_first_regular_line_of_the_log_ends_with_its_numbers(
    policy_uri: str, pairs_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dice_core.training.checkpoints import CheckpointStore

    settings = {"max_steps": 4, "save_steps": 2, "logging_steps": 100, "eval_steps": 100}
    whole = train(tmp_path / "whole", policy_uri, pairs_uri, **settings)
    save = CheckpointStore.save

    def save_and_stop(self: CheckpointStore, step: int) -> None:
        save(self, step)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CheckpointStore, "save", save_and_stop)
        train(tmp_path / "stopped", policy_uri, pairs_uri, **settings)
    resumed = train(tmp_path / "stopped", policy_uri, pairs_uri, **settings)
    assert {name: resumed.metrics[name] for name in MEASURED} == {name: whole.metrics[name] for name in MEASURED}
    assert [line["step"] for line in resumed.lines] == [line["step"] for line in whole.lines]


def test_start_and_end_are_measured_on_the_same_pairs(policy_uri: str, tmp_path: Path) -> None:
    rows = make_rows(num_train=8)
    for i, row in enumerate(rows):
        # Rewards of the start are read off these: six pairs have a clearly better chosen response, two a worse one.
        row["chosen_reference_logps"] = row["rejected_reference_logps"] = 0.0
        row["chosen_token_ids"], row["rejected_token_ids"] = [100] * (1 if i < 6 else 20), [200] * (20 if i < 6 else 1)
    uri = write_rows(rows, tmp_path / "pairs.parquet")
    run = train(tmp_path / "out", policy_uri, uri, max_steps=1, global_batch_size=2, learning_rate=1e-9)
    assert run.metrics["num_measured_pairs"] == 8
    assert run.metrics["first_reward_accuracy"] == run.metrics["last_reward_accuracy"] == 0.75
    assert run.metrics["first_loss"] == pytest.approx(run.metrics["last_loss"], rel=1e-4)
    assert run.metrics["first_loss"] != pytest.approx(run.metrics["step0_loss"], rel=1e-2)


def test_what_a_stop_after_publishing_left_is_deleted(
    policy_uri: str, pairs_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dice_core.training.checkpoints import CheckpointStore

    monkeypatch.setenv("DICE_SCRATCH", str(tmp_path / "cache"))
    uri = tmp_path / "out"
    job = make_job(uri, policy_uri, pairs_uri, {"save_steps": 1})
    job.write()

    def stop(self: CheckpointStore) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointStore, "delete_all", stop)
    with pytest.raises(KeyboardInterrupt):
        run_training(job)
    published = manifest.require_manifest(str(uri))
    assert list(uri.glob("checkpoints/*/rank-0/manifest.json")) and job.scratch_folder().exists()
    delete_leftovers(str(uri))
    assert not list(uri.glob("checkpoints/**/*.*")) and not job.scratch_folder().exists()
    assert manifest.require_manifest(str(uri)) == published
    fetch_model(str(uri))
    delete_leftovers(str(uri))


def test_the_average_of_weights_follows_its_formula_and_survives_a_checkpoint(tmp_path: Path) -> None:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from dice_core.training.weight_average import WeightAverage

    model = torch.nn.Linear(1, 1, bias=False)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    rest = (arguments, TrainerState(global_step=1), TrainerControl())
    (tmp_path / "checkpoint-1").mkdir()
    average = WeightAverage(0.75, None, save_file)
    model.weight.data.fill_(4.0)
    average.on_train_begin(*rest, model=model)
    model.weight.data.fill_(8.0)
    average.on_step_end(*rest, model=model)  # 0.75 x 4 + 0.25 x 8 = 5
    average.on_save(*rest)
    resumed = WeightAverage(0.75, tmp_path / "checkpoint-1", save_file)
    resumed.on_train_begin(*rest, model=model)
    model.weight.data.fill_(1.0)
    resumed.on_step_end(*rest, model=model)  # 0.75 x 5 + 0.25 x 1 = 4
    resumed.copy_to(model)
    assert model.weight.item() == pytest.approx(4.0)


def test_reused_references_are_taken_and_their_noise_is_reported(policy_uri: str, tmp_path: Path) -> None:
    rows, model = make_rows(num_train=4), load_model(fetch_model(policy_uri), "float32")
    for row in rows:
        for name in ("chosen", "rejected"):
            ids = torch.tensor([row["prompt_token_ids"] + row[f"{name}_token_ids"]])
            with torch.no_grad():
                logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            row[f"{name}_reference_logps"] = logps[len(row["prompt_token_ids"]) - 1 :].sum().item()
    exact = train(tmp_path / "exact", policy_uri, write_rows(rows, tmp_path / "exact.parquet"), max_steps=1)
    assert exact.metrics["step0_loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert exact.metrics["reference_noise_rms"] < 1e-3

    for row in rows:
        row["chosen_reference_logps"] -= 3.0
    shifted = write_rows(rows, tmp_path / "shifted.parquet")
    reused = train(tmp_path / "reused", policy_uri, shifted, max_steps=1)
    # Chosen is off by 3 nats and rejected by none: margin 0.1 x 3, noise sqrt((9 + 0) / 2).
    assert reused.metrics["step0_loss"] == pytest.approx(math.log(1 + math.exp(-0.3)), abs=1e-4)
    assert reused.metrics["reference_noise_rms"] == pytest.approx(3 / math.sqrt(2), abs=1e-3)
    recomputed = train(
        tmp_path / "recomputed", policy_uri, shifted, max_steps=1, reference_logps="recompute", precision="bf16"
    )
    assert recomputed.metrics["step0_loss"] == pytest.approx(math.log(2), abs=0.02)


def test_the_published_model_can_be_fetched_and_its_manifest_tells_the_run(
    policy_uri: str, pairs_uri: str, tmp_path: Path
) -> None:
    run = train(
        tmp_path, policy_uri, pairs_uri, precision="bf16", saved_dtype="bfloat16", eval_steps=2, learning_rate=1e-6
    )
    model = load_model(fetch_model(str(tmp_path)), "float32")
    assert all(torch.isfinite(weight).all() for weight in model.parameters())
    assert {weight.dtype for weight in run.weights.values()} == {torch.bfloat16}
    metrics = run.metrics
    assert (metrics["num_steps"], metrics["num_pairs"], metrics["num_eval_pairs"]) == (3, 12, 3)
    assert metrics["num_dropped_pairs"] == 0
    # Updates of 1e-6 on weights that bfloat16 does not hold exactly: rounding moves them much more than training did.
    assert metrics["update_rounding_loss"] > 1
    assert 0 < metrics["relative_update"] < 1e-3
    assert metrics["tokens_per_second"] > 0 and metrics["peak_memory_bytes"] > 1e6
    assert [line["step"] for line in run.lines if "eval_rewards/accuracies" in line] == [2, 3]
    assert [line["epoch"] for line in run.lines if "loss" in line] == pytest.approx([1 / 3, 2 / 3, 1.0], abs=1e-3)


def test_ipo_and_the_sft_term_reach_the_loss(policy_uri: str, pairs_uri: str, tmp_path: Path) -> None:
    run = train(tmp_path, policy_uri, pairs_uri, max_steps=1, loss="ipo", sft_weight=0.5)
    # Policy = reference: (0 - 1 / (2 x 0.1)) squared = 25, and half the likelihood term.
    first = next(line for line in run.lines if "loss" in line)
    assert run.losses[0] == pytest.approx(25 + 0.5 * first["nll_loss"], rel=1e-5)
    assert first["nll_loss"] > 1


def test_too_long_pairs_are_dropped_and_counted_and_none_left_is_an_error_before_any_model(
    policy_uri: str, tmp_path: Path
) -> None:
    rows = make_rows(num_train=3)
    for i, num_tokens in enumerate((50, 20, 20)):
        rows[i]["chosen_token_ids"] = [100] * num_tokens
    uri = write_rows(rows, tmp_path / "pairs.parquet")
    assert train(tmp_path / "out", policy_uri, uri, max_steps=1, max_length=40).metrics["num_dropped_pairs"] == 1
    with pytest.raises(records.RecordError, match=r"no training pair is left of 3 pairs \(training.max_length is 20"):
        train(tmp_path / "none", "no-such-model", uri, max_length=20, max_steps=1)


def test_a_loss_that_is_not_finite_names_the_step_and_the_pairs(
    policy_uri: str, pairs_uri: str, tmp_path: Path
) -> None:
    with pytest.raises(NonFiniteError, match=r"stopped at step [23]: the (loss is not finite .* prompt-\d+|gradient)"):
        train(tmp_path, policy_uri, pairs_uri, learning_rate=1e30)
    assert not (tmp_path / "manifest.json").exists()


def test_bad_inputs_are_one_line_errors(policy_uri: str, pairs_uri: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no-such-pairs"):
        train(tmp_path, policy_uri, str(tmp_path / "no-such-pairs.parquet"))
    rows = make_rows(num_train=2)
    rows[1]["rejected_token_ids"] = []
    with pytest.raises(records.RecordError, match="prompt-1 has a prompt or a response of no tokens"):
        train(tmp_path, policy_uri, write_rows(rows, tmp_path / "empty.parquet"))
    rows[1]["rejected_token_ids"] = [100] * 3000
    with pytest.raises(ConfigError, match=r"the model has 2048 positions and the longest pair 300\d tokens"):
        train(tmp_path, policy_uri, write_rows(rows, tmp_path / "long.parquet"))


def test_a_job_survives_its_file_and_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    job = make_job(tmp_path, "a-policy", "some-pairs", {"beta": 0.2})
    assert TrainingJob.read(job.write()) == job
    (tmp_path / "job.json").write_text('{"training": {"bta": 1}}')
    with pytest.raises(ConfigError, match=r"training.bta: unknown setting, did you mean 'beta'"):
        TrainingJob.read(str(tmp_path / "job.json"))
    (tmp_path / "job.json").write_text("[]")
    with pytest.raises(StorageError, match="not a training job"):
        TrainingJob.read(str(tmp_path / "job.json"))


def test_a_process_says_whether_its_error_would_come_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([str(tmp_path / "job.json")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
    (tmp_path / "job.json").write_text('{"training": {"bta": 1}}')
    assert main([str(tmp_path / "job.json")]) == 1
    assert capsys.readouterr().err.startswith("final error: training.bta: unknown setting")

    def diverge(*_: object) -> None:
        raise NonFiniteError("stopped at step 3")

    monkeypatch.setattr("dice_core.training.worker.run_training", diverge)
    assert main([make_job(tmp_path, "a-policy", "some-pairs", {}).write()]) == 1
    assert capsys.readouterr().err == "final error: stopped at step 3\n"


@pytest.mark.parametrize(
    ("cause", "prefix"),
    [
        (OSError(errno.ESTALE, "Stale file handle"), "error: "),
        (torch.OutOfMemoryError("CUDA out of memory"), "error: "),
        (RuntimeError("Connection closed by peer"), "error: "),
        (OSError("it holds no file named model.safetensors"), "final error: "),
        (ValueError("unknown architecture"), "final error: "),
    ],
)
def test_a_model_that_a_disk_or_an_accelerator_kept_from_loading_may_load_the_next_time(
    cause: Exception,
    prefix: str,
    model_copy: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise cause

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fail)
    monkeypatch.setattr("dice_core.training.worker.run_training", lambda *_: load_model(model_copy, "float32"))
    assert main([make_job(tmp_path, "a-policy", "some-pairs", {}).write()]) == 1
    assert capsys.readouterr().err.startswith(prefix)
