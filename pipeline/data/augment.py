"""Augmentation: what is drawn for a sample, as plain numbers. Spatial parameters are drawn first,
so only the needed box is read and resampled once (`geometry`); intensity comes last (`intensity`).

Choices follow nnU-Net's augmentation (Isensee et al. 2021; code of version 2.8): probabilities and
ranges are those of the recipe. `docs/augmentation.md` lists what differs.
"""

from __future__ import annotations

import numpy as np

from segfleet.pipeline.data.geometry import Spatial
from segfleet.pipeline.sections import Augment

ANISOTROPY = 3.0  # ratio above which rotation, scale and blur stay in plane, as in nnU-Net
LONG = 1.5  # a 2D patch longer than this turns by 15 degrees only, as in nnU-Net
MULTIPLIER = (0.75, 1.25)  # of brightness and contrast
POWER = (0.7, 1.5)  # gamma
SIGMA = (0.5, 1.0)  # of the blur, voxels
NOISE = 0.1  # largest standard deviation
REDUCED = (0.5, 1.0)  # resolution
CHANNELS = 0.5  # share of channels that blur and low resolution take


def flat(patch: tuple[int, ...], spacing: tuple[float, ...]) -> bool:
    """Whether geometry is changed in plane only: a 2D patch, slices much thicker than pixels, or a
    patch of few slices."""
    return (
        patch[0] == 1
        or spacing[0] > ANISOTROPY * max(spacing[1:])
        or max(patch) > ANISOTROPY * patch[0]
    )


def largest_angle(options: Augment, patch: tuple[int, ...], in_plane: bool) -> float:
    """Degrees. nnU-Net's, unless the recipe says one: 30, in plane 180, long 2D patches 15."""
    if options.angle is not None:
        return options.angle
    if patch[0] == 1 and max(patch[1:]) > LONG * min(patch[1:]):
        return 15.0
    return 180.0 if in_plane else 30.0


def draw_spatial(
    options: Augment,
    rng: np.random.Generator,
    patch: tuple[int, int, int],
    spacing: tuple[float, float, float],
) -> Spatial:
    """Draw the spatial part; the draws before the elastic field are always the same ones, so
    options do not shift each other's numbers."""
    in_plane = flat(patch, spacing)
    mirror, coin = rng.random(3), rng.random(3)
    angles = rng.uniform(-1, 1, 3) * np.deg2rad(largest_angle(options, patch, in_plane))
    view = rng.uniform(*options.scale_range)
    turns = int(rng.integers(4))
    axes = (0, 1, 2) if options.flip is None else options.flip
    flips = tuple(axis for axis in axes if patch[axis] > 1 and mirror[axis] < 0.5)
    if options.rot90 and patch[1] != patch[2]:
        turns = 2 * (turns % 2)
    matrix = np.eye(3)
    if coin[0] < options.rotation:
        mm = np.diag(spacing)
        matrix = np.linalg.inv(mm) @ _rotation(angles * ([1, 0, 0] if in_plane else [1, 1, 1])) @ mm
    if coin[1] < options.scale:
        matrix = matrix * np.array([[1.0 if in_plane else view], [view], [view]])
    shifts = None
    if coin[2] < options.elastic:
        knots = tuple(max(2, p // 16) if p > 1 else 1 for p in patch)
        shifts = rng.normal(0, options.elastic_size / 2, (3, *knots))
        if in_plane:
            shifts[0] = 0
    moved = coin[0] < options.rotation or coin[1] < options.scale
    return Spatial(
        flips=flips,
        turns=turns if options.rot90 else 0,
        matrix=matrix if moved or shifts is not None else None,
        shifts=shifts,
    )


def _rotation(angles: np.ndarray) -> np.ndarray:
    """Rotation matrix about z, then y, then x; axes ordered (z, y, x)."""
    matrix = np.eye(3)
    for plane, angle in zip(((1, 2), (0, 2), (0, 1)), angles, strict=True):
        turn = np.eye(3)
        a, b = plane
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    return matrix


def draw_intensity(options: Augment, rng: np.random.Generator, channels: int) -> dict:
    """Draw the intensity part: plain numbers, applied by `apply_intensity` wherever the image is.

    A list has one value per channel; None leaves that channel as it is.
    """
    coin, strength, seed = rng.random(7), rng.random(), int(rng.integers(2**63))
    uniform = rng.random((10, channels))
    if not options.per_channel:
        uniform = np.repeat(uniform[:, :1], channels, axis=1)
    drawn: dict = {}
    if coin[0] < options.noise:
        drawn["noise"] = (float(NOISE * strength), seed)
    if coin[1] < options.blur:
        sigmas = SIGMA[0] + (SIGMA[1] - SIGMA[0]) * uniform[1:4].T
        chosen = uniform[0] < (CHANNELS if options.per_channel else 1)
        drawn["blur"] = [s.tolist() if c else None for c, s in zip(chosen, sigmas, strict=True)]
    if coin[2] < options.brightness:
        drawn["brightness"] = _about_one(uniform[4], *MULTIPLIER)
    if coin[3] < options.contrast:
        drawn["contrast"] = _about_one(uniform[5], *MULTIPLIER)
    if coin[4] < options.low_resolution:
        scales = REDUCED[0] + (REDUCED[1] - REDUCED[0]) * uniform[7]
        chosen = uniform[6] < (CHANNELS if options.per_channel else 1)
        drawn["low_resolution"] = [
            float(s) if c else None for c, s in zip(chosen, scales, strict=True)
        ]
    if coin[5] < options.gamma_inverted:
        drawn["gamma_inverted"] = _about_one(uniform[8], *POWER)
    if coin[6] < options.gamma:
        drawn["gamma"] = _about_one(uniform[9], *POWER)
    return drawn


def _about_one(unit: np.ndarray, low: float, high: float) -> list[float]:
    """Half of the values evenly below 1, half above."""
    below, above = low + (1 - low) * 2 * unit, 1 + (high - 1) * (2 * unit - 1)
    return np.where(unit < 0.5, below, above).tolist()
