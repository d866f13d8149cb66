"""Where a model can come from: the Hub, a folder, storage, or a GGUF file. Each becomes a folder of safetensors here.

Says what a source is and brings it to this machine; `importing.py` checks and publishes it.
"""

import errno
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from dice_core.hub_access import is_hub_out_of_reach
from dice_core.models.files import (
    INDEX,
    WEIGHTS,
    ModelError,
    check_names,
    is_model_file,
    model_file_names,
    shard_names,
    small_file_patterns,
)
from dice_core.models.hub_download import download
from dice_core.storage import layout
from dice_core.storage.address import open_storage
from dice_core.storage.manifest import Manifest, describe_file, fetch_files, read_manifest

# Not the Hub's: there is no room for its files here, or no right to write them.
_LOCAL_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}
_ALLOWED = "a Hub id (org/name), a folder, s3://bucket/prefix, or a .gguf file"
# ./folder is none.
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True)
class Source:
    """A model that can be imported."""

    kind: Literal["hub", "folder", "storage", "gguf"]
    address: str
    revision: str
    identity: str
    """What tells two sources apart without reading all their bytes."""
    manifest: Manifest | None = None
    """Of a model that an import or a training published."""


def find_source(source: str, revision: str) -> Source:
    """Recognise a source.

    A Hub model is identified by its id and revision (a branch that moves on stays the same), a GGUF file by its
    content, a published model by its manifest, other folders by the names, sizes and times of their files.

    Raises:
        ModelError: no such thing, or a revision where there are none.
        StorageError: the address cannot be read.
    """
    if not source.strip():
        # A path that is empty would be the current folder.
        raise ModelError(f"source: is empty; allowed: {_ALLOWED}")
    path = Path(source.removeprefix("file://")).expanduser()
    is_address = source.startswith("s3://")
    if not is_address and not path.exists() and _HUB_ID.fullmatch(source) and not source.endswith(".gguf"):
        return Source("hub", source, revision, f"hub {source}@{revision}")
    if revision:
        raise ModelError(f"{source}: revision {revision!r} is only for models of the Hub (org/name): leave it out")
    if source.endswith(".gguf"):
        if not path.is_file():
            raise ModelError(f"{source}: no such file; a GGUF file must be on this machine")
        return Source("gguf", str(path), "", f"gguf {describe_file(path).sha256}")
    if not is_address and path.is_file():
        raise ModelError(f"{source!r}: a file that is no model; allowed: {_ALLOWED}")
    if not is_address and not path.is_dir():
        raise ModelError(f"{source!r}: no such folder; allowed: {_ALLOWED}")
    address = source if is_address else str(path.absolute())
    manifest = read_manifest(address)
    if manifest is not None:
        return Source("storage", address, "", f"published {manifest.content_digest}", manifest)
    found = [f"{item.key} {item.size}" for item in open_storage(address).list() if "/" not in item.key]
    if not is_address:
        found += [f"{item.name} {item.stat().st_mtime_ns}" for item in sorted(path.iterdir())]
    return Source("storage" if is_address else "folder", address, "", "files " + _digest([address, *found]))


def bring(source: Source, folder: Path, with_code: bool) -> Path:
    """Bring a model to this machine.

    Args:
        source: of find_source.
        folder: empty; takes what has to be downloaded or converted.
        with_code: bring Python files as well.

    Returns:
        A folder with the model (not necessarily `folder`), not yet verified.

    Raises:
        ModelError: it is not there, may not be read, or its weights are pickle.
        StorageError: an object of storage is missing or changed.
    """
    if source.kind == "hub":
        return _from_hub(source, with_code)
    if source.kind == "gguf":
        _from_gguf(Path(source.address), folder)
        return folder
    if source.kind == "storage":
        _from_storage(source, folder, with_code)
        return folder
    return Path(source.address)


def _from_hub(source: Source, with_code: bool) -> Path:
    """Download from the Hub into its own cache, which resumes and is shared with other programs."""
    from huggingface_hub import HfApi, errors

    is_out_of_reach = is_hub_out_of_reach()
    # The small files first: the index among them says which weights are wanted, so that no second copy in another
    # form (consolidated.safetensors, original/) is downloaded.
    small = [*small_file_patterns(with_code), INDEX]
    try:
        folder = download(source.address, small, source.revision or None, is_offline=is_out_of_reach)
        shards = shard_names(folder)
        # The commit and not the branch: it may have moved in between.
        download(source.address, shards, folder.name, is_offline=is_out_of_reach)
        if not is_out_of_reach and not all((folder / shard).exists() for shard in shards):
            check_names(HfApi().list_repo_files(source.address, revision=folder.name), source.address)
    except (OSError, ValueError, errors.EntryNotFoundError) as error:
        raise ModelError(_explain_hub(source, error)) from None
    return folder


def _explain_hub(source: Source, error: Exception) -> str:
    from huggingface_hub import constants, errors

    name = source.address + (f"@{source.revision}" if source.revision else "")
    if isinstance(error, errors.GatedRepoError):
        return f"{name}: access is restricted: accept its terms on the Hub and set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{name}: no such folder here and no such model on the Hub (a private one needs HF_TOKEN)"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{name}: the model has no such revision: take a branch, a tag or a commit of it"
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return (
            f"{name}: no such folder here, and the Hub cannot be reached ({_why_unreachable(error)}): "
            "check the network and HF_ENDPOINT, or bring the model as a folder"
        )
    if isinstance(error, OSError) and error.errno in _LOCAL_FAULTS:
        return (
            f"{name}: the download cannot be kept in {constants.HF_HUB_CACHE} ({error.strerror}): make room there, let "
            f"user {os.geteuid()} write there, or set HF_HUB_CACHE to another folder"
        )
    return f"{name}: the Hub did not deliver it: {_first_line(error)}"


def _why_unreachable(error: Exception) -> str:
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    return _first_line(error.__cause__) if error.__cause__ else f"no connection to {constants.ENDPOINT}"


def _from_storage(source: Source, folder: Path, with_code: bool) -> None:
    if source.manifest is not None:
        wanted = [name for name in source.manifest.files if is_model_file(name, with_code)]
        fetch_files(source.address, source.manifest, folder, wanted)
        return
    storage = open_storage(source.address)
    present = [item.key for item in storage.list() if "/" not in item.key]
    if not present:
        raise ModelError(f"{source.address}: nothing is there: correct the address")
    check_names(present, source.address)
    if INDEX in present:
        storage.download(INDEX, folder / INDEX)
    shards = shard_names(folder)
    for name in model_file_names(present, shards, with_code):
        if name not in present:
            raise ModelError(f"{layout.join(source.address, name)}: missing; the model is not complete")
        storage.download(name, folder / name)


def _from_gguf(path: Path, folder: Path) -> None:
    """Write a GGUF file's model as float32 safetensors.

    float32 and not bfloat16: its weights are small integers times a scale, which float32 holds exactly. Rounding them
    again would also round away what the first training steps change.
    """
    try:
        import torch
    except ImportError:
        raise ModelError(
            f"{path}: a GGUF file is converted where PyTorch is installed: run `dice import-model` in the train image "
            "(or on your machine), then give its s3:// address"
        ) from None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **place)
        model: Any = AutoModelForCausalLM.from_pretrained(path.parent, dtype=torch.float32, **place)
    # The GGUF reader fails in many ways on a file that is cut or of an unknown architecture.
    except Exception as error:
        reason = "it is truncated, copy it again" if _is_truncated(path) else _first_line(error)
        raise ModelError(f"{path}: cannot be read as a GGUF model: {reason}") from None
    # The weights are whole numbers no longer, but transformers would still write the file's marks into the config.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # Titles and paths of the one who made the file: they tell nothing about this copy.
    model.config._name_or_path = ""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if not (folder / WEIGHTS).exists() and not (folder / INDEX).exists():
        raise ModelError(f"{path}: transformers wrote no safetensors for it")


def _is_truncated(path: Path) -> bool:
    """Return whether a GGUF file ends before what its header promises. Takes seconds: for a file that was not read."""
    from gguf import GGUFReader

    try:
        GGUFReader(path)
    except IndexError:
        return True
    except ValueError as error:
        # numpy's words for a view beyond the end of the file.
        return "reshape" in str(error) or "larger dtype" in str(error)
    except Exception:
        return False
    return False


def _digest(lines: Iterable[str]) -> str:
    return sha256("\n".join(lines).encode()).hexdigest()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
