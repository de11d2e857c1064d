"""nnU-Net v2: dataset.json, one file per channel with a four-digit suffix, regions and an ignore
label.

Source: specification `datasets_3d`, section 5.
"""

from __future__ import annotations

import glob
import re
import unicodedata
from functools import cached_property
from pathlib import Path
from typing import Any

from segfleet.core.errors import InputError, Problem, check_one_of
from segfleet.core.files import parse_json
from segfleet.preprocess.files.images import ENDINGS, NATURAL, peek, stem
from segfleet.preprocess.readers.base import (
    CaseRef,
    Facts,
    Folds,
    RawReader,
    count_problem,
    field,
    fold_problems,
    natural,
    number,
    read_json,
    visible,
)
from segfleet.preprocess.stores.manifest import Dataset

MANY_CHANNELS = (*NATURAL, ".tif", ".tiff")  # one file may hold all channels


def channels_of(document: dict[str, Any], file: Path) -> tuple[str, ...]:
    """Channel names of a dataset.json, in their order. Raises InputError."""
    names = field(document, "channel_names", dict, file)
    ordered = sorted(
        (number(index, "channel_names", file), str(name)) for index, name in names.items()
    )
    if not ordered or [index for index, _ in ordered] != list(range(len(ordered))):
        raise InputError(
            f'{file}: channel_names: found the indices {list(names)}, expected "0", "1", '
            "... without a gap"
        )
    return tuple(name for _, name in ordered)


def dataset_of(
    document: dict[str, Any], file: Path, *, name: str, dims: int, ending: str
) -> Dataset:
    """The data set that a dataset.json of nnU-Net v2 (`document`, read from `file`) describes.
    Raises InputError."""
    labels = field(document, "labels", dict, file)
    plain: dict[str, int] = {}
    regions: dict[str, tuple[int, ...]] = {}
    for key, value in labels.items():
        if isinstance(value, list):
            regions[key] = tuple(number(v, f"labels: {key}", file) for v in value)
        else:
            plain[key] = number(value, f"labels: {key}", file)
    ignore = plain.pop("ignore", None)
    if plain.get("background") != 0:
        raise InputError(
            f"{file}: labels: background: found {labels.get('background')!r}, expected 0"
        )
    values = sorted({*plain.values(), *(v for region in regions.values() for v in region)})
    if values != list(range(len(values))) or len(values) < 2:
        raise InputError(
            f"{file}: labels: found the values {values}, expected 0, 1, 2, ... without a "
            "gap, at least one beside 0"
        )
    if ignore is not None and ignore != len(values):
        raise InputError(
            f"{file}: labels: ignore: found {ignore}, expected the highest integer, {len(values)}"
        )
    order: tuple[int, ...] = ()
    if regions:
        regions = {
            n: regions.get(n, (plain.get(n, 0),))
            for n in labels
            if n not in ("background", "ignore")
        }
        if any(not region or 0 in region for region in regions.values()):
            raise InputError(
                f"{file}: labels: a region needs one or more values above 0, found {regions}"
            )
        listed = field(document, "regions_class_order", list, file)
        order = tuple(number(v, "regions_class_order", file) for v in listed)
        if len(order) != len(regions):
            expected = f"{len(regions)}: one for each of {list(regions)}"
            raise InputError(
                f"{file}: regions_class_order: found {len(order)} entries, expected {expected}"
            )
        names = {value: name for name, value in plain.items()}
        plain = {names.get(value, f"label {value}"): value for value in values}
    return Dataset(
        name=name,
        reader="nnunet",
        dims=dims,
        channels=channels_of(document, file),
        labels=dict(sorted(plain.items(), key=lambda item: item[1])),
        ignore_label=ignore,
        regions=regions,
        region_order=order,
        file_ending=ending,
        licence=str(document.get("licence", document.get("license", ""))),
    )


def _from_version_1(document: dict, root: Path, file: Path) -> dict:
    """What version 2 would say of a folder made for nnU-Net version 1, whose images are a file per
    channel too. Raises InputError for a folder of the Decathlon, whose images are not."""
    entries = field(document, "training", list, file) if "training" in document else []
    listed = [str(e.get("image", "")) for e in entries if isinstance(e, dict)]
    first = Path(listed[0]).name if listed else ""
    kind = next((end for end in ENDINGS if first.lower().endswith(end)), ".nii.gz")
    if (
        not first
        or (root / "imagesTr" / first).is_file()
        or not any((root / "imagesTr").glob(f"*_0000{glob.escape(kind)}"))
    ):
        raise InputError(f"{file}: has modality, so it is an MSD folder. Use the layout msd.")
    labels = field(document, "labels", dict, file)
    return {
        **document,
        "channel_names": field(document, "modality", dict, file),
        "labels": {str(name): number(value, "labels", file) for value, name in labels.items()},
        "file_ending": kind,
    }


class Reader(RawReader):
    about = (
        "Your own data in the nnU-Net layout (v2 or v1), 3D or 2D, with regions and an ignore "
        "label."
    )
    layout = (
        "an nnU-Net v2 folder: dataset.json (channel_names, labels, numTraining, file_ending), "
        "imagesTr/CASE_0000.nii.gz, labelsTr/CASE.nii.gz"
    )

    facts = Facts(dims="2D, 3D", modality="any")

    def __init__(self, root: str | Path, **options: str):
        super().__init__(root, **options)
        self.file = self.root / "dataset.json"
        if not self.file.is_file():
            raise InputError(f"raw: {self.root} holds no dataset.json. Expected {self.layout}")
        self.json = read_json(self.file)
        if "modality" in self.json and "channel_names" not in self.json:
            self.json = _from_version_1(self.json, self.root, self.file)
        self.ending = str(field(self.json, "file_ending", str, self.file)).lower()
        legal = [ending for ending in ENDINGS if ending not in (".jpg", ".jpeg")]
        check_one_of(f"{self.file}: file_ending", self.ending, legal)

    @cached_property
    def channels(self) -> tuple[str, ...]:
        return channels_of(self.json, self.file)

    def dataset(self) -> Dataset:
        name = str(self.json.get("name", self.root.resolve().name))
        return dataset_of(self.json, self.file, name=name, dims=self._dims(), ending=self.ending)

    def _dims(self) -> int:
        if self.ending in NATURAL:
            return 2
        depths = {peek(ref.images[0])[1] for ref in self.cases()[:5] if ref.images} - {0}
        return 2 if depths == {1} else 3

    @cached_property
    def _files(self) -> tuple[dict[str, dict[int, Path]], dict[str, Path]]:
        """Images by case and channel, labels by case."""
        images: dict[str, dict[int, Path]] = {}
        pattern = re.compile(rf"(.+)_(\d{{4}}){re.escape(self.ending)}", re.IGNORECASE)
        for path in visible(self.root / "imagesTr"):
            if match := pattern.fullmatch(path.name):
                case = unicodedata.normalize("NFC", match[1])
                if int(match[2]) in images.get(case, {}):
                    case = match[1]  # spelt in both ways: two cases
                images.setdefault(case, {})[int(match[2])] = path
        labels = {
            stem(p): p
            for p in visible(self.root / "labelsTr")
            if p.name.lower().endswith(self.ending)
        }
        return images, labels

    def cases(self) -> list[CaseRef]:
        if "dataset" in self.json:
            return self._explicit()
        images, labels = self._files
        if not images and not labels:
            raise InputError(
                f"raw: {self.root / 'imagesTr'} holds no CASE_0000{self.ending}. Expected "
                f"{self.layout}"
            )
        refs = []
        for case in sorted({*images, *labels}, key=natural):
            channels = images.get(case, {})
            together = set(channels) == {0} and self.ending in MANY_CHANNELS
            numbers = [0] if together else range(len(self.channels))
            paths = tuple(
                channels.get(i, self.root / "imagesTr" / f"{case}_{i:04d}{self.ending}")
                for i in numbers
            )
            label = labels.get(case, self.root / "labelsTr" / f"{case}{self.ending}")
            refs.append(CaseRef(id=case, images=paths, labels=(label,)))
        return refs

    def _explicit(self) -> list[CaseRef]:
        listed = field(self.json, "dataset", dict, self.file)
        refs = []
        for case in sorted(listed, key=natural):
            entry = listed[case]
            if (
                not isinstance(entry, dict)
                or not isinstance(entry.get("images"), list)
                or not isinstance(entry.get("label"), str)
            ):
                raise InputError(
                    f'{self.file}: dataset: {case}: found {entry!r}, expected {{"images": [path, '
                    f'...], "label": path}}'
                )
            images = tuple(self.root / str(path) for path in entry["images"])
            refs.append(
                CaseRef(
                    id=case,
                    images=images,
                    labels=(self.root / entry["label"],),
                )
            )
        if not refs:
            raise InputError(f"{self.file}: dataset: found no case. Expected {self.layout}")
        return refs

    def problems(self) -> list[Problem]:
        refs = self.refs()
        problems = count_problem(len(refs), field(self.json, "numTraining", int, self.file))
        images, _ = self._files
        for case in sorted(images, key=natural) if "dataset" not in self.json else ():
            for extra in sorted(i for i in images[case] if i >= len(self.channels)):
                expected, mend = (
                    f"{len(self.channels)} channel(s)",
                    "Declare it in channel_names or move it away.",
                )
                problems.append(
                    Problem(
                        case=case,
                        field="channel",
                        found=f"_{extra:04d}",
                        expected=expected,
                        mend=mend,
                    )
                )
        return problems + self._split_problems({ref.id for ref in refs})

    def _split_problems(self, ids: set[str]) -> list[Problem]:
        folds = self.brought().get("nnunet", ())
        return [
            p
            for index, fold in enumerate(folds)
            for p in fold_problems("splits_final.json", f"fold {index}", fold, ids, "imagesTr")
        ]

    def brought(self) -> dict[str, Folds]:
        path = self.root / "splits_final.json"
        if not path.is_file():
            return {}
        try:
            folds = parse_json(path.read_text(encoding="utf-8"))
            return {
                "nnunet": tuple(
                    {side: tuple(map(str, fold[side])) for side in ("train", "val")}
                    for fold in folds
                )
            }
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise InputError(
                f'{path}: expected a list of {{"train": [case, ...], "val": [case, ...]}} '
                f"({reason})"
            ) from None
