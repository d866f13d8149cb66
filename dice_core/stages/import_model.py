"""Stage import-model: bring a model into storage once."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dice_core.models import importing
from dice_core.models.files import model_kind
from dice_core.progress import log
from dice_core.settings.base import Values
from dice_core.stages.attempts import attempt
from dice_core.stages.judge_models import kind_for
from dice_core.stages.place import Artifact, show
from dice_core.stages.run_settings import read_task
from dice_core.stages.runner import StageReport, scratch_folder
from dice_core.stages.table import IMPORT_MODEL, WARM_START_TRAINING
from dice_core.storage import layout
from dice_core.storage.manifest import clear_stage, fetch_files, read_manifest, require_manifest
from dice_core.storage.probe import require_writable
from dice_core.training.settings import TrainingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def import_model(
    source: str,
    output_uri: str,
    *,
    run_uri: str = "",
    revision: str = "",
    trust_remote_code: bool = False,
    kind: str = "language-model",
    overwrite: bool = False,
) -> StageReport:
    """Bring a model into storage once: a Hub id, a folder, an s3:// address or a GGUF file.

    Args:
        source: the model: a Hub id, a folder, an s3:// address or a GGUF file.
        output_uri: where the model goes; runs look in ROOT/models/<name>.
        run_uri: the run that needs the model; if the import fails, the reason is left there.
        revision: branch, tag or commit of a Hub model.
        trust_remote_code: let code inside the model run, here and wherever the model is loaded.
        kind: language-model, or reward-model: a sequence classification model with one label, to judge or to reward.
        overwrite: first delete the model at the output.

    Raises:
        ModelError: it cannot be read, is cut, or is not safetensors.
    """
    wanted = model_kind(kind)
    with attempt(IMPORT_MODEL, layout.import_for_run(run_uri, output_uri) if run_uri else ""):
        if overwrite:
            clear_stage(output_uri, IMPORT_MODEL.name)
        was_complete = read_manifest(output_uri) is not None
        if not was_complete:
            require_writable(output_uri)
        manifest = importing.import_model(
            source,
            output_uri,
            revision=revision,
            trust_remote_code=trust_remote_code,
            kind=wanted,
            # A reward model has no head for text; its runner is another one.
            check_model=_check_structure if wanted == "language-model" else None,
        )
    return StageReport(output_uri, "already complete" if was_complete else "completed", manifest.metrics)


def _check_structure(model: "PreTrainedModel") -> None:
    # Loads torch, which the check before it has asked for.
    from dice_core.logprobs.trial import check_structure

    check_structure(model)


def _check_adapters(uri: str, sections: Mapping[str, Values]) -> None:
    """Check that a policy has the layers that adapters are for: training, which does too, comes hours later.

    Raises:
        ConfigError: it has not.
    """
    for section in ("training", WARM_START_TRAINING):
        config = TrainingConfig.parse(sections.get(section), section)
        if config.lora_rank:
            from dice_core.training.adapters import check_layers

            with scratch_folder() as folder:
                manifest = require_manifest(uri)
                fetch_files(uri, manifest, folder, [n for n in manifest.files if not n.endswith(".safetensors")])
                check_layers(folder, config, section)


def import_model_task(settings_uri: str, role: str, metrics: Artifact) -> None:
    """Import a model of a run for all runs below its root, as a task of a pipeline; see import_model.

    Args:
        settings_uri: of the run.
        role: what the model is to the run: policy, reference, judge or reward. Of the last two the settings say which
            kind of model that is, and whether it is used at all.
        metrics: of the task.
    """
    task = read_task(settings_uri, IMPORT_MODEL.name)
    source, kind = task.plan[f"{role}_source"], kind_for(role, task.sections)
    if kind is None:
        reason = f"the settings of the run have no use for {source or 'a model'} as {role}"
        log(f"{IMPORT_MODEL.name}: skipped: {reason}")
        report = StageReport("", "skipped", {}, reason)
    else:
        uri = task.imported_uri(role)
        report = import_model(source, uri, run_uri=task.run_uri, kind=kind)
        if role == "policy":
            with attempt(IMPORT_MODEL, layout.import_for_run(task.run_uri, uri)):
                _check_adapters(uri, task.sections)
    show(report, task.place, metrics)
