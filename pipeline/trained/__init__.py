"""Trained networks: opened, put together, chosen, brought in from elsewhere."""
