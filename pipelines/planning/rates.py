"""How fast things go, with where each figure is from. No GPU has run this suite yet: figures of GPUs are cited.

A figure is a range: the low bound is what a careless reading of the sources would call too slow, so that the truth
lies between. On CPUs the speed of this machine is measured when a plan is made (pipelines/demo/precision.py).
"""

from dataclasses import dataclass
from typing import Literal

from pipelines.planning.ranges import Range


@dataclass(frozen=True)
class Rate:
    """A figure and its source."""

    what: str
    value: Range
    unit: str
    kind: Literal["cited", "measured", "assumed"]
    source: str


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet: dense bfloat16 operations and bytes of memory traffic a second, and training's MFU."""

    operations: float
    bandwidth: float
    utilization: Rate


_FOUNDRY = "mosaicml/llm-foundry, scripts/train/benchmarking/README.md (7B to 70B, full shard)"
_HANDBOOK = "alignment-handbook/zephyr-7b-dpo-full, train_results.json: 61,135 pairs in 5,328 s on 8 cards"

A100_UTILIZATION = Rate("training MFU, A100", Range(0.20, 0.50), "of 312 TFLOP/s", "cited", f"{_FOUNDRY}; {_HANDBOOK}")
H100_UTILIZATION = Rate("training MFU, H100", Range(0.15, 0.42), "of 989 TFLOP/s", "cited", _FOUNDRY)

CARDS = {
    ("A100", 40): Card(312e12, 1.555e12, A100_UTILIZATION),
    ("A100", 80): Card(312e12, 2.039e12, A100_UTILIZATION),
    ("H100", 80): Card(989e12, 3.35e12, H100_UTILIZATION),
}
"""By name and GiB (pipelines/cluster/pools.py). NVIDIA's data sheets, SXM versions."""

FORWARD_UTILIZATION = Rate(
    "scoring, of the card's operations",
    Range(0.25, 0.60),
    "share",
    "assumed",
    "a forward alone: from training's low bound to what large matrix products reach",
)
DECODING = Rate(
    "vLLM, of the bandwidth that weights and cache take to read",
    Range(0.15, 0.50),
    "share",
    "cited",
    "morphllm.com/vllm-benchmarks: 7B on an A100 3,363 tokens/s (0.15), Llama 3.1 8B on an H100 12,500 (0.5)",
)
STORAGE = Rate("S3, a pod", Range(0.2e9, 1.0e9), "bytes/s", "assumed", "a node of 100 Gbit/s has more, a policy less")
POD_START = Rate("start of a pod", Range(20, 300), "s", "assumed", "the high bound pulls the image")
IMPORTS = Rate("imports of Python", Range(15, 40), "s", "assumed", "torch, transformers and DeepSpeed from a cold disk")
ENGINE_START = Rate("start of vLLM", Range(60, 240), "s", "assumed", "weights, compilation, CUDA graphs of 7B to 70B")
COMPILATION = Rate("compiling attention", Range(30, 120), "s", "assumed", "FlexAttention, forward and backward")
LOADING = Rate("loading or saving a model's weights", Range(10, 120), "s", "assumed", "7B from memory, 70B from a disk")
UPDATE_IN_MEMORY = Rate(
    "an offloaded update, of a node's memory",
    Range(50e9, 300e9),
    "bytes/s",
    "assumed",
    "a tenth to a half of what two sockets with DDR5-4800 have (614e9): torch's AdamW in 8 processes",
)
GPU_RATES = (
    DECODING,
    FORWARD_UTILIZATION,
    STORAGE,
    POD_START,
    IMPORTS,
    LOADING,
    ENGINE_START,
    COMPILATION,
    UPDATE_IN_MEMORY,
)

REFERENCE_IMPORT_SECONDS = 5.2
"""What the import of torch and transformers took of the processor where the times below were measured (AMD EPYC, 2
cores): on another machine they are as many times as long as that import."""


def _share(what: str, low: float, high: float, kind: str) -> Rate:
    source = 'make bench BENCH="--stage plan", by the processor\'s time'
    return Rate(f"{what}, {kind}", Range(low, high), "of the machine's matrix products", "measured", source)


CPU_FORWARD = {
    "bfloat16": _share("scoring", 0.50, 0.65, "bfloat16"),
    "float32": _share("scoring", 0.68, 0.90, "float32"),
}
CPU_TRAINING = {
    "bfloat16": _share("training", 0.30, 0.42, "bfloat16"),
    "float32": _share("training", 0.60, 0.85, "float32"),
}
CPU_DECODING = {
    "bfloat16": _share("vLLM", 0.30, 0.48, "bfloat16"),
    "float32": _share("vLLM", 0.80, 1.10, "float32"),
}
_LOGS = "read from the demo's logs on that machine"
CPU_STORAGE = Rate("S3 here", Range(150e6, 400e6), "bytes/s", "measured", 'make bench BENCH="--stage storage"')
CPU_IMPORTING = Rate(
    "importing a GGUF file",
    Range(22e6, 30e6),
    "bytes/s",
    "measured",
    "dice import-model of the demo's: 23 s of processor",
)
CPU_START = Rate("start of a task", Range(1, 2), "s", "measured", _LOGS)
CPU_IMPORTS = Rate("imports of Python", Range(3.5, 5.2), "s", "measured", "torch and transformers, in a fresh process")
CPU_MODEL_START = Rate("loading a model", Range(1, 3), "s", "measured", _LOGS)
CPU_TRAINING_START = Rate("a training's processes and its model", Range(8, 14), "s", "measured", _LOGS)
CPU_ENGINE_START = Rate(
    "start of vLLM", Range(4, 9), "s", "measured", "5 s in the benchmark of plans, 4 s a second time"
)
CPU_TIMES = (
    CPU_STORAGE,
    CPU_IMPORTING,
    CPU_START,
    CPU_IMPORTS,
    CPU_MODEL_START,
    CPU_TRAINING_START,
    CPU_ENGINE_START,
)
