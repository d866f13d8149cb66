"""Runs on Kubeflow Pipelines: submitted, scheduled, followed, retried."""
