"""How the process of a stage begins, whichever program starts it: without torch where the stage loads no model."""

from dice_core.models.hidden_torch import hide_torch
from dice_core.stages.table import STAGES


def begin(stage: str) -> None:
    """Prepare this process for its stage; to be called before anything of the stage is loaded.

    Args:
        stage: its name; that of a command, or of nothing, needs no preparation.
    """
    if stage in STAGES and not STAGES[stage].loads_model:
        hide_torch()
