"""Medical Segmentation Decathlon: dataset.json (v1), 4D images whose last axis is the channel."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

from segfleet.core.errors import InputError, Problem
from segfleet.preprocess.files.images import stem
from segfleet.preprocess.readers.base import (
    CaseRef,
    Facts,
    RawReader,
    count_problem,
    duplicates,
    field,
    number,
    read_json,
    visible,
)
from segfleet.preprocess.stores.manifest import Dataset

# of known tasks, in their numbering, largest first: names, label values, and the label each paints
REGIONS = {
    "BrainTumour": {"whole tumour": (1, 2, 3), "tumour core": (2, 3), "enhancing tumour": (3,)},
    "BRATS": {"whole tumour": (1, 2, 3), "tumour core": (2, 3), "enhancing tumour": (3,)},
    "Liver": {"liver": (1, 2), "tumour": (2,)},
    "Pancreas": {"pancreas": (1, 2), "tumour": (2,)},
}


class Reader(RawReader):
    about = (
        "Medical Segmentation Decathlon tasks: brain tumour, liver, hippocampus, hepatic vessel, "
        "..."
    )
    layout = (
        "an MSD folder: dataset.json (modality, labels, training), imagesTr/CASE.nii.gz, "
        "labelsTr/CASE.nii.gz"
    )

    facts = Facts(
        dims="3D",
        modality="MRI, CT",
        download="http://medicaldecathlon.com",
        licence="CC BY-SA 4.0",
        counts="Task01 BrainTumour 484 (4 channels), Task03 Liver 131, Task04 Hippocampus 260, "
        "Task08 HepaticVessel 303, ...",
    )
    options = {"regions": ("none", "overlapping")}

    def __init__(self, root: str | Path, **options: str):
        super().__init__(root, **options)
        self.file = self.root / "dataset.json"
        if not self.file.is_file():
            raise InputError(f"raw: {self.root} holds no dataset.json. Expected {self.layout}")
        self.json = read_json(self.file)
        if "channel_names" in self.json and "modality" not in self.json:
            raise InputError(
                f"{self.file}: has channel_names, so it is an nnU-Net v2 folder. Use the layout "
                "nnunet."
            )
        if any((self.root / "imagesTr").glob("*_0000.nii.gz")) and not any(
            ref.images[0].is_file() for ref in self.cases()[:1]
        ):
            raise InputError(
                f"{self.file}: its images are a file per channel (_0000), so it is an nnU-Net v1 "
                "folder. Use the layout nnunet."
            )

    def dataset(self) -> Dataset:
        modality = field(self.json, "modality", dict, self.file)
        labels = field(self.json, "labels", dict, self.file)
        values = {
            str(name): number(value, f"labels: value of '{name}'", self.file)
            for value, name in labels.items()
        }
        if len(values) < len(labels) or 0 not in values.values() or len(values) < 2:
            expected = (
                'value -> name, all names different, "0" the background and at least one more'
            )
            raise InputError(f"{self.file}: labels: found {labels}, expected {expected}")
        channels = sorted(modality.items(), key=lambda item: number(item[0], "modality", self.file))
        if not channels:
            raise InputError(f"{self.file}: modality: found no channel, expected index -> name")
        name = str(self.json.get("name", self.root.resolve().name))
        regions = self._regions(name, set(values.values()))
        return Dataset(
            name=name,
            reader="msd",
            dims=3,
            channels=tuple(str(name) for _, name in channels),
            labels=dict(sorted(values.items(), key=lambda item: item[1])),
            regions=regions,
            region_order=tuple(
                min(set(members) - set(inner))
                for members, inner in pairwise([*regions.values(), ()])
            ),
            licence=str(self.json.get("licence", "")),
        )

    def _regions(self, name: str, values: set[int]) -> dict[str, tuple[int, ...]]:
        """The overlapping targets a known task is scored by, if the user wants them: whole tumour,
        tumour core, enhancing tumour."""
        if self.chosen["regions"] == "none":
            return {}
        targets = next(
            (
                regions
                for task, regions in REGIONS.items()
                if task.lower() in f"{name} {self.root.resolve().name}".lower()
            ),
            None,
        )
        if targets is None or not {v for members in targets.values() for v in members} <= values:
            raise InputError(
                f"option regions: found 'overlapping', but {name} has no known ones; tasks that "
                f"have: {', '.join(REGIONS)}"
            )
        return targets

    def cases(self) -> list[CaseRef]:
        listed = field(self.json, "training", list, self.file)
        refs = []
        for index, entry in enumerate(listed):
            if not isinstance(entry, dict) or not all(
                isinstance(entry.get(key), str) and entry[key] for key in ("image", "label")
            ):
                raise InputError(
                    f'{self.file}: training[{index}]: found {entry!r}, expected {{"image": path, '
                    f'"label": path}}'
                )
            if Path(entry["image"]).name.startswith("._"):
                continue
            image, label = (self.root / Path(entry[key]) for key in ("image", "label"))
            name = stem(image)
            refs.append(CaseRef(id=name, images=(image,), labels=(label,)))
        if not refs:
            raise InputError(f"{self.file}: training: found no case. Expected {self.layout}")
        return refs

    def problems(self) -> list[Problem]:
        refs = self.refs()
        problems = duplicates([ref.id for ref in refs])
        problems += count_problem(len(refs), self.json.get("numTraining"))
        listed = {os.path.realpath(ref.images[0]) for ref in refs}
        for folder in {ref.images[0].parent for ref in refs}:
            for path in visible(folder, "*.nii*"):
                if os.path.realpath(path) not in listed:
                    wording = {
                        "found": "a file",
                        "expected": "to be listed in dataset.json",
                        "mend": "List it or move it away.",
                    }
                    problems.append(Problem(case=stem(path), field="image", **wording))
        return problems
