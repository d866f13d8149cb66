"""Where training runs: processes of this machine, or pods of a cluster."""
