"""Changes of settings that may make a stage fit, the smallest first. fit.py tries them on the plan.

None changes results: another model, length, rank of adapters or reference is the user's to choose.
"""

from collections.abc import Iterator, Sequence
from itertools import chain, combinations, product

from dice_core.generation.settings import EngineConfig
from dice_core.preferences.settings import ScoringConfig
from pipelines.cluster.pools import NODE_KINDS
from pipelines.planning.memory import GIB
from pipelines.presets import Preset

Change = Sequence[str]
"""Assignments that are made together."""

OTHERWISE = {
    "states": ", a lower training.max_length, or adapters (training.lora_rank)",
    "the reference": ", or training.reference=start",
    "vLLM": ", or lower generation.max_new_tokens and max_concurrent_sequences",
    "the judge": ", or a lower judging.max_length",
}
"""After "take a smaller model", by what lacks memory: what helps where nothing does that leaves results as they are."""
OF_NODE = 0.95
"""Of a node's memory: the most that a pod may ask for."""
_POOLS = [[f"pool={name}"] for name in NODE_KINDS]
_NODES = [[f"launch.num_nodes={number}"] for number in (2, 4, 8)]
_TRAINING = [
    ["training.deepspeed=zero3"],
    ["training.gradient_checkpointing=true"],
    ["training.per_device_batch_size=1"],
    ["training.offload_optimizer=cpu"],
    ["training.deepspeed=zero3", "training.offload_optimizer=cpu"],
    ["training.gradient_checkpointing=true", "training.deepspeed=zero3"],
    ["training.gradient_checkpointing=true", "training.deepspeed=zero3", "training.offload_optimizer=cpu"],
]


def of_training() -> Iterator[Change]:
    """Yield changes for the states and activations of training: settings, more nodes, larger ones, then several."""
    yield from _joined(_TRAINING, _NODES, _POOLS)


def of_engine(section: str) -> Iterator[Change]:
    """Yield changes for vLLM: more of the card, more cards, larger ones, then several of these."""
    share = [[f"{section}.gpu_memory_utilization={EngineConfig().gpu_memory_utilization}"]]
    yield from _joined(share, _gpus(section), _POOLS)


def of_log_probs(section: str) -> Iterator[Change]:
    """Yield changes for scoring and evaluation: smaller batches, more cards (vLLM's), larger ones, then several."""
    usual = ScoringConfig().tokens_per_batch
    batches = [[f"{section}.tokens_per_batch={number}"] for number in (usual, usual // 4)]
    yield from _joined(batches, _gpus("generation"), _POOLS)


def of_reference() -> Iterator[Change]:
    """Yield changes for a reference that each process of training holds whole."""
    yield from _POOLS


def of_pod(setting: str, needed: float, preset: Preset, *, is_training: bool) -> Iterator[Change]:
    """Yield changes for a pod that lacks memory: a larger request where a node has it, more nodes, larger ones.

    Args:
        setting: of section `cluster`, the request.
        needed: bytes.
        preset: names the nodes' kind.
        is_training: the work may be shared by several pods.
    """
    gib = -(-int(needed * 1.1) // GIB)
    node = NODE_KINDS.get(preset.pool)
    if node is None or gib <= node.memory_gib * OF_NODE:
        yield [f"cluster.{setting}={gib}Gi"]
    if node and is_training:
        most = f"cluster.{setting}={int(node.memory_gib * OF_NODE)}Gi"
        yield from ([*nodes, most] for nodes in _NODES)
    for name, other in NODE_KINDS.items():
        if gib <= other.memory_gib * OF_NODE:
            yield [f"pool={name}", f"cluster.{setting}={gib}Gi"]


def _gpus(section: str) -> list[list[str]]:
    return [[f"{section}.tensor_parallel_size={number}"] for number in (2, 4, 8)]


def _joined(*kinds: Sequence[Change]) -> Iterator[Change]:
    """Yield changes of one kind, then those of two kinds together, and so on."""
    for number in range(1, len(kinds) + 1):
        for chosen in combinations(kinds, number):
            yield from (list(chain.from_iterable(changes)) for changes in product(*chosen))
