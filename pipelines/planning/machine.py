"""How fast this machine is: matrix products a second, and the seconds that Python takes to load torch.

Measured when a run on CPUs is planned, so that its plan holds on other machines too, and while something else runs.
"""

import subprocess
import sys
import time
from dataclasses import dataclass

from dice_core.settings.base import ConfigError, DType
from pipelines.demo import precision

_TIMEOUT = 300.0


@dataclass(frozen=True)
class MachineSpeed:
    """Operations a second of products of 512 x 512 matrices, by format, and the seconds of an import."""

    operations: dict[str, float]
    import_seconds: float
    """Of torch and transformers, in a fresh process."""

    def of(self, dtype: DType) -> float:
        """Return the operations a second in a format."""
        return self.operations[dtype]


def measure_speed() -> MachineSpeed:
    """Measure this machine for some seconds.

    Raises:
        ConfigError: torch does not work here.
    """
    start = time.monotonic()
    command = [sys.executable, "-c", "import torch, transformers; transformers.AutoModelForCausalLM"]
    done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT, check=False)
    import_seconds = time.monotonic() - start
    products = precision.measure()
    if done.returncode or not products:
        raise ConfigError("this machine's speed cannot be measured: torch does not load here, run make install")
    per_product = 2 * precision.SIZE**3
    return MachineSpeed({name: per_product * number for name, number in products.items()}, import_seconds)
