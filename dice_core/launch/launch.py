"""Starts a training job with the backend that the settings name.

The job is a JSON file in storage (training.job), its result a manifest beside it: a backend carries neither settings
nor data, so that processes on this machine and pods on a cluster are started the same way. Loads no torch.
"""

from dice_core.launch.backend import Backend
from dice_core.launch.settings import LaunchConfig, PodConfig
from dice_core.launch.torchrun import TorchrunBackend


def launch_training(job_uri: str, launch: LaunchConfig, pods: PodConfig | None = None) -> None:
    """Run a training job with the backend that the settings name.

    Args:
        job_uri: of the job.
        launch: which processes to start.
        pods: what their pods look like, for the backends of a cluster.

    Raises:
        LaunchError: a process failed or was stopped.
    """
    _backend(launch.backend, pods or PodConfig()).run(job_uri, launch)


def _backend(name: str, pods: PodConfig) -> Backend:
    if name == "torchrun":
        return TorchrunBackend()
    # Loads the Kubernetes client, which training on one machine does without.
    from dice_core.launch.cluster_backend import ClusterBackend

    return ClusterBackend(pods)
