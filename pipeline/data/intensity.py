"""Changes of intensity, in place, in the loader.

The bits depend neither on the number of threads nor on whether the compiled kernels are there.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from segfleet.pipeline.data import kernels

SMALL = 1e-7
LANES = 16  # sums side by side, as in kernels.cpp
INFINITY = float("inf")


def apply_intensity(
    image: Tensor, drawn: dict, in_plane: bool, masked: Sequence[int] = ()
) -> Tensor:
    """The drawn changes, in nnU-Net's order, of (C, z, y, x) contiguous float32, which is changed
    and returned. `in_plane`: blur and resolution leave the slice axis alone. Voxels that are 0 in
    all `masked` channels are background and stay 0 there."""
    if not drawn:
        return image
    outside = (image[list(masked)] == 0).all(0) if masked else None
    if "noise" in drawn:
        add_noise(image, *drawn["noise"])
    for c, channel in enumerate(image):
        for name, change in CHANGES.items():
            if name in drawn and (value := drawn[name][c]) is not None:
                change(channel, value, in_plane)
    if outside is not None:
        for c in masked:
            image[c].masked_fill_(outside, 0)
    return image


def add_noise(image: Tensor, sigma: float, seed: int) -> None:
    """Normal noise of standard deviation `sigma`, numpy's stream of this seed."""
    if same_normals():
        kernels.library().segfleet_noise(image.data_ptr(), image.numel(), sigma, seed)
        return
    noise = np.random.Generator(np.random.Philox(key=seed)).standard_normal(
        tuple(image.shape), dtype=np.float32
    )
    noise *= np.float32(sigma)
    image.add_(torch.from_numpy(noise))


def same_normals() -> bool:
    """Whether the kernel draws what this numpy draws: another numpy, or another machine's
    mathematical library, may draw others."""
    return (library := kernels.library()) is not None and _draws_as_numpy(library)


@functools.cache
def _draws_as_numpy(library: ctypes.CDLL) -> bool:
    drawn = np.zeros(2**15, np.float32)
    library.segfleet_noise(drawn.ctypes.data, len(drawn), 1.0, 1)
    numpys = np.random.Generator(np.random.Philox(key=1))
    return np.array_equal(drawn, numpys.standard_normal(len(drawn), dtype=np.float32))


def blur(channel: Tensor, sigmas: Sequence[float], in_plane: bool) -> None:
    """Gaussian blur of (z, y, x), one width per axis; the border is repeated."""
    library = kernels.library()
    for axis in (1, 2) if in_plane else (0, 1, 2):
        size, sigma = channel.shape[axis], sigmas[axis]
        if size == 1:
            continue
        radius = int(3 * sigma + 0.5)
        weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
        weights = (weights / weights.sum()).astype(np.float32)
        if library:
            shape = kernels.sizes(*channel.shape)
            library.segfleet_blur(channel.data_ptr(), shape, axis, weights.ctypes.data, radius)
            continue
        indices = torch.arange(-radius, size + radius).clamp(0, size - 1)
        padded = channel.index_select(axis, indices)
        blurred = padded.narrow(axis, radius, size) * float(weights[radius])
        for k in range(radius):
            pair = padded.narrow(axis, k, size) + padded.narrow(axis, 2 * radius - k, size)
            blurred.add_(pair.mul_(float(weights[k])))
        channel.copy_(blurred)


def brightness(channel: Tensor, factor: float, in_plane: bool) -> None:
    channel.mul_(factor)


def contrast(channel: Tensor, factor: float, in_plane: bool) -> None:
    """Away from the mean, or towards it, within the old range."""
    low, high, mean, _ = moments(channel)
    affine(channel, mean, factor, mean, low, high)


def low_resolution(channel: Tensor, scale: float, in_plane: bool) -> None:
    """Fewer voxels, each the nearest one, and back, linear. Voxel centres stay where they are."""
    size = channel.shape
    small = [
        s if axis == 0 and in_plane else max(1, round(s * scale)) for axis, s in enumerate(size)
    ]
    drop = 1 if size[0] == 1 else 0  # a single slice in 2D: the same, and faster
    interpolation = "bilinear" if drop else "trilinear"
    reduced = F.interpolate(
        channel.reshape(1, 1, *size[drop:]), size=small[drop:], mode="nearest-exact"
    )
    back = F.interpolate(reduced, size=size[drop:], mode=interpolation, align_corners=False)
    channel.copy_(back.view(size))


def gamma(channel: Tensor, power: float, in_plane: bool) -> None:
    """A power of the position within the range; mean and standard deviation stay."""
    low, high, mean, deviation = moments(channel)
    span = np.float32(high) - np.float32(low)
    raise_to(channel, low, max(float(span), SMALL), float(span), power)
    _, _, own_mean, own_deviation = moments(channel)
    affine(channel, own_mean, deviation / max(own_deviation, SMALL), mean, -INFINITY, INFINITY)


def gamma_inverted(channel: Tensor, power: float, in_plane: bool) -> None:
    channel.neg_()
    gamma(channel, power, in_plane)
    channel.neg_()


CHANGES = {  # in nnU-Net's order
    "blur": blur,
    "brightness": brightness,
    "contrast": contrast,
    "low_resolution": low_resolution,
    "gamma_inverted": gamma_inverted,
    "gamma": gamma,
}


def moments(channel: Tensor) -> tuple[float, float, float, float]:
    """Smallest and largest value, mean and standard deviation (n - 1); sums in float64."""
    n = channel.numel()
    if library := kernels.library():
        results = (ctypes.c_double * 4)()
        library.segfleet_moments(channel.data_ptr(), n, results)
        low, high, total, square = results
    else:
        values = channel.reshape(-1).numpy()
        low, high = float(values.min()), float(values.max())
        total, square = _sums(values.astype(np.float64))
    mean = total / n
    return low, high, mean, float(np.sqrt(max(square - total * mean, 0.0) / max(n - 1, 1)))


def _sums(values: np.ndarray) -> tuple[float, float]:
    """Sum and sum of squares, in the order of the kernel."""
    even = len(values) // LANES * LANES
    totals = []
    for part in (values, values * values):
        lanes = np.zeros(LANES)
        for row in np.array_split(part[:even].reshape(-1, LANES), max(1, even // 2**20)):
            lanes = np.add.reduce(np.concatenate([lanes[None], row]), axis=0)
        lanes[: len(part) - even] += part[even:]
        total = 0.0
        for lane in lanes:
            total += float(lane)
        totals.append(total)
    return totals[0], totals[1]


def affine(
    channel: Tensor, subtract: float, factor: float, add: float, low: float, high: float
) -> None:
    """(x - subtract) * factor + add, within [low, high]."""
    if library := kernels.library():
        library.segfleet_affine(
            channel.data_ptr(), channel.numel(), subtract, factor, add, low, high
        )
    else:
        channel.sub_(subtract).mul_(factor).add_(add).clamp_(low, high)


def raise_to(channel: Tensor, low: float, span: float, extent: float, power: float) -> None:
    """((x - low) / span) ** power * extent + low, of x in [low, low + span]."""
    if library := kernels.library():
        library.segfleet_power(channel.data_ptr(), channel.numel(), low, span, extent, power)
        return
    unit = channel.sub_(low).div_(torch.tensor(span))
    channel.copy_(_power(unit, power).mul_(extent).add_(low))


def _power(unit: Tensor, power: float) -> Tensor:
    """2 ** (power * log2(unit)) of values in [0, 1], to some 1e-6, in the kernel's operations."""
    bits = unit.view(torch.int32)
    exponent = (bits >> 23) - 127
    part = ((bits & 0x7FFFFF) | 0x3F800000).view(torch.float32)
    large = part > 1.41421356
    part, exponent = torch.where(large, part * 0.5, part), exponent + large.int()
    s = (part - 1) / (part + 1)
    t = s * s
    series = 0.11111111
    for factor in (0.14285715, 0.2, 0.33333334, 1.0):
        series = t * series + factor
    y = (((s * 2.8853901) * series + exponent.float()) * power).clamp(min=-126)
    whole = (y + 0.5).floor()
    r = (y - whole) * 0.6931472
    raised = 0.0013888889
    for factor in (0.008333334, 0.041666668, 0.16666667, 0.5, 1.0, 1.0):
        raised = r * raised + factor
    scale = ((whole.int() + 127) << 23).view(torch.float32)
    return torch.where(unit > 0, raised * scale, torch.zeros_like(unit))
