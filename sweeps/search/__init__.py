"""What to run next, and what to stop or go on with: no Ray, no SLURM here."""
