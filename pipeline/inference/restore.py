"""From the network's grid back to the patient's: probabilities of the stored, cropped grid become
labels on the raw grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from segfleet.pipeline.task import Task
from segfleet.preprocess.transforms.case_transforms import paste
from segfleet.preprocess.transforms.resample import nearest

Crop = Sequence[tuple[int, int]]
SLAB = 2**24  # probabilities on the raw grid at a time


@dataclass(frozen=True, kw_only=True)
class Map:
    """What one network, or several of one plan, say of an image: their mean on the stored grid.

    `crop` is the box (start, stop) per axis of the raw grid that was kept, as in CaseEntry.
    `anisotropic_axis`: an axis of the raw grid along which the nearest slice is taken, otherwise
    resampling is linear. `transpose`: the raw axis that each stored one is. `networks`: how many.
    Maps that are combined lie on one device.
    """

    found_KZYX: Tensor
    task: Task  # `task.averages` says whether these are probabilities or logits
    crop: Crop
    anisotropic_axis: int | None = None
    transpose: Sequence[int] = (0, 1, 2)
    networks: int = 1

    def slab(self, box: Crop, here: slice) -> Tensor:
        """(K, slices, Y, X) of the raw grid: the slices `here` of the box `box`, outside the own
        crop background."""
        found = self.found_KZYX.detach().float()
        found = found.permute(0, *(1 + axis for axis in np.argsort(self.transpose)))
        shape = _shape(self.crop)
        if tuple(self.crop) == tuple(box):
            return resampled(found, shape, self.anisotropic_axis, here)
        size = (len(found), here.stop - here.start, *_shape(box)[1:])
        outside = torch.zeros(size, device=found.device)
        background = _background(self.task)
        if background is not None:
            outside[background] = 1.0
        (first, end), (top, bottom), (left, right) = [
            (start - low, stop - low)
            for (start, stop), (low, _) in zip(self.crop, box, strict=True)
        ]
        start, stop = max(first, here.start), min(end, here.stop)
        if start < stop:
            own = slice(start - first, stop - first)
            inside = resampled(found, shape, self.anisotropic_axis, own)
            if self.task.averages == "logits":
                inside = self.task.probabilities(inside[None])[0]
            rows = slice(start - here.start, stop - here.start)
            outside[:, rows, top:bottom, left:right] = inside
        return outside


def combine(
    maps: Sequence[Map], raw_shape: Sequence[int], keep: np.ndarray | None = None
) -> np.ndarray:
    """The mean of maps, weighted by their networks -> (Z, Y, X) uint8 label values on the raw grid,
    background outside the crop.

    Probabilities are resampled, not labels, so an outline may pass between stored voxels. It goes
    slab by slab, where the maps are: beside them there is the label and little else, and only the
    label leaves a GPU. The logits of one map alone
    are compared as they are; of several maps probabilities are averaged, after resampling, as
    nnU-Net's ensembles do. `keep` (K, Z, Y, X), full of zeros: gets the probabilities.
    """
    try:
        return _combine(maps, raw_shape, keep)
    except torch.OutOfMemoryError:
        pass
    return _combine(
        [replace(one, found_KZYX=one.found_KZYX.cpu()) for one in maps], raw_shape, keep
    )


def _combine(maps: Sequence[Map], raw_shape: Sequence[int], keep: np.ndarray | None) -> np.ndarray:
    task, alone = maps[0].task, len(maps) == 1
    box = [
        (min(start for start, _ in ends), max(stop for _, stop in ends))
        for ends in zip(*(one.crop for one in maps), strict=True)
    ]
    shape = _shape(box)
    label = torch.empty(shape, dtype=torch.uint8, device=maps[0].found_KZYX.device)
    if keep is not None and (background := _background(task)) is not None:
        keep[background] = 1
    inside = tuple(slice(start, stop) for start, stop in box)
    of_all = task if alone else replace(task, averages="probabilities")
    total = sum(one.networks for one in maps)
    thick = max(1, SLAB // (len(maps[0].found_KZYX) * shape[1] * shape[2]))
    for start in range(0, shape[0], thick):
        here = slice(start, min(start + thick, shape[0]))
        if alone:
            found = maps[0].slab(box, here)
        else:
            found = sum(_probabilities(one, box, here) * (one.networks / total) for one in maps)
        rows = max(1, SLAB // (found.shape[0] * found.shape[1] * shape[2]))
        for top in range(0, shape[1], rows):  # comparing copies a channel
            strip = slice(top, min(top + rows, shape[1]))
            label[here, strip] = of_all.labels(found[:, :, strip])
        if keep is not None:
            if of_all.averages == "logits":
                found = of_all.probabilities(found[None])[0]
            raw = slice(inside[0].start + here.start, inside[0].start + here.stop)
            keep[:, raw, inside[1], inside[2]] = found.cpu().numpy()
    return paste(label.cpu().numpy(), box, tuple(raw_shape))


def _probabilities(one: Map, box: Crop, here: slice) -> Tensor:
    found = one.slab(box, here)
    if one.task.averages == "logits" and tuple(one.crop) == tuple(box):
        return one.task.probabilities(found[None])[0]
    return found


def _shape(box: Crop) -> tuple[int, ...]:
    return tuple(int(stop) - int(start) for start, stop in box)


def _background(task: Task) -> int | None:
    """The channel that is 1 where nothing was looked at."""
    return task.values.index(0) if task.head == "softmax" else None


def restore(
    probabilities_KZYX: Tensor,
    task: Task,
    *,
    crop: Crop,
    raw_shape: Sequence[int],
    anisotropic_axis: int | None = None,
    transpose: Sequence[int] = (0, 1, 2),
) -> np.ndarray:
    """Probabilities (K, Z, Y, X) on the stored grid -> (Z, Y, X) uint8 label values on the raw
    grid: `combine` of one `Map`."""
    assert probabilities_KZYX.ndim == 4, tuple(probabilities_KZYX.shape)
    return combine(
        [
            Map(
                found_KZYX=probabilities_KZYX,
                task=task,
                crop=crop,
                anisotropic_axis=anisotropic_axis,
                transpose=transpose,
            )
        ],
        raw_shape,
    )


def resampled(
    probabilities_KZYX: Tensor,
    shape: Sequence[int],
    nearest_axis: int | None = None,
    slab: slice | None = None,
) -> Tensor:
    """(K, *shape), or of it the slices `slab` along z: what
    `preprocess.resample.resample_probabilities` gives, by torch's routines, which are some twenty
    times as fast."""
    slab = slab or slice(0, shape[0])
    found = _slices(probabilities_KZYX, shape[0], slab, nearest_axis == 0)
    old = found.shape[2:]
    linear = [
        o if axis == nearest_axis else n
        for axis, (o, n) in enumerate(zip(old, shape[1:], strict=True), start=1)
    ]
    if linear != list(old):
        found = F.interpolate(found, size=linear, mode="bilinear", align_corners=False)
    if nearest_axis and found.shape[1 + nearest_axis] != shape[nearest_axis]:
        lines = torch.from_numpy(nearest(found.shape[1 + nearest_axis], shape[nearest_axis]))
        found = found.index_select(1 + nearest_axis, lines.to(found.device))
    return found


def _slices(found: Tensor, new: int, slab: slice, whole: bool) -> Tensor:
    """(K, slab, Y, X): slices of a grid of `new` slices, each the nearest old one, or linear."""
    old = found.shape[1]
    if old == new:
        return found[:, slab]
    if whole:
        return found[:, torch.from_numpy(nearest(old, new)[slab]).to(found.device)]
    at = ((np.arange(new)[slab] + 0.5) * (old / new) - 0.5).clip(0, old - 1)
    low = np.minimum(at.astype(np.int64), max(old - 2, 0))
    part = torch.from_numpy((at - low).astype(np.float32))[:, None, None].to(found.device)
    first, second = (
        found[:, torch.from_numpy(lines).to(found.device)]
        for lines in (low, np.minimum(low + 1, old - 1))
    )
    return first.lerp(second, part)
