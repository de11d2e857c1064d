"""A stage tree driven by Ray Tune."""
