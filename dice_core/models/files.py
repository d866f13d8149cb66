"""What a model folder holds, and whether it is whole. Reads names, sizes and headers; loads no weights and no torch.

Weights are safetensors, never pickle: reading a pickle runs whatever code it contains.
"""

import json
from collections.abc import Iterable
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# In a model's config: the person who imported it allows the code in it to run. Saved on with every trained policy.
TRUST_KEY = "dice_trust_remote_code"

_SMALL_FILES = ("*.json", "*.jinja", "*.model", "tokenizer*", "merges.txt", "vocab.txt", "LICENSE*", "NOTICE*")
_CODE_FILES = ("*.py",)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# Those that the tokenizers package reads: a SentencePiece file alone would need a package that not all images have.
_TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",))


class ModelError(RuntimeError):
    """A model that cannot be used. The message is one line: which, what is wrong, what to do."""


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


def refuse_pickle(names: Iterable[str], where: str) -> None:
    """Raise ModelError if the weights are there, but as pickle only."""
    names = list(names)
    pickles = sorted(name for name in names if _matches(name, _PICKLES))
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise ModelError(
            f"{where}: its weights are pickle files ({pickles[0]}), which can run code when they are read: "
            "convert them to safetensors first, or take a revision that has model.safetensors"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json.

    Raises:
        ModelError: it is missing, or is not a model's config.
    """
    config = _read_json(folder / CONFIG)
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{folder / CONFIG}: names no model_type, so this is no transformers model")
    return config


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
    refuse_pickle(names, str(folder))
    read_config(folder)
    if not any(names.issuperset(parts) for parts in _TOKENIZERS):
        raise ModelError(_no_tokenizer(folder, names))
    shards = {name: _tensor_sizes(folder / name) for name in shard_names(folder)}
    if (folder / INDEX).exists():
        for tensor, shard in _weight_map(folder).items():
            if tensor not in shards[shard]:
                raise ModelError(f"{folder / shard}: lacks tensor {tensor!r}, which {INDEX} puts there")
    return sum(sum(shard.values()) for shard in shards.values())


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


def _tensor_sizes(path: Path) -> dict[str, int]:
    """Return the number of values of each tensor in a safetensors file.

    Reads the header alone. safetensors compares it with the file's length: one that is cut or too long is refused.
    """
    if not path.is_file():
        raise ModelError(f"{path}: missing; fetch the model again")
    try:
        with safe_open(path, framework="numpy") as tensors:
            return {name: prod(tensors.get_slice(name).get_shape()) for name in tensors.offset_keys()}
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{path}: not a whole safetensors file ({path.stat().st_size} bytes; {reason}): fetch it again "
            "(in a Git clone: git lfs pull)"
        ) from None
