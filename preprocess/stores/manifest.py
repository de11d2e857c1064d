"""The manifest of a shard store: small, versioned, written last. It is the only thing a loader
trusts."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from segfleet.core.errors import InputError
from segfleet.core.files import write_atomically

# 2: the id holds all that changes a result, the file its own sha256, shards whose they are
VERSION = 2
# store format -> revision of its shard files, where it has changed since the first: another one
# cannot be read
LAYOUTS = {"hdf5": 2}
NAME = "manifest.json"


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Dataset(Frozen):
    """What the raw data set is, independent of any preprocessing."""

    name: str
    reader: str
    dims: int  # 2 or 3
    channels: tuple[str, ...]
    labels: dict[str, int]  # name -> value, background 0 first; without the ignore label
    ignore_label: int | None = None
    # overlapping targets, in order; empty: plain classes
    regions: dict[str, tuple[int, ...]] = Field(default_factory=dict)
    # the label painted for each region, later ones over earlier ones
    region_order: tuple[int, ...] = ()
    file_ending: str = ".nii.gz"  # of predictions
    licence: str = ""


class Plan(Frozen):
    """How raw cases become training cases. Axes (z, y, x) of the stored grid, whose z is the
    coarsest of the raw grid's; 2D data sets have one slice."""

    target_spacing: tuple[float, float, float]  # mm; 0: that axis is never resampled
    # stored axis i is axis transpose[i] of the raw grid
    transpose: tuple[int, int, int] = (0, 1, 2)
    patch: tuple[int, int, int]  # voxels
    batch: int = 2  # patches that the planned memory holds
    patch_2d: tuple[int, int, int] | None = None  # of 2D networks; None: not planned
    batch_2d: int = 2
    # per channel: zscore | ct | rgb_to_0_1 | imagenet | rescale_to_0_1 | minmax | minmax255 | none
    normalisation: tuple[str, ...]
    # per channel, of the foreground: mean std median min max percentile_00_5 percentile_99_5
    intensity: tuple[dict[str, float], ...] = ()
    nonzero_mask: bool = False  # z-score inside the non-zero mask only
    anisotropic_axis: int | None = None  # axis resampled apart from the others
    median_shape: tuple[int, int, int] = (1, 1, 1)
    dtype: str = "float16"  # of stored images; integers are multiplied by `scale` when read
    scale: float = 1.0
    size: tuple[int, int, int] | None = (
        None  # of every stored case, whatever its spacing; None: by target_spacing
    )
    interpolation: str = "cubic"  # of resized images: cubic | bilinear | area
    masks: str = "linear"  # of resized labels: linear | nearest | nearest-exact

    @property
    def masked(self) -> tuple[int, ...]:
        """Channels whose voxels outside the non-zero mask are exactly 0."""
        kinds = enumerate(self.normalisation) if self.nonzero_mask else ()
        return tuple(channel for channel, kind in kinds if kind == "zscore")


def inside(path: str) -> str:
    """A path that stays inside its folder, whatever system reads it. Raises ValueError."""
    parts = path.split("/")
    if any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in parts):
        raise ValueError(f"path {path!r} leads out of its folder")
    return path


InsidePath = Annotated[str, AfterValidator(inside)]


class CaseEntry(Frozen):
    """One case of the store."""

    id: str
    group: str  # patient: never on both sides of a split
    shard: InsidePath  # path inside the store
    key: InsidePath  # array group inside the shard
    shape: tuple[int, int, int]  # of the stored grid (z, y, x), voxels
    spacing: tuple[float, float, float]  # mm
    # box of the raw grid that was kept: (start, stop) per axis
    crop: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    raw_shape: tuple[int, int, int]
    raw_spacing: tuple[float, float, float]
    affine: tuple[tuple[float, ...], ...] | None = None
    has_truth: bool = False  # the label on the raw grid is stored beside the resampled one
    voxels: dict[int, int] = Field(default_factory=dict)  # label value -> count on the stored grid
    # label value -> sampled flat voxel indices of the stored grid
    foreground: dict[int, tuple[int, ...]] = Field(default_factory=dict)
    sha256: str = ""  # of the stored image and label bytes: the same for every store format
    source_sha256: str = ""  # of the raw files
    image_sha256: str = (
        ""  # of the raw image's pixels, whatever file they were in; empty: not recorded
    )
    image_file: str = ""  # relative to the raw folder, for the reader of predictions and reports


class Manifest(Frozen):
    version: int = VERSION
    format: str  # zarr | hdf5
    layout: int  # revision of the shard files
    id: str = ""  # of the content, see `content_id`; `save_manifest` fills it in
    dataset: Dataset
    plan: Plan
    fingerprint: dict[str, Any] = Field(default_factory=dict)
    cases: tuple[CaseEntry, ...]
    # name -> folds of {"train": ids, "val": ids}
    splits: dict[str, tuple[dict[str, tuple[str, ...]], ...]] = Field(default_factory=dict)
    split_seed: int = 0
    joined: dict[str, str] | None = (
        # case id -> its patient in the layout, where equal images made it another's; None: not
        # recorded
        None
    )
    # path -> {"bytes": n, "sha256": hex}
    files: dict[InsidePath, dict[str, Any]] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _present_layout(cls, facts: Any) -> Any:
        return (
            {"layout": layout_of(facts.get("format")), **facts}
            if isinstance(facts, dict)
            else facts
        )

    @cached_property
    def by_id(self) -> tuple[tuple[CaseEntry, ...], dict[str, CaseEntry]]:
        """The cases, and each by its id."""
        return self.cases, {entry.id: entry for entry in self.cases}

    def case(self, case_id: str) -> CaseEntry:
        if self.by_id[0] is not self.cases:  # a copy with other cases has brought it along
            del self.__dict__["by_id"]
        if entry := self.by_id[1].get(case_id):
            return entry
        raise InputError(
            f"case: found '{case_id}', which is not one of the {len(self.cases)} cases of "
            f"{self.dataset.name}"
        )

    def folds(self, split: str) -> tuple[dict[str, tuple[str, ...]], ...]:
        """All folds of a split. Raises InputError with the legal names."""
        if split == "all" and split not in self.splits:  # every case trains
            return ({"train": tuple(case.id for case in self.cases), "val": ()},)
        if split not in self.splits:
            raise InputError(
                f"data.split: found '{split}', expected one of: {', '.join([*self.splits, 'all'])}"
            )
        return self.splits[split]

    def fold(self, split: str, fold: int | str) -> dict[str, tuple[str, ...]]:
        """Ids of one fold: {"train": ..., "val": ...}. Raises InputError with the legal names and
        numbers."""
        folds = self.folds(split)
        if isinstance(fold, str):
            raise InputError(
                f"data.fold: found '{fold}', which train and submit take; expected one fold here, 0 "
                f"to {len(folds) - 1} (split '{split}')"
            )
        if not 0 <= fold < len(folds):
            raise InputError(
                f"data.fold: found {fold}, expected 0 to {len(folds) - 1} (split '{split}')"
            )
        return folds[fold]


def layout_of(format: str) -> int:
    """The present revision of a format's shard files."""
    return LAYOUTS.get(format, 1)


# of a case: where it lies and where it came from, which change no result
PLACE = {"shard", "key", "source_sha256", "image_sha256", "image_file"}


def content_id(document: dict[str, Any]) -> str:
    """Identity of a store, the same for every format, folder and time: the hash of everything in
    its manifest (as plain JSON) that changes a result."""
    cases = [
        {name: value for name, value in case.items() if name not in PLACE}
        for case in sorted(document["cases"], key=lambda case: case["id"])
    ]
    facts = [document["dataset"], document["plan"], document["splits"], cases]
    return hashlib.sha256(_canonical(facts)).hexdigest()[:32]


def _canonical(facts: Any) -> bytes:
    return json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()


def _digest(document: dict[str, Any]) -> str:
    """Of all of a manifest, so that no changed digit goes unseen."""
    return hashlib.sha256(_canonical(document)).hexdigest()


def load_manifest(store: Path) -> Manifest:
    """Read STORE/manifest.json. Raises InputError if there is none, it is damaged, or its shards
    are of another revision."""
    path = Path(store) / NAME
    if not path.is_file():
        raise InputError(
            f"store: {store} holds no {NAME}: it is no store, or its preprocessing never "
            "finished. Run `segfleet preprocess`."
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        told = raw.pop("sha256", None)
        if raw.get("version") != VERSION:
            raise InputError(
                f"store: {path} has version {raw.get('version')}, expected {VERSION}. Preprocess "
                "the raw data again into a new folder."
            )
        if (layout := raw.get("layout", 1)) != layout_of(raw.get("format")):
            age = "an earlier" if layout < layout_of(raw.get("format")) else "a later"
            raise InputError(
                f"store: {store} was made by {age} version of segfleet. Preprocess the raw data "
                "again into a new folder."
            )
        if told != _digest(raw) or raw.get("id") != content_id(raw):
            raise InputError(
                f"store: {path} is damaged or was changed by hand (its sha256 differs). Restore it "
                "from a backup, or preprocess the raw data again."
            )
        return Manifest.model_validate(raw)
    except (
        ValidationError,
        json.JSONDecodeError,
        UnicodeDecodeError,
        AttributeError,
        TypeError,
        KeyError,
        RecursionError,
    ) as error:
        raise InputError(
            f"store: {path} is damaged ({str(error).splitlines()[0]}). Preprocess the raw data "
            "again."
        ) from None


def with_id(manifest: Manifest) -> Manifest:
    """The manifest with the id of its content."""
    return manifest.model_copy(update={"id": content_id(manifest.model_dump(mode="json"))})


def save_manifest(store: Path, manifest: Manifest) -> Manifest:
    """Write STORE/manifest.json with the id of its content; the manifest as written."""
    manifest = with_id(manifest)
    document = manifest.model_dump(mode="json")
    text = json.dumps({**document, "sha256": _digest(document)}, indent=1)
    write_atomically(Path(store) / NAME, text)
    return manifest
