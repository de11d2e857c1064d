"""A real SLURM with pretended GPUs on one machine."""
