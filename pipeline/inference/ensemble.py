"""Several trained networks as one: the mean of their probabilities.

Networks of one plan and one window are added up in the same sums on the stored grid, each going
over the whole image and then dropped; the map of any other plan waits in a file. So memory does not
grow with the number of networks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from segfleet.pipeline.devices.out_of_memory import named, predicting_words
from segfleet.pipeline.inference.restore import Crop, Map
from segfleet.pipeline.inference.sliding_window import Forward, sliding_window
from segfleet.pipeline.task import Task
from segfleet.preprocess.stores.manifest import Plan
from segfleet.preprocess.transforms.case_transforms import raw_resample_axis


@dataclass(frozen=True, kw_only=True)
class Member:
    """A trained network and how it is used. `forward()` loads it; the one before may be gone
    then."""

    forward: Callable[[], Forward]
    plan: Plan
    task: Task
    patch: tuple[int, int, int]  # (z, y, x) voxels of the stored grid; one slice: a 2D network
    overlap: float = 0.5
    mirror_axes: tuple[int, ...] = ()
    batch: int = 1
    dims: int | None = None  # by default by the patch
    name: str = "the network"  # for messages

    def window(self) -> dict[str, Any]:
        """Arguments of `sliding_window`."""
        return {
            "patch": self.patch,
            "overlap": self.overlap,
            "mirror_axes": self.mirror_axes,
            "batch": self.batch,
            "dims": self.dims or (2 if self.patch[0] == 1 else 3),
        }

    def settings(self) -> dict[str, Any]:
        """What decides the result besides the network, as plain JSON."""
        return {
            "patch": list(self.patch),
            "overlap": self.overlap,
            "mirror_axes": sorted(self.mirror_axes),
            "dims": self.window()["dims"],
            "averages": self.task.averages,
        }


@dataclass(frozen=True, kw_only=True)
class Stored:
    """An image as a plan has it, on the stored grid, in the type of its store: integers are to be
    multiplied by `scale`. A photograph of a slide has billions of values, of a byte each."""

    image_CZYX: Tensor
    scale: float = 1.0
    crop: Crop
    raw_spacing: Sequence[float]


def predict_maps(
    members: Sequence[Member],
    stored: Callable[[Member], Stored],
    *,
    device: torch.device | str = "cpu",
    folder: Path | None = None,
) -> list[Map]:
    """One map for all members of a plan and a window, in a fixed order. `stored(member)` is the
    image as that member's plan has it. `folder`: where maps wait for the others; by default the
    system's folder for such files."""
    groups, maps = list(_groups(members)), []
    for group in groups:
        first, image = group[0], stored(group[0])
        with named(device, predicting_words(first.name, first.patch, first.batch)):
            sums = sliding_window(
                (member.forward() for member in group),
                image.image_CZYX,
                scale=image.scale,
                device=device,
                **first.window(),
            )
        if len(groups) > 1:  # maps of several plans wait for each other on the host
            sums = sums.cpu()
        maps.append(
            Map(
                scores_KZYX=sums if group is groups[-1] else _on_disk(sums, folder),
                task=first.task,
                crop=image.crop,
                anisotropic_axis=raw_resample_axis(image.raw_spacing, first.plan),
                transpose=first.plan.transpose,
                networks=len(group),
            )
        )
    return maps


def _groups(members: Sequence[Member]) -> Iterator[list[Member]]:
    """Members whose sums may be shared. Logits are not: it is probabilities that are averaged."""
    groups: list[list[Member]] = []
    for member in members:
        for group in groups:
            first = group[0]
            if member.task.averages == "probabilities" and (first.plan, first.settings()) == (
                member.plan,
                member.settings(),
            ):
                group.append(member)
                break
        else:
            groups.append([member])
    yield from groups


def _on_disk(values: Tensor, folder: Path | None) -> Tensor:
    """The same numbers in a file without a name: it is gone with its last reader, however that
    ends."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(np.ascontiguousarray(values.numpy()).data)  # tofile hides that a disk is full
        file.flush()
        # "c": torch asks for memory that could be written
        return torch.from_numpy(np.memmap(file, np.float32, "c", shape=tuple(values.shape)))
