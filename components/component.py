"""How a function of this package becomes a component of Kubeflow Pipelines (KFP), and how a pod calls it.

KFP's lightweight components carry their source and a script that unpacks it. A workflow keeps each task several times
and has to fit into etcd, so that here, as in KFP's containerized components, the image has the source.
"""

import os
from collections.abc import Callable
from typing import Any

from kfp import dsl

_COMMAND = ["python3", "-m", "components", "kfp.dsl.executor_main"]
"""__main__.py finds the function for KFP's executor. Named here, for kfp.local starts only what names it."""


def component(image: str) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator: where pipelines are compiled it makes a component, in a pod the function stays as it is.

    Args:
        image: that has this package.
    """

    def declare(function: Callable[..., Any]) -> Any:
        # KFP's own sign that its executor runs: it then has no decorators either.
        if os.environ.get("_KFP_RUNTIME") == "true":
            return function
        declared = dsl.component(function, base_image=image, target_image=image, install_kfp_package=False)
        declared.component_spec.implementation.container.command = _COMMAND
        return declared

    return declare
