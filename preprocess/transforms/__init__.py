"""Crop, normalise, resample; and the way back."""
