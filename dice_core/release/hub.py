"""A model on its way to a repository of the Hugging Face Hub: private unless somebody says otherwise, in one commit.

Which models may go is decided elsewhere (commands/push.py).
"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dice_core.models.cache import fetch_model
from dice_core.models.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_model_file
from dice_core.progress import doing, log
from dice_core.release.model_card import CARD
from dice_core.storage.manifest import Manifest, fetch_files, require_manifest

if TYPE_CHECKING:
    from huggingface_hub import HfApi


class HubError(RuntimeError):
    """The Hub did not take a model. The message is one line."""


@dataclass(frozen=True)
class Upload:
    """What goes where."""

    model_uri: str
    repository: str
    """org/name"""
    is_public: bool
    branch: str
    """Empty: the repository's own, main."""
    sizes: dict[str, int]
    """Bytes of each file by its name, the card among them."""
    card: str
    adapter_config: str = ""
    """The adapter goes, with this config, and not the model."""

    @classmethod
    def of(cls, model_uri: str, manifest: Manifest, card: str, **where: Any) -> "Upload":
        """Plan the upload of a model: its own files, and of the rest of what its stage made only the card."""
        sizes = {name: entry.size for name, entry in manifest.files.items() if is_model_file(name)}
        return cls(model_uri, sizes={**sizes, CARD: len(card.encode())}, card=card, **where)

    @classmethod
    def of_adapter(cls, model_uri: str, manifest: Manifest, card: str, config: str, **where: Any) -> "Upload":
        """Plan the upload of the adapter beside a model, with a config that names its base."""
        sizes = {_name(ADAPTER_WEIGHTS): manifest.files[ADAPTER_WEIGHTS].size}
        sizes |= {_name(ADAPTER_CONFIG): len(config.encode()), CARD: len(card.encode())}
        return cls(model_uri, sizes=sizes, card=card, adapter_config=config, **where)


def upload(plan: Upload, message: str) -> str:
    """Send a model to the Hub; the repository is made where there is none.

    Args:
        plan: what goes where.
        message: of the commit.

    Returns:
        Address of the commit.

    Raises:
        HubError: there is no token or no right, or the repository is public and nobody said that it may be.
        StorageError: the model is gone, or not what its manifest says.
    """
    from huggingface_hub import HfApi, get_token

    if not get_token():
        raise HubError(f"{plan.repository}: no token for the Hub: set HF_TOKEN to one that may write there")
    api = HfApi()
    with _explained(plan.repository):
        # First, so that a repository that cannot be written is known before the model is fetched.
        api.create_repo(plan.repository, private=not plan.is_public, exist_ok=True)
        if not plan.is_public and not api.model_info(plan.repository).private:
            raise HubError(f"{plan.repository}: is public: --public says that this model may be")
        if plan.branch:
            api.create_branch(plan.repository, branch=plan.branch, exist_ok=True)
    with _files(plan) as files:
        return _commit(api, plan, files, message)


@contextmanager
def _files(plan: Upload) -> Iterator[dict[str, bytes | Path]]:
    """Yield what goes by its name in the repository: files of this machine, or their content."""
    files: dict[str, bytes | Path] = {CARD: plan.card.encode()}
    if not plan.adapter_config:
        folder = fetch_model(plan.model_uri)
        yield files | {name: folder / name for name in plan.sizes if name != CARD}
        return
    files[_name(ADAPTER_CONFIG)] = plan.adapter_config.encode()
    with tempfile.TemporaryDirectory(prefix="dice-") as scratch:
        manifest = require_manifest(plan.model_uri)
        fetched = fetch_files(plan.model_uri, manifest, Path(scratch), [ADAPTER_WEIGHTS])
        yield files | {_name(ADAPTER_WEIGHTS): fetched[ADAPTER_WEIGHTS]}


def _name(path: str) -> str:
    """Return what a file of an adapter is called in a repository, where it lies at the top."""
    return path.rpartition("/")[2]


def _commit(api: "HfApi", plan: Upload, files: Mapping[str, bytes | Path], message: str) -> str:
    """Send files in one commit; return its address."""
    from huggingface_hub import CommitOperationAdd

    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
    num_bytes = sum(plan.sizes.values())
    log(f"push: {len(files)} files, {num_bytes / 1e6:,.1f} MB, to {plan.repository}")
    with _explained(plan.repository), doing(f"uploading to {plan.repository}"):
        done = api.create_commit(
            plan.repository, operations=operations, commit_message=message, revision=plan.branch or None
        )
    return str(done.commit_url)


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Turn the errors of the Hub's client into one line."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "?"
        remedies = {401: "HF_TOKEN is no valid token", 403: "HF_TOKEN has no right to write there"}
        reason = remedies.get(status, "") if isinstance(status, int) else ""
        raise HubError(f"{repository}: the Hub answers {status}: {reason or _first_line(error)}") from None
    except HFValidationError as error:
        raise HubError(f"{repository}: {_first_line(error)}") from None
    except HubError:
        raise
    except Exception as error:
        # Its client has a transport of its own, whose errors are those of no module that is promised.
        if not type(error).__module__.partition(".")[0].startswith(("httpx", "httpcore", "hf_xet")):
            raise
        raise HubError(f"{repository}: cannot reach the Hub ({_first_line(error)}): try again") from None


def _first_line(error: Exception) -> str:
    return " ".join(str(error).strip().partition("\n")[0].split()) or type(error).__name__
