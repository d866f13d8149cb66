"""DICE: align a language model with its own DPO implicit reward (arXiv 2406.09760).

The algorithm and its effects. Knows nothing of Kubeflow Pipelines; pipelines and the command line call `stages`.
"""

__version__ = "0.1.0"
