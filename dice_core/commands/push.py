"""Command push: a model goes to a repository of the Hugging Face Hub, with a card that says where it comes from."""

import json
import re
from typing import Any

from dice_core.commands.table import Answer
from dice_core.release.adapter import adapter_config
from dice_core.release.evaluated import Evaluated, find_evaluation, read_evaluation, require_model
from dice_core.release.hub import Upload, upload
from dice_core.release.model_card import write_card
from dice_core.settings.base import ConfigError
from dice_core.storage.contract import UnfitError
from dice_core.storage.manifest import Manifest

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", flags=re.ASCII)


def push(
    model_uri: str,
    repository: str,
    *,
    evaluation_uri: str = "",
    branch: str = "",
    public: bool = False,
    adapter: bool = False,
    dry_run: bool = False,
    force: bool = False,
    reason: str = "",
) -> Answer:
    """Send a model with its card to a repository of the Hugging Face Hub, private unless --public says otherwise.

    Args:
        model_uri: the model.
        repository: of the Hub, ORG/NAME; it is made where there is none. HF_TOKEN must be able to write it.
        evaluation_uri: the evaluation that the card tells of; by default the one beside the model in its run.
        branch: of the repository; by default main.
        public: everybody may read it.
        adapter: send the adapter that was trained, in place of the model; what it belongs to must be a model of the
            Hub.
        dry_run: only show what would be sent; asks nobody.
        force: send a model that its evaluation refused; needs --reason.
        reason: why, for the commit's message.
    """
    if force and not reason.strip():
        raise ConfigError("--force: needs --reason, which the commit's message tells")
    if not _REPOSITORY.fullmatch(repository):
        raise ConfigError(f"--repository: must be ORG/NAME, got {repository!r}")
    manifest = require_model(model_uri)
    evaluated = read_evaluation(evaluation_uri) if evaluation_uri else find_evaluation(model_uri)
    if evaluated:
        evaluated.require_of(model_uri, manifest)
        if not evaluated.is_accepted and not force:
            raise UnfitError(
                f"{model_uri}: not sent: {evaluated.uri} refused it ({evaluated.reason}); --force --reason TEXT sends "
                "it all the same"
            )
    plan = _plan(model_uri, manifest, evaluated, adapter, repository=repository, is_public=public, branch=branch)
    card = plan.card
    values = {"repository": repository, "public": public, "branch": branch or "main", "files": plan.sizes, "card": card}
    if dry_run:
        return Answer(_shown(plan), values | {"dry_run": True})
    told = f" (forced: {reason.strip()})" if force else ""
    address = upload(plan, f"{'Adapter of model' if adapter else 'Model'} {manifest.content_digest[:12]}{told}")
    return Answer(f"sent: {address}", values | {"dry_run": False, "commit": address})


def _plan(model_uri: str, manifest: Manifest, evaluated: Evaluated | None, adapter: bool, **where: Any) -> Upload:
    if not adapter:
        return Upload.of(model_uri, manifest, write_card(model_uri, manifest, evaluated, is_public=True), **where)
    config = adapter_config(model_uri, manifest)
    base = str(config["base_model_name_or_path"])
    card = write_card(model_uri, manifest, evaluated, is_public=True, adapter_base=base)
    return Upload.of_adapter(model_uri, manifest, card, json.dumps(config, indent=2), **where)


def _shown(plan: Upload) -> str:
    access = "public" if plan.is_public else "private"
    width = max(map(len, plan.sizes))
    files = [f"  {name.ljust(width)} {size:>15,} bytes" for name, size in sorted(plan.sizes.items())]
    total = f"{len(plan.sizes)} files, {sum(plan.sizes.values()) / 1e6:,.1f} MB"
    where = f"{plan.repository}, branch {plan.branch or 'main'}, {access} where it is made"
    return "\n".join([f"would send {plan.model_uri}", f"to {where}: {total}", *files, "", plan.card.rstrip()])
