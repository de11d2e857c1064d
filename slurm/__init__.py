"""A recipe and resources become ranks that run the pipeline, here or on a cluster."""
