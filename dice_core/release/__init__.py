"""A model's way out of its run: what its evaluation says, its card, model registries, the Hub."""
