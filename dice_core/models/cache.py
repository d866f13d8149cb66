"""Models from storage on this machine: downloaded and verified once, for every process and every stage.

One that lies in a folder of this machine is verified and used there.

`loading.py` loads them. Nothing is deleted here: whoever owns the disk empties it.
"""

import os
from pathlib import Path

from dice_core.models.files import ModelError, ModelKind, is_model_file, trusts_remote_code, verify_model_folder
from dice_core.models.fitting import check_parts_fit, needs_check
from dice_core.progress import doing, log
from dice_core.storage.address import open_storage
from dice_core.storage.contract import StorageError
from dice_core.storage.folder import FolderStorage
from dice_core.storage.manifest import Manifest, check_files, describe_file, fetch_files, require_manifest


def require_kind(manifest: Manifest, uri: str, kind: ModelKind) -> None:
    """Check that a published model is of a kind. What was trained, or imported before there were kinds, answers.

    Raises:
        ModelError: it is of the other one.
    """
    found = manifest.settings.get("kind", "language-model") if manifest.stage == "import-model" else "language-model"
    if found != kind:
        raise ModelError(
            f"{uri}: holds a {found}, where a {kind} is needed: give another model, or another way to use this one"
        )


def fetch_model(uri: str, cache_dir: Path | None = None, *, kind: ModelKind = "language-model") -> Path:
    """Return a local folder with a model from storage, downloaded and verified once for each machine.

    A model that lies in a folder is used in place, verified each time. Others are kept by the digest of their content.
    Several processes may ask at once: one downloads, the others wait.
    A download that was cut goes on with the files it lacks.

    Args:
        uri: where an import or a training published it.
        cache_dir: where models are kept; by default the variable DICE_CACHE, or ~/.cache/dice/models.
        kind: what it has to be: a reward model answers nothing, and only a reward model gives rewards.

    Raises:
        StorageError: no finished model is there, it was changed, or the cache cannot be written.
        ModelError: what is there is no model, or one of another kind, or an earlier version, which checked less, has
            imported it and it fails now.
    """
    manifest = require_manifest(uri)
    if manifest.skipped:
        raise ModelError(f"{uri}: holds no model: its stage was skipped ({manifest.skipped})")
    require_kind(manifest, uri, kind)
    folder = fetch_as_it_is(uri, manifest, cache_dir)
    if needs_check(manifest):
        try:
            check_parts_fit(folder, trusts_remote_code(folder), kind=kind)
        except ModelError as error:
            raise ModelError(f"{uri}: imported by an earlier version, which checked less: {error}") from None
    return folder


def fetch_as_it_is(uri: str, manifest: Manifest, cache_dir: Path | None = None) -> Path:
    """Return a local folder with a model whose files are those of its manifest; see fetch_model."""
    from filelock import FileLock

    if in_place := _verified_in_place(uri, manifest):
        return in_place
    cache = cache_dir or Path(os.environ.get("DICE_CACHE") or "~/.cache/dice/models").expanduser()
    folder, unfinished = cache / manifest.content_digest, cache / f"{manifest.content_digest}.unfinished"
    # It got its name when it was complete.
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with doing(f"waiting for another process that downloads {uri}"):
            lock = FileLock(cache / f"{manifest.content_digest}.lock").acquire()
    except OSError as error:
        raise StorageError(
            f"{cache}: user {os.geteuid()} cannot write the model cache ({error.strerror}): let it write there (a "
            "volume: chown of its root), or set DICE_CACHE to another folder"
        ) from None
    with lock:
        if not folder.is_dir():
            names = [name for name in manifest.files if is_model_file(name)]
            kept = _keep_whole_files(unfinished, manifest)
            log(f"model: downloading {len(names) - len(kept)} of {len(names)} files of {uri}")
            with doing(f"downloading {uri}"):
                fetch_files(uri, manifest, unfinished, [name for name in names if name not in kept])
            verify_model_folder(unfinished)
            os.replace(unfinished, folder)
    return folder


def _verified_in_place(uri: str, manifest: Manifest) -> Path | None:
    """Return the folder that an address means, verified; None: it is elsewhere, or holds more than the manifest names.

    A library that is given the folder would read the rest too.
    """
    storage = open_storage(uri)
    if not isinstance(storage, FolderStorage):
        return None
    folder = Path(storage.uri)
    names = [name for name in manifest.files if is_model_file(name)]
    if foreign := sorted({path.name for path in folder.iterdir() if is_model_file(path.name)} - {*names}):
        log(f"model: {uri} is copied, since its manifest does not name {foreign[0]}")
        return None
    num_bytes = sum(manifest.files[name].size for name in names)
    log(f"model: {uri} is checked and used where it is ({num_bytes / 1e6:,.0f} MB)")
    with doing(f"checking {uri}"):
        check_files(folder, manifest, names)
    verify_model_folder(folder)
    return folder


def _keep_whole_files(unfinished: Path, manifest: Manifest) -> set[str]:
    """Remove what a killed download left half done; return the names of what it left whole."""
    kept = set()
    for path in unfinished.iterdir() if unfinished.is_dir() else ():
        if path.name in manifest.files and describe_file(path) == manifest.files[path.name]:
            kept.add(path.name)
        else:
            path.unlink()
    return kept
