"""A model folder, loaded: the model for log-probs and training, its tokenizer, its context length.

torch and transformers are imported when they are needed: `dice --help` does not wait for them.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dice_core.models.files import ModelError, trusts_remote_code
from dice_core.settings.base import DType

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def _unloadable(folder: Path, part: str, error: Exception) -> ModelError:
    text = str(error).strip() or type(error).__name__
    if "trust_remote_code" in text:
        return ModelError(
            f"{folder}: its {part} is code inside the model, which is not run unless you allow it: "
            "read that code, then import the model with trust_remote_code"
        )
    return ModelError(f"{folder}: its {part} cannot be loaded: {text.splitlines()[0]}")


def load_model(
    folder: Path,
    dtype: DType,
    *,
    device: "str | torch.device | None" = None,
) -> "PreTrainedModel":
    """Load a causal language model for log-probs and training: eval mode, no dropout, no key-value cache.

    Args:
        folder: of fetch_model.
        dtype: of the weights in memory, whatever they were saved in.
        device: where to; the CPU by default.

    Raises:
        ModelError: it cannot be loaded, or lacks weights (transformers itself would make them up).
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
    from transformers.utils.logging import disable_progress_bar

    from dice_core.models.rotary import restore_frequencies

    disable_progress_bar()  # a batch job's log has no cursor
    try:
        config = load_config(folder)
        _switch_dropout_off(config)
        # With output_loading_info it returns two values, which its annotation does not say.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=trusts_remote_code(folder),
        )
    except (ValueError, OSError, ImportError, KeyError, RuntimeError) as error:
        raise _unloadable(folder, "model", error) from None
    model: PreTrainedModel = loaded[0]
    loading: dict[str, Any] = loaded[1]
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise ModelError(f"{folder}: {len(missing)} weights are missing, such as {missing[0]}: import the model again")
    for part in (model.config, model.config.get_text_config()):
        part.use_cache = False
    if is_deepspeed_zero3_enabled():
        restore_frequencies(model)
    model.eval()
    if device is not None:
        move(model, device)
    return model


def move(model: "nn.Module", device: "str | torch.device") -> None:
    """Move a model to a device, in place."""
    # As a plain module: by the annotation of transformers, a model's own `to` takes no device.
    model.to(device)


def load_config(folder: Path) -> "PretrainedConfig":
    """Load the config of a model folder. Raises what transformers raises."""
    from transformers import AutoConfig

    trusts = trusts_remote_code(folder)
    config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trusts)
    return config


def eos_token_ids(folder: Path) -> tuple[int, ...]:
    """Return the ids that end a text by the model's own files: generation_config.json, or config.json without it."""
    from transformers import GenerationConfig

    try:
        settings = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except OSError:
        settings = GenerationConfig.from_model_config(load_config(folder))
    ids = settings.eos_token_id
    return tuple(ids) if isinstance(ids, list) else () if ids is None else (ids,)


def _switch_dropout_off(config: "PretrainedConfig") -> None:
    for part in (config, config.get_text_config()):
        for name, value in vars(part).items():
            if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
                setattr(part, name, 0.0)


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model folder.

    Raises:
        ModelError: it cannot be loaded.
    """
    return _load_tokenizer(folder, trusts_remote_code(folder))


def _load_tokenizer(folder: Path, trust_remote_code: bool) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, ImportError, KeyError, TypeError) as error:
        raise _unloadable(folder, "tokenizer", error) from None


def context_length(config: "PretrainedConfig") -> int:
    """Return the most tokens, prompt and response together, that a model has positions for.

    Raises:
        ModelError: its config does not say.
    """
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(length, int):
        raise ModelError(f"config of {config.model_type}: has no max_position_embeddings")
    return length


def check_it_loads(folder: Path, trust_remote_code: bool) -> None:
    """Load config and tokenizer, so that a model that cannot be used fails on import and not hours later."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, ImportError, KeyError) as error:
        raise _unloadable(folder, "config", error) from None
    _load_tokenizer(folder, trust_remote_code)
