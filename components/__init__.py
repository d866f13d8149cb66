"""One thin Kubeflow Pipelines component per stage: a body of a few lines that calls dice_core.stages.

A body runs in a pod that has dice_core and nothing of this package: it imports what it uses. Storage addresses travel
as strings and each stage's own address follows from dice_core.storage.layout; the artifacts are for people.
"""
