"""Training: ours and TRL's DPOTrainer on the same pairs in the same order, the same pairs a step, all in float32.

A step is four pairs: in one batch on both sides, or in four micro-batches of one on both sides, for less memory.

Half of the pairs come with reference log-probs, as from scoring, and half without, as replayed ones: ours fills these
in within the time measured. TRL 1.16 runs a reference model beside the policy, or all pairs through it beforehand.
"""

import contextlib
import importlib.util
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from tests.benchmarks.measure import Comparison, Timed, Values, stopwatch
from tests.benchmarks.work import CACHE, Work

if TYPE_CHECKING:
    from dice_core.training.batches import TrainingPairs
    from dice_core.training.settings import TrainingConfig

TOLERANCE = 1e-3
SEED = 11
# Where `make bench` puts what only benchmarks need: TRL is in no lock of the project.
PACKAGES = CACHE / "packages"
HOW_TO_INSTALL = (
    "TRL 1.16 is not there: `make bench` installs it, or "
    "`uv pip install --no-deps --target .cache/benchmarks/packages -r tests/benchmarks/requirements.txt`"
)


def _config(work: Work, num_pairs: int, micro_batch: int, lora_rank: int = 0) -> "TrainingConfig":
    from dice_core.training.settings import TrainingConfig

    size = work.size
    return TrainingConfig(
        max_steps=num_pairs // size.batch_size,
        global_batch_size=size.batch_size,
        per_device_batch_size=micro_batch or size.batch_size,
        # Large enough that the losses of the second and later steps tell whether the first steps were the same.
        learning_rate=1e-5,
        precision="float32",
        saved_dtype="float32",
        gradient_checkpointing=False,
        lora_rank=lora_rank,
    )


def _pairs(work: Work, config: "TrainingConfig", num_pairs: int) -> "TrainingPairs":
    from dice_core.training.batches import read_pairs

    return read_pairs(work.pairs().slice(0, num_pairs), config.max_length, "benchmark")


def known_logps(folder: Path) -> Timed:
    """Score the generated half of the pairs with the policy: the reference log-probs that scoring hands to training."""
    from dice_core.logprobs.forward import PromptGroup, group_logps
    from dice_core.models.loading import load_model
    from dice_core.preferences.settings import ScoringConfig

    work = Work(folder)
    rows = work.pairs().to_pylist()
    groups = [
        PromptGroup(row["prompt_token_ids"], [row["chosen_token_ids"], row["rejected_token_ids"]])
        for row in rows
        if row["source"] == "generated"
    ]
    model = load_model(work.policy, "float32")
    with stopwatch() as watch:
        logps = group_logps(model, groups, tokens_per_batch=ScoringConfig().tokens_per_batch)
    return Timed.of(watch, {"logps": logps})


def fill_known(folder: Path, logps: Sequence[Sequence[float]]) -> None:
    """Write log-probs of `known_logps` into the pairs of the work."""
    from dice_core.data.records import PAIRS, write_table

    rows, known = Work(folder).pairs().to_pylist(), iter(logps)
    for row in rows:
        if row["source"] == "generated":
            row["chosen_reference_logps"], row["rejected_reference_logps"] = next(known)
    write_table(pa.Table.from_pylist(rows, schema=PAIRS), PAIRS, folder / "pairs.parquet")


def ours(folder: Path, num_pairs: str = "") -> Timed:
    """Train with DPOTrainer, the reference pass of replayed pairs and the measure of the start included."""
    return _ours(Work(folder), num_pairs)


def ours_accumulated(folder: Path) -> Timed:
    """Train with DPOTrainer in micro-batches of one pair."""
    return _ours(Work(folder), "", micro_batch=1)


def adapters(folder: Path) -> Timed:
    """Train adapters of rank 16 on all linear layers with DPOTrainer."""
    return _ours(Work(folder), "", lora_rank=16)


def trl(folder: Path, num_pairs: str = "") -> Timed:
    """Train with TRL, the reference model beside the policy; both loaded before."""
    return _trl(Work(folder), num_pairs)


def trl_precomputed(folder: Path) -> Timed:
    """Train with TRL, the reference log-probs of all pairs made beforehand; that pass counts."""
    return _trl(Work(folder), "", precompute=True)


def trl_accumulated(folder: Path) -> Timed:
    """Train with TRL in micro-batches of one pair, the reference model beside the policy."""
    return _trl(Work(folder), "", micro_batch=1)


def _ours(work: Work, num_pairs: str, micro_batch: int = 0, lora_rank: int = 0) -> Timed:
    from dice_core.models.loading import load_model
    from dice_core.training.adapters import load_with_adapters
    from dice_core.training.arguments import training_arguments
    from dice_core.training.checkpoint_files import CheckpointOwner
    from dice_core.training.checkpoints import CheckpointStore
    from dice_core.training.copies import Copies
    from dice_core.training.trainer import DPOTrainer

    number = int(num_pairs or work.size.num_pairs)
    config = _config(work, number, micro_batch, lora_rank)
    pairs = _pairs(work, config, number)
    if lora_rank:
        policy = load_with_adapters(work.policy, config, SEED, "training")
    else:
        policy = load_model(work.policy, "float32")
    with tempfile.TemporaryDirectory() as scratch:
        arguments = training_arguments(config, Path(scratch), has_eval_pairs=False, seed=SEED)
        owner = CheckpointOwner("benchmark", num_processes=1, num_nodes=1, deepspeed="none")
        # It stores nothing: no checkpoint is made.
        store = CheckpointStore(f"{scratch}/stored", Path(scratch), owner, Copies(Path(scratch) / "copies.lock"))
        with stopwatch() as watch:
            trainer = DPOTrainer(policy, pairs, config, arguments, store)
            trainer.train()
    return Timed.of(watch, {"losses": _losses(trainer)})


def _trl(work: Work, num_pairs: str, *, precompute: bool = False, micro_batch: int = 0) -> Timed:
    with _benchmark_packages():
        import datasets
        import trl
    from torch.utils.data import SequentialSampler

    from dice_core.models.loading import load_model, load_tokenizer
    from dice_core.training.batches import step_order

    class FixedOrderTrainer(trl.DPOTrainer):
        """TRL's trainer on pairs that are token ids already, in the order given."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    number = int(num_pairs or work.size.num_pairs)
    config = _config(work, number, micro_batch)
    pairs = _pairs(work, config, number).train
    order = step_order([p.num_tokens for p in pairs], config.global_batch_size, config.max_steps, SEED)
    names = {"prompt_ids": "prompt_token_ids", "chosen_ids": "chosen_token_ids", "rejected_ids": "rejected_token_ids"}
    rows = [{name: getattr(pairs[i], field).tolist() for name, field in names.items()} for i in order]
    policy, tokenizer = load_model(work.policy, "float32"), load_tokenizer(work.policy)
    reference = None if precompute else load_model(work.policy, "float32")
    with tempfile.TemporaryDirectory() as scratch, stopwatch() as watch:
        trainer = FixedOrderTrainer(
            policy,
            reference,
            args=_trl_arguments(config, scratch, precompute),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        trainer.train()
    return Timed.of(watch, {"losses": _losses(trainer)})


def _trl_arguments(config: "TrainingConfig", folder: str, precompute: bool) -> Any:
    import torch
    import trl

    return trl.DPOConfig(
        output_dir=folder,
        beta=config.beta,
        max_length=None,
        precompute_ref_log_probs=precompute,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.per_device_batch_size,
        gradient_accumulation_steps=config.accumulation_steps(1),
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim="adamw_torch_fused",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=SEED,
    )


def _losses(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@contextlib.contextmanager
def _benchmark_packages() -> Iterator[None]:
    """Make importable what only benchmarks need; the project's own packages come first."""
    sys.path.append(str(PACKAGES))
    try:
        yield
    finally:
        sys.path.remove(str(PACKAGES))


def is_trl_there() -> bool:
    """Return whether TRL can be imported."""
    with _benchmark_packages():
        return importlib.util.find_spec("trl") is not None


def same_losses(ours: Sequence[Values], peer: Sequence[Values]) -> str:
    """Say whether a step's loss differs by more than the tolerance."""
    mine, theirs = (np.asarray(values[0]["losses"]) for values in (ours, peer))
    if mine.shape != theirs.shape:
        return f"{len(mine)} steps against {len(theirs)}"
    farthest = float(np.abs(mine - theirs).max())
    return "" if farthest <= TOLERANCE else f"losses differ by up to {farthest:.2g}"


def same_first_loss(ours: Sequence[Values], peer: Sequence[Values]) -> str:
    """Say whether the loss before the first update differs: adapters then go another way than all weights."""
    first = [[{**values[0], "losses": values[0]["losses"][:1]}] for values in (ours, peer)]
    return same_losses(*first)


def _comparison(against: str, ours: str, peer: str, most_memory: float | None = 0.4) -> Comparison:
    return Comparison("train", against, (ours,), (peer,), "part", same_losses, least_ratio=1.7, most_memory=most_memory)


COMPARISONS = [
    _comparison("TRL 1.16 DPOTrainer, reference model; a step in one batch", "train:ours", "train:trl"),
    _comparison(
        "TRL 1.16 DPOTrainer, precomputed references, that pass counted; a step in one batch",
        "train:ours",
        "train:trl_precomputed",
    ),
    # The goal is one of a batch: weights, gradients and moments are most of what one pair takes.
    _comparison(
        "TRL 1.16 DPOTrainer, reference model; a step in four micro-batches of one",
        "train:ours_accumulated",
        "train:trl_accumulated",
        most_memory=None,
    ),
    Comparison(
        "train",
        "our training of all weights; adapters of rank 16",
        ("train:adapters",),
        ("train:ours",),
        "part",
        same_first_loss,
    ),
]
