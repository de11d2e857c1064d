"""What is hidden of a patch that a network is to reconstruct: cubes of voxels. He et al. 2022
(masked autoencoders)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from segfleet.core.errors import InputError
from segfleet.pipeline.sections import Mask


def check_mask(mask: Mask, patch: Sequence[int]) -> None:
    """Raises InputError if cubes are larger than the patch (z, y, x; flat: one slice), or if all or
    none of it would be hidden."""
    sizes = patch[1:] if patch[0] == 1 else patch
    if any(mask.block > size for size in sizes):
        raise InputError(
            f"data.mask.block: found {mask.block} voxels, but the patch is {list(sizes)}; expected "
            f"at most {min(sizes)}"
        )
    blocks = int(np.prod([-(-size // mask.block) for size in sizes]))
    if not 0 < round(mask.ratio * blocks) < blocks:
        raise InputError(
            f"data.mask: ratio {mask.ratio:g} of {blocks} block(s) of {mask.block} voxels in a "
            f"patch of {list(sizes)} hides all or nothing; take smaller blocks or another ratio"
        )


def hidden(mask: Mask, patch: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """(z, y, x) bool, True in a share `ratio` of the blocks. Blocks of a flat patch are flat."""
    edges = [1 if size == 1 else mask.block for size in patch]
    grid = [-(-size // edge) for size, edge in zip(patch, edges, strict=True)]
    chosen = np.zeros(int(np.prod(grid)), bool)
    chosen[rng.permutation(chosen.size)[: round(mask.ratio * chosen.size)]] = True
    blocks = chosen.reshape(grid)
    for axis, edge in enumerate(edges):
        blocks = blocks.repeat(edge, axis)
    return blocks[tuple(slice(size) for size in patch)]
