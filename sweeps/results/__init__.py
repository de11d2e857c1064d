"""Where a sweep stands and what came out."""
