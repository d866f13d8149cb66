"""Settings as types: their base class, Kubernetes quantities, times, overrides, seeds. Every room may use it."""
