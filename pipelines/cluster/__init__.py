"""Where pods run on a Kubernetes cluster, and what a person sees of them."""
