"""What each process of a training run does: read the job, train, and publish from process 0.

    torchrun ... -m dice_core.training.worker OUTPUT_URI/job.json

`launch` starts the processes, and `trainer.py` has the loop. Importing this module loads no torch.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from dice_core.accelerator import AcceleratorError, device_type
from dice_core.child_processes import end_with_parent
from dice_core.data import records
from dice_core.progress import Progress, doing, log, never_silent
from dice_core.settings.base import ConfigError
from dice_core.storage import layout
from dice_core.storage.address import open_storage
from dice_core.storage.contract import StorageError
from dice_core.storage.manifest import Manifest, Metric, fetch_files, publish_files, read_manifest
from dice_core.tracking.run_tracking import Tracked, tracked_training
from dice_core.training.batches import TrainingPairs, read_pairs
from dice_core.training.copies import Copies
from dice_core.training.interconnect import sockets_warning
from dice_core.training.job import CHECKPOINTS, ERROR, FINAL_ERROR, TrainingJob
from dice_core.training.settings import TrainingConfig

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, TrainingArguments

    from dice_core.training.checkpoints import CheckpointStore
    from dice_core.training.trainer import DPOTrainer

# torchrun sets it for its workers.
_TORCHRUN_ID = "TORCHELASTIC_RUN_ID"
# Before the launcher, which shows these lines, would say that nothing is said.
_SILENT_SECONDS = 9.0
METRICS_FILE, PAIRS_FILE = "metrics.jsonl", "pairs.parquet"


def load_pairs(job: TrainingJob, folder: Path) -> TrainingPairs:
    """Download the pairs into a folder of this process, and check them.

    Raises:
        StorageError, RecordError: they are not there, or not usable.
    """
    uri, name = job.pairs_uri, PAIRS_FILE
    if uri.endswith(".parquet"):
        uri, _, name = uri.rpartition("/")
    manifest = read_manifest(uri or ".")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    if manifest is None:
        open_storage(uri or ".").download(name, path)
    else:
        fetch_files(uri or ".", manifest, folder, [name])
    table = records.read_table(path, records.PAIRS, where=job.pairs_uri)
    path.unlink()
    return read_pairs(table, job.training.max_length, job.pairs_uri, job.section)


def run_training(job: TrainingJob, copies: Copies | None = None) -> None:
    """Do this process's part of a training run: resume or start, train, and publish from process 0.

    Args:
        job: what to train.
        copies: what the node stores meanwhile, for a process that is told to stop.

    Raises:
        ConfigError, RecordError, StorageError, ModelError, NonFiniteError: one line each.
    """
    with never_silent("train", _SILENT_SECONDS) if os.environ.get("RANK", "0") == "0" else nullcontext():
        _run_training(job, copies or copies_of(job))


def _run_training(job: TrainingJob, copies: Copies) -> None:
    scratch = job.scratch_folder()
    # Cheap checks first: what is wrong with pairs or settings is said before torch and the model load.
    pairs = load_pairs(job, scratch / f"pairs-{os.environ.get('RANK', '0')}")
    _quieten_libraries()
    with doing("importing torch and transformers"), nullcontext() if job.training.lora_rank else _without_peft():
        from dice_core.training import ranks
        from dice_core.training.arguments import training_arguments
        from dice_core.training.checkpoint_files import CheckpointOwner
        from dice_core.training.checkpoints import CheckpointStore

    config = job.training
    arguments = training_arguments(config, scratch / CHECKPOINTS, has_eval_pairs=bool(pairs.eval), seed=job.seed)
    owner = CheckpointOwner(job.fingerprint, ranks.num_processes(), ranks.num_nodes(), config.deepspeed)
    store = CheckpointStore(layout.join(job.output_uri, CHECKPOINTS), scratch / CHECKPOINTS, owner, copies)
    try:
        with _tracked(job, scratch) if ranks.rank() == 0 else nullcontext() as tracked:
            _train_and_publish(job, pairs, arguments, store, copies, tracked)
        if ranks.local_rank() == 0:
            shutil.rmtree(scratch, ignore_errors=True)
    finally:
        store.close()
        ranks.close()


@contextmanager
def _without_peft() -> Iterator[None]:
    """Keep transformers' Trainer from importing peft wherever that is installed, for classes that nobody makes here.

    It takes a third of a second. Whether there is a peft, transformers asks but once.
    """
    if "peft" in sys.modules:
        yield
        return
    sys.modules["peft"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["peft"]


def _tracked(job: TrainingJob, scratch: Path) -> AbstractContextManager[Tracked]:
    settings = job.manifest_fields.get("settings", {})
    return tracked_training(job.output_uri, job.fingerprint, settings, scratch / "tracking")


def copies_of(job: TrainingJob) -> Copies:
    """Return what this node stores of a job."""
    return Copies(job.scratch_folder() / "copies.lock")


def _train_and_publish(
    job: TrainingJob,
    pairs: TrainingPairs,
    arguments: "TrainingArguments",
    store: "CheckpointStore",
    copies: Copies,
    tracked: Tracked | None,
) -> None:
    from dice_core.models.cache import fetch_model
    from dice_core.training import ranks
    from dice_core.training.adapters import trained_parameters
    from dice_core.training.checkpoints import CheckpointCallback
    from dice_core.training.live_metrics import LiveMetrics
    from dice_core.training.reference import with_reference
    from dice_core.training.trained_model import ExactMasterWeights, gather_weights
    from dice_core.training.trainer import DPOTrainer
    from dice_core.training.weight_average import WeightAverage

    start, config, is_first = time.monotonic(), job.training, ranks.rank() == 0
    policy_folder, checkpoint = fetch_model(job.policy_uri), store.newest()
    progress = Progress("train: reference log-probs", "pairs") if is_first else None
    if job.reference_uri and not checkpoint:
        # A checkpoint has them.
        with doing("computing the reference's log-probs"):
            pairs = with_reference(pairs, fetch_model(job.reference_uri), config, progress)
    if is_first:
        log(f"train: {len(pairs.train)} pairs, {pairs.num_dropped} dropped, {config.max_steps} steps")
        if device_type() == "cuda" and (warning := sockets_warning(ranks.num_nodes())):
            log(f"train: {warning}")
        log(f"train: resuming from {checkpoint.name}" if checkpoint else "train: starting at step 0")
    policy = _load_policy(job, pairs, policy_folder)
    average = WeightAverage(config.ema_decay, checkpoint, store.stage_tensors) if config.ema_decay else None
    if config.deepspeed != "none":
        from dice_core.training.checkpoint_engine import use_staged_checkpoints

        use_staged_checkpoints(store)
    needs_masters = config.deepspeed != "none" and config.precision == "bf16" and not config.lora_rank
    # The store comes after what adds files to a checkpoint.
    callbacks = [
        average,
        ExactMasterWeights(policy_folder) if needs_masters else None,
        CheckpointCallback(store, copies, config),
        LiveMetrics(tracked.put, _passes_per_step(config, pairs)) if tracked else None,
    ]
    trainer = DPOTrainer(
        policy,
        pairs,
        config,
        arguments,
        store,
        section=job.section,
        callbacks=[callback for callback in callbacks if callback],
        on_reference_progress=progress,
    )
    with doing("training"):
        trainer.train(str(checkpoint) if checkpoint else None)
    if average:
        average.copy_to(trainer.scorer)
    metrics = {**_training_metrics(trainer), **trainer.speed.totals(trainer.policy)}
    if device_type() == "cuda":
        metrics["num_gpus"] = ranks.num_processes()
    if tracked:
        tracked.describe(metrics)
    trained = trained_parameters(trainer.policy, config)
    weights = gather_weights(trained, uses_deepspeed=config.deepspeed != "none", keep=is_first)
    if is_first:
        with copies.begin():
            _publish(job, trainer, weights, policy_folder, job.scratch_folder() / "model", metrics, start)
        store.delete_all()


def _load_policy(job: TrainingJob, pairs: TrainingPairs, folder: Path) -> "PreTrainedModel":
    """Return what is trained, which these settings can train on these pairs."""
    from dice_core.models.loading import context_length, load_model
    from dice_core.models.rotary import stretches_positions
    from dice_core.training.adapters import load_with_adapters

    config = job.training
    with doing("loading the policy"):
        if config.lora_rank:
            policy = load_with_adapters(folder, config, job.seed, job.section)
        else:
            policy = load_model(folder, "float32")
    check_context(job, pairs, context_length(policy.config))
    if config.deepspeed == "zero3" and stretches_positions(policy):
        # Each response then runs alone, and processes that collect weights together must make as many forwards.
        raise ConfigError(
            f"{job.section}.deepspeed: 'zero3' cannot train {policy.config.model_type}, whose positions depend on the "
            "longest row of a batch: set 'zero2' or 'none'"
        )
    return policy


def _quieten_libraries() -> None:
    """Leave the log to lines a person reads; call it before accelerate or DeepSpeed is imported."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    if device_type() == "cpu":
        # DeepSpeed, which accelerate imports, otherwise warns at length that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def check_context(job: TrainingJob, pairs: TrainingPairs, context_length: int) -> None:
    """Check that the model has positions for every pair.

    Raises:
        ConfigError: it has not.
    """
    longest = max(pair.length for pair in pairs.all)
    if longest > context_length:
        raise ConfigError(
            f"{job.section}.max_length: the model has {context_length} positions and the longest pair {longest} "
            f"tokens; set it to {context_length} or less, got {job.training.max_length}"
        )


def _training_metrics(trainer: "DPOTrainer") -> dict[str, Metric]:
    """Return the numbers that describe the run. Every process calls it.

    `first_` and `last_` numbers are of the same training pairs, before the first update and with the weights that are
    saved; of an accuracy a tie counts as a half, so that it starts at about a half. `step0_loss` and
    `reference_noise_rms` are of the first step's pairs. What no line of the log has, as in one that an earlier version
    began, is left out.
    """
    from dice_core.training.trainer import START_PREFIX

    last = trainer.measure(trainer.measured)
    logged = {name: value for line in reversed(trainer.state.log_history) for name, value in line.items()}
    first = {name: logged.get(f"{START_PREFIX}{name}") for name in last}
    metrics = {
        "num_steps": trainer.state.global_step,
        "num_pairs": len(trainer.pairs.train),
        "num_eval_pairs": len(trainer.pairs.eval),
        "num_dropped_pairs": trainer.pairs.num_dropped,
        "num_identical_pairs": trainer.pairs.num_identical,
        "num_measured_pairs": len(trainer.measured),
        "first_loss": first["loss"],
        "last_loss": last["loss"],
        "first_reward_accuracy": first["rewards/accuracies"],
        "last_reward_accuracy": last["rewards/accuracies"],
        "first_reward_margin": first["rewards/margins"],
        "last_reward_margin": last["rewards/margins"],
        "step0_loss": logged.get("step0_loss"),
        "reference_noise_rms": logged.get("reference_noise_rms"),
    }
    return {name: value for name, value in metrics.items() if value is not None}


def _publish(
    job: TrainingJob,
    trainer: "DPOTrainer",
    weights: "Mapping[str, Tensor]",
    policy_folder: Path,
    folder: Path,
    metrics: dict[str, Metric],
    start: float,
) -> None:
    """Save the model and the metrics into a folder, check them, and publish them with a manifest."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from dice_core.models.loading import load_tokenizer
    from dice_core.models.tokenizers import text_digests
    from dice_core.training.adapters import save_merged_model
    from dice_core.training.trained_model import save_trained_model

    # Under ZeRO-3 every model is otherwise loaded in shards, by all processes together.
    unset_hf_deepspeed_config()
    shutil.rmtree(folder, ignore_errors=True)
    tokenizer = load_tokenizer(policy_folder)
    if job.training.lora_rank:
        pair = min(trainer.measured, key=lambda pair: pair.num_tokens)
        change = save_merged_model(weights, trainer.policy, pair, policy_folder, tokenizer, folder, job)
    else:
        change = save_trained_model(weights, policy_folder, tokenizer, folder, job.training.saved_dtype)
    _write_lines(trainer, folder / METRICS_FILE)
    metrics |= {
        "num_parameters": change.num_parameters,
        "num_trained_parameters": sum(weight.numel() for weight in weights.values()),
        "relative_update": change.relative_update,
        "update_rounding_loss": change.rounding_loss,
        "seconds": round(time.monotonic() - start, 1),
    }
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    fields = {"stage": "train", "fingerprint": "", "text_digests": text_digests(tokenizer), **job.manifest_fields}
    manifest = Manifest(**fields, files={}, metrics=metrics)
    publish_files(job.output_uri, files, manifest)
    log(f"train: published {job.output_uri}")


def _write_lines(trainer: "DPOTrainer", path: Path) -> None:
    """Write one JSON object for each logged step, measures at step 0 and of eval pairs among them."""
    from dice_core.training.live_metrics import metric_lines

    with path.open("w") as stream:
        for line in metric_lines(trainer.state.log_history, _passes_per_step(trainer.dpo_config, trainer.pairs)):
            stream.write(json.dumps(line) + "\n")


def _passes_per_step(config: TrainingConfig, pairs: TrainingPairs) -> float:
    passes: float = config.global_batch_size / len(pairs.train)
    return passes


def _may_pass(error: Exception) -> bool:
    """Return whether another try may succeed; what is wrong with pairs, settings or the model stays so.

    A model that could not be loaded for a disk, an accelerator or another process (what torch and the system raise) was
    whole when it was imported.
    """
    cause = error.__context__
    has_errno = isinstance(cause, OSError) and cause.errno is not None
    return isinstance(error, StorageError | AcceleratorError) or isinstance(cause, RuntimeError) or has_errno


def main(arguments: list[str] | None = None) -> int:
    """Run one process of a training job; errors meant for a person are one line on standard error."""
    if _TORCHRUN_ID in os.environ:
        # torchrun starts each worker in a session of its own, which no signal to its group reaches. When torchrun is
        # killed, by the launcher or for want of memory, its workers would go on and hold their GPUs.
        end_with_parent(os.getppid())
    job_uri, *rest = sys.argv[1:] if arguments is None else arguments
    if rest:
        raise SystemExit("usage: torchrun ... -m dice_core.training.worker JOB_URI")
    try:
        job = TrainingJob.read(job_uri)
        copies = copies_of(job)
        with copies.end_process_on_sigterm():
            run_training(job, copies)
    except (ConfigError, records.RecordError, RuntimeError) as error:
        # RuntimeErrors of our own are one line for a person; torch's are not, and keep their traceback.
        if type(error) is RuntimeError or type(error).__module__.partition(".")[0] != "dice_core":
            raise
        print(f"{ERROR if _may_pass(error) else FINAL_ERROR}{error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    exit_code = main()
    if not exit_code:
        # All is done. DeepSpeed keeps process groups whose threads C++ may find running at its end, and abort: torchrun
        # would then stop the process that is still publishing.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    sys.exit(exit_code)
