"""A store and a recipe become checkpoints, predictions, scores and a report."""
