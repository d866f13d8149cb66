"""LoRA: adapters beside a policy's frozen weights, saved on their own, and merged into the weights at the end.

An adapter makes W x into W x + lora_alpha / lora_rank * B A x. B begins at 0: the policy as it starts, DPO's reference,
is what it was. peft makes adapters and reads them. It is imported here alone, where they are trained.
"""

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from dice_core.accelerator import device_type
from dice_core.models.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ModelError, trusts_remote_code
from dice_core.models.fitting import empty_model
from dice_core.models.loading import load_config, load_model
from dice_core.models.saving import save_model
from dice_core.progress import log
from dice_core.settings.base import ConfigError, DType
from dice_core.settings.hints import allowed
from dice_core.training import ranks
from dice_core.training.batches import TrainingPair
from dice_core.training.job import TrainingJob
from dice_core.training.reference import whole_models
from dice_core.training.settings import TrainingConfig
from dice_core.training.trained_model import WeightChange, replace_weights

# peft's names: of the only adapter, and what it puts before the names of the model.
_NAME, _PREFIX = "default", "base_model.model."
_LARGEST_OF_FULL_TRAINING = 1e-6
_CHECKED_TOKENS = 32
_MERGE_TOLERANCE = 1e-3
"""Nats, of the summed log-probs of so many tokens in float32, where rounding makes up to about 1e-4."""


def load_with_adapters(folder: Path, config: TrainingConfig, seed: int, section: str) -> PreTrainedModel:
    """Load a policy, its weights frozen, with adapters that change nothing yet. Every process calls it.

    In mixed precision the frozen weights are bfloat16: what never moves loses no small updates.

    Args:
        folder: of fetch_model.
        config: of the training.
        seed: of the adapters' first values.
        section: what a person calls the settings.

    Raises:
        ConfigError: as check_adapters.
        ModelError: the model cannot be loaded.
    """
    check_adapters(folder, config, section)
    dtype: DType = "bfloat16" if config.precision == "bf16" else "float32"
    is_quantized = config.quantize_base != "none"
    policy = load_model(folder, dtype, device=ranks.device() if is_quantized else None, in_4_bits=is_quantized)
    said = add_adapters(policy, config, seed)
    if ranks.rank() == 0:
        log(f"train: {said}")
        if warning := learning_rate_warning(config, section):
            log(f"train: {warning}")
    return policy


def check_adapters(folder: Path, config: TrainingConfig, section: str) -> None:
    """Check, before its weights are loaded, that a model has the layers, and this machine what 4 bits need.

    Args:
        folder: of fetch_model.
        config: of the training.
        section: what a person calls its settings.

    Raises:
        ConfigError: as check_layers, or there is no GPU or no bitsandbytes.
    """
    if config.quantize_base != "none" and (device_type() != "cuda" or not find_spec("bitsandbytes")):
        lack = "no bitsandbytes" if device_type() == "cuda" else "no GPU"
        raise ConfigError(
            f"{section}.quantize_base: {config.quantize_base!r} needs a GPU and bitsandbytes, and {lack} is here: take "
            "the GPU train image, or set it to 'none'"
        )
    check_layers(folder, config, section)


def check_layers(folder: Path, config: TrainingConfig, section: str) -> None:
    """Check that a model has the layers that adapters are for. Its weights need not be there.

    Args:
        folder: of a model.
        config: of the training.
        section: what a person calls its settings.

    Raises:
        ConfigError: a name is no linear layer's, or the rank is more than any of the layers has.
    """
    with whole_models():
        model = empty_model(folder, load_config(folder), trusts_remote_code(folder))
    sides = _smaller_sides(model)
    for name in config.lora_target_modules:
        if name not in sides:
            raise ConfigError(
                f"{section}.lora_target_modules: {model.config.model_type} has no linear layer {name!r} that can have "
                f"an adapter, {allowed(name, sorted(sides))}"
            )
    most = max((sides[name] for name in config.lora_target_modules or sides), default=0)
    if config.lora_rank > most:
        raise ConfigError(
            f"{section}.lora_rank: must be at most {most}, the rank that the layers themselves can have, got "
            f"{config.lora_rank}: take 16, or 0 to train the weights themselves"
        )


def add_adapters(policy: PreTrainedModel, config: TrainingConfig, seed: int) -> str:
    """Freeze a policy's weights, and put adapters beside them, whose updates are made in float32.

    Args:
        policy: changed in place. ZeRO-3 may have cut up its weights.
        config: of the training.
        seed: of the adapters' first values, which all processes draw alike.

    Returns:
        What is trained, in a line for a person.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    names = list(config.lora_target_modules) or _names(policy)
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # peft only divides it
        lora_dropout=config.lora_dropout,
        target_modules=names,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(lora, policy)
    for module in policy.modules():
        if isinstance(module, LoraLayer):
            # Autocast or DeepSpeed has one dtype for all products; peft would go by way of float32.
            module.cast_input_dtype_enabled = False
    adapters = trained_parameters(policy, config)
    # DeepSpeed keeps float32 copies of its own, and takes weights that ZeRO-3 has not cut up yet for what they are.
    is_copied = config.deepspeed != "none" and config.precision == "bf16"
    for parameter in adapters.values():
        parameter.data = parameter.data.to(torch.bfloat16 if is_copied else torch.float32)
    num_trained = sum(parameter.numel() for parameter in adapters.values())
    return f"LoRA of rank {config.lora_rank} on {len(adapters) // 2} layers trains {num_trained:,} parameters"


def learning_rate_warning(config: TrainingConfig, section: str) -> str:
    """Return what to say of a learning rate that is one of full training; empty: nothing."""
    if config.learning_rate > _LARGEST_OF_FULL_TRAINING:
        return ""
    return (
        f"{section}.learning_rate {config.learning_rate:g} is one of full training, with which adapters hardly move: "
        f"take about ten times as much, {10 * config.learning_rate:g}"
    )


def trained_parameters(policy: PreTrainedModel, config: TrainingConfig) -> dict[str, nn.Parameter]:
    """Return what is trained of a policy, by name: the adapters, or all."""
    return {name: weight for name, weight in policy.named_parameters() if weight.requires_grad or not config.lora_rank}


def save_merged_model(
    adapters: Mapping[str, Tensor],
    policy: PreTrainedModel,
    pair: TrainingPair,
    policy_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    job: TrainingJob,
) -> WeightChange:
    """Write the adapters, and the finished model with the adapters merged, and check that both are one.

    The adapters are read back as a user of theirs would. They are merged in float32 into the exact weights that the
    policy's files have, also where training held those in fewer bits, and rounded once.

    Args:
        adapters: whole and in float32, by the names of trained_parameters.
        policy: that was trained: knows what kind of adapters they are.
        pair: whose log-probs are compared.
        policy_folder: the model that training began with.
        tokenizer: saved with the model.
        folder: gets the model, and the adapters in a folder below.
        job: knows the policy's address, which the adapters' files name.

    Raises:
        ModelError: a weight is not finite, the two differ by more than rounding, or the files do not read back.
    """
    dtype = job.training.saved_dtype
    _write_adapters(adapters, policy, job.policy_uri, folder)
    model = load_model(policy_folder, "float32")
    merged, expected = _merged(model, (folder / ADAPTER_CONFIG).parent, adapters, pair)
    change = replace_weights(model, {**dict(model.named_parameters()), **merged}, dtype)
    _require_same(_logps(model, pair), expected)
    save_model(model, tokenizer, folder, dtype)
    return change


def _smaller_sides(model: PreTrainedModel) -> dict[str, int]:
    """Return the smaller side of the largest linear layer of each name: no product of matrices has a larger rank."""
    sides: dict[str, int] = {}
    for name, layer in _linear_layers(model):
        sides[name] = max(sides.get(name, 0), min(layer.weight.shape))
    return sides


def _linear_layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear | Conv1D]]:
    """Yield linear layers and what they are called, but the output head: that of many models is the embedding too."""
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module is not head:
            yield name.rpartition(".")[2], module


def _names(model: PreTrainedModel) -> list[str]:
    return sorted({name for name, _ in _linear_layers(model)})


def _write_adapters(adapters: Mapping[str, Tensor], policy: PreTrainedModel, policy_uri: str, folder: Path) -> None:
    (folder / ADAPTER_WEIGHTS).parent.mkdir(parents=True, exist_ok=True)
    named = {_PREFIX + name.replace(f".{_NAME}.", "."): weight.contiguous() for name, weight in adapters.items()}
    save_file(named, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    # peft leaves it at the model, which has no such field of its own.
    lora: Any = vars(policy)["peft_config"][_NAME]
    lora.base_model_name_or_path = policy_uri
    # A set would be written in another order each time, and give each run another digest.
    lora.target_modules = sorted(lora.target_modules)
    lora.inference_mode = True
    # It writes adapter_config.json.
    lora.save_pretrained((folder / ADAPTER_CONFIG).parent)


def _merged(
    model: PreTrainedModel, folder: Path, adapters: Mapping[str, Tensor], pair: TrainingPair
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the weights of the layers with adapters, merged, by name, and log-probs of a pair without merging.

    The model is as it was afterwards.
    """
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    adapted: Any = PeftModel.from_pretrained(model, folder, torch_device="cpu")
    loaded = dict(model.named_parameters())
    for name, weight in adapters.items():
        if name not in loaded or not torch.equal(loaded[name], weight):
            raise ModelError(f"{folder}: the adapters do not read back as they were trained, such as {name}")
    expected = _logps(model, pair)
    with torch.no_grad():
        layers: dict[str, Any] = {name: part for name, part in model.named_modules() if isinstance(part, LoraLayer)}
        merged = {
            f"{name}.weight": layer.get_base_layer().weight + layer.get_delta_weight(_NAME)
            for name, layer in layers.items()
        }
    adapted.unload()
    return merged, expected


@torch.no_grad()
def _logps(model: PreTrainedModel, pair: TrainingPair) -> Tensor:
    """Return the summed log-probs of the begin of both responses after the end of the prompt, nats. Shape: (2,)."""
    prompt, sums = pair.prompt_token_ids[-_CHECKED_TOKENS:].tolist(), []
    for response in (pair.chosen_token_ids, pair.rejected_token_ids):
        ids = torch.tensor([[*prompt, *response[:_CHECKED_TOKENS].tolist()]])  # (1, tokens)
        logps = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)  # (tokens - 1, vocabulary)
        sums.append(logps.gather(1, ids[0, 1:, None])[len(prompt) - 1 :].double().sum())
    return torch.stack(sums)


def _require_same(merged: Tensor, expected: Tensor) -> None:
    difference = float((merged - expected).abs().max())
    if not difference <= _MERGE_TOLERANCE:
        raise ModelError(
            f"the merged model's log-probs differ by {difference:.2g} nats from those with adapters, where rounding "
            f"makes less than {_MERGE_TOLERANCE:g}: the model is not published"
        )
