"""A model folder, loaded: the model for log-probs and training, its tokenizer, its context length.

torch and transformers are imported when they are needed: `dice --help` does not wait for them.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dice_core.models.files import CONFIG, ModelError, trusts_remote_code
from dice_core.models.hidden_torch import torch_hidden
from dice_core.settings.base import DType

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def unloadable(folder: Path, part: str, error: Exception) -> ModelError:
    """Return one line for an error of transformers.

    Args:
        folder: of the model.
        part: of the model, in words.
        error: what loading it raised.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    if "trust_remote_code" in text:
        return ModelError(
            f"{folder}: its {part} is code inside the model, which is not run unless you allow it: "
            "read that code, then import the model with trust_remote_code"
        )
    # All lines in one: what is wrong often stands in the second line of transformers' validation.
    return ModelError(f"{folder}: its {part} cannot be loaded: {text[:300]}")


def load_model(
    folder: Path,
    dtype: DType,
    *,
    device: "str | torch.device | None" = None,
    in_4_bits: bool = False,
) -> "PreTrainedModel":
    """Load a causal language model for log-probs and training: eval mode, no dropout, no key-value cache.

    Args:
        folder: of fetch_model.
        dtype: of the weights in memory, whatever they were saved in.
        device: where to; the CPU by default.
        in_4_bits: hold the matrices of the layers as bitsandbytes' NF4, and compute with them in the dtype; for
            training adapters beside them, on a GPU.

    Raises:
        ModelError: it cannot be loaded, lacks weights (transformers itself would make them up), or has others.
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
            **(_four_bits(dtype, device) if in_4_bits else {}),
        )
    except (ValueError, OSError, ImportError, KeyError, RuntimeError) as error:
        raise unloadable(folder, "model", error) from None
    model: PreTrainedModel = loaded[0]
    require_fit(loaded[1], str(folder))
    for part in (model.config, model.config.get_text_config()):
        part.use_cache = False
    if is_deepspeed_zero3_enabled():
        restore_frequencies(model)
    model.eval()
    if device is not None and not in_4_bits:
        move(model, device)
    return model


def _four_bits(dtype: DType, device: "str | torch.device | None") -> dict[str, Any]:
    """Return how from_pretrained quantises as QLoRA does (arXiv 2305.14314): NF4, its constants quantised too."""
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    # It quantises a weight when it brings it to the device.
    return {"quantization_config": quantization, "device_map": {"": device}}


def require_fit(loading: Mapping[str, Any], where: str) -> None:
    """Check that the weights are those of the model, by what transformers says of its loading.

    What it regards as harmless it does not name: tied weights, buffers of older versions, layers that it leaves out.

    Args:
        loading: its loading info.
        where: what a message calls the model.

    Raises:
        ModelError: weights are missing, superfluous, or of another shape.
    """
    missing, unexpected = sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])
    mismatched = sorted(loading["mismatched_keys"])
    if missing:
        raise ModelError(
            f"{where}: {len(missing)} weights are missing that {CONFIG} asks for, such as {missing[0]!r}: fetch the "
            "model again, or correct its config"
        )
    if mismatched:
        name, found, wanted = mismatched[0]
        raise ModelError(
            f"{where}: {len(mismatched)} weights have another shape than {CONFIG} asks for, such as {name!r}: "
            f"{tuple(found)}, not {tuple(wanted)}: take the config that belongs to the weights"
        )
    if unexpected:
        raise ModelError(
            f"{where}: {len(unexpected)} weights have no place in the model of {CONFIG}, such as {unexpected[0]!r} (a "
            "head of another kind, or more layers than num_hidden_layers): it would run without them"
        )
    if errors := [*loading.get("error_msgs", ()), *loading.get("conversion_errors", {}).values()]:
        raise ModelError(f"{where}: its weights cannot be loaded: {' '.join(str(errors[0]).split())[:300]}")


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
    return load_tokenizer_files(folder, trusts_remote_code(folder))


def load_tokenizer_files(folder: Path, trust_remote_code: bool) -> "PreTrainedTokenizerBase":
    """Load a tokenizer, where it is not the model's config that says whether its code may run.

    Raises:
        ModelError: it cannot be loaded.
    """
    # Code inside a model may import what it likes.
    with nullcontext() if trust_remote_code else torch_hidden():
        from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    # A tokenizer.json that a newer version wrote, or that is none, is a plain Exception of the tokenizers package.
    except Exception as error:
        if "did not match any variant" in str(error):
            raise ModelError(
                f"{folder / 'tokenizer.json'}: not a form that tokenizers {version('tokenizers')} reads: a newer "
                "version wrote it, or it is damaged: save it with this version, or fetch it again"
            ) from None
        raise unloadable(folder, "tokenizer", error) from None


def context_length(config: "PretrainedConfig") -> int:
    """Return the most tokens, prompt and response together, that a model has positions for.

    Raises:
        ModelError: its config does not say.
    """
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(length, int):
        raise ModelError(f"config of {config.model_type}: has no max_position_embeddings")
    if length < 1:
        raise ModelError(f"config of {config.model_type}: max_position_embeddings must be at least 1, got {length}")
    return length
