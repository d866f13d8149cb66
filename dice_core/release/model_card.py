"""The card of a model: a README.md beside it that says what it is, what it was made from, and what was measured.

No manifest names the card. It is written for people, from manifests, and written anew when there is more to say: after
the training, and after the evaluation. Were it a file of the model, the model would change its digest with each word of
the card; and nobody who reads a model may trust what no manifest names, so nobody reads the card but people.
"""

import json
from collections.abc import Iterator, Mapping

from dice_core import __version__
from dice_core.progress import log, one_line
from dice_core.release.evaluated import Evaluated, find_evaluation
from dice_core.release.lineage import Lineage, Origin, read_lineage
from dice_core.storage import layout
from dice_core.storage.address import open_storage
from dice_core.storage.manifest import Manifest, Metric, require_manifest

CARD = "README.md"
_DIGITS = 12


def update_card(model_uri: str, evaluated: Evaluated | None = None) -> None:
    """Write the card of a model beside it, from what its run has made so far. One that fails is a line in the log.

    Args:
        model_uri: of a finished model.
        evaluated: what an evaluation says; by default the one in its run, if there is one.
    """
    try:
        text = write_card(model_uri, require_manifest(model_uri), evaluated or find_evaluation(model_uri))
        open_storage(model_uri).write_bytes(CARD, text.encode())
    except Exception as error:
        log(f"model card: {layout.join(model_uri, CARD)} was not brought up to date: {one_line(error)}")


def write_card(
    model_uri: str,
    manifest: Manifest,
    evaluated: Evaluated | None,
    *,
    is_public: bool = False,
    adapter_base: str = "",
) -> str:
    """Return the card of a model, in Markdown with the front matter of the Hugging Face Hub.

    Args:
        model_uri: of the model.
        manifest: of the model.
        evaluated: what an evaluation says of it; None: it was not evaluated.
        is_public: leave out the addresses of one's own storage, for readers elsewhere.
        adapter_base: the card goes with the adapter alone, which belongs to this model of the Hub.
    """
    lineage = read_lineage(model_uri, manifest)
    parts = [
        _front_matter(lineage, adapter_base),
        f"# {_title(model_uri)}",
        _introduction(model_uri, manifest, lineage, is_public, adapter_base),
        "## What was measured",
        _measured(evaluated, is_public),
        "## What it was made from",
        "\n".join(_made_from(lineage, is_public)),
        "## Settings of its training",
        _settings(manifest),
        f"Written by dice-suite {__version__} from the manifests of the run.",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(lineage: Lineage, adapter_base: str) -> str:
    """Return the Hub's metadata. A licence is left out: that of the weights and of the data is not known here."""
    values: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    values["tags"] = ["dice", "dpo", "alignment"]
    if adapter_base:
        values |= {"library_name": "peft", "base_model": adapter_base, "base_model_relation": "adapter"}
    elif lineage.base_model:
        values |= {"base_model": lineage.base_model, "base_model_relation": "finetune"}
    if lineage.datasets:
        values["datasets"] = lineage.datasets
    # JSON is YAML.
    return "\n".join(["---", *(f"{name}: {json.dumps(value)}" for name, value in values.items()), "---"])


def _title(uri: str) -> str:
    run, place = layout.run_of(uri), uri.rstrip("/").split("/")
    return f"{run}, {place[-2].replace('-', ' ')}" if run and len(place) > 1 else place[-1]


def _introduction(uri: str, manifest: Manifest, lineage: Lineage, is_public: bool, adapter_base: str) -> str:
    run, number = layout.run_of(uri), manifest.settings.get("iteration")
    if manifest.stage != "train":
        return f"A model that was imported from `{manifest.settings.get('source', '?')}`."
    what = f"iteration {number}" if number else "the warm start"
    base = f", which began with [{lineage.base_model}](https://huggingface.co/{lineage.base_model})"
    return (
        f"The policy of {what} of run `{run or '?'}`{base if lineage.base_model else ''}. It was trained by DPO on "
        "pairs of responses, ranked by the implicit reward of the policies before it (DICE, "
        f"[arXiv 2406.09760](https://arxiv.org/abs/2406.09760)).{_adapter(manifest, is_public, adapter_base)}"
    )


def _adapter(manifest: Manifest, is_public: bool, adapter_base: str) -> str:
    """Return what to say of the adapter that was trained; empty: there was none."""
    rank = manifest.settings.get("training", {}).get("lora_rank")
    if not rank:
        return ""
    if adapter_base:
        return f" This is its LoRA adapter of rank {rank} alone, for {adapter_base}; what was measured is both merged."
    place = "" if is_public else ", and lies beside this file too, in `adapter/`"
    return f" What was trained is a LoRA adapter of rank {rank}: it is merged into these weights{place}."


def _measured(evaluated: Evaluated | None, is_public: bool) -> str:
    if evaluated is None:
        return "It has not been evaluated."
    word = "better" if evaluated.is_promotable else "accepted, not shown to be better" if evaluated.is_accepted else ""
    lines = [f"**{word or 'refused'}**: {evaluated.reason}", "", "| measure | value |", "|---|---|"]
    lines += [f"| {name} | {_number(value)} |" for name, value in evaluated.verdict.items() if name != "reason"]
    return "\n".join([*lines, "", f"From `{_place(evaluated.uri, is_public)}`."])


def _made_from(lineage: Lineage, is_public: bool) -> Iterator[str]:
    yield "| what | where | content (SHA-256) |"
    yield "|---|---|---|"
    named: list[tuple[str, Origin | None]] = [("this model", lineage.models[0])]
    named += [("trained from, and reference" if i == 0 else "before", one) for i, one in enumerate(lineage.models[1:])]
    named += [("pairs", lineage.pairs), ("data", lineage.data)]
    for what, origin in named:
        if origin:
            yield f"| {what} | `{_address(origin, is_public)}` | `{origin.content_digest[:_DIGITS]}` |"


def _address(origin: Origin, is_public: bool) -> str:
    source = origin.manifest.settings.get("source") if origin.manifest else None
    commit = origin.manifest.settings.get("commit") if origin.manifest else None
    # The Hub's own name says more than the address of a copy of it.
    if commit:
        return f"{source}@{commit}"
    return _place(origin.uri, is_public) + ("" if origin.manifest else " (gone, or another by now)")


def _place(uri: str, is_public: bool) -> str:
    """Return an address, for readers elsewhere only what is below the root."""
    if not is_public:
        return uri
    run = layout.run_uri_of(uri)
    return uri.removeprefix(run.removesuffix(f"runs/{layout.run_of(uri)}")) if run else uri.rpartition("/")[2]


def _settings(manifest: Manifest) -> str:
    training: Mapping[str, object] = manifest.settings.get("training", {})
    shown = {**training, "seed": manifest.settings.get("seed"), **manifest.ran_by} if training else {}
    rows = [f"| {name} | {value} |" for name, value in shown.items() if value is not None]
    return "\n".join(["| setting | value |", "|---|---|", *rows]) if rows else "None: it was not trained here."


def _number(value: Metric) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
