"""How fast this machine is: matrix products a second, and the seconds that Python takes to load torch.

Measured when a run on CPUs is planned, by the processor's time and not by the clock: the plan is that of a machine
that does nothing else, whatever runs there meanwhile.
"""

import resource
import subprocess
import sys
from dataclasses import dataclass

from dice_core.settings.base import ConfigError, DType
from pipelines.demo import precision

_TIMEOUT = 300.0


@dataclass(frozen=True)
class MachineSpeed:
    """Operations a second of products of 512 x 512 matrices, by format, and the seconds of an import."""

    operations: dict[str, float]
    import_seconds: float
    """Of torch and transformers, in a fresh process: the processor's."""

    def of(self, dtype: DType) -> float:
        """Return the operations a second in a format."""
        return self.operations[dtype]


def measure_speed() -> MachineSpeed:
    """Measure this machine for some seconds.

    Raises:
        ConfigError: torch does not work here.
    """
    before = _seconds_of_children()
    command = [sys.executable, "-c", "import torch, transformers; transformers.AutoModelForCausalLM"]
    done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT, check=False)
    import_seconds = _seconds_of_children() - before
    products = precision.measure()
    if done.returncode or not products:
        raise ConfigError("this machine's speed cannot be measured: torch does not load here, run make install")
    per_product = 2 * precision.SIZE**3
    return MachineSpeed({name: per_product * number for name, number in products.items()}, import_seconds)


def _seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
