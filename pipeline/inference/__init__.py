"""From images to predictions on their raw grid."""
