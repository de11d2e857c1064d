"""Mended copies of labels: what a machine can put right without guessing. The raw folder itself is
never touched."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from segfleet.core.errors import InputError
from segfleet.core.making import making
from segfleet.preprocess.case import Geometry
from segfleet.preprocess.files.grids import disagreement, laid, within_rounding
from segfleet.preprocess.files.images import ImageError, ending
from segfleet.preprocess.files.writer import WRITABLE, write_label
from segfleet.preprocess.readers.base import RawReader
from segfleet.preprocess.stores.manifest import Dataset
from segfleet.preprocess.transforms.voxels import pieces

Changes = list[dict[str, str]]


def repair(
    reader: RawReader,
    out: Path,
    remap: Mapping[int, int] | None = None,
    *,
    same_voxels: bool = False,
) -> Changes:
    """Copy the raw folder to the new folder `out` with its labels repaired; what was done, one
    entry per case and field.

    Repaired are: values the user renumbers by `remap`; masks of 0 and another value, such as 255,
    where one label is declared; values a rounding error off an integer; labels whose grid is the
    image's turned, exchanged or shifted by whole voxels, which are laid onto the image's. The
    image's geometry is given to voxels that stay where they are only if it says the same place, or
    if the user says so: `same_voxels` means that labels lie voxel by voxel on their images,
    whatever their headers say.

    A label that would still hold anything but integers from 0 to 255 is left alone, and so is one
    outside the raw folder: the check reports it. Files that need nothing are linked, not copied
    (copied where links are impossible). `out` appears complete or, when nothing can be repaired,
    not at all. Raises InputError if it exists, or another process is writing it.
    """
    out, root = Path(out), Path(os.path.abspath(reader.root))
    if out.resolve().is_relative_to(root.resolve()):
        raise InputError(
            f"to: {out} lies in the raw folder. Choose a new folder for the repaired copy."
        )
    if out.exists():
        raise InputError(f"to: {out} exists. Choose a new folder for the repaired copy.")
    dataset, done = reader.dataset(), []
    with making(out) as partial:
        for ref in reader.refs():
            if not ref.labels:
                continue
            # a link counts as a file of the folder it lies in
            path = Path(os.path.abspath(ref.labels[0]))
            if (
                len(ref.labels) != 1
                or not path.is_file()
                or not path.is_relative_to(root)
                or not _writable(path)
            ):
                continue
            try:
                label, grid = reader.label(ref)
                repaired, geometry, changes = repaired_label(
                    label, grid, _grid(reader, ref), dataset, remap or {}, same_voxels
                )
            except ImageError:
                continue  # the check reports it
            if not changes:
                continue
            if not done:
                _link_tree(root, partial)
            _write(partial / path.relative_to(root), repaired, geometry)
            done += [{"case": ref.id, **change} for change in changes]
    return done


def repaired_label(
    label: np.ndarray,
    grid: Geometry,
    image: Geometry | None,
    dataset: Dataset,
    remap: Mapping[int, int],
    same_voxels: bool = False,
) -> tuple[np.ndarray, Geometry, Changes]:
    """The label (Z, Y, X) with legal values on the image's grid, and what was changed: {"field",
    "was", "now"}.

    Nothing is changed where a voxel is no finite integer, or where the result could not be stored
    as uint8.
    """
    if label.dtype.kind == "f" and not all(
        (np.isfinite(piece) & (piece == np.rint(piece))).all() for _, piece in pieces(label)
    ):
        return label, grid, []
    untouched, changes = (label, grid, []), []
    for field, was, now, _ in grid.file.warnings:
        if field == "label values":  # rounded when it was read
            changes.append({"field": field, "was": was, "now": now})
    rules = _rules(label, dataset, remap)
    if rules:
        # a type which holds the new values
        original, label = label, label.astype(np.promote_types(label.dtype, np.int16))
        for old, new in rules.items():
            label[original == old] = new
        pairs = (", ".join(f"{side:g}" for side in sides) for sides in (rules, rules.values()))
        changes.append({"field": "label values", "was": next(pairs), "now": next(pairs)})
    if image is not None and (difference := disagreement(grid, image)):
        field, was, now = difference
        placed = None if same_voxels and grid.shape == image.shape else laid(label, grid, image)
        if placed is not None:
            label, now = placed, f"{now}, laid onto the image's grid as its affine says"
        elif grid.shape != image.shape or not (same_voxels or within_rounding(grid, image)):
            return (label, grid, changes) if changes and _storable(label) else untouched
        changes.append({"field": f"label {field}", "was": was, "now": now})
        grid = image
    return (label, grid, changes) if _storable(label) else untouched


def _rules(label: np.ndarray, dataset: Dataset, remap: Mapping[int, int]) -> dict[float, int]:
    """Which values become which others."""
    present = {float(v) for v in np.unique(label)}
    rules: dict[float, int] = {old: new for old, new in remap.items() if old in present}
    odd = sorted(present - {0.0} - dataset.values)
    foreground = [value for value in dataset.labels.values() if value]
    if not rules and len(foreground) == 1 and present - {0.0} == {*odd} and len(odd) == 1:
        return {odd[0]: foreground[0]}
    return rules


def _storable(label: np.ndarray) -> bool:
    return bool(0 <= label.min() and label.max() <= 255)


def _grid(reader: RawReader, ref) -> Geometry | None:
    try:
        return reader.image(ref)[1] if all(path.is_file() for path in ref.images) else None
    except ImageError:
        return None


def _writable(path: Path) -> bool:
    if path.suffix == ".npy":
        return True
    try:
        return ending(path) in WRITABLE
    except InputError:
        return False


def _write(path: Path, label: np.ndarray, grid: Geometry) -> None:
    """Never through a link: the new file replaces it."""
    if path.suffix == ".npy":
        path.unlink()
        np.save(path, label[0].astype(np.uint8))
    else:
        write_label(path, label.astype(np.uint8), grid)


def _link_tree(root: Path, out: Path) -> None:
    def link(source: str, target: str) -> None:
        if not os.path.exists(source):  # a link to nowhere
            return
        try:
            os.link(os.path.realpath(source), target)
        except OSError:
            shutil.copy2(source, target)

    shutil.copytree(root, out, copy_function=link, dirs_exist_ok=True)
