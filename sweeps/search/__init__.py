"""What to run next, and what to stop or continue: no Ray, no SLURM here."""
