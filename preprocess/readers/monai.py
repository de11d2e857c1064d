"""A datalist of MONAI: a JSON file that names image and label of every case."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from segfleet.core.errors import InputError, Problem
from segfleet.preprocess.files.images import peek, stem
from segfleet.preprocess.readers.base import (
    CaseRef,
    Facts,
    Folds,
    RawReader,
    declared_labels,
    duplicates,
    field,
    number,
    read_json,
    visible,
)
from segfleet.preprocess.stores.manifest import Dataset

LISTS = ("training", "validation")


class Reader(RawReader):
    about = "A MONAI datalist: a JSON file with the image and the label of every case, and folds."
    layout = (
        'a folder with one NAME.json: {"training": [{"image": path or [paths], "label": path, '
        '"fold": 0}, ...]}; labels and modality there or in labels.json'
    )
    facts = Facts(dims="2D, 3D", modality="any")

    def __init__(self, root: str | Path, **options: str):
        super().__init__(root, **options)
        files = [p for p in visible(self.root, "*.json") if p.is_file() and p.name != "labels.json"]
        listed = [p for p in files if isinstance(read_json(p).get("training"), list)]
        if len(listed) != 1:
            names = ", ".join(p.name for p in listed or files) or "none"
            raise InputError(f"raw: found the files {names}. Expected {self.layout}")
        self.file = listed[0]
        self.json = read_json(self.file)

    @cached_property
    def entries(self) -> list[tuple[str, dict]]:
        """(list, entry) of every labelled case. Raises InputError."""
        entries = []
        for part in LISTS:
            listed = field(self.json, part, list, self.file) if part in self.json else []
            for index, entry in enumerate(listed):
                images = entry.get("image") if isinstance(entry, dict) else None
                images = images if isinstance(images, list) else [images]
                if not images or not all(isinstance(i, str) and i for i in images):
                    raise InputError(
                        f'{self.file}: {part}[{index}]: found {entry!r}, expected {{"image": path, '
                        '"label": path}'
                    )
                if isinstance(entry.get("label"), str) and entry["label"]:
                    entries.append((part, {**entry, "image": images}))
        if not entries:
            raise InputError(f"{self.file}: found no case with a label. Expected {self.layout}")
        return entries

    def dataset(self) -> Dataset:
        first = self.cases()[0]
        channels = self.json.get("channel_names", self.json.get("modality", {}))
        if isinstance(channels, dict) and channels:
            indices = {number(key, "modality", self.file): key for key in channels}
            names = tuple(str(channels[indices[index]]) for index in sorted(indices))
        else:
            count = max(1, sum(peek(path)[0] for path in first.images))
            names = tuple(f"channel {n}" for n in range(count)) if count > 1 else ("image",)
        depth = peek(first.images[0])[1]
        return Dataset(
            name=str(self.json.get("name", self.root.resolve().name)),
            reader="monai",
            dims=2 if depth == 1 else 3,
            channels=names,
            labels=self.labels,
        )

    @cached_property
    def labels(self) -> dict[str, int]:
        if labels := declared_labels(self.root / "labels.json"):
            return labels
        listed = self.json.get("labels")
        if not isinstance(listed, dict) or not listed:
            raise InputError(
                f'{self.file}: names no labels. Add "labels": {{"0": "background", "1": "name"}} '
                "to it, or a labels.json beside it"
            )
        flipped = all(str(key).isdecimal() for key in listed)
        pairs = {str(n): v for v, n in listed.items()} if flipped else listed
        labels = {
            name: number(value, f"labels: {name}", self.file) for name, value in pairs.items()
        }
        if labels.get("background") != 0 or not len(listed) == len(set(labels.values())) == len(
            labels
        ):
            expected = "0 for background, all names and values different"
            raise InputError(f"{self.file}: labels: found {listed}, expected {expected}")
        return dict(sorted(labels.items(), key=lambda item: item[1]))

    def cases(self) -> list[CaseRef]:
        refs = []
        for _, entry in self.entries:
            images = tuple(self.root / path for path in entry["image"])
            refs.append(
                CaseRef(id=stem(images[0]), images=images, labels=(self.root / entry["label"],))
            )
        return refs

    def problems(self) -> list[Problem]:
        return duplicates([ref.id for ref in self.refs()])

    def brought(self) -> dict[str, Folds]:
        """ "folds" of the entries' `fold`, "given" of the lists training and validation."""
        pairs = list(zip(self.entries, self.refs(), strict=True))
        splits: dict[str, Folds] = {}
        folds = sorted({e["fold"] for (_, e), _ in pairs if isinstance(e.get("fold"), int)})
        if len(folds) > 1 and all(isinstance(e.get("fold"), int) for (_, e), _ in pairs):
            splits["folds"] = tuple(
                {
                    "train": tuple(ref.id for (_, e), ref in pairs if e["fold"] != fold),
                    "val": tuple(ref.id for (_, e), ref in pairs if e["fold"] == fold),
                }
                for fold in folds
            )
        train, val = (tuple(r.id for (part, _), r in pairs if part == name) for name in LISTS)
        if train and val:
            splits["given"] = ({"train": train, "val": val},)
        return splits
