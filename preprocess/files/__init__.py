"""Single image files in and out."""
