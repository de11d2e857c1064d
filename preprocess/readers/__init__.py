"""Raw layouts, one file each, found by name."""
