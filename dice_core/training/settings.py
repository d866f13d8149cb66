"""Settings of DPO training."""

from typing import Literal, Self

from pydantic import Field, model_validator

from dice_core.settings.base import ADDED, OPERATIONAL, ConfigError, DType, Int, Names, Settings


class TrainingConfig(Settings):
    """DPO. The global batch does not depend on the number of GPUs: gradient accumulation is derived."""

    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """Of a pair, from the reward margin: sigmoid is DPO."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the tie to the reference: rewards are beta times the log-ratio."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of the pairs whose labels are taken to be wrong (conservative DPO)."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the negative log-likelihood per token of the chosen response, added to the loss."""
    learning_rate: float = Field(default=5e-7, gt=0)
    """The highest of the schedule."""
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    """How the learning rate changes over the steps."""
    warmup_steps: Int = Field(default=0, ge=0)
    """Steps in which the learning rate rises from 0."""
    max_steps: Int = Field(default=300, ge=1)
    """Optimizer steps."""
    global_batch_size: Int = Field(default=32, ge=1)
    """Pairs per optimizer step over all processes."""
    max_length: Int = Field(default=4096, ge=8)
    """Pairs whose prompt plus longer response exceed it are dropped and counted, never cut."""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Longer gradients are scaled down to this norm."""
    precision: Literal["bf16", "float32"] = "bf16"
    """`bf16` is autocast over float32 master weights; bfloat16 weights would lose small updates."""
    saved_dtype: DType = "bfloat16"
    """float32 where the change of a run is small against bfloat16's rounding (the report shows that cost)."""
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Exponential moving average of the weights, saved in place of the last ones; 0 is off."""
    reference: Literal["start", "base"] = "start"
    """DPO's reference. `start` is the policy as it starts, as in DICE. `base` is what the first policy's own DPO
    started from, in every iteration: offline DPO as the paper compares with. It is loaded for a pass over the pairs."""
    reference_logps: Literal["reuse", "recompute"] = "reuse"
    """`reuse` takes scoring's numbers; `recompute` makes one pass with training's own kernels and batches. Reference
    `base` always makes a pass of its own."""
    lora_rank: Int = Field(default=0, ge=0, json_schema_extra=ADDED)
    """Above 0, adapters of this rank are trained beside the frozen weights (LoRA), and merged into them at the end; 0
    trains the weights themselves. Adapters need about ten times the learning rate of full training."""
    lora_alpha: float = Field(default=32.0, gt=0, json_schema_extra=ADDED)
    """What an adapter adds is scaled by lora_alpha / lora_rank."""
    lora_dropout: float = Field(default=0.0, ge=0, lt=1, json_schema_extra=ADDED)
    """Share of an adapter's inputs that a training step leaves out; what is measured leaves out none."""
    lora_target_modules: Names = Field(default=(), json_schema_extra=ADDED)
    """Names of the linear layers with an adapter, such as q_proj; empty: all of them but the output head."""
    quantize_base: Literal["none", "nf4"] = Field(default="none", json_schema_extra=ADDED)
    """`nf4` holds the frozen weights in 4 bits (QLoRA), on a GPU with bitsandbytes. The adapters are merged into the
    exact weights."""
    gradient_checkpointing: bool = Field(default=True, json_schema_extra=OPERATIONAL)
    """Keep one activation a layer and compute the others again: a third more time for a fraction of the memory."""
    per_device_batch_size: Int = Field(default=1, ge=1, json_schema_extra=OPERATIONAL)
    """Pairs of a micro-batch on the average: a step's pairs are packed into rows of like numbers of tokens."""
    deepspeed: Literal["none", "zero2", "zero3"] = Field(default="none", json_schema_extra=OPERATIONAL)
    """How states are split over processes: not at all, optimizer and gradients (ZeRO-2), or weights too (ZeRO-3)."""
    offload_optimizer: Literal["none", "cpu"] = Field(default="none", json_schema_extra=OPERATIONAL)
    """Where ZeRO-3 keeps the float32 weights, their moments and gradients, and updates them: beside the weights, or in
    the node's memory (`cpu`), which then needs 18 bytes a parameter, shared by the nodes; a GPU keeps 2 in place of
    16."""
    eval_steps: Int = Field(default=20, ge=1, json_schema_extra=OPERATIONAL)
    """Measure the evaluation pairs every so many steps."""
    save_minutes: float = Field(default=30.0, gt=0, json_schema_extra=OPERATIONAL)
    """Write a checkpoint every so many minutes, and when a pod is told to stop. Training goes on while it is written
    and stored; what restarts loses so many minutes at most."""
    save_steps: Int = Field(default=0, ge=0, json_schema_extra=OPERATIONAL)
    """Write one every so many steps too; 0: by time alone."""
    logging_steps: Int = Field(default=1, ge=1, json_schema_extra=OPERATIONAL)
    """Log the loss every so many steps."""

    @model_validator(mode="after")
    def _loss_settings_agree(self) -> Self:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing is defined for loss 'sigmoid' only, got loss {self.loss!r}")
        if self.warmup_steps and self.lr_scheduler == "constant":
            raise ValueError("warmup_steps has no effect with lr_scheduler 'constant': use 'constant_with_warmup'")
        batch, most = self.per_device_batch_size, self.global_batch_size
        if batch > most:
            raise ValueError(f"per_device_batch_size must not exceed global_batch_size {most}, got {batch}")
        if self.ema_decay and self.deepspeed != "none":
            cut = f"ema_decay averages whole weights, which deepspeed {self.deepspeed!r} cuts up"
            raise ValueError(f"{cut}: set ema_decay 0 or deepspeed 'none', got ema_decay {self.ema_decay}")
        if self.offload_optimizer != "none" and self.deepspeed != "zero3":
            raise ValueError(
                f"offload_optimizer {self.offload_optimizer!r} needs deepspeed 'zero3', got {self.deepspeed!r}: set "
                "offload_optimizer 'none' or deepspeed 'zero3'"
            )
        return self

    @model_validator(mode="after")
    def _adapter_settings_agree(self) -> Self:
        values, added = self.to_dict(), self.added()
        idle = [name for name in sorted(added) if name != "lora_rank" and values[name] != added[name]]
        if idle and not self.lora_rank:
            raise ValueError(f"{idle[0]} has no effect with lora_rank 0: set lora_rank, such as 16")
        if self.quantize_base == "none":
            return self
        if self.deepspeed != "none":
            raise ValueError(
                f"quantize_base {self.quantize_base!r} needs deepspeed 'none', which would have little to cut up, got "
                f"{self.deepspeed!r}"
            )
        if self.reference == "start" and self.reference_logps != "recompute":
            raise ValueError(
                f"quantize_base {self.quantize_base!r} needs reference_logps 'recompute': scoring's numbers are those "
                "of the exact weights"
            )
        return self

    def accumulation_steps(self, num_processes: int, where: str = "training") -> int:
        """Return the micro-batches per optimizer step of each process.

        Args:
            num_processes: that train, on all nodes.
            where: the name the person knows these settings by.

        Raises:
            ConfigError: global_batch_size cannot be split over that many processes.
        """
        per_pass = self.per_device_batch_size * num_processes
        if self.global_batch_size % per_pass:
            raise ConfigError(
                f"{where}.global_batch_size: must be a multiple of per_device_batch_size x processes = "
                f"{self.per_device_batch_size} x {num_processes} = {per_pass}, got {self.global_batch_size}"
            )
        return self.global_batch_size // per_pass
