"""The kinds of training jobs on a cluster, by the name that setting `launch.backend` has for each."""

from dice_core.launch.job_kind import JobKind
from dice_core.launch.pytorchjob import PYTORCH_JOB
from dice_core.launch.trainjob import TRAIN_JOB

JOB_KINDS: dict[str, JobKind] = {"pytorchjob": PYTORCH_JOB, "trainjob": TRAIN_JOB}
"""A backend that is not here trains where it is called."""
