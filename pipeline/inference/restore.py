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

    scores_KZYX: Tensor
    task: Task  # `task.averages` says whether these are probabilities or logits
    crop: Crop
    anisotropic_axis: int | None = None
    transpose: Sequence[int] = (0, 1, 2)
    networks: int = 1

    def slab(self, box: Crop, slices: slice) -> Tensor:
        """(K, slices, Y, X) of the raw grid: the slices `slices` of the box `box`, outside the own
        crop background."""
        values = self.scores_KZYX.detach().float()
        values = values.permute(0, *(1 + axis for axis in np.argsort(self.transpose)))
        shape = _shape(self.crop)
        if tuple(self.crop) == tuple(box):
            return resampled(values, shape, self.anisotropic_axis, slices)
        size = (len(values), slices.stop - slices.start, *_shape(box)[1:])
        outside = torch.zeros(size, device=values.device)
        background = _background(self.task)
        if background is not None:
            outside[background] = 1.0
        (first, end), (top, bottom), (left, right) = [
            (start - low, stop - low)
            for (start, stop), (low, _) in zip(self.crop, box, strict=True)
        ]
        start, stop = max(first, slices.start), min(end, slices.stop)
        if start < stop:
            own = slice(start - first, stop - first)
            inside = resampled(values, shape, self.anisotropic_axis, own)
            if self.task.averages == "logits":
                inside = self.task.probabilities(inside[None])[0]
            rows = slice(start - slices.start, stop - slices.start)
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
        [replace(member, scores_KZYX=member.scores_KZYX.cpu()) for member in maps], raw_shape, keep
    )


def _combine(maps: Sequence[Map], raw_shape: Sequence[int], keep: np.ndarray | None) -> np.ndarray:
    task, alone = maps[0].task, len(maps) == 1
    box = [
        (min(start for start, _ in ends), max(stop for _, stop in ends))
        for ends in zip(*(member.crop for member in maps), strict=True)
    ]
    shape = _shape(box)
    label = torch.empty(shape, dtype=torch.uint8, device=maps[0].scores_KZYX.device)
    if keep is not None and (background := _background(task)) is not None:
        keep[background] = 1
    inside = tuple(slice(start, stop) for start, stop in box)
    of_all = task if alone else replace(task, averages="probabilities")
    total = sum(member.networks for member in maps)
    thick = max(1, SLAB // (len(maps[0].scores_KZYX) * shape[1] * shape[2]))
    for start in range(0, shape[0], thick):
        slices = slice(start, min(start + thick, shape[0]))
        if alone:
            values = maps[0].slab(box, slices)
        else:
            values = sum(
                _probabilities(member, box, slices) * (member.networks / total) for member in maps
            )
        rows = max(1, SLAB // (values.shape[0] * values.shape[1] * shape[2]))
        for top in range(0, shape[1], rows):  # comparing copies a channel
            strip = slice(top, min(top + rows, shape[1]))
            label[slices, strip] = of_all.labels(values[:, :, strip])
        if keep is not None:
            if of_all.averages == "logits":
                values = of_all.probabilities(values[None])[0]
            raw = slice(inside[0].start + slices.start, inside[0].start + slices.stop)
            keep[:, raw, inside[1], inside[2]] = values.cpu().numpy()
    return paste(label.cpu().numpy(), box, tuple(raw_shape))


def _probabilities(member: Map, box: Crop, slices: slice) -> Tensor:
    values = member.slab(box, slices)
    if member.task.averages == "logits" and tuple(member.crop) == tuple(box):
        return member.task.probabilities(values[None])[0]
    return values


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
                scores_KZYX=probabilities_KZYX,
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
    values = _slices(probabilities_KZYX, shape[0], slab, nearest_axis == 0)
    old = values.shape[2:]
    linear = [
        o if axis == nearest_axis else n
        for axis, (o, n) in enumerate(zip(old, shape[1:], strict=True), start=1)
    ]
    if linear != list(old):
        values = F.interpolate(values, size=linear, mode="bilinear", align_corners=False)
    if nearest_axis and values.shape[1 + nearest_axis] != shape[nearest_axis]:
        lines = torch.from_numpy(nearest(values.shape[1 + nearest_axis], shape[nearest_axis]))
        values = values.index_select(1 + nearest_axis, lines.to(values.device))
    return values


def _slices(values: Tensor, new: int, slab: slice, whole: bool) -> Tensor:
    """(K, slab, Y, X): slices of a grid of `new` slices, each the nearest old one, or linear."""
    old = values.shape[1]
    if old == new:
        return values[:, slab]
    if whole:
        return values[:, torch.from_numpy(nearest(old, new)[slab]).to(values.device)]
    at = ((np.arange(new)[slab] + 0.5) * (old / new) - 0.5).clip(0, old - 1)
    low = np.minimum(at.astype(np.int64), max(old - 2, 0))
    part = torch.from_numpy((at - low).astype(np.float32))[:, None, None].to(values.device)
    first, second = (
        values[:, torch.from_numpy(lines).to(values.device)]
        for lines in (low, np.minimum(low + 1, old - 1))
    )
    return first.lerp(second, part)
