"""Whether the parts of a model fit each other: config, weights, tokenizer, chat template and generation config.

Nothing is loaded: transformers builds the model on the meta device and "loads" tensors that have a name, a shape and a
dtype but no values, so what counts as missing, superfluous or harmless is decided by its own rules. What saving will
need after training is tried here too. `files.py` checks names and headers, `weights.py` the values.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dice_core.models.files import (
    CONFIG,
    GENERATION_CONFIG,
    ModelError,
    ModelKind,
    TensorHeader,
    read_config,
    read_generation_config,
    shard_names,
    tensor_headers,
)
from dice_core.models.generation_config import savable
from dice_core.models.loading import context_length, load_tokenizer_files, require_fit, unloadable
from dice_core.progress import log
from dice_core.storage.manifest import Manifest

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

IMPORT_STAGE = "import-model"
CHECKS = 1
"""Raised when an import begins to check what a model in storage may fail: that one is then checked when it is read."""

# By safetensors' names. The floating types are those that can be trained and checked to be finite.
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_INTEGERS = {"BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"}
_ROWS = 4096
_PROBE = "Hello, world: 1 + 1 = 2.\n"
_ID_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Placeholders of pictures and sounds that a text model's tokenizer has from its family: no text becomes them.
_PLACEHOLDERS = ("image", "audio", "video", "boi", "eoi")


def needs_check(manifest: Manifest) -> bool:
    """Return whether a model was imported by a version that checked less. What training saves, it has tried itself."""
    return manifest.stage == IMPORT_STAGE and manifest.checks < CHECKS


def check_parts_fit(
    folder: Path,
    trust_remote_code: bool,
    check_model: "Callable[[PreTrainedModel], None] | None" = None,
    *,
    kind: ModelKind = "language-model",
) -> "GenerationConfig | None":
    """Check that a whole model folder can be loaded, spoken to, and saved again.

    Args:
        folder: verified by files.verify_model_folder.
        trust_remote_code: whether code inside the model may run.
        check_model: raises ModelError for a model, on the meta device, that its users cannot run.
        kind: what the model has to be.

    Returns:
        The generation config to store, where transformers would refuse to write the one that is there.

    Raises:
        ModelError: one line naming the part at fault.
    """
    try:
        import torch  # noqa: F401
    except ImportError:
        raise ModelError(
            f"{folder}: a model is checked where PyTorch is installed: run `dice import-model` in the train image (or "
            "on your machine)"
        ) from None
    with _quiet():
        config = _config(folder, trust_remote_code)
        tokenizer = load_tokenizer_files(folder, trust_remote_code)
        if kind == "reward-model":
            _require_reward(folder, config, tokenizer)
        model = _fit_weights(folder, config, trust_remote_code, kind)
        _check_positions(folder, model)
        if check_model is not None:
            check_model(model)
        given = _generation_config(folder)
        stored = savable(given) if given is not None else None
        embedding: Any = model.get_input_embeddings()
        _check_ids(folder, tokenizer, num_rows=len(embedding.weight))
        _check_tokenizer(folder, tokenizer)
        _check_template(folder, tokenizer)
        _try_to_save(folder, model, tokenizer, stored)
    if given is None or stored is given:
        return None
    log(f"{IMPORT_STAGE}: {GENERATION_CONFIG} is cleaned: transformers could not save it with a trained model")
    return stored


def _config(folder: Path, trust_remote_code: bool) -> "PretrainedConfig":
    from transformers import AutoConfig

    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    # Values of a stranger's file: transformers' validation, and whatever fails behind it.
    except Exception as error:
        raise unloadable(folder, "config", error) from None
    return config


def _require_reward(folder: Path, config: "PretrainedConfig", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Check that a model gives one number, and says how it wants to read an answer."""
    names = config.architectures or [config.model_type]
    if not names[0].endswith("ForSequenceClassification"):
        raise ModelError(
            f"{folder / CONFIG}: architectures names {names[0]}, where a reward model is needed, a sequence "
            "classification model such as Skywork-Reward-V2; a model that chats judges as chat-logprob"
        )
    if config.num_labels != 1:
        raise ModelError(
            f"{folder / CONFIG}: has {config.num_labels} labels, and a reward model has one (num_labels 1): take a "
            "model that was trained to give rewards"
        )
    if not tokenizer.chat_template:
        raise ModelError(f"{folder}: its tokenizer has no chat template, by which a reward model reads an answer")


def _fit_weights(
    folder: Path, config: "PretrainedConfig", trust_remote_code: bool, kind: ModelKind
) -> "PreTrainedModel":
    """Return the model on the meta device, with all its weights found in the files."""
    files = {name: folder / shard for shard in shard_names(folder) for name in tensor_headers(folder / shard)}
    headers = {name: header for path in sorted(set(files.values())) for name, header in _headers(path).items()}
    model_class = type(empty_model(folder, config, trust_remote_code, kind))
    names = config.architectures or []
    if names and model_class.__name__ not in names:
        raise ModelError(
            f"{folder / CONFIG}: architectures names {names[0]}, where a causal language model is needed "
            f"({model_class.__name__} for model_type {config.model_type!r})"
        )
    try:
        # The annotation of transformers knows neither the state dict alone nor the second value.
        loaded: Any = model_class.from_pretrained(
            None,
            config=config,
            state_dict={name: _meta_tensor(header) for name, header in headers.items()},
            device_map={"": "meta"},
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:
        raise unloadable(folder, "weights", error) from None
    model: PreTrainedModel = loaded[0]
    require_fit(loaded[1], str(folder))
    _refuse_packed(folder, model, headers)
    for target, source in model.all_tied_weights_keys.items():
        if {target, source} <= files.keys() and not _is_same(files, target, source):
            raise ModelError(
                f"{folder}: {CONFIG} ties {target} to {source}, and the files have different values for them, so one "
                "program would use the first and another the second: set tie_word_embeddings to what is meant"
            )
    return model


def _check_positions(folder: Path, model: "PreTrainedModel") -> None:
    """Check that the config gives the model positions. One without max_position_embeddings says so where it is used."""
    from dice_core.models.rotary import require_finite_frequencies

    config = model.config.get_text_config()
    if getattr(config, "max_position_embeddings", None) is not None:
        context_length(config)
    require_finite_frequencies(model, str(folder / CONFIG))


def _is_same(files: Mapping[str, Path], name: str, other: str) -> bool:
    """Return whether two tensors are equal, without holding them whole."""
    import torch
    from safetensors import safe_open

    with safe_open(files[name], framework="pt") as one, safe_open(files[other], framework="pt") as two:
        left, right = one.get_slice(name), two.get_slice(other)
        num_rows = left.get_shape()[0]
        return left.get_shape() == right.get_shape() and all(
            torch.equal(left[row : row + _ROWS], right[row : row + _ROWS]) for row in range(0, num_rows, _ROWS)
        )


def _headers(path: Path) -> Mapping[str, TensorHeader]:
    headers = tensor_headers(path)
    for name, header in headers.items():
        if header.dtype not in _FLOATS | _INTEGERS:
            raise ModelError(
                f"{path}: tensor {name!r} has dtype {header.dtype}, so the weights are quantised; allowed: "
                f"{', '.join(_FLOATS)}"
            )
    return headers


def _meta_tensor(header: TensorHeader) -> "torch.Tensor":
    import torch

    dtype = getattr(torch, (_FLOATS | _INTEGERS)[header.dtype])
    return torch.empty(header.shape, dtype=dtype, device="meta")


def empty_model(
    folder: Path, config: "PretrainedConfig", trust_remote_code: bool, kind: ModelKind = "language-model"
) -> "PreTrainedModel":
    """Return a model on the meta device, without weights.

    Args:
        folder: that a message names.
        config: of the model.
        trust_remote_code: whether code inside the model may run.
        kind: what the model has to be.

    Raises:
        ModelError: transformers has no such model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    # Each has annotations of its own for the same two methods.
    auto: Any = AutoModelForSequenceClassification if kind == "reward-model" else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            model: PreTrainedModel = auto.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        if "Unrecognized configuration class" in str(error):
            names = ", ".join(config.architectures or [config.model_type])
            wanted = "sequence classification model" if kind == "reward-model" else "causal language model"
            raise ModelError(f"{folder / CONFIG}: {names} is no {wanted} that transformers has") from None
        raise unloadable(folder, "model", error) from None
    return model


def _refuse_packed(folder: Path, model: "PreTrainedModel", headers: Mapping[str, TensorHeader]) -> None:
    """Refuse integers where the model has floating weights: values packed by a quantisation that the config hides."""
    for name, weight in model.state_dict().items():
        if weight.is_floating_point() and name in headers and headers[name].dtype in _INTEGERS:
            raise ModelError(
                f"{folder}: tensor {name!r} has dtype {headers[name].dtype}, so the weights are quantised; allowed: "
                f"{', '.join(_FLOATS)}"
            )


def _generation_config(folder: Path) -> "GenerationConfig | None":
    from transformers import GenerationConfig

    if not (folder / GENERATION_CONFIG).exists():
        return None
    try:
        return GenerationConfig.from_dict(read_generation_config(folder))
    except ModelError:
        raise
    except Exception as error:
        raise unloadable(folder, "generation config", error) from None


def _check_ids(folder: Path, tokenizer: "PreTrainedTokenizerBase", num_rows: int) -> None:
    """Check that the embedding has a row for every id that the files know."""
    special = {getattr(tokenizer, f"{name}_token", None) for name in _PLACEHOLDERS}
    beyond = {i: token for token, i in tokenizer.get_vocab().items() if i >= num_rows and token not in special}
    if beyond:
        first = min(beyond)
        raise ModelError(
            f"{folder}: its tokenizer has ids up to {max(beyond)}, its embedding {num_rows} rows: token "
            f"{beyond[first]!r} (id {first}) has none: resize the embeddings (resize_token_embeddings) and train them, "
            "or take the tokenizer that belongs to the weights"
        )
    for file, field, token_id in _named_ids(folder):
        if token_id >= num_rows:
            raise ModelError(f"{folder / file}: {field} is {token_id}, the embedding has {num_rows} rows: correct it")


def _named_ids(folder: Path) -> Iterator[tuple[str, str, int]]:
    config = read_config(folder)
    text_config = config.get("text_config")
    parts: list[tuple[str, Any]] = [(CONFIG, config), (CONFIG, text_config)]
    if (folder / GENERATION_CONFIG).exists():
        parts.append((GENERATION_CONFIG, read_generation_config(folder)))
    for file, values in parts:
        for field in _ID_FIELDS if isinstance(values, dict) else ():
            ids = values.get(field)
            yield from ((file, field, i) for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int))


def _check_tokenizer(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> None:
    try:
        ids = tokenizer.encode(_PROBE, add_special_tokens=False)
        text = tokenizer.decode(ids)
    except Exception as error:
        raise unloadable(folder, "tokenizer", error) from None
    if not ids or not str(text).strip():
        raise ModelError(f"{folder}: its tokenizer turns {_PROBE!r} into {len(ids)} ids and these into {text!r}")


def _check_template(folder: Path, tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a chat template that cannot be read. One that is read and fails is no matter for other chat formats."""
    from jinja2 import TemplateSyntaxError

    if not tokenizer.chat_template:
        return
    try:
        messages = [{"role": "user", "content": _PROBE.strip()}]
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateSyntaxError as error:
        raise ModelError(
            f"{folder}: its chat template is no valid Jinja (line {error.lineno}: {error.message})"
        ) from None
    # Jinja's own errors and whatever a template raises.
    except Exception as error:
        log(f"{IMPORT_STAGE}: the chat template of {folder} cannot be used: {' '.join(str(error).split())[:300]}")


def _try_to_save(
    folder: Path,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    generation_config: "GenerationConfig | None",
) -> None:
    """Save everything but the weights: what cannot be saved now cannot be saved after training either."""
    parts = {"config": model.config, "generation config": generation_config, "tokenizer": tokenizer}
    with tempfile.TemporaryDirectory(prefix="dice-") as scratch:
        for name, part in parts.items():
            try:
                if part is not None:
                    part.save_pretrained(scratch)
            except Exception as error:
                raise ModelError(
                    f"{folder}: its {name} cannot be saved again, so no model trained from it could be: "
                    f"{' '.join(str(error).split())[:300]}"
                ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from writing its own report about what is reported here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
