"""Stage extrapolate: a policy moved further along the step that training made.

No stage of a pipeline: which of several policies is worth it, `dice evaluate` says.
"""

import math
import shutil
from functools import partial

from dice_core.progress import Progress, doing
from dice_core.settings.base import ConfigError
from dice_core.stages.attempts import leaves_reason
from dice_core.stages.models_agree import require_one_tokenizer, require_other_weights
from dice_core.stages.runner import StageContext, StageReport, run_stage
from dice_core.stages.table import EXTRAPOLATE
from dice_core.storage.manifest import Manifest, Metric, publish_files


@leaves_reason(EXTRAPOLATE)
def extrapolate(
    policy_uri: str, previous_uri: str, output_uri: str, *, alpha: float = 0.3, overwrite: bool = False
) -> StageReport:
    """Move a policy further along its last step: policy + alpha * (policy - previous).

    Args:
        policy_uri: a model.
        previous_uri: the model that it was trained from, or one before that.
        output_uri: where the new model goes.
        alpha: how much further, in steps, above 0: 0.3 to 0.5 is usual, 1 is as far again.
        overwrite: first delete what this stage left at its output.

    Raises:
        ModelError: the two are not one architecture, or the new weights would not be finite.
    """
    if not (math.isfinite(alpha) and alpha > 0):
        raise ConfigError(f"alpha: must be a number above 0, such as 0.3, got {alpha}")
    return run_stage(
        EXTRAPOLATE,
        output_uri,
        partial(_move, alpha=alpha),
        settings={},
        arguments={"alpha": alpha},
        overwrite=overwrite,
        inputs={"policy": policy_uri, "previous": previous_uri},
    )


def _move(context: StageContext, *, alpha: float) -> Manifest:
    """Write the new weights beside copies of the policy's other files, check them, and publish them."""
    from dice_core.models.cache import fetch_model
    from dice_core.models.extrapolation import extrapolate as extrapolate_weights
    from dice_core.models.files import is_model_file, verify_model_folder

    require_one_tokenizer(context, "policy", ("previous",))
    require_other_weights(context, "policy", "previous")
    policy, previous = (fetch_model(context.inputs[name].uri) for name in ("policy", "previous"))
    folder, progress = context.folder / "model", Progress("extrapolate", "MiB")
    sizes = extrapolate_weights(
        policy, previous, folder, alpha, lambda done, total: progress(done >> 20, max(1, total >> 20))
    )
    # A model that is used in place may have files of others beside it.
    for name in context.inputs["policy"].manifest.files:
        if is_model_file(name) and not name.endswith(".safetensors"):
            shutil.copy(policy / name, folder / name)
    metrics: dict[str, Metric] = {
        "num_parameters": verify_model_folder(folder),
        "relative_update": sizes.relative_update,
        "update_rounding_loss": sizes.rounding_loss,
        "seconds": context.seconds(),
    }
    digests = context.inputs["policy"].manifest.text_digests
    manifest = Manifest(files={}, metrics=metrics, text_digests=digests, **context.manifest_fields)
    with doing("uploading the model"):
        return publish_files(context.uri, {path.name: path for path in sorted(folder.iterdir())}, manifest)
