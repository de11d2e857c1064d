"""What a run's report shows."""
