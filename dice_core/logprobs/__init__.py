"""A model and token ids in, log-probs of responses out: prompt groups packed into rows."""
