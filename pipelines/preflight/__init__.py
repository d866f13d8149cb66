"""Checks, line by line, that a cluster has what a run needs before the run starts."""
