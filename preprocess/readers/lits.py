"""LiTS 2017, liver and tumours in CT: numbered volumes in training batches.

Source: specification `datasets_2d`, section 9, and `datasets_3d`, section 4.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from segfleet.core.errors import Problem
from segfleet.preprocess.readers.base import CaseRef, Facts, RawReader, duplicates, natural
from segfleet.preprocess.stores.manifest import Dataset

FILE = re.compile(r"(volume|segmentation)-(\d+)\.nii(\.gz)?", re.IGNORECASE)


class Reader(RawReader):
    about = "LiTS 2017: liver and liver tumours in CT."
    layout = (
        "'Training Batch 1'/ and 'Training Batch 2'/ (or one folder) with volume-N.nii and "
        "segmentation-N.nii"
    )
    facts = Facts(
        dims="3D",
        modality="CT",
        download="https://competitions.codalab.org/competitions/17094",
        licence="CC BY-NC-ND 4.0",
        complete=131,
        counts="131 volumes (70 more without labels); a tumour in 118; the same as MSD Task03, "
        "and holds 3D-IRCADb",
    )
    options = {"regions": ("none", "liver-tumour")}

    def lies_in(self, folder: Path) -> bool:
        return bool(_files(folder))

    def dataset(self) -> Dataset:
        regions = {"liver": (1, 2), "tumour": (2,)} if self.chosen["regions"] != "none" else {}
        labels = {"background": 0, "liver": 1, "tumour": 2}
        source = {
            "regions": regions,
            "region_order": (1, 2) if regions else (),
            "licence": self.facts.licence,
        }
        return Dataset(
            name="lits", reader="lits", dims=3, channels=("CT",), labels=labels, **source
        )

    def cases(self) -> list[CaseRef]:
        volumes, segmentations = (
            _sorted(self.folder, "volume"),
            _sorted(self.folder, "segmentation"),
        )
        masks: dict[str, list[Path]] = {}
        for number, path in segmentations:
            masks.setdefault(number, []).append(path)
        refs = []
        for number, path in volumes:
            beside = path.with_name(
                re.sub("volume", "segmentation", path.name, flags=re.IGNORECASE)
            )
            # beside the volume, if there is one
            label = min(masks.get(number, [beside]), key=lambda mask: mask.parent != path.parent)
            refs.append(CaseRef(id=f"volume-{number}", images=(path,), labels=(label,)))
        for number in sorted({*masks} - {number for number, _ in volumes}, key=int):
            path = masks[number][0]
            image = path.with_name(re.sub("segmentation", "volume", path.name, flags=re.IGNORECASE))
            refs.append(CaseRef(id=f"volume-{number}", images=(image,), labels=(path,)))
        return sorted(refs, key=lambda ref: natural(ref.id))

    def problems(self) -> list[Problem]:
        problems = duplicates([ref.id for ref in self.refs()])
        volumes = Counter(number for number, _ in _sorted(self.folder, "volume"))
        masks: dict[str, list[str]] = {}
        for number, path in _sorted(self.folder, "segmentation"):
            masks.setdefault(number, []).append(path.relative_to(self.folder).as_posix())
        for number, paths in masks.items():
            if len(paths) > max(1, volumes[number]):
                wording = {"expected": "one", "mend": "Keep the right one."}
                problems.append(
                    Problem(
                        case=f"volume-{number}",
                        field="label",
                        found=f"{len(paths)} masks: {', '.join(paths)}",
                        **wording,
                    )
                )
        return problems


def _files(folder: Path) -> list[Path]:
    """Volumes and segmentations in a folder and in the batches inside it."""
    files = [
        p
        for pattern in ("*", "[!.]*/*")
        for p in folder.glob(pattern)
        if FILE.fullmatch(p.name) and p.is_file()
    ]
    return files if any(p.name.lower().startswith("volume") for p in files) else []


def _sorted(folder: Path, kind: str) -> list[tuple[str, Path]]:
    matches = [(FILE.fullmatch(path.name), path) for path in _files(folder)]
    numbered = [
        (str(int(match[2])), path) for match, path in matches if match and match[1].lower() == kind
    ]
    return sorted(numbered, key=lambda item: (int(item[0]), str(item[1])))
