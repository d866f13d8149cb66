"""A run's plan: its stages in order, each with what it takes, and the sums.

stage_plans.py makes it; the numbers of a stage are of one attempt without waiting for nodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from pipelines.planning.memory import Memory
from pipelines.planning.ranges import Range, exactly
from pipelines.planning.rates import Rate


@dataclass(frozen=True)
class Use:
    """A use of a device's memory within a stage: each stage's largest one decides whether it fits."""

    what: str
    memory: Memory


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What one stage of a run, or of an iteration, takes. Bytes and tokens are of all its pods together."""

    title: str
    """Such as `iteration 1: train`."""
    num_pods: int = 1
    gpus_per_pod: int = 0
    uses: Sequence[Use] = ()
    """Of one GPU; of the process where it computes on a CPU. None: what is small."""
    host_bytes: float = 0.0
    """Of a pod's memory beside its GPUs; 0: small."""
    disk_bytes: float = 0.0
    """Of a pod's node."""
    read_bytes: Range = field(default_factory=lambda: exactly(0))
    """From S3."""
    written_bytes: Range = field(default_factory=lambda: exactly(0))
    tokens: Range | None = None
    """What it runs or samples; None: no data are known, or it runs none."""
    seconds: Range | None = None
    """Of its longest pod; None: no data are known."""
    is_beside: bool = False
    """It runs beside the stage before it."""

    @property
    def largest(self) -> Use | None:
        """Return the use that takes most of a device."""
        return max(self.uses, key=lambda use: use.memory.total, default=None)

    @property
    def gpu_seconds(self) -> Range | None:
        """Return the seconds of all GPUs that it holds."""
        return None if self.seconds is None else self.seconds * (self.num_pods * self.gpus_per_pod)


@dataclass(frozen=True)
class RunPlan:
    """All stages of a run, and what their numbers rest on."""

    name: str
    device: str
    """What a stage computes on, such as `A100 40 GiB`."""
    device_bytes: float
    """Of one GPU, or of this machine."""
    stages: Sequence[StagePlan]
    rates: Sequence[Rate]
    notes: Sequence[str]
    """Where shapes and counts are from, and what is not known."""
    refusals: Sequence[str] = ()
    """What cannot fit, a line each, with the setting to change."""
    changes: Sequence[str] = ()
    """Settings with which all of it fits; none where everything does, or no change of the plan's helps."""
    warnings: Sequence[str] = ()
    """What is close."""
    late: Sequence[str] = ()
    """Stages that may take longer than an attempt of them has."""

    @property
    def seconds(self) -> Range | None:
        """Return the time from the first stage to the last; None where a stage's is not known."""
        times = [stage.seconds for stage in self.stages if not stage.is_beside]
        return None if None in times else _sum([time for time in times if time])

    @property
    def gpu_seconds(self) -> Range | None:
        """Return the seconds of all GPUs."""
        times = [stage.gpu_seconds for stage in self.stages if stage.gpus_per_pod]
        return None if None in times else _sum([time for time in times if time])

    @property
    def read_bytes(self) -> Range:
        """Return what all stages read from S3."""
        return _sum([stage.read_bytes for stage in self.stages])

    @property
    def written_bytes(self) -> Range:
        """Return what all stages write to S3."""
        return _sum([stage.written_bytes for stage in self.stages])


def _sum(ranges: Sequence[Range]) -> Range:
    return Range(sum(r.low for r in ranges), sum(r.high for r in ranges))
