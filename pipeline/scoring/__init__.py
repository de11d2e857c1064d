"""Scores of whole cases on their raw grid."""
