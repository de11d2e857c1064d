"""From a search space to a tree of stages."""
