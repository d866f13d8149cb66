"""One thin Kubeflow Pipelines component per stage: a body of a few lines that calls dice_core.stages.

The images have this package, and KFP's executor calls a body in it. A body imports what it uses, so that a pipeline is
compiled without the stages' packages. Where a task's inputs and results are follows from the address of the run's
settings and from its place; the artifacts are for people.
"""
