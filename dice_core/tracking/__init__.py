"""Curves and records of a run in trackers, as it goes: TensorBoard, MLflow, W&B. No stage waits for one."""
