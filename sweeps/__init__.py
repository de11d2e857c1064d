"""A search space becomes a stage tree of trials, and the best of them."""
