"""Synthetic data sets in real layouts: for trying things out and for tests."""
