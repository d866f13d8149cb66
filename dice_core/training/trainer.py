"""transformers.Trainer for DPO without a reference model: reference log-probs are numbers known before step 0.

Every forward goes through PairScorer, the module that DDP or DeepSpeed wraps. `trained_model.py` saves the finished
model, and `checkpoints.py` keeps the checkpoints.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, load_model
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import TrainOutput

from dice_core.logprobs.forward import PromptGroup, packed_token_logps
from dice_core.logprobs.packing import fill_to
from dice_core.progress import log
from dice_core.training import loss as dpo
from dice_core.training import ranks
from dice_core.training.activations import keep_fewer_activations
from dice_core.training.adapters import trained_parameters
from dice_core.training.batches import TrainingPair, TrainingPairs, measured_pairs, packed_rows, step_order
from dice_core.training.checkpoints import CheckpointStore
from dice_core.training.settings import TrainingConfig
from dice_core.training.staging import load_state
from dice_core.training.throughput import Speedometer

REFERENCE_FILE, WEIGHTS_FILE = "reference_logps.npy", "policy.safetensors"
START_PREFIX = "start_"

LogpsTable = npt.NDArray[np.float64]


class NonFiniteError(RuntimeError):
    """The loss or the gradient is not a number any more. One line: the step, the pairs."""


class PairScorer(nn.Module):
    """The policy as a function of pairs: what DDP and DeepSpeed wrap, so that their hooks see every forward."""

    def __init__(self, policy: PreTrainedModel, gradient_checkpointing: bool = False) -> None:
        """Take a policy whose dropout is off."""
        super().__init__()
        self.policy = policy
        self.config = policy.config
        if gradient_checkpointing:
            policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            recognised = keep_fewer_activations(policy)
            if ranks.rank() == 0:
                log(f"train: {recognised}")

    def forward(self, pairs: Sequence[TrainingPair]) -> Tensor:
        """Return summed response log-probs in nats, chosen first. Shape: (pairs, 2), float64."""
        groups = [
            PromptGroup(
                pair.prompt_token_ids.tolist(), [pair.chosen_token_ids.tolist(), pair.rejected_token_ids.tolist()]
            )
            for pair in pairs
        ]
        token_logps = packed_token_logps(self.policy, groups)  # for each pair and response: (response tokens,)
        return torch.stack([torch.stack([logps.double().sum() for logps in group]) for group in token_logps])


class _Rows(Dataset[list[TrainingPair]]):
    """The micro-batches of a run in order, each one packed row of pairs."""

    def __init__(self, rows: list[list[TrainingPair]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> list[TrainingPair]:
        return self._rows[index]


def _collate(rows: list[list[TrainingPair]]) -> dict[str, list[TrainingPair]]:
    return {"pairs": [pair for row in rows for pair in row]}


class DPOTrainer(Trainer):
    """Trains a policy on pairs. `train()` fills in missing reference log-probs first."""

    def __init__(
        self,
        policy: PreTrainedModel,
        pairs: TrainingPairs,
        config: TrainingConfig,
        arguments: TrainingArguments,
        store: CheckpointStore,
        *,
        section: str = "training",
        callbacks: list[TrainerCallback] | None = None,
        on_reference_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Take a policy with float32 weights and dropout off, the pairs, and where checkpoints go.

        Args:
            policy: on the CPU or a device.
            pairs: both splits.
            config: of DPO.
            arguments: of transformers, made from the same settings.
            store: takes what a checkpoint holds.
            section: what a person calls these settings.
            callbacks: beside those for measuring.
            on_reference_progress: called with (pairs done, all pairs) while reference log-probs are computed.
        """
        self._section, self._store = section, store
        self.pairs, self.dpo_config, self.reference_logps = pairs, config, pairs.reference_logps.copy()
        self._on_reference_progress = on_reference_progress
        self._resume_folder: Path | None = None
        self._totals: dict[str, Any] = {}
        self._num_counted = 0
        self._step0 = torch.zeros(3, dtype=torch.float64)
        self.speed = Speedometer()
        lengths = [pair.num_tokens for pair in pairs.train]
        order = step_order(lengths, config.global_batch_size, config.max_steps, arguments.seed)
        self._rows_per_step = arguments.world_size * config.accumulation_steps(arguments.world_size)
        rows = packed_rows(order, lengths, config.global_batch_size, self._rows_per_step)
        self.measured = measured_pairs(pairs.train, len(order))
        self._used = {pairs.train[i].index for i in order} | {pair.index for pair in [*self.measured, *pairs.eval]}
        # What training holds with gradients, a pass without them can hold too.
        self._row_tokens = max(sum(lengths[i] for i in row) for row in rows)
        self._filled: set[int] = set()
        self._train_rows = _Rows([[pairs.train[i] for i in row] for row in rows])
        self.policy, self.scorer = policy, PairScorer(policy, config.gradient_checkpointing)
        if self._trains_adapters:
            self.scorer.register_state_dict_post_hook(_leave_out_frozen)  # type: ignore[no-untyped-call]
        super().__init__(
            model=self.scorer,
            args=arguments,
            data_collator=_collate,
            train_dataset=self._train_rows,
            eval_dataset=_Rows([pairs.eval]) if pairs.eval else None,
            callbacks=[_MeasureBefore(self), self.speed, *(callbacks or [])],
        )
        # Speedometer's lines are made for people.
        self.remove_callback(PrinterCallback)
        # compute_loss returns the mean of a micro-batch: the Trainer divides it by the number of micro-batches.
        self.loss_is_scaled_for_ga = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return a micro-batch's share of the step's mean loss, times the micro-batches, and count its metrics.

        Rows hold different numbers of pairs: the mean over the rows of a step is the mean over its pairs.

        Raises:
            NonFiniteError: a pair's loss is not finite.
        """
        pairs: list[TrainingPair] = inputs["pairs"]
        logps: Tensor = model(pairs)  # (pairs, 2)
        losses, metrics = self._pair_losses(pairs, logps)
        if not torch.isfinite(losses).all():
            names = ", ".join(
                pair.prompt_id for pair, loss in zip(pairs, losses.tolist(), strict=True) if not math.isfinite(loss)
            )
            raise NonFiniteError(
                f"stopped at step {self.state.global_step + 1}: the loss is not finite for the pairs of prompts "
                f"{names}; look at these pairs, {self._advice}"
            )
        self._count(pairs, logps.detach(), losses.detach(), metrics)
        share: Tensor = losses.sum() * self._rows_per_step / self.dpo_config.global_batch_size  # ()
        return share.float()

    def _pair_losses(self, pairs: Sequence[TrainingPair], logps: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and the metrics of each pair. logps: (pairs, 2); both results: (pairs,)."""
        config = self.dpo_config
        reference = self._references(pairs).to(logps.device)  # (pairs, 2)
        lengths = [[len(pair.chosen_token_ids), len(pair.rejected_token_ids)] for pair in pairs]
        num_tokens = logps.new_tensor(lengths)  # (pairs, 2)
        losses, chosen_rewards, rejected_rewards = dpo.dpo_loss(
            *logps.unbind(1),
            *reference.unbind(1),
            beta=config.beta,
            loss=config.loss,
            label_smoothing=config.label_smoothing,
            num_chosen_tokens=num_tokens[:, 0],
            num_rejected_tokens=num_tokens[:, 1],
        )
        metrics = dpo.pair_metrics(chosen_rewards, rejected_rewards, *logps.unbind(1))
        if config.sft_weight:
            nll = dpo.chosen_nll(logps[:, 0], num_tokens[:, 0])  # (pairs,)
            losses = losses + config.sft_weight * nll
            metrics["nll_loss"] = nll.detach()
        return losses, metrics

    def _references(self, pairs: Sequence[TrainingPair]) -> Tensor:
        """Return their reference log-probs in nats, on the CPU. Shape: (pairs, 2), chosen first."""
        return torch.from_numpy(self.reference_logps[[pair.index for pair in pairs]])

    def _count(self, pairs: Sequence[TrainingPair], logps: Tensor, losses: Tensor, metrics: dict[str, Tensor]) -> None:
        for name, values in metrics.items():
            self._totals[name] = self._totals.get(name, 0) + values.sum().cpu()
        self._num_counted += len(pairs)
        self.speed.count(pairs)
        if self.state.global_step == 0:
            noise = logps.cpu() - self._references(pairs)  # (pairs, 2)
            self._step0 += torch.stack([losses.sum().cpu(), noise.square().sum(), torch.tensor(float(len(pairs)))])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means over all pairs since the last line, of all processes, to a line of training."""
        # Only lines of training have "loss": evaluation's are prefixed and the summary's is "train_loss".
        if "loss" in logs:
            names = sorted(self._totals)
            values = [self._totals[name] for name in names]
            sums = self._total([*values, float(self._num_counted), *self._step0])
            logs |= {name: float(sums[i] / sums[len(names)]) for i, name in enumerate(names)}
            if sums[-1]:
                logs["step0_loss"] = float(sums[-3] / sums[-1])
                if self.dpo_config.reference == "start":
                    # Of the same model, all that differs is noise.
                    logs["reference_noise_rms"] = float((sums[-2] / (2 * sums[-1])).sqrt())
            self._totals, self._num_counted = {}, 0
            self._step0.zero_()
            logs |= self.speed.since_last_line(self.policy)
        super().log(logs, start_time)

    def _total(self, values: Sequence[Any]) -> Tensor:
        return ranks.total(torch.tensor([float(value) for value in values], dtype=torch.float64).to(self.args.device))

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measure the evaluation pairs: `eval_loss`, `eval_rewards/accuracies` and so on, each pair counted once."""
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.measure(self.pairs.eval).items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure(self, pairs: Sequence[TrainingPair]) -> dict[str, float]:
        """Return the mean loss and metrics of some pairs under the weights of now."""
        return self._means(pairs, self.pair_logps(pairs))

    def _means(self, pairs: Sequence[TrainingPair], logps: LogpsTable) -> dict[str, float]:
        """Return the means over pairs. logps: (pairs, 2)."""
        losses, metrics = self._pair_losses(pairs, torch.from_numpy(logps))
        return {name: float(values.mean()) for name, values in {"loss": losses, **metrics}.items()}

    def pair_logps(
        self, pairs: Sequence[TrainingPair], on_progress: Callable[[int, int], None] | None = None
    ) -> LogpsTable:
        """Return log-probs under the weights of now, by the very module of training in rows as long as its longest.

        Every process takes a share and gets the whole. Shape: (pairs, 2), chosen first, in the order given.
        """
        rows = fill_to([pair.num_tokens for pair in pairs], self._row_tokens)
        num, share = self.args.world_size, self.args.process_index
        # ZeRO-3 collects weights in each forward, so every process must make as many: the last row is repeated.
        mine = [rows[min(start + share, len(rows) - 1)] for start in range(0, len(rows), num)]
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        found = []
        with torch.no_grad():
            for number, row in enumerate(mine, 1):
                found.append(model([pairs[k] for k in row]))  # (pairs of the row, 2)
                if on_progress:
                    on_progress(sum(map(len, rows[: number * num])), len(pairs))
        model.train(was_training)
        values = torch.cat(found).tolist() if found else []
        mine_by_pair = dict(zip(itertools.chain.from_iterable(mine), values, strict=True))
        everything = {k: logps for part in ranks.gather(mine_by_pair) for k, logps in part.items()}
        return np.array([everything[k] for k in range(len(pairs))], dtype=np.float64).reshape(len(pairs), 2)

    def fill_references(self) -> None:
        """Know the reference log-probs: the checkpoint's, those known of the pairs, or the policy's as it starts.

        What is known of the pairs comes from scoring, or from a reference of its own.
        """
        if self._resume_folder:
            self.reference_logps = np.load(self._resume_folder / REFERENCE_FILE)
            return
        if self.dpo_config.reference == "start" and self.dpo_config.reference_logps == "recompute":
            self.reference_logps[:] = np.nan
        unknown = [
            pair
            for pair in self.pairs.all
            if pair.index in self._used and not np.isfinite(self.reference_logps[pair.index]).all()
        ]
        self._filled = {pair.index for pair in unknown}
        if unknown:
            self.reference_logps[[pair.index for pair in unknown]] = self.pair_logps(
                unknown, self._on_reference_progress
            )

    def measure_start(self) -> None:
        """Measure the policy as it starts, once in a run: a line of the log, which checkpoints carry along."""
        if self.state.global_step:
            return
        # The references just filled in are what this policy gives: no pair is run twice.
        logps = self.reference_logps.copy()  # (train + eval pairs, 2)
        others = [pair for pair in self.measured if pair.index not in self._filled]
        logps[[pair.index for pair in others]] = self.pair_logps(others)
        start = self._means(self.measured, logps[[pair.index for pair in self.measured]])
        self.log({f"{START_PREFIX}{name}": value for name, value in start.items()})

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """See Trainer; the checkpoint is a folder this class saved."""
        self._resume_folder = Path(resume_from_checkpoint) if isinstance(resume_from_checkpoint, str) else None
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what a resume needs beside the optimizer's state. DeepSpeed saves its weights with its optimizer."""
        folder = Path(output_dir or self.args.output_dir or "")
        folder.mkdir(parents=True, exist_ok=True)
        if not self.args.should_save:
            return
        np.save(folder / REFERENCE_FILE, self.reference_logps)
        if not self.is_deepspeed_enabled:
            adapters = trained_parameters(self.policy, self.dpo_config) if self._trains_adapters else None
            self._store.stage_tensors(adapters or _by_first_name(self.policy.state_dict()), folder / WEIGHTS_FILE)

    @property
    def _trains_adapters(self) -> bool:
        """Whether the weights are frozen: checkpoints leave them out, for the policy's own files have them."""
        return self.dpo_config.lora_rank > 0

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled:
            # By way of checkpoint_engine.py.
            engine: Any = self.model_wrapped
            engine.save_checkpoint(output_dir, exclude_frozen_parameters=self._trains_adapters)
        elif self.args.should_save and self.optimizer:
            self._store.stage_state(self.optimizer.state_dict(), Path(output_dir) / OPTIMIZER_NAME)
        if self.args.should_save and self.lr_scheduler:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        # The Trainer has DeepSpeed ask a checkpoint for all weights, unless the model is of a class of peft's.
        loads_here = self.is_deepspeed_enabled and self._trains_adapters
        given = None if loads_here else resume_from_checkpoint
        prepared = super()._prepare_for_training(max_steps, train_dataloader, given)  # type: ignore[no-untyped-call]
        if loads_here and resume_from_checkpoint:
            deepspeed_load_checkpoint(self.model_wrapped, resume_from_checkpoint, load_module_strict=False)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None and self.optimizer and self.lr_scheduler:
            self.optimizer.load_state_dict(load_state(Path(checkpoint) / OPTIMIZER_NAME))
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        path = Path(resume_from_checkpoint) / WEIGHTS_FILE
        if not self._trains_adapters:
            load_model(self.policy, str(path))
            return
        weights = load_file(path)
        for name, parameter in trained_parameters(self.policy, self.dpo_config).items():
            parameter.data.copy_(weights[name])

    @property
    def _advice(self) -> str:
        return f"lower {self._section}.learning_rate, or try {self._section}.precision 'float32'"

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Any]:
        return SequentialSampler(self._train_rows)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        if norm is not None and not math.isfinite(float(norm)):
            raise NonFiniteError(
                f"stopped at step {self.state.global_step + 1}: the gradient's norm is {float(norm)}; {self._advice}"
            )
        return norm


def _leave_out_frozen(scorer: nn.Module, state: dict[str, Tensor], *_: object) -> None:
    """Take the frozen weights out of a state for a checkpoint; of tied ones DeepSpeed itself takes out one name."""
    trained = {name for name, parameter in scorer.named_parameters() if parameter.requires_grad}
    for name in state.keys() - trained:
        del state[name]


def _by_first_name(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return each tensor once, where modules share one: safetensors keeps no second name."""
    names: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in state.items():
        names.setdefault((tensor.data_ptr(), tensor.shape), name)
    return {name: state[name] for name in names.values()}


class _MeasureBefore(TrainerCallback):
    """Runs after the model is wrapped and before the first step: its passes use training's own kernels."""

    def __init__(self, trainer: DPOTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._trainer.fill_references()
        self._trainer.measure_start()
