"""Mended copies of labels: what a machine can put right without guessing. The raw folder itself is
never touched."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from segfleet.core.errors import InputError
from segfleet.preprocess.case import Geometry
from segfleet.preprocess.files.images import ImageError, disagreement, ending
from segfleet.preprocess.files.writer import WRITABLE, write_label
from segfleet.preprocess.readers.base import RawReader
from segfleet.preprocess.stores.manifest import Dataset
from segfleet.preprocess.transforms.voxels import pieces


def mend(
    reader: RawReader, out: Path, remap: Mapping[int, int] | None = None
) -> list[dict[str, str]]:
    """Copy the raw folder to the new folder `out` with its labels mended; what was done, one entry
    per case and field.

    Mended are: values the user renumbers by `remap`; masks of 0 and another value, such as 255,
    where one label is declared; labels on the right voxels but with another spacing or affine than
    the image, which get the image's. A label that would still hold anything but integers from 0 to
    255 is left alone, and so is one outside the raw folder: the check tells. Files that need
    nothing are linked, not copied (copied where links are impossible). `out` appears complete or,
    when nothing can be mended, not at all. Raises InputError if it is taken.
    """
    out, root = Path(out), Path(os.path.abspath(reader.root))
    if out.exists() or out.resolve().is_relative_to(root.resolve()):
        raise InputError(
            f"to: {out} {'exists' if out.exists() else 'lies in the raw folder'}. Choose a new "
            "folder for the mended copy."
        )
    dataset, partial = reader.dataset(), out.with_name(out.name + ".partial")
    done: list[dict[str, str]] = []
    shutil.rmtree(partial, ignore_errors=True)  # of a killed run
    try:
        for ref in reader.refs():
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
                mended, here, changes = mended_label(
                    label, grid, _grid(reader, ref), dataset, remap or {}
                )
            except ImageError:
                continue  # the check tells
            if not changes:
                continue
            if not done:
                _link_tree(root, partial)
            _write(partial / path.relative_to(root), mended, here)
            done += [{"case": ref.id, **change} for change in changes]
        if done:
            os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return done


def mended_label(
    label: np.ndarray,
    grid: Geometry,
    image: Geometry | None,
    dataset: Dataset,
    remap: Mapping[int, int],
) -> tuple[np.ndarray, Geometry, list[dict[str, str]]]:
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
    declared = {
        *dataset.labels.values(),
        *(v for region in dataset.regions.values() for v in region),
        dataset.ignore_label,
    }
    present = {float(v) for v in np.unique(label)}
    rules = {old: new for old, new in remap.items() if old in present}
    odd = sorted(present - {0.0} - declared)
    foreground = [value for value in dataset.labels.values() if value]
    if not rules and len(foreground) == 1 and present - {0.0} == {*odd} and len(odd) == 1:
        rules = {odd[0]: foreground[0]}
    if rules:
        # which holds the new values
        original, label = (
            label,
            label.astype(np.promote_types(label.dtype, np.int16)),
        )
        for old, new in rules.items():
            label[original == old] = new
        pairs = (", ".join(f"{side:g}" for side in sides) for sides in (rules, rules.values()))
        changes.append({"field": "label values", "was": next(pairs), "now": next(pairs)})
    if (
        image is not None
        and image.shape == grid.shape
        and (difference := disagreement(grid, image))
    ):
        field, was, now = difference
        changes.append({"field": f"label {field}", "was": was, "now": now})
        grid = replace(grid, spacing=image.spacing, affine=image.affine)
    return (label, grid, changes) if 0 <= label.min() and label.max() <= 255 else untouched


def _grid(reader: RawReader, ref) -> Geometry | None:
    try:
        return reader.image(ref)[1] if all(path.is_file() for path in ref.images) else None
    except ImageError:
        return None


def _writable(path: Path) -> bool:
    return path.suffix == ".npy" or ending(path) in WRITABLE


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

    shutil.copytree(root, out, copy_function=link)
