"""The training loop and what belongs to a step."""
