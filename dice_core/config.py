"""The settings of every stage, one class a stage.

A setting lives in the class of the stage that reads it. `operational` settings (memory, batch sizes, logging) change
how fast a stage runs and not what it computes: they stay out of its fingerprint, so that a run that ran out of memory
resumes with smaller batches.

Loads no torch. Presets live in `pipelines/presets.py`; this module has only defaults that suit every model.
"""

import hashlib
import math
from typing import Literal, Self

from pydantic import Field, model_validator

from dice_core.pod_settings import Annotations, Labels, OptionalQuantity, Tolerations
from dice_core.settings import OPERATIONAL, ConfigError, DType, Int, Ints, Settings

__all__ = [
    "ChatConfig",
    "ConfigError",
    "DType",
    "DataConfig",
    "EvaluationConfig",
    "GenerationConfig",
    "Int",
    "LaunchConfig",
    "PairingConfig",
    "ScoringConfig",
    "Settings",
    "TrainingConfig",
    "derive_seed",
    "finite_or_none",
]


class ChatConfig(Settings):
    """How a prompt becomes token ids. One format for generation, pairs and evaluation of a run."""

    prompt_format: Literal["model", "zephyr", "llama3"] = "model"
    """`model` is the tokenizer's own chat template; the others are the formats upstream DICE used."""
    system_prompt: str = ""
    """Only for `model`; empty means no system message. The zephyr format has its one space built in."""
    max_prompt_tokens: Int = Field(default=2048, ge=1)
    """A longer prompt is dropped and counted by prepare-data, and an error anywhere else; never cut."""
    enable_thinking: bool = False
    """Passed to templates that know it (Qwen3 and its like)."""

    @model_validator(mode="after")
    def _system_prompt_needs_model_format(self) -> Self:
        if self.system_prompt and self.prompt_format != "model":
            raise ValueError(f"system_prompt is allowed only with prompt_format 'model', got {self.prompt_format!r}")
        return self


class DataConfig(Settings):
    """prepare-data: checks and splits the user's prompts and preference pairs."""

    num_held_out: Int = Field(default=256, ge=1)
    """Preference pairs kept aside for evaluation; they are never replayed."""
    max_prompts: Int = Field(default=0, ge=0)
    """Random subset of the prompts (seeded); 0 takes all."""
    max_preferences: Int = Field(default=0, ge=0)
    """Random subset of the pairs beside the held-out ones (seeded), and so of their prompts; 0 takes all."""
    max_response_characters: Int = Field(default=20_000, ge=1)
    """Preference pairs with a longer chosen or rejected text are dropped and counted."""
    decontamination_words: Int = Field(default=13, ge=2)
    """A prompt that shares a run of so many words with a prompt of the benchmarks given is dropped and counted."""


class GenerationConfig(Settings):
    """vLLM sampling. K responses a prompt with the policy."""

    num_responses: Int = Field(default=16, ge=2)
    """K. Two at least: a pair needs a best and a worst."""
    temperature: float = Field(default=0.7, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0)
    max_new_tokens: Int = Field(default=2048, ge=1)
    stop_token_ids: Ints = ()
    """End-of-turn ids beside the model's own EOS."""
    dtype: DType = "bfloat16"
    prompts_per_part: Int = Field(default=256, ge=1)
    """A killed shard resumes at the first part that is not stored."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, lt=1, json_schema_extra=OPERATIONAL)
    max_concurrent_sequences: Int = Field(default=0, ge=0, json_schema_extra=OPERATIONAL)
    """0 leaves it to vLLM, which knows the device."""
    policy_logps: bool = False
    """Keep the log-prob of each response that vLLM sampled it with, for `scoring.policy_logps: generation`."""
    cpu_kv_cache_gib: Int = Field(default=1, ge=1, json_schema_extra=OPERATIONAL)


class ScoringConfig(Settings):
    """Which responses are valid, and how their log-probs are computed."""

    min_characters: Int = Field(default=4, ge=0)
    """Of the stripped response. Upstream keeps 3 < characters (generate_dpo_scores.py)."""
    max_characters: Int = Field(default=6699, ge=1)
    """Of the stripped response. Upstream keeps characters < 6700."""
    min_valid_responses: Int = Field(default=8, ge=2)
    """Prompts with fewer valid responses are not scored."""
    dtype: DType = "bfloat16"
    """Of the weights; log-softmax and sums are float32 always."""
    policy_logps: Literal["forward", "generation"] = "forward"
    """`generation` takes vLLM's (it must have kept them) and saves the policy's forward pass. Its kernels are not those
    that score the reference: in float32 they agree to 0.001 nats a response, in bfloat16 they differ by up to 1."""
    num_checked_responses: Int = Field(default=64, ge=1)
    """With `generation`: so many of the first part of each shard are scored by a forward pass too, and compared."""
    max_logps_difference: float = Field(default=0.01, gt=0)
    """Nats. With `generation`: a checked response that differs by more ends the stage."""
    tokens_per_batch: Int = Field(default=16384, ge=64, json_schema_extra=OPERATIONAL)

    @model_validator(mode="after")
    def _character_range_is_not_empty(self) -> Self:
        if self.min_characters > self.max_characters:
            raise ValueError(
                f"min_characters must not exceed max_characters, got {self.min_characters} and {self.max_characters}"
            )
        return self


class PairingConfig(Settings):
    """Length penalty, selection of the best and the worst response, replay of offline pairs."""

    length_penalty: Literal["exact", "grid"] | float = "exact"
    """`exact` balances lengths by the zero crossing of the gap, `grid` by upstream's grid (0, 0.001, ... < 1).

    A number is used as it is, in nats per unit of length, on the scale without beta: paper alpha / beta."""
    length_unit: Literal["characters", "tokens"] = "characters"
    min_valid_responses: Int = Field(default=8, ge=2)
    """Upstream's n_least_score."""
    replay_ratio: float = Field(default=0.5, ge=0, le=1)
    """gamma: share of offline pairs in the training set."""
    num_eval_pairs: Int = Field(default=576, ge=0)
    """Pairs kept aside to watch the loss, a tenth of all at most; upstream's val_size."""


class TrainingConfig(Settings):
    """DPO. The global batch does not depend on the number of GPUs: gradient accumulation is derived."""

    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    beta: float = Field(default=0.1, gt=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the negative log-likelihood per token of the chosen response, added to the loss."""
    learning_rate: float = Field(default=5e-7, gt=0)
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "constant"
    warmup_steps: Int = Field(default=0, ge=0)
    max_steps: Int = Field(default=300, ge=1)
    global_batch_size: Int = Field(default=32, ge=1)
    """Pairs per optimizer step over all processes."""
    max_length: Int = Field(default=4096, ge=8)
    """Pairs whose prompt plus longer response exceed it are dropped and counted, never cut."""
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    precision: Literal["bf16", "float32"] = "bf16"
    """`bf16` is autocast over float32 master weights; bfloat16 weights would lose small updates."""
    saved_dtype: DType = "bfloat16"
    """float32 where the change of a run is small against bfloat16's rounding (the report shows that cost)."""
    ema_decay: float = Field(default=0.0, ge=0, lt=1)
    """Exponential moving average of the weights, saved in place of the last ones; 0 is off."""
    reference_logps: Literal["reuse", "recompute"] = "reuse"
    """`reuse` takes scoring's numbers; `recompute` makes one pass with training's own kernels and batches."""
    gradient_checkpointing: bool = Field(default=True, json_schema_extra=OPERATIONAL)
    """Keep one activation a layer and compute the others again: a third more time for a fraction of the memory."""
    per_device_batch_size: Int = Field(default=1, ge=1, json_schema_extra=OPERATIONAL)
    """Pairs of a micro-batch on the average: a step's pairs are packed into rows of like numbers of tokens."""
    deepspeed: Literal["none", "zero2", "zero3"] = Field(default="none", json_schema_extra=OPERATIONAL)
    eval_steps: Int = Field(default=20, ge=1, json_schema_extra=OPERATIONAL)
    save_steps: Int = Field(default=50, ge=1, json_schema_extra=OPERATIONAL)
    logging_steps: Int = Field(default=1, ge=1, json_schema_extra=OPERATIONAL)

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
        return self

    def accumulation_steps(self, num_processes: int) -> int:
        """Return the micro-batches per optimizer step of each process.

        Raises:
            ConfigError: global_batch_size cannot be split over that many processes.
        """
        per_pass = self.per_device_batch_size * num_processes
        if self.global_batch_size % per_pass:
            raise ConfigError(
                f"training.global_batch_size: must be a multiple of per_device_batch_size x processes = "
                f"{self.per_device_batch_size} x {num_processes} = {per_pass}, got {self.global_batch_size}"
            )
        return self.global_batch_size // per_pass


class EvaluationConfig(Settings):
    """What is measured of a new policy, and when it is accepted."""

    dtype: DType = "bfloat16"
    num_sample_prompts: Int = Field(default=16, ge=1)
    """Prompts answered by the old and the new policy, for the length gate and for people to read."""
    num_shown_samples: Int = Field(default=6, ge=1)
    """Of these, shown side by side in the report."""
    max_new_tokens: Int = Field(default=0, ge=0)
    """Of an answer; 0: as many as generation.max_new_tokens. Fewer take less time, and the length gate sees no growth
    beyond them."""
    max_length_growth: float = Field(default=0.5, gt=0)
    """The new policy is refused when its mean answer is longer by more than this share."""
    max_accuracy_drop: float = Field(default=0.05, ge=0, le=1)
    """The new policy is refused when its held-out implicit-reward accuracy falls by more than this."""
    tokens_per_batch: Int = Field(default=16384, ge=64, json_schema_extra=OPERATIONAL)


class LaunchConfig(Settings):
    """Where training runs. Decides no result: the global batch is fixed by `training`.

    Everything after `processes_per_node` is for pods on a cluster and read by backend `pytorchjob` alone.
    """

    backend: Literal["torchrun", "pytorchjob"] = "torchrun"
    """`torchrun` starts the processes on this machine, `pytorchjob` in pods of a cluster with the training operator."""
    num_nodes: Int = Field(default=1, ge=1)
    """Pods. One with all GPUs of a machine needs no gang scheduling and no network between pods."""
    processes_per_node: Int = Field(default=1, ge=1)
    """GPUs of a node, or CPU processes."""

    image: str = ""
    namespace: str = ""
    """Empty: where the launcher's own pod is. In another one the job cannot be owned by the run that starts it."""
    service_account: str = ""
    """Of the training pods: they need S3 and no right on the Kubernetes API."""
    gpu_resource: str = "nvidia.com/gpu"
    """Asked for once for each process; empty: no GPU."""
    cpu: OptionalQuantity = ""
    """Request of a pod, such as "90"; empty: none."""
    memory: OptionalQuantity = ""
    """Request and limit of a pod, such as "1000Gi"; shared memory in use counts. Empty: none."""
    shm_size: OptionalQuantity = ""
    """Size of /dev/shm in memory, such as "64Gi"; empty: the container runtime's own (64 MB with most)."""
    model_cache_claim: str = ""
    """Volume claim to keep models on; empty: each pod downloads its own."""
    run_as_user: Int = Field(default=10001, ge=0)
    """User and group of the processes. 0 leaves the choice to the cluster (OpenShift); root is refused either way."""
    env: dict[str, str] = Field(default_factory=dict)
    """More environment variables of the pods, such as NCCL_SOCKET_IFNAME; they win over the built-in ones."""
    labels: Labels = Field(default_factory=dict)
    """More labels of the pods, such as a cost centre; the suite's own win."""
    annotations: Annotations = Field(default_factory=dict)
    credentials_secret: str = ""
    """Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; empty: the service account gives access."""
    image_pull_secrets: list[str] = Field(default_factory=list)
    node_selector: Labels = Field(default_factory=dict)
    tolerations: Tolerations = Field(default_factory=list)
    queue_name: str = ""
    """Kueue's LocalQueue: the job is created suspended and starts when Kueue admits it. Empty: no queue."""
    priority_class: str = ""

    restart_policy: Literal["OnFailure", "ExitCode", "Never"] = "OnFailure"
    """`OnFailure` restarts a failed pod up to backoff_limit times; it resumes from its checkpoint. `ExitCode` restarts
    after a signal or eviction only, without limit but the deadline; `Never` leaves retries to the pipeline. What the
    training knows to fail again (pairs, settings, a loss that is not finite) is not tried again in the same run."""
    backoff_limit: Int = Field(default=3, ge=0)
    pending_deadline_seconds: Int = Field(default=1800, ge=1)
    """A job whose pods have not all started by then is deleted, with the reason. Time in Kueue's queue is not
    counted: on a cluster cluster.queue_timeout bounds it."""
    active_deadline_seconds: Int = Field(default=172_800, ge=1)
    """A job that has trained for so long is deleted; waiting for pods is not counted. The operator counts that too and
    is given pending_deadline_seconds more: it ends a job that no launcher follows."""
    ttl_seconds_after_finished: Int = Field(default=86_400, ge=0)
    """The finished job stays for so long; its pods' logs can be read meanwhile."""
    clean_pod_policy: Literal["Running", "All", "None"] = "Running"
    """Which pods the operator deletes when the job ends."""
    on_cancel: Literal["delete", "leave"] = "delete"
    """What becomes of the job when the launcher is told to stop. A launcher that is evicted always leaves it."""


def derive_seed(*parts: str | int) -> int:
    """Return a stable 31-bit seed for a purpose, such as (run seed, iteration, "pair").

    hashlib and not `hash`: Python salts the latter per process.
    """
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def finite_or_none(value: float | None) -> float | None:
    """Return None for a missing or non-finite number: JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None
