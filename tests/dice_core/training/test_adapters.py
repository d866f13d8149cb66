"""LoRA: what is trained, what is published, and that a stopped run goes on to the bit; on a tiny model."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dice_core.launch.launch import launch_training
from dice_core.launch.settings import LaunchConfig
from dice_core.models.cache import fetch_model
from dice_core.models.files import ModelError
from dice_core.models.loading import load_model
from dice_core.settings.base import ConfigError
from dice_core.stages.train import train as train_stage
from dice_core.storage.manifest import require_manifest
from dice_core.training.checkpoints import CheckpointStore
from tests.dice_core.training.pair_rows import as_own_pairs, make_rows, write_rows
from tests.dice_core.training.test_worker import (
    SETTINGS,
    Run,
    assert_same_weights,
    finished,
    make_job,
    train,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

LORA = {"lora_rank": 4, "lora_alpha": 8.0, "learning_rate": 1e-2}
# In each of two layers, by rank x (inputs + outputs): q and o 4 x 128, k and v 4 x 96, the MLP's three 4 x 192.
NUM_TRAINED = 2 * (2 * 512 + 2 * 384 + 3 * 768)


@pytest.fixture(scope="module")
def whole(policy_uri: str, pairs_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a run of one process, in float32."""
    return train(tmp_path_factory.mktemp("whole"), policy_uri, pairs_uri, **LORA, max_steps=6)


def logps(model: torch.nn.Module) -> list[float]:
    """Return the log-prob of each pair's responses, by plain forwards."""
    found = []
    for row in make_rows():
        for name in ("chosen_token_ids", "rejected_token_ids"):
            ids = torch.tensor([row["prompt_token_ids"] + row[name]])
            with torch.no_grad():
                values = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            found.append(values[len(row["prompt_token_ids"]) - 1 :].sum().item())
    return found


def test_the_policy_as_it_starts_is_its_own_reference_to_the_bit(whole: Run) -> None:
    assert whole.metrics["first_loss"] == pytest.approx(math.log(2), abs=1e-15)
    assert whole.losses[0] == pytest.approx(math.log(2), abs=1e-7), "the log has float32"
    assert whole.metrics["reference_noise_rms"] == 0
    assert whole.metrics["last_loss"] < 0.6


def test_adapters_alone_are_trained(whole: Run, policy_uri: str) -> None:
    start = load_file(fetch_model(policy_uri) / "model.safetensors")
    moved = {name for name, weight in whole.weights.items() if not torch.equal(weight, start[name])}
    assert moved == {name for name in start if name.endswith("_proj.weight")}
    assert len(moved) == 14
    assert whole.metrics["num_trained_parameters"] == NUM_TRAINED
    assert whole.metrics["num_parameters"] == sum(weight.numel() for weight in start.values())


def test_the_merged_model_and_the_adapter_on_its_base_are_one_model(whole: Run, policy_uri: str) -> None:
    from peft import PeftModel

    config = json.loads((whole.uri / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == policy_uri
    linear = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert config["target_modules"] == linear, "in order: the digest is that of every run alike"
    assert {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"} < require_manifest(
        str(whole.uri)
    ).files.keys()
    base = load_model(fetch_model(policy_uri), "float32")
    before = logps(base)
    adapted = logps(PeftModel.from_pretrained(base, str(whole.uri / "adapter")))
    assert logps(load_model(fetch_model(str(whole.uri)), "float32")) == pytest.approx(adapted, abs=1e-3)
    assert max(abs(now - then) for now, then in zip(adapted, before, strict=True)) > 1


def test_a_stopped_run_goes_on_to_the_bit_from_a_checkpoint_of_adapters_alone(
    policy_uri: str, pairs_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Dropout makes each step depend on the random numbers before it.
    settings = {**LORA, "lora_dropout": 0.2, "max_steps": 4, "save_steps": 2, "ema_decay": 0.5}
    once = train(tmp_path / "once", policy_uri, pairs_uri, **settings)
    save, sizes = CheckpointStore.save, []

    def save_and_stop(self: CheckpointStore, step: int) -> None:
        save(self, step)
        self.wait()
        files = (tmp_path / "stopped").glob("checkpoints/*/rank-0/**/*")
        sizes.append(sum(path.stat().st_size for path in files if path.is_file()))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CheckpointStore, "save", save_and_stop)
        train(tmp_path / "stopped", policy_uri, pairs_uri, **settings)
    resumed = train(tmp_path / "stopped", policy_uri, pairs_uri, **settings)
    assert resumed.losses == once.losses
    assert_same_weights(once, resumed, 0)
    # Adapter, its average and two moments, 4 bytes each; what is not theirs (references, random states) is small.
    assert 16 * NUM_TRAINED < sizes[0] < 16 * NUM_TRAINED + 60_000 < 4 * once.metrics["num_parameters"] / 10


@pytest.mark.parametrize("deepspeed", ["zero2", "zero3"])
def test_two_processes_under_zero_equal_one_and_go_on_to_the_bit_when_killed(
    deepspeed: str,
    whole: Run,
    policy_uri: str,
    pairs_uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    settings = {**LORA, "max_steps": 6, "deepspeed": deepspeed}
    job = make_job(tmp_path / "once", policy_uri, pairs_uri, settings)
    launch_training(job.write(), LaunchConfig(processes_per_node=2))
    once = finished(tmp_path / "once")
    assert once.losses == pytest.approx(whole.losses, abs=1e-5)
    assert_same_weights(whole, once, 2e-4)

    uri = tmp_path / "killed"
    job_uri = make_job(uri, policy_uri, pairs_uri, {**settings, "save_steps": 3}).write()
    monkeypatch.setenv("DICE_SCRATCH", str(tmp_path / "machine-1"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["--module", "dice_core.training.worker", job_uri]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[3])
    while not all(list(uri.glob(f"checkpoints/*/rank-{rank}/manifest.json")) for rank in range(2)):
        assert process.poll() is None, "the run ended before its first checkpoint"
        time.sleep(0.01)
    process.kill()
    process.wait()
    stored = sum(path.stat().st_size for path in uri.glob("checkpoints/**/*.safetensors"))
    assert stored < 16 * NUM_TRAINED + 20_000, "no frozen weight is in it"

    # On another machine, which has the stored checkpoint alone.
    monkeypatch.setenv("DICE_SCRATCH", str(tmp_path / "machine-2"))
    launch_training(job_uri, LaunchConfig(processes_per_node=2))
    resumed = finished(uri)
    assert "resuming from checkpoint-3" in capfd.readouterr().err
    assert resumed.losses == once.losses
    assert_same_weights(once, resumed, 0)


def test_frozen_weights_in_bfloat16_stay_exact_in_what_is_published(
    whole: Run, policy_uri: str, pairs_uri: str, tmp_path: Path
) -> None:
    run = train(tmp_path, policy_uri, pairs_uri, **LORA, max_steps=6, precision="bf16")
    start = load_file(fetch_model(policy_uri) / "model.safetensors")
    assert not all(torch.equal(weight, weight.bfloat16().float()) for weight in start.values())
    kept = {name: weight for name, weight in start.items() if not name.endswith("_proj.weight")}
    assert kept and all(torch.equal(run.weights[name], weight) for name, weight in kept.items())
    assert run.losses == pytest.approx(whole.losses, abs=0.02)
    adapters = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {weight.dtype for weight in adapters.values()} == {torch.float32}


def test_zero3_in_bfloat16_trains_adapters_in_float32(
    whole: Run, policy_uri: str, pairs_uri: str, tmp_path: Path
) -> None:
    settings = {**LORA, "max_steps": 6, "deepspeed": "zero3", "precision": "bf16", "gradient_checkpointing": True}
    job = make_job(tmp_path, policy_uri, pairs_uri, settings)
    launch_training(job.write(), LaunchConfig(processes_per_node=2))
    run = finished(tmp_path)
    assert run.losses == pytest.approx(whole.losses, abs=0.02)
    adapters = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert not any(torch.equal(weight, weight.bfloat16().float()) for weight in adapters.values())


@pytest.mark.gpu("bitsandbytes")
def test_adapters_of_weights_in_4_bits_are_merged_into_the_exact_ones(
    policy_uri: str, pairs_uri: str, tmp_path: Path
) -> None:
    settings = {"quantize_base": "nf4", "reference_logps": "recompute", "precision": "bf16", "max_steps": 6}
    run = train(tmp_path, policy_uri, pairs_uri, **LORA, **settings)
    start = load_file(fetch_model(policy_uri) / "model.safetensors")
    kept = {name: weight for name, weight in start.items() if not name.endswith("_proj.weight")}
    assert kept and all(torch.equal(run.weights[name], weight) for name, weight in kept.items())
    assert run.losses[0] == pytest.approx(math.log(2), abs=1e-2)
    assert run.metrics["last_loss"] < 0.6


def test_a_stage_publishes_the_model_and_the_adapter_with_the_base_that_it_belongs_to(
    tiny_model: Path, policy_uri: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    own = as_own_pairs(make_rows(num_eval=3), tiny_model)
    pairs_uri = write_rows(own, tmp_path_factory.mktemp("own") / "pairs.parquet")
    training = {**SETTINGS, **LORA, "max_steps": 1, "saved_dtype": "bfloat16", "lora_target_modules": ["q_proj"]}
    report = train_stage(policy_uri, pairs_uri, str(tmp_path), training=training)
    assert report.metrics["num_trained_parameters"] == 2 * 512
    model = load_model(fetch_model(report.uri), "bfloat16")
    assert torch.isfinite(torch.tensor(logps(model))).all()
    manifest, base = require_manifest(report.uri), require_manifest(policy_uri)
    assert manifest.inputs["policy"] == f"{policy_uri}@{base.content_digest}"
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["target_modules"] == ["q_proj"]
    assert "`adapter/`" in (tmp_path / "README.md").read_text()


def test_a_merge_that_gives_another_model_is_not_published(
    policy_uri: str, pairs_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import Linear

    delta = Linear.get_delta_weight
    monkeypatch.setattr(Linear, "get_delta_weight", lambda layer, name: 1.1 * delta(layer, name))
    with pytest.raises(ModelError, match=r"differ by .* nats from those with adapters.* not published"):
        train(tmp_path, policy_uri, pairs_uri, **LORA)
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"lora_target_modules": ["q_prj"]},
            r"training.lora_target_modules: llama has no linear layer 'q_prj' that can have an adapter, did you mean "
            r"'q_proj'\? allowed: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj$",
        ),
        ({"lora_target_modules": ["lm_head"]}, "no linear layer 'lm_head' that can have an adapter"),
        (
            {"quantize_base": "nf4", "reference_logps": "recompute"},
            "training.quantize_base: 'nf4' needs a GPU and bitsandbytes, and no GPU is here",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_weights_are_loaded(
    settings: dict[str, Any],
    message: str,
    policy_uri: str,
    pairs_uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=message):
        train(tmp_path, policy_uri, pairs_uri, **LORA, **settings)


def test_a_learning_rate_of_full_training_is_said_to_be_one(
    policy_uri: str, pairs_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, policy_uri, pairs_uri, lora_rank=4, learning_rate=5e-7, max_steps=1)
    assert "training.learning_rate 5e-07 is one of full training, with which adapters hardly move" in (
        capsys.readouterr().err
    )


def test_a_process_that_trains_no_adapter_does_not_wait_for_peft(pairs_uri: str, tmp_path: Path) -> None:
    job_uri = make_job(tmp_path / "out", str(tmp_path / "no-such-model"), pairs_uri, {}).write()
    code = (
        "import sys; from dice_core.training.worker import main; "
        f"main([{job_uri!r}]); print('dice_core.training.trainer' in sys.modules, 'peft' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "True False", ended.stderr
