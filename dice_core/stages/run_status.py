"""How a run has ended, as far as what it left says it. Loads no torch."""

from dice_core.stages.place import Place
from dice_core.stages.table import EVALUATE
from dice_core.storage.run_contents import RunContents
from dice_core.tracking.feed import Status


def run_status(contents: RunContents, num_iterations: int) -> Status | None:
    """Return FINISHED or FAILED; None for a run that still works, or was stopped.

    A run that its gate ended is finished. One that failed and was continued has taken its failures back.

    Args:
        contents: what the run has left.
        num_iterations: planned.
    """
    if contents.failures:
        return "FAILED"
    for iteration in range(1, num_iterations + 1):
        evaluated = contents.manifests.get(Place(EVALUATE.name, iteration).below)
        if evaluated is None:
            return None
        if not evaluated.metrics.get("accepted"):
            break
    return "FINISHED"
