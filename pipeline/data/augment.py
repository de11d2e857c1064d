"""Augmentation. Spatial parameters are drawn first, then only the needed box is read and resampled
once; intensity comes last.

Every operation gives the same bits for any number of threads, so samples do not depend on who
computed them. Choices follow nnU-Net's augmentation (Isensee et al. 2021, supplement):
probabilities and ranges are those of the recipe.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from segfleet.pipeline.recipe import Augment
from segfleet.preprocess.stores.base import Box

ANISOTROPY = 3.0  # spacing ratio above which rotation, scale and blur stay in plane, as in nnU-Net


@dataclass(frozen=True, kw_only=True)
class Spatial:
    """A drawn spatial transform. `matrix` (3, 3) maps offsets from the patch centre to offsets on
    the stored grid, in voxels."""

    flips: tuple[int, ...] = ()
    turns: int = 0  # quarter turns in plane
    matrix: np.ndarray | None = None  # None: identity
    shifts: np.ndarray | None = None  # (3, z, y, x) coarse displacements in voxels


def flat(patch: tuple[int, ...], spacing: tuple[float, ...]) -> bool:
    """Whether geometry is changed in plane only: a 2D patch, or slices much thicker than pixels."""
    return patch[0] == 1 or spacing[0] > ANISOTROPY * max(spacing[1:])


def draw_spatial(
    options: Augment,
    rng: np.random.Generator,
    patch: tuple[int, int, int],
    spacing: tuple[float, float, float],
) -> Spatial:
    """Draw the spatial part; the draws before the elastic field are always the same ones, so
    options do not shift each other's numbers."""
    in_plane = flat(patch, spacing)
    mirror, coin, angles, zoom = (
        rng.random(3),
        rng.random(3),
        rng.uniform(-1, 1, 3) * np.deg2rad(options.angle),
        rng.random(2),
    )
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
        low, high = options.scale_range  # shrink and enlarge are equally likely, as in nnU-Net
        magnify = (
            1 - zoom[1] * (1 - low)
            if zoom[0] < 0.5 and low < 1
            else max(low, 1) + zoom[1] * (high - max(low, 1))
        )
        matrix = matrix / np.array([[1.0 if in_plane else magnify], [magnify], [magnify]])
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


def source_grid(
    spatial: Spatial, start: tuple[int, int, int], patch: tuple[int, int, int]
) -> tuple[Box, Tensor | None]:
    """The box of the stored grid a patch needs, and where each of its voxels lies in that box.

    The second is None for a plain copy, else (z, y, x, 3) positions in voxels of the box.
    """
    if spatial.matrix is None:
        return tuple(slice(s, s + p) for s, p in zip(start, patch, strict=True)), None
    axes = [torch.arange(p, dtype=torch.float64) - (p - 1) / 2 for p in patch]
    offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    m = torch.from_numpy(spatial.matrix)
    # Written out instead of a matrix product: products may be summed in another order on another
    # number of threads.
    positions = torch.stack(
        [
            offsets[..., 0] * m[a, 0] + offsets[..., 1] * m[a, 1] + offsets[..., 2] * m[a, 2]
            for a in range(3)
        ],
        -1,
    )
    if spatial.shifts is not None:
        coarse = torch.from_numpy(spatial.shifts)[None].float()
        positions = (
            positions
            + F.interpolate(coarse, size=patch, mode="trilinear", align_corners=True)[0]
            .permute(1, 2, 3, 0)
            .double()
        )
    positions = positions + torch.tensor(
        [s + (p - 1) / 2 for s, p in zip(start, patch, strict=True)], dtype=torch.float64
    )
    low = [int(np.floor(positions[..., a].min().item())) for a in range(3)]
    high = [int(np.floor(positions[..., a].max().item())) + 2 for a in range(3)]
    if patch[0] == 1:  # stay in the slice
        low[0], high[0] = start[0], start[0] + 1
    return tuple(slice(lo, hi) for lo, hi in zip(low, high, strict=True)), (
        positions - torch.tensor(low, dtype=torch.float64)
    ).float()


def resample(image: Tensor, label: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """(C, z, y, x) image and (z, y, x) label at `positions`: linear; labels as one-hot channels, so
    that edges stay where they are."""
    size = torch.tensor(image.shape[1:])
    grid = (positions / (size - 1).clamp(min=1) * 2 - 1).flip(-1)[None]
    values = torch.unique(label)
    channels = torch.cat([image, torch.stack([label == v for v in values]).float()])
    channels = F.grid_sample(
        channels[None], grid, mode="bilinear", padding_mode="border", align_corners=True
    )[0]
    return channels[: len(image)], values[channels[len(image) :].argmax(0)]


def mirror(spatial: Spatial, image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Flips and quarter turns, on the trailing axes (z, y, x)."""
    if spatial.turns:
        image, label = image.rot90(spatial.turns, (-2, -1)), label.rot90(spatial.turns, (-2, -1))
    axes = [axis - 3 for axis in spatial.flips]
    return (image.flip(axes), label.flip(axes)) if axes else (image, label)


def draw_intensity(options: Augment, rng: np.random.Generator, channels: int) -> dict:
    """Draw the intensity part: plain numbers, applied by `apply_intensity` wherever the image
    is."""
    coin, unit, per_channel = rng.random(7), rng.random(6), rng.random((3, channels))
    drawn: dict = {}
    if coin[0] < options.noise:
        drawn["noise"] = (float(unit[0] * 0.1), int(rng.integers(2**63)))
    if coin[1] < options.blur:
        drawn["blur"] = (0.5 + 0.5 * per_channel[0]).tolist()
    if coin[2] < options.brightness:
        drawn["brightness"] = float(0.75 + 0.5 * unit[1])
    if coin[3] < options.contrast:
        drawn["contrast"] = float(0.75 + 0.5 * unit[2])
    if coin[4] < options.low_resolution:
        drawn["low_resolution"] = float(0.5 + 0.5 * unit[3])
    if coin[5] < options.gamma:
        drawn["gamma"] = (float(0.7 + 0.8 * unit[4]), bool(coin[6] < 0.25))
    return drawn


def apply_intensity(image: Tensor, drawn: dict, in_plane: bool) -> Tensor:
    """(C, z, y, x) float32 with the drawn changes, in nnU-Net's order. `in_plane`: blur and
    resolution leave the slice axis alone."""
    if "noise" in drawn:
        variance, seed = drawn["noise"]
        noise = np.random.Generator(np.random.Philox(key=seed)).standard_normal(
            tuple(image.shape), dtype=np.float32
        )
        image = image + torch.from_numpy(noise).to(image.device) * variance**0.5
    if "blur" in drawn:
        image = torch.stack(
            [
                _blur(channel, sigma, in_plane)
                for channel, sigma in zip(image, drawn["blur"], strict=True)
            ]
        )
    if "brightness" in drawn:
        image = image * drawn["brightness"]
    if "contrast" in drawn:
        low, high, mean = _range(image)
        image = ((image - mean) * drawn["contrast"] + mean).clamp(low, high)
    if "low_resolution" in drawn:
        size = image.shape[1:]
        small = [
            s if axis == 0 and in_plane else max(1, round(s * drawn["low_resolution"]))
            for axis, s in enumerate(size)
        ]
        image = F.interpolate(
            F.interpolate(image[None], size=small, mode="nearest"),
            size=size,
            mode="trilinear",
            align_corners=False,
        )[0]
    if "gamma" in drawn:
        power, inverted = drawn["gamma"]
        image = -image if inverted else image
        low, high, mean = _range(image)
        image = ((image - low) / (high - low).clamp(min=1e-7)).pow(power) * (high - low) + low
        image = image - _range(image)[2] + mean
        image = -image if inverted else image
    return image


def _range(image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Smallest, largest and mean value per channel. The mean is a sum of row sums in float64: the
    same for any number of threads."""
    rows = image.flatten(1)
    if image.device.type == "cpu":
        mean = torch.from_numpy(rows.numpy().mean(1, dtype=np.float64).astype(np.float32))
    else:
        mean = rows.double().mean(1).float()
    return tuple(v.view(-1, 1, 1, 1) for v in (rows.amin(1), rows.amax(1), mean))


def _blur(channel: Tensor, sigma: float, in_plane: bool) -> Tensor:
    """Gaussian blur of (z, y, x) as sums of shifted copies: the same bits on any number of
    threads."""
    radius = int(3 * sigma + 0.5)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights /= weights.sum()
    for axis in (1, 2) if in_plane else (0, 1, 2):
        size = channel.shape[axis]
        if size == 1:
            continue
        indices = torch.arange(-radius, size + radius).clamp(0, size - 1).to(channel.device)
        padded = channel.index_select(axis, indices)
        channel = sum(padded.narrow(axis, k, size) * float(w) for k, w in enumerate(weights))
    return channel
