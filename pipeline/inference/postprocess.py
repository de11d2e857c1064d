"""What is taken out of a predicted label, structure by structure: all but the largest connected
part, or parts below a size.

Voxels that touch with a face, an edge or a corner are one part, as in nnU-Net's post-processing
(Isensee et al. 2021). What is taken out becomes background.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from segfleet.core.errors import InputError
from segfleet.pipeline.task import Task

AUTO = "auto"
TOUCHING = np.ones((3, 3, 3))


@dataclass(frozen=True, kw_only=True)
class Rule:
    """`text`: largest, min-size=N (voxels) or min-size=Nmm3."""

    text: str
    smallest: float = 0.0  # what is smaller goes
    unit: str = "voxels"  # or mm3
    largest: bool = False

    def kept(self, mask_ZYX: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
        """The part of a mask that stays; `spacing` in mm (z, y, x)."""
        if not mask_ZYX.any():
            return mask_ZYX
        parts, count = ndimage.label(mask_ZYX, TOUCHING)
        if count == 1 and self.largest:
            return mask_ZYX
        sizes = np.bincount(parts.ravel())
        sizes[0] = 0
        if self.largest:
            return parts == sizes.argmax()  # of equal ones the first in the order of the grid
        voxel = math.prod(spacing) if self.unit == "mm3" else 1.0
        stays = sizes * voxel >= self.smallest
        stays[0] = False
        return stays[parts]


LARGEST = Rule(text="largest", largest=True)


def parse_rule(text: str) -> Rule:
    """A rule from the words of a user. Raises InputError."""
    if text == "largest":
        return LARGEST
    match = re.fullmatch(r"min-size=(\d+(?:\.\d+)?)(mm3)?", text)
    if not match or not float(match[1]):
        raise InputError(
            f"postprocess: found '{text}', expected one of: auto, largest, min-size=N (voxels), "
            "min-size=Nmm3"
        )
    return Rule(text=text, smallest=float(match[1]), unit=match[2] or "voxels")


def rules_of(texts: Mapping[str, str]) -> dict[str, Rule]:
    """{structure: rule} from what a record says."""
    return {name: parse_rule(text) for name, text in texts.items()}


def for_all(rule: Rule, task: Task) -> dict[str, Rule]:
    return dict.fromkeys(task.names, rule)


def clean(
    label_ZYX: np.ndarray, rules: Mapping[str, Rule], task: Task, spacing: Sequence[float]
) -> np.ndarray:
    """The label with every structure's rule obeyed, in the order of the task; a new array if
    anything goes."""
    for name, members in zip(task.names, task.members, strict=True):
        if name in rules:
            mask = np.isin(label_ZYX, members)
            gone = mask & ~rules[name].kept(mask, spacing)
            if gone.any():
                label_ZYX = np.where(gone, 0, label_ZYX).astype(label_ZYX.dtype)
    return label_ZYX
