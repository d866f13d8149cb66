"""vLLM: responses of a model to prompts, token ids in and token ids out."""
