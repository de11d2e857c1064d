"""Raw layouts, one file each, found by name."""

from segfleet.core.plugins import paths

__path__ += paths("preprocess/readers")
