"""Any raw data set as a raw folder of nnU-Net, version 2 or 1.

Source: nnU-Net's documentation, dataset_format.md of version 2 and setting_up_paths/dataset
conversion of version 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from segfleet.core.errors import InputError
from segfleet.core.making import making
from segfleet.preprocess.case import Geometry
from segfleet.preprocess.checking.check import survey
from segfleet.preprocess.files.names import write_names
from segfleet.preprocess.files.writer import write_image, write_label
from segfleet.preprocess.readers.base import RawReader
from segfleet.preprocess.stores.manifest import Dataset


def write_nnunet(
    reader: RawReader,
    out: Path,
    version: int = 2,
    progress: Callable[[int, int], None] | None = None,
    workers: int | None = None,
) -> int:
    """Check all cases, then write OUT/imagesTr, labelsTr, dataset.json, and for version 2 the split
    `kfold` as splits_final.json; the number of cases. One case is in memory when writing.

    Values are those of the raw files, on their grid. Flat pictures of 8 bits become PNG, all else
    NIfTI. Raises DataError with every problem of the data, InputError if `out` is taken, or for
    what version 1 cannot say (regions, an ignore label).
    """
    from segfleet.preprocess.building.request import SPLIT_SEED
    from segfleet.preprocess.planning.splits import FOLDS, Member, kfold

    dataset, report = reader.dataset(), progress or (lambda done, total: None)
    if version == 1 and (dataset.regions or dataset.ignore_label is not None):
        raise InputError("nnunet: version 1 knows no regions and no ignore label. Use version 2.")
    with making(Path(out)) as partial:
        surveyed = survey(
            reader, workers=workers, progress=lambda done, total: report(done, 2 * total)
        )
        surveyed.raise_problems()
        flat = dataset.dims == 2 and {case.dtype for case in surveyed.facts} == {"uint8"}
        kind = ".png" if flat else ".nii.gz"
        for number, ref in enumerate(surveyed.refs):
            case = reader.read(ref)
            grid = replace(case.geometry, file=replace(case.geometry.file, header=b""))
            _write_images(partial / "imagesTr", ref.id, case.image_CZYX, grid, kind)
            write_label(partial / "labelsTr" / f"{ref.id}{kind}", case.label_ZYX, grid)
            report(len(surveyed.refs) + number + 1, 2 * len(surveyed.refs))
        ids = [ref.id for ref in surveyed.refs]
        write = (_version_2 if version == 2 else _version_1)(dataset, ids, kind)
        (partial / "dataset.json").write_text(json.dumps(write, indent=1) + "\n", encoding="utf-8")
        write_names(partial, dataset.labels)
        members = [
            Member(
                id=case.id,
                group=case.group or case.id,
                foreground=case.foreground(dataset.ignore_label),
                stratum=ref.stratum,
            )
            for case, ref in zip(surveyed.facts, surveyed.refs, strict=True)
        ]
        groups = {member.group for member in members}
        if version == 2 and len(groups) > 1:
            folds = kfold(members, min(FOLDS, len(groups)), SPLIT_SEED)
            text = json.dumps([{side: list(ids) for side, ids in f.items()} for f in folds])
            (partial / "splits_final.json").write_text(text, encoding="utf-8")
    return len(ids)


def _write_images(folder: Path, case: str, image: np.ndarray, grid: Geometry, kind: str) -> None:
    if kind == ".png" and len(image) in (3, 4):  # nnU-Net takes colours from one file
        write_image(folder / f"{case}_0000.png", image, grid)
        return
    for channel, array in enumerate(image):
        write_image(folder / f"{case}_{channel:04d}{kind}", array[None], grid)


def _version_2(dataset: Dataset, ids: list[str], kind: str) -> dict:
    return dataset_document(dataset, len(ids), kind)


def dataset_document(dataset: Dataset, cases: int, kind: str) -> dict:
    """dataset.json of nnU-Net v2 for files that end in `kind`."""
    labels: dict = dict(dataset.labels)
    document = {
        "name": dataset.name,
        "channel_names": {str(n): name for n, name in enumerate(dataset.channels)},
        "labels": labels,
        "numTraining": cases,
        "file_ending": kind,
    }
    if dataset.regions:
        document["labels"] = {"background": 0, **{n: list(v) for n, v in dataset.regions.items()}}
        document["regions_class_order"] = list(dataset.region_order)
    if dataset.ignore_label is not None:
        document["labels"]["ignore"] = dataset.ignore_label
    return document | ({"licence": dataset.licence} if dataset.licence else {})


def _version_1(dataset, ids: list[str], kind: str) -> dict:
    return {
        "name": dataset.name,
        "tensorImageSize": "3D",
        "licence": dataset.licence,
        "modality": {str(n): name for n, name in enumerate(dataset.channels)},
        "labels": {str(value): name for name, value in dataset.labels.items()},
        "numTraining": len(ids),
        "numTest": 0,
        "training": [
            {"image": f"./imagesTr/{case}{kind}", "label": f"./labelsTr/{case}{kind}"}
            for case in ids
        ],
        "test": [],
    }


def describe_predictions(dataset: Dataset, folder: Path) -> list[Path]:
    """Write FOLDER/dataset.json as nnU-Net has it beside predictions, so that its evaluation runs
    on them; what was written. Raises InputError if the folder holds no labels, or of several
    endings."""
    from segfleet.preprocess.files.writer import WRITABLE

    names = [path.name.lower() for path in folder.iterdir() if not path.name.startswith(".")]
    endings = {next((end for end in WRITABLE if name.endswith(end)), None) for name in names}
    endings -= {None}
    if len(endings) != 1:
        found = ", ".join(sorted(endings)) or "none"
        raise InputError(
            f"nnunet: {folder} holds labels ending in: {found}; expected one ending, as nnU-Net "
            "has one for a data set"
        )
    path = folder / "dataset.json"
    document = dataset_document(dataset, sum(n.endswith(tuple(endings)) for n in names), *endings)
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return [path]
