"""Training settings turned into what transformers.Trainer and DeepSpeed understand.

The only module that knows their names; `trainer.py` uses what is built here.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from dice_core.training import ranks
from dice_core.training.settings import TrainingConfig

_MEGABYTES = 1_000_000

# Rank 0 may write a large checkpoint while the others wait in a collective.
_COLLECTIVE_TIMEOUT_SECONDS = 7200


def deepspeed_config(config: TrainingConfig, num_processes: int) -> dict[str, Any] | None:
    """Return DeepSpeed's configuration, or None where it is not used.

    Every number is given: "auto" would need a model configuration at the root of the module.
    """
    if config.deepspeed == "none":
        return None
    zero: dict[str, Any] = {
        "stage": 2 if config.deepspeed == "zero2" else 3,
        "overlap_comm": torch.cuda.is_available(),
        "contiguous_gradients": True,
    }
    if config.deepspeed == "zero3":
        zero |= {
            "stage3_prefetch_bucket_size": 100 * _MEGABYTES,
            "stage3_param_persistence_threshold": 100_000,
            # The finished weights are collected in float32 by trained_model.py, never through this 16-bit path.
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    if config.offload_optimizer == "cpu":
        # Pinned, so that gradients arrive while backward goes on. There is nothing to pin for without a GPU.
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": config.accumulation_steps(num_processes),
        "gradient_clipping": config.max_grad_norm,
        # bfloat16 working weights; DeepSpeed's optimizer keeps the float32 master copy.
        "bf16": {"enabled": config.precision == "bf16"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # torch's fused AdamW runs on CPUs too. DeepSpeed would build its own with CUDA's compiler, which no image has.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000,
    }


def training_arguments(config: TrainingConfig, folder: Path, *, has_eval_pairs: bool, seed: int) -> TrainingArguments:
    """Build the Trainer's arguments. Joins the process group, where torchrun started several processes.

    Args:
        config: of the run.
        folder: where checkpoints are written on this machine.
        has_eval_pairs: whether there is anything to evaluate.
        seed: of the run.

    Raises:
        ConfigError: global_batch_size cannot be split over the processes.
    """
    num_processes, on_cpu = ranks.num_processes(), not torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=config.max_steps,
        # A packed row of pairs, as many as the trainer put into it.
        per_device_train_batch_size=1,
        gradient_accumulation_steps=config.accumulation_steps(num_processes),
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=config.precision == "bf16",
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and num_processes > 1 else None,
        ddp_timeout=_COLLECTIVE_TIMEOUT_SECONDS,
        ddp_find_unused_parameters=False,
        deepspeed=deepspeed_config(config, num_processes),
        # Off here because the module that is trained wraps the policy: PairScorer switches it on inside.
        gradient_checkpointing=False,
        eval_strategy="steps" if has_eval_pairs else "no",
        eval_steps=config.eval_steps,
        # checkpoints.CheckpointCallback says when.
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=config.logging_steps,
        # The loss before the first update is a number of the result: no run ends, and no checkpoint is made, before it
        # is in the log.
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        seed=seed,
    )
    if config.deepspeed != "none" and on_cpu:
        _join_on_cpu()
    return arguments


def _join_on_cpu() -> None:
    import deepspeed

    # An operator for inference, which DeepSpeed would build with a C++ compiler here. A build that was killed leaves
    # its lock in the home directory, and every training after it waits for that lock for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Otherwise DeepSpeed looks for MPI and for its own CPU communication library.
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
