"""The inner chunk follows the patch."""

from __future__ import annotations

import numpy as np
import pytest

from segfleet.preprocess.stores.chunks import LARGEST, SMALLEST, chunk_of


@pytest.mark.parametrize(
    "patch, shape, voxel_bytes, expected",
    [
        ((64, 96, 96), (128, 256, 256), 2, (32, 32, 32)),
        ((128, 128, 128), (200, 400, 400), 2, (32, 32, 32)),
        ((128, 128, 128), (155, 240, 240), 8, (32, 32, 32)),
        ((1, 512, 512), (1, 1000, 800), 3, (1, 128, 256)),
        ((1, 256, 256), (1, 256, 320), 1, (1, 256, 320)),
        ((40, 56, 40), (36, 50, 35), 2, (36, 50, 35)),
        ((32, 48, 32), (36, 50, 35), 2, (36, 50, 35)),
        ((64, 128, 128), (110, 280, 280), 2, (16, 32, 64)),
        ((8, 8, 8), (6, 5, 4), 2, (6, 5, 4)),
        ((1, 1024, 1024), (40, 2000, 2000), 12, (1, 128, 128)),
    ],
)
def test_chunks_follow_the_patch(patch, shape, voxel_bytes, expected):
    chunk = chunk_of(patch, shape, voxel_bytes)
    held = int(np.prod(chunk)) * voxel_bytes
    assert chunk == expected
    assert held <= LARGEST and (
        held >= SMALLEST or all(c >= min(p, s) for c, p, s in zip(chunk, patch, shape, strict=True))
    )
