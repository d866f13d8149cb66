"""What a model folder holds, and whether it is whole. Reads names, sizes and headers; loads no weights and no torch.

Weights are safetensors, never pickle: reading a pickle runs whatever code it contains.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any, Literal, cast, get_args

from safetensors import SafetensorError, safe_open

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter/adapter_config.json", "adapter/adapter_model.safetensors"
"""Of a trained adapter, beside the model that it is merged into, in peft's form."""

ModelKind = Literal["language-model", "reward-model"]
"""A causal language model, which answers: policies, references and judges that chat. Or a sequence classification model
with one label, which gives an answer one number."""

# In a model's config: the person who imported it allows the code in it to run. Saved on with every trained policy.
TRUST_KEY = "dice_trust_remote_code"

_SMALL_FILES = ("*.json", "*.jinja", "*.model", "tokenizer*", "merges.txt", "vocab.txt", "LICENSE*", "NOTICE*")
_CODE_FILES = ("*.py",)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_ADAPTERS = ("adapter_config.json", "adapter_model.*")
_SHARDS = ("*-of-*.safetensors",)
_LFS_POINTER = b"version https://git-lfs.github.com/"
# Those that the tokenizers package reads: a SentencePiece file alone would need a package that not all images have.
_TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",))


class ModelError(RuntimeError):
    """A model that cannot be used. The message is one line: which, what is wrong, what to do."""


def model_kind(name: str) -> ModelKind:
    """Return a kind of model by its name.

    Raises:
        ValueError: there is no such kind.
    """
    if name not in get_args(ModelKind):
        raise ValueError(f"kind: must be {' or '.join(get_args(ModelKind))}, got {name!r}")
    return cast(ModelKind, name)


def is_model_file(name: str, with_code: bool = True) -> bool:
    """Return whether a file of that name belongs to a model; files in folders below it never do."""
    patterns = (*_SMALL_FILES, "*.safetensors", *(_CODE_FILES if with_code else ()))
    return _matches(name, patterns) and name != "manifest.json"


def model_file_names(names: Iterable[str], shards: Iterable[str], with_code: bool) -> list[str]:
    """Return the files to import: the named shards and what is small, but no second copy of the weights."""
    small = (name for name in names if is_model_file(name, with_code) and not name.endswith(".safetensors"))
    return sorted({*shards, *small})


def small_file_patterns(with_code: bool) -> list[str]:
    """Return patterns of everything but the weights."""
    return [*_SMALL_FILES, *(_CODE_FILES if with_code else ())]


def shard_names(folder: Path) -> list[str]:
    """Return the files that hold the weights: those of the index, or the one file there is without an index.

    Raises:
        ModelError: the index cannot be read.
    """
    if (folder / INDEX).exists():
        return sorted(set(_weight_map(folder).values()))
    return [WEIGHTS]


def check_names(names: Iterable[str], where: str) -> None:
    """Check by their names that files are the weights of a whole model that may be read.

    Raises:
        ModelError: an adapter is among them, they are pickle only, or shards have no index.
    """
    names = sorted(names)
    if adapters := [name for name in names if _matches(name, _ADAPTERS)]:
        raise ModelError(
            f"{where}: {adapters[0]} is an adapter, which changes or needs another model: merge the two first "
            "(peft: merge_and_unload, then save_pretrained), or remove the adapter's files"
        )
    pickles = [name for name in names if _matches(name, _PICKLES)]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise ModelError(
            f"{where}: its weights are pickle files ({pickles[0]}), which can run code when they are read: "
            "convert them to safetensors first, or take a revision that has model.safetensors"
        )
    shards = [name for name in names if _matches(name, _SHARDS)]
    if shards and not {INDEX, WEIGHTS} & set(names):
        raise ModelError(f"{where}: has shards of weights ({shards[0]}) and no {INDEX}: fetch it again, with that file")


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json.

    Raises:
        ModelError: it is missing, or is not a model's config.
    """
    config = _read_json(folder / CONFIG)
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{folder / CONFIG}: names no model_type, so this is no transformers model")
    return config


def read_generation_config(folder: Path) -> dict[str, Any]:
    """Return generation_config.json.

    Raises:
        ModelError: it is missing, or no JSON object.
    """
    return _read_json(folder / GENERATION_CONFIG)


def trusts_remote_code(folder: Path) -> bool:
    """Return whether the person who imported the model allowed the code inside it to run."""
    return read_config(folder).get(TRUST_KEY) is True


def verify_model_folder(folder: Path) -> int:
    """Check that a model is whole: config, tokenizer, and every tensor of the index in a shard of the right length.

    Returns:
        The number of parameters.

    Raises:
        ModelError: one line naming the file and its fault.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder")
    names = {path.name for path in folder.iterdir()}
    check_names(names, str(folder))
    for name in sorted(names):
        if is_model_file(name) and _is_lfs_pointer(folder / name) and not name.endswith(".safetensors"):
            raise ModelError(f"{folder / name}: a Git LFS pointer, not the file itself: fetch it with git lfs pull")
    _refuse_quantised(folder)
    if not any(names.issuperset(parts) for parts in _TOKENIZERS):
        raise ModelError(_no_tokenizer(folder, names))
    shards = {name: tensor_headers(folder / name) for name in shard_names(folder)}
    if (folder / INDEX).exists():
        for tensor, shard in _weight_map(folder).items():
            if tensor not in shards[shard]:
                raise ModelError(f"{folder / shard}: lacks tensor {tensor!r}, which {INDEX} puts there")
    return sum(prod(tensor.shape) for shard in shards.values() for tensor in shard.values())


def _refuse_quantised(folder: Path) -> None:
    config = read_config(folder)
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    if found := next((part for part in parts if part.get("quantization_config")), None):
        method = found["quantization_config"]
        method = method.get("quant_method", "unknown") if isinstance(method, dict) else method
        raise ModelError(
            f"{folder / CONFIG}: its weights are quantised ({method}), and cannot be trained: take the model in "
            "bfloat16, float16 or float32"
        )


def _is_lfs_pointer(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(len(_LFS_POINTER)) == _LFS_POINTER


def _no_tokenizer(folder: Path, names: Iterable[str]) -> str:
    if any(name.endswith(".model") for name in names):
        return (
            f"{folder}: its tokenizer is a SentencePiece file alone; a tokenizer.json is needed: where sentencepiece "
            "and transformers are installed, AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes one"
        )
    return f"{folder}: has no tokenizer (tokenizer.json): copy it beside the weights"


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return "/" not in name and any(fnmatchcase(name, pattern) for pattern in patterns)


def _weight_map(folder: Path) -> dict[str, str]:
    weight_map = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{folder / INDEX}: has no weight_map; fetch it again")
    for shard in weight_map.values():
        # A name from a stranger's file becomes a path here.
        if not isinstance(shard, str) or "/" in shard or not shard.endswith(".safetensors"):
            raise ModelError(f"{folder / INDEX}: names a shard {shard!r}; allowed: safetensors files beside it")
    return weight_map


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path}: missing; a model folder needs it") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path}: must hold a JSON object, got {type(values).__name__}")
    return values


@dataclass(frozen=True)
class TensorHeader:
    """What a safetensors file says of a tensor: dtype by safetensors' own name, such as BF16, and shape."""

    dtype: str
    shape: tuple[int, ...]


def tensor_headers(path: Path) -> dict[str, TensorHeader]:
    """Return the tensors of a safetensors file by name.

    Reads the header alone. safetensors compares it with the file's length: one that is cut or too long is refused.

    Raises:
        ModelError: the file is missing, or not whole.
    """
    if not path.is_file():
        raise ModelError(f"{path}: missing; fetch the model again")
    try:
        with safe_open(path, framework="numpy") as tensors:
            found = {name: tensors.get_slice(name) for name in tensors.offset_keys()}
            return {name: TensorHeader(part.get_dtype(), tuple(part.get_shape())) for name, part in found.items()}
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{path}: not a whole safetensors file ({path.stat().st_size} bytes; {reason}): fetch it again "
            "(in a Git clone: git lfs pull)"
        ) from None
