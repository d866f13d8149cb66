"""The interface of a backend, which runs a training job somewhere, and the errors it raises."""

from typing import Protocol

from dice_core.launch.settings import LaunchConfig


class LaunchError(RuntimeError):
    """Training did not succeed. First line: the cause and the exit code; then the last lines of each process."""


class FinalError(LaunchError):
    """Training failed, and would again: its pairs, its settings or its model are at fault. See LaunchError."""


class PassingError(LaunchError):
    """Its processes failed, or a pod of it went, and nobody has started them again. See LaunchError."""


class Backend(Protocol):
    """Runs a job to its end somewhere."""

    def run(self, job_uri: str, launch: LaunchConfig) -> None:
        """Start the job's processes and return when all have succeeded.

        A backend whose processes outlive it finds them again by the job's URI and goes on with them.

        Raises:
            LaunchError: anything else than success.
            ConfigError: the backend cannot run such a job.
        """
        ...
