"""Ranks on this machine. Knows no SLURM."""
