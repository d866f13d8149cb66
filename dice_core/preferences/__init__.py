"""The model's own preferences: responses, implicit rewards, length penalty, and training pairs."""
