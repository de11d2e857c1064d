"""The one pass over raw files: problems, facts, copies, repaired labels, slices."""
