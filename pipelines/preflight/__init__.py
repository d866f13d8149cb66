"""What a cluster must have before a run starts, checked line by line."""
