"""Models as stages use them: imported once into storage, loaded, saved.

What a model folder is, model_files.py knows; where models come from, model_sources.py; model_cache.py fetches them.
torch and transformers are imported when they are needed: `dice --help` does not wait for them.
"""

import json
import os
import tempfile
import time
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dice_core.config import DType
from dice_core.manifest import Manifest, read_manifest, require_stage
from dice_core.model_files import (
    CONFIG,
    TRUST_KEY,
    ModelError,
    model_file_names,
    read_config,
    shard_names,
    trusts_remote_code,
    verify_model_folder,
)
from dice_core.model_sources import Source, bring, find_source
from dice_core.model_upload import upload_model
from dice_core.progress import log
from dice_core.storage import StorageError

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "ModelError",
    "context_length",
    "import_model",
    "load_model",
    "load_tokenizer",
    "model_num_bytes",
    "save_model",
    "trusts_remote_code",
    "verify_model_folder",
]

_FORMAT_VERSION = 1
_STAGE = "import-model"
_SHARD_SIZE = "5GB"


def import_model(source: str, uri: str, *, revision: str = "", trust_remote_code: bool = False) -> Manifest:
    """Bring a model into storage as verified safetensors with config and tokenizer; the manifest comes last.

    An import that was killed goes on with the files that storage lacks; a download from the Hub, with what its cache
    lacks.

    Args:
        source: a Hub id (org/name), a folder, an s3:// address, or the path of a GGUF file (becomes float32).
        uri: the model's own place.
        revision: branch, tag or commit of a Hub model.
        trust_remote_code: allow code inside the model to run, here and wherever the model or one trained from it is
            loaded.

    Returns:
        The manifest there; at once if the same source was imported before.

    Raises:
        ModelError: the source cannot be found, is cut, is pickle, or needs code that is not allowed.
        StorageError: storage cannot be used, or the place holds another model.
    """
    found = find_source(source, revision)
    fingerprint = sha256(f"{_STAGE} {_FORMAT_VERSION} {found.identity} {trust_remote_code}".encode()).hexdigest()
    present = read_manifest(uri)
    if present is not None:
        # Whoever asks for no revision of a Hub model takes what somebody has imported of it, without asking the Hub.
        is_any = found.kind == "hub" and not revision and present.settings.get("source") == source
        if is_any or fingerprint == present.fingerprint or _published_digest(found) == present.content_digest:
            return present
        require_stage(present, _STAGE, uri)
        raise StorageError(
            f"{uri}: holds a model from {_named(present.settings)}, not from "
            f"{_named({'source': source, 'revision': revision})}: import to another place, or pass --overwrite"
        )
    log(f"{_STAGE}: {source}")
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dice-", dir=os.environ.get("DICE_SCRATCH")) as scratch:
        fields = {
            "stage": _STAGE,
            "fingerprint": fingerprint,
            "settings": {"source": source, "revision": revision, "trust_remote_code": trust_remote_code},
            "inputs": {"model": f"{source}@{found.manifest.content_digest}"} if found.manifest else {},
        }
        return _import(found, uri, Path(scratch), trust_remote_code, fields, start)


def _named(settings: Mapping[str, Any]) -> str:
    """Return where an imported model comes from, for people."""
    revision = settings.get("revision")
    return str(settings.get("source")) + (f"@{revision}" if revision else "")


def _published_digest(source: Source) -> str | None:
    return source.manifest.content_digest if source.manifest else None


def _import(
    source: Source, uri: str, scratch: Path, trust_remote_code: bool, fields: dict[str, Any], start: float
) -> Manifest:
    (scratch / "model").mkdir()
    folder = bring(source, scratch / "model", trust_remote_code)
    if source.kind == "hub":
        # The Hub's cache names the folder after the commit, which a branch or a tag stood for at this moment.
        fields["settings"]["commit"] = folder.name
    num_parameters = verify_model_folder(folder)
    names = model_file_names([path.name for path in folder.iterdir()], shard_names(folder), trust_remote_code)
    files = {name: folder / name for name in names}
    # Whether code may run is said by the one who imports, never by the model itself.
    config = read_config(folder)
    if trust_remote_code != (config.get(TRUST_KEY) is True):
        config[TRUST_KEY] = trust_remote_code
        files[CONFIG] = scratch / CONFIG
        files[CONFIG].write_text(json.dumps(config, indent=2))
    _check_it_loads(folder, trust_remote_code)
    metrics = {
        "num_parameters": num_parameters,
        "num_bytes": sum(path.stat().st_size for path in files.values()),
        "seconds": round(time.monotonic() - start, 1),
    }
    return upload_model(uri, files, Manifest(files={}, metrics=metrics, **fields))


def _check_it_loads(folder: Path, trust_remote_code: bool) -> None:
    """Load config and tokenizer, so that a model that cannot be used fails on import and not hours later."""
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, ImportError, KeyError) as error:
        raise _unloadable(folder, "config", error) from None
    _load_tokenizer(folder, trust_remote_code)


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
    attn_implementation: str | None = None,
) -> "PreTrainedModel":
    """Load a causal language model for log-probs and training: eval mode, no dropout, no key-value cache.

    Args:
        folder: of fetch_model.
        dtype: of the weights in memory, whatever they were saved in.
        device: where to; the CPU by default.
        attn_implementation: of transformers; its own choice by default.

    Raises:
        ModelError: it cannot be loaded, or lacks weights (transformers itself would make them up).
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.integrations import is_deepspeed_zero3_enabled
    from transformers.utils.logging import disable_progress_bar

    from dice_core.rotary import restore_frequencies

    disable_progress_bar()  # a batch job's log has no cursor
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trusts_remote_code(folder)}
    try:
        config = AutoConfig.from_pretrained(folder, **options)
        _switch_dropout_off(config)
        if attn_implementation:
            options["attn_implementation"] = attn_implementation
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except (ValueError, OSError, ImportError, KeyError, RuntimeError) as error:
        raise _unloadable(folder, "model", error) from None
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise ModelError(f"{folder}: {len(missing)} weights are missing, such as {missing[0]}: import the model again")
    for part in (model.config, model.config.get_text_config()):
        part.use_cache = False
    if is_deepspeed_zero3_enabled():
        restore_frequencies(model)
    model.eval()
    return model.to(device) if device is not None else model


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


def save_model(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", folder: Path, dtype: DType) -> None:
    """Save a whole model as safetensors in a dtype, with config and tokenizer, and verify what was written.

    Args:
        model: unsharded; its own weights stay as they are.
        tokenizer: of the model.
        folder: is made if it does not exist.
        dtype: of the saved weights.

    Raises:
        ModelError: what was written is not a whole model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _repair_generation_config(model)
    use_cache, model.config.use_cache = model.config.use_cache, True
    model.save_pretrained(folder, state_dict=_converted(model, dtype), max_shard_size=_SHARD_SIZE)
    model.config.use_cache = use_cache
    tokenizer.save_pretrained(folder)
    # transformers wrote the dtype that the model has in memory.
    config = read_config(folder)
    (folder / CONFIG).write_text(json.dumps({**config, "dtype": dtype}, indent=2))
    verify_model_folder(folder)


def _repair_generation_config(model: "PreTrainedModel") -> None:
    """Some published models have sampling settings but not do_sample, which transformers reads and refuses to write."""
    if model.generation_config is None:
        return
    try:
        model.generation_config.validate(strict=True)
    except ValueError:
        model.generation_config.do_sample = True


def _converted(model: "PreTrainedModel", dtype: DType) -> "dict[str, torch.Tensor]":
    """Return the weights in a dtype; those that two modules share stay one tensor, or they would be saved twice."""
    import torch

    converted: dict[tuple[int, torch.Size], torch.Tensor] = {}
    weights = {}
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            identity = (value.data_ptr(), value.shape)
            if identity not in converted:
                converted[identity] = value.to(getattr(torch, dtype))
            value = converted[identity]
        weights[name] = value
    return weights


def model_num_bytes(folder: Path) -> int:
    """Return the bytes of a model's weights on disk."""
    return sum((folder / name).stat().st_size for name in shard_names(folder))


def context_length(config: "PretrainedConfig") -> int:
    """Return the most tokens, prompt and response together, that a model has positions for.

    Raises:
        ModelError: its config does not say.
    """
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(length, int):
        raise ModelError(f"config of {config.model_type}: has no max_position_embeddings")
    return length
