"""How much memory each stage takes, part by part, in bytes. Pure arithmetic; the formulas stand in docs/planning.md.

Sources: the bytes a parameter of mixed-precision Adam and its sharding are ZeRO's (arXiv 1910.02054, section 3), the
sizes of buffers DeepSpeed's defaults (runtime/zero/config.py) and ours (training/arguments.py), chunks of logits those
of logprobs/output_head.py, and what vLLM takes is its gpu_memory_utilization. What is assumed is named so.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from dice_core.generation.settings import EngineConfig
from dice_core.settings.base import DType
from dice_core.training.settings import TrainingConfig
from pipelines.planning.shapes import ModelShape

GIB = 2**30
BYTES: Mapping[DType, int] = {"float32": 4, "bfloat16": 2}

LOGITS_BYTES = {"cpu": 4 * 2**23, "gpu": 4 * 2**27}
"""A chunk of float32 logits (output_head.py; a test compares)."""
GPU_LIBRARIES = 2 * GIB
"""CUDA's context, NCCL's buffers and what the allocator cannot use. Assumed."""
GPU_FORWARD_BYTES = 2.5 * GIB
"""CUDA's context (1 GiB, assumed), two chunks of logits, and what kernels take (1.5 GiB, models/placement.py)."""
CPU_LIBRARIES = 0.92e9
"""Python, torch, transformers and what a stage loads beside them. Measured: prepare-data, which computes nothing."""
ENGINE_LIBRARIES = {"cpu": 1.2e9, "gpu": 2 * GIB}
"""vLLM beside weights and cache; on a GPU with CUDA graphs. CPU: measured by the benchmark of generation (2.83 GB, of
which 0.54 are float32 weights and 1.07 the cache); GPU: assumed."""
_LIVE, _BUCKET, _SUB_GROUP = 10**9, 5 * 10**8, 10**9
"""DeepSpeed's stage3_max_live_parameters, reduce_bucket_size and sub_group_size, in parameters."""


@dataclass(frozen=True)
class Memory:
    """What a process takes of a GPU, or of the host where it computes on a CPU, by part, in bytes."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    cache: float = 0.0
    """Keys and values, in vLLM."""
    working: float = 0.0
    """Libraries, buffers, chunks of logits."""

    @property
    def total(self) -> float:
        """Return the sum of the parts."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Return the parts by name."""
        return dict(vars(self))


def layer_values(shape: ModelShape, *, recomputes_elementwise: bool) -> int:
    """Return the values a layer keeps for backward, a token.

    Inputs of both norms and their outputs, queries, keys and values before and after rotation, what attention gives,
    and the two inner products of the MLP: activations.py makes the rest again. Without it, the normalised inputs in
    float32, the activation and its product are kept too.
    """
    queries, keys = shape.num_heads * shape.head_size, shape.num_kv_heads * shape.head_size
    kept = 4 * shape.hidden_size + (queries + 2 * keys) + (queries + keys) + queries + 2 * shape.intermediate_size
    return kept if recomputes_elementwise else kept + 4 * shape.hidden_size + 2 * shape.intermediate_size


def activation_bytes(shape: ModelShape, config: TrainingConfig, row_tokens: float) -> float:
    """Return what forward keeps for backward of one row.

    With gradient checkpointing: the input of each layer, and one layer whole while it is computed again.
    """
    size = 2 if config.precision == "bf16" else 4
    if config.gradient_checkpointing:
        one = layer_values(shape, recomputes_elementwise=False)
        return row_tokens * size * (shape.num_layers * shape.hidden_size + one)
    return row_tokens * size * shape.num_layers * layer_values(shape, recomputes_elementwise=True)


def head_bytes(shape: ModelShape, device: str, *, trains: bool) -> float:
    """Return what the output head takes beside its weights: two chunks of logits.

    With gradients a third one of half the size, and the gradient of its weights, in float32 and in the weights' dtype.
    """
    chunks = LOGITS_BYTES[device] * (2.5 if trains else 2)
    return chunks + (shape.num_embedding * 6 if trains else 0)


def num_trained(shape: ModelShape, config: TrainingConfig) -> int:
    """Return how many parameters are trained: all, or those of adapters of rank lora_rank on the layers' products."""
    if not config.lora_rank:
        return shape.num_parameters
    hidden, queries = shape.hidden_size, shape.num_heads * shape.head_size
    keys, inner = shape.num_kv_heads * shape.head_size, shape.intermediate_size
    sums = {"q_proj": hidden + queries, "k_proj": hidden + keys, "v_proj": hidden + keys, "o_proj": queries + hidden}
    sums |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), hidden + inner)
    # Of a layer by another name the largest product is counted.
    chosen = [sums.get(name, hidden + inner) for name in config.lora_target_modules or sums]
    return shape.num_layers * config.lora_rank * sum(chosen)


def training_memory(
    shape: ModelShape, config: TrainingConfig, num_ranks: int, row_tokens: float, device: str = "gpu"
) -> Memory:
    """Return what one process of training takes.

    Args:
        shape: of the policy.
        config: of training.
        num_ranks: processes, over which ZeRO shards: exactly, an equal share each.
        row_tokens: of the largest packed row.
        device: `gpu`, or `cpu`.
    """
    size, trained, is_full = 2 if config.precision == "bf16" else 4, num_trained(shape, config), not config.lora_rank
    libraries = GPU_LIBRARIES if device == "gpu" else CPU_LIBRARIES
    head = head_bytes(shape, device, trains=is_full)
    working, activations = libraries + head, activation_bytes(shape, config, row_tokens)
    frozen = 0.0 if is_full else frozen_bytes(shape, config)
    if config.deepspeed == "none":
        # float32 weights, gradients and two moments in each process; autocast keeps bfloat16 copies of the weights.
        copies = 2 * trained if config.precision == "bf16" else 0
        average = 4 * trained if config.ema_decay else 0
        return Memory(frozen + 4 * trained, 4 * trained, 8 * trained + average, activations, 0, working + copies)
    shard = trained / num_ranks
    # The float32 weight and two moments: 12 bytes, sharded in both stages, as gradients are.
    if config.deepspeed == "zero2":
        buckets = 2 * size * min(_BUCKET, trained)
        return Memory(frozen + size * trained, size * shard, 12 * shard, activations, 0, working + buckets)
    weights = frozen / num_ranks + size * shard
    gathered = size * (min(_LIVE, shape.num_parameters) + min(_BUCKET, trained))
    if config.offload_optimizer == "cpu":
        return Memory(weights, 0, 0, activations, 0, working + gathered)
    # The update takes float32 gradients of a group of parameters, when activations and gathered layers are gone.
    update = 4 * min(_SUB_GROUP, shard)
    working += max(gathered, update - activations - head)
    return Memory(weights, size * shard, 12 * shard, activations, 0, working)


def frozen_bytes(shape: ModelShape, config: TrainingConfig) -> float:
    """Return the bytes of weights that adapters stand beside: bfloat16 in mixed precision, the layers in 4 bits each.

    nf4 keeps a float32 scale for 64 weights: 0.5625 bytes a weight.
    """
    size = 2 if config.precision == "bf16" else 4
    if config.quantize_base == "none":
        return size * shape.num_parameters
    return 0.5625 * shape.num_layer_weights + size * (shape.num_parameters - shape.num_layer_weights)


def reference_memory(shape: ModelShape, config: TrainingConfig, row_tokens: float, device: str = "gpu") -> Memory:
    """Return what the pass under a reference of its own takes before training: the whole model in each process."""
    dtype: DType = "bfloat16" if config.precision == "bf16" else "float32"
    return logprobs_memory(shape, dtype, row_tokens, device)


def scoring_memory(
    shape: ModelShape, dtype: DType, tokens: float, device: str = "gpu", *, num_gpus: int = 1, device_bytes: float = 0.0
) -> Memory:
    """Return what scoring takes of each of its GPUs, on the average of them.

    Both models are there if they fit together, and take turns if not (models/placement.py; on a CPU both stay).

    Args:
        shape: of the policy, and of the reference.
        dtype: of the weights.
        tokens: of one forward.
        device: `gpu`, or `cpu`.
        num_gpus: of the task, over which a model is spread that none has room for.
        device_bytes: of a GPU.
    """
    one = logprobs_memory(shape, dtype, tokens, device, num_gpus=num_gpus)
    both = joined(one, Memory(weights=one.weights))
    return both if device == "cpu" or both.total <= device_bytes else one


def logprobs_memory(
    shape: ModelShape, dtype: DType, tokens: float, device: str = "gpu", *, num_gpus: int = 1
) -> Memory:
    """Return what log-probs without gradients take: one model, and the tensors of one layer.

    On GPUs as models/placement.py counts before it spreads a model (a test compares): ten tensors of the hidden size
    and four of the intermediate one, and a half more.
    """
    size = BYTES[dtype]
    weights = size * shape.num_parameters / num_gpus
    if device == "gpu":
        activations = tokens * (16 * shape.hidden_size + 6 * shape.intermediate_size) * size
        return Memory(weights, activations=activations, working=GPU_FORWARD_BYTES)
    activations = tokens * size * layer_values(shape, recomputes_elementwise=False)
    return Memory(weights, activations=activations, working=CPU_LIBRARIES + head_bytes(shape, device, trains=False))


def engine_memory(
    shape: ModelShape, config: EngineConfig, num_tokens: int, device: str = "gpu", *, device_bytes: float = 0.0
) -> Memory:
    """Return what vLLM takes of each of the GPUs that share a model.

    Its cache is what gpu_memory_utilization leaves; on a CPU cpu_kv_cache_gib. A cache that cannot hold the longest
    request is refused by vLLM: `cache` is then what that request needs, so that the total tells what is lacking.

    Args:
        shape: of the model.
        config: dtype, GPUs and memory.
        num_tokens: of the longest prompt and response together.
        device: `gpu`, or `cpu`.
        device_bytes: of the GPU.
    """
    size, num_gpus = BYTES[config.dtype], config.tensor_parallel_size
    weights = size * shape.num_parameters / num_gpus
    sequences, batched = engine_limits(config, device_bytes) if device == "gpu" else (64, 1024)
    activations = batched * size * layer_values(shape, recomputes_elementwise=False) / num_gpus
    working = ENGINE_LIBRARIES[device] + 2 * 4 * sequences * shape.vocab_size
    least = shape.kv_bytes_per_token(size, num_gpus) * num_tokens
    left = config.gpu_memory_utilization * device_bytes - weights - activations - working
    cache = max(left, least) if device == "gpu" else config.cpu_kv_cache_gib * GIB
    return Memory(weights, activations=activations, cache=cache, working=working)


def engine_limits(config: EngineConfig, device_bytes: float) -> tuple[int, int]:
    """Return the sequences that vLLM runs at a time and the tokens of one of its batches.

    Its defaults for class LLM (vllm/engine/arg_utils.py): larger from 70 GiB on, but not on an A100, whose name is not
    known here: of a card of 80 GiB the larger ones are counted, which take more memory.
    """
    sequences, batched = (1024, 16_384) if device_bytes >= 70 * GIB else (256, 8192)
    return config.max_concurrent_sequences or sequences, batched


def loading_host_bytes(shape: ModelShape, config: TrainingConfig, num_nodes: int, processes_per_node: int) -> float:
    """Return what a training pod holds while it reads the model, where it computes on GPUs.

    Each process holds the whole float32 model on its way to the GPU, unless ZeRO-3 cuts it up while it is read; in
    bfloat16 where that is frozen.
    training/host_memory.py has what a pod holds later.
    """
    whole = (2.0 if config.lora_rank and config.precision == "bf16" else 4.0) * shape.num_parameters
    read = whole / num_nodes if config.deepspeed == "zero3" else whole * processes_per_node
    return processes_per_node * 4 * GIB + read


def scoring_host_bytes(shape: ModelShape, dtype: DType) -> float:
    """Return what a task that scores takes of its host's memory beside a GPU: both models are read there first."""
    return 4 * GIB + 2.0 * BYTES[dtype] * shape.num_parameters


def joined(one: Memory, other: Memory) -> Memory:
    """Return what one process takes that does both and gives nothing back."""
    return Memory(**{name: value + other.parts()[name] for name, value in one.parts().items()})
