"""Brings a model into storage once, as verified safetensors with config and tokenizer.

sources.py finds it, files.py says what a model folder is, upload.py carries it, cache.py fetches it later.
torch and transformers are imported when they are needed: `dice --help` does not wait for them.
"""

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dice_core.models.cache import fetch_as_it_is, require_kind
from dice_core.models.files import (
    CONFIG,
    GENERATION_CONFIG,
    TRUST_KEY,
    ModelError,
    ModelKind,
    model_file_names,
    read_config,
    shard_names,
    trusts_remote_code,
    verify_model_folder,
)
from dice_core.models.fitting import CHECKS, IMPORT_STAGE, check_parts_fit, needs_check
from dice_core.models.loading import load_tokenizer, load_tokenizer_files
from dice_core.models.sources import Source, bring, find_source
from dice_core.models.tokenizers import text_digests
from dice_core.models.upload import upload_model
from dice_core.models.weights import check_finite
from dice_core.progress import doing, log
from dice_core.storage.contract import UnfitError
from dice_core.storage.manifest import Manifest, Metric, publish_files, read_manifest, require_stage
from dice_core.storage.scratch import scratch_root

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FORMAT_VERSION = 1

Check = Callable[["PreTrainedModel"], None]
"""Raises ModelError for a model, on the meta device, that its users cannot run."""


def import_model(
    source: str,
    uri: str,
    *,
    revision: str = "",
    trust_remote_code: bool = False,
    kind: ModelKind = "language-model",
    check_model: Check | None = None,
) -> Manifest:
    """Bring a model into storage as verified safetensors with config and tokenizer; the manifest comes last.

    An import that was killed goes on with the files that storage lacks; a download from the Hub, with what its cache
    lacks.

    Args:
        source: a Hub id (org/name), a folder, an s3:// address, or the path of a GGUF file (becomes float32).
        uri: the model's own place.
        revision: branch, tag or commit of a Hub model.
        trust_remote_code: allow code inside the model to run, here and wherever the model or one trained from it is
            loaded.
        kind: what it has to be; no other kind is taken from the place either.
        check_model: a further check, of rooms that run the model.

    Returns:
        The manifest there; at once if the same source was imported before, by a version that checked as much.

    Raises:
        ModelError: the source cannot be found, is cut, is pickle, has parts that do not fit each other or weights that
            are not finite, or needs code that is not allowed.
        StorageError: storage cannot be used, or the place holds another model.
    """
    found = find_source(source, revision)
    identity = f"{IMPORT_STAGE} {_FORMAT_VERSION} {found.identity} {trust_remote_code}"
    identity += f" {kind}" if kind != "language-model" else ""
    fingerprint = sha256(identity.encode()).hexdigest()
    present = read_manifest(uri)
    if present is not None:
        require_kind(present, uri, kind)
        # Whoever asks for no revision of a Hub model takes what somebody has imported of it, without asking the Hub.
        is_any = found.kind == "hub" and not revision and present.settings.get("source") == source
        if is_any or fingerprint == present.fingerprint or _published_digest(found) == present.content_digest:
            return _checked_anew(uri, present, kind, check_model) if needs_check(present) else present
        require_stage(present, IMPORT_STAGE, uri)
        raise UnfitError(
            f"{uri}: holds a model from {_named(present.settings)}, not from "
            f"{_named({'source': source, 'revision': revision})}: import to another place, or pass --overwrite"
        )
    log(f"{IMPORT_STAGE}: {source}")
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dice-", dir=scratch_root()) as scratch:
        fields = {
            "stage": IMPORT_STAGE,
            "fingerprint": fingerprint,
            "settings": {"source": source, "revision": revision, "trust_remote_code": trust_remote_code, "kind": kind},
            "inputs": {"model": f"{source}@{found.manifest.content_digest}"} if found.manifest else {},
        }
        return _import(found, uri, Path(scratch), trust_remote_code, kind, fields, start, check_model)


def _checked_anew(uri: str, present: Manifest, kind: ModelKind, check_model: Check | None) -> Manifest:
    """Check a model in storage that was imported by a version that checked less, and write down that it passed.

    Its files stay as they are, and so do the results that were made with it.
    """
    log(f"{IMPORT_STAGE}: {uri}: imported by an earlier version, which checked less: checked anew")
    folder = fetch_as_it_is(uri, present)
    try:
        check_parts_fit(folder, trusts_remote_code(folder), check_model, kind=kind)
        check_finite(folder)
    except ModelError as error:
        raise ModelError(f"{uri}: imported by an earlier version, which checked less: {error}") from None
    return publish_files(uri, {}, replace(present, checks=CHECKS, text_digests=text_digests(load_tokenizer(folder))))


def _named(settings: Mapping[str, Any]) -> str:
    """Return where an imported model comes from, for people."""
    revision = settings.get("revision")
    return str(settings.get("source")) + (f"@{revision}" if revision else "")


def _published_digest(source: Source) -> str | None:
    return source.manifest.content_digest if source.manifest else None


def _import(
    source: Source,
    uri: str,
    scratch: Path,
    trust_remote_code: bool,
    kind: ModelKind,
    fields: dict[str, Any],
    start: float,
    check_model: Check | None,
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
    with doing("checking that its parts fit each other"):
        cleaned = check_parts_fit(folder, trust_remote_code, check_model, kind=kind)
    if cleaned is not None:
        cleaned.save_pretrained(scratch)
        files[GENERATION_CONFIG] = scratch / GENERATION_CONFIG
    metrics: dict[str, Metric] = {
        "num_parameters": num_parameters,
        "num_bytes": sum(path.stat().st_size for path in files.values()),
        "seconds": round(time.monotonic() - start, 1),
    }
    digests = text_digests(load_tokenizer_files(folder, trust_remote_code))
    made = Manifest(files={}, metrics=metrics, text_digests=digests, checks=CHECKS, **fields)
    return upload_model(uri, files, made)
