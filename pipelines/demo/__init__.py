"""The whole loop on this machine: `make demo`."""
