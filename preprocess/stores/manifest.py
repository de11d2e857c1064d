"""The manifest of a shard store: small, versioned, written last. It is the only thing a loader
trusts.

STORE/manifest.json                what a person reads: data set, plan, names of the splits
      cases-<hash>.safetensors     cases, splits, files and sampled voxels in columns
                                   (`case_table.py`), mapped when the store is opened; the
                                   manifest has its sha256
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidatorFunctionWrapHandler,
    WrapSerializer,
    WrapValidator,
    model_validator,
)

from segfleet.core.errors import InputError, check_one_of, did_you_mean
from segfleet.core.files import parse_json, write_atomically
from segfleet.preprocess.stores.case_entry import RESTORE, CaseEntry, Frozen, InsidePath, inside
from segfleet.preprocess.stores.case_table import (
    CaseTable,
    FileTable,
    Rows,
    SplitTable,
    mapped,
    split_columns,
    stamp_of,
)
from segfleet.preprocess.stores.columns import (
    CodedBuilder,
    TextBuilder,
    sha256_of,
    write_columns,
)

# 2: the id holds all that changes a result, the file its own sha256, shards whose they are
# 3: cases, splits and files in columns beside it; an older store is read, and has the same id
VERSION = 3
READ = (2, 3)
# store format -> revision of its shard files, where it has changed since the first: another one
# cannot be read
LAYOUTS = {"hdf5": 2}
NAME = "manifest.json"
FEW = 5  # cases that a message names
TABLE = "cases-{}.safetensors"


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

    @property
    def values(self) -> set[int]:
        """All that a label may hold."""
        ignored = () if self.ignore_label is None else (self.ignore_label,)
        parts = (value for region in self.regions.values() for value in region)
        return {*self.labels.values(), *parts, *ignored}


def _every_axis(axes: tuple[int, int, int]) -> tuple[int, int, int]:
    if sorted(axes) != [0, 1, 2]:
        raise ValueError(f"expected each of the axes 0, 1, 2 once, found {axes}"[:200])
    return axes


Size = Annotated[int, Field(gt=0, lt=2**31)]  # voxels along an axis
Spacing = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Plan(Frozen):
    """How raw cases become training cases. Axes (z, y, x) of the stored grid, whose z is the
    coarsest of the raw grid's; 2D data sets have one slice."""

    target_spacing: tuple[Spacing, Spacing, Spacing]  # mm; 0: that axis is never resampled
    # stored axis i is axis transpose[i] of the raw grid
    transpose: Annotated[tuple[int, int, int], AfterValidator(_every_axis)] = (0, 1, 2)
    patch: tuple[Size, Size, Size]  # voxels
    batch: int = 2  # patches that the planned memory holds
    patch_2d: tuple[Size, Size, Size] | None = None  # of 2D networks; None: not planned
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
    size: tuple[Size, Size, Size] | None = (
        None  # of every stored case, whatever its spacing; None: by target_spacing
    )
    interpolation: str = "cubic"  # of resized images: cubic | bilinear | area
    masks: str = "linear"  # of resized labels: linear | nearest | nearest-exact

    @property
    def masked(self) -> tuple[int, ...]:
        """Channels whose voxels outside the non-zero mask are exactly 0."""
        kinds = enumerate(self.normalisation) if self.nonzero_mask else ()
        return tuple(channel for channel, kind in kinds if kind == "zscore")


def _as_it_lies(kind: type):
    """A field that is `kind` when it was read from a table, and plain otherwise."""

    def check(value: Any, plain: ValidatorFunctionWrapHandler) -> Any:
        return value if isinstance(value, kind) else plain(value)

    return WrapValidator(check)


def _cases(value: Any, check: ValidatorFunctionWrapHandler) -> CaseTable:
    return value if isinstance(value, CaseTable) else CaseTable.of(check(value))


def _plain(value: Any, write: SerializerFunctionWrapHandler) -> Any:
    if isinstance(value, CaseTable):
        return write(tuple(value))
    return write(dict(value)) if isinstance(value, Mapping) else write(value)


if TYPE_CHECKING:
    Cases = CaseTable
else:  # plain JSON becomes the table, and the table plain JSON
    Cases = Annotated[tuple[CaseEntry, ...], WrapValidator(_cases), WrapSerializer(_plain)]


class Manifest(Frozen):
    version: int = VERSION
    format: str  # zarr | hdf5
    codec: str = "blosc"  # | zstd, of the chunks; every array says it, too
    layout: int = 0  # revision of the shard files; 0: becomes the format's present one
    id: str = ""  # of the content, see `content_id`; `save_manifest` fills it in
    dataset: Dataset
    plan: Plan
    fingerprint: dict[str, Any] = Field(default_factory=dict)
    cases: Cases
    # name -> folds of {"train": ids, "val": ids}
    splits: Annotated[
        dict[str, tuple[dict[str, tuple[str, ...]], ...]],
        _as_it_lies(SplitTable),
        WrapSerializer(_plain),
    ] = Field(default_factory=dict)
    split_seed: int = 0
    joined: dict[str, str] | None = (
        # case id -> its patient in the layout, where equal images made it another's; None: not
        # recorded
        None
    )
    # path -> {"bytes": n, "sha256": hex}
    files: Annotated[
        dict[InsidePath, dict[str, Any]], _as_it_lies(FileTable), WrapSerializer(_plain)
    ] = Field(default_factory=dict)
    # of a store that was read: the file of columns beside the manifest, {path: {"bytes", "sha256"}}
    tables: dict[InsidePath, dict[str, Any]] = Field(default_factory=dict, exclude=True)

    @model_validator(mode="before")
    @classmethod
    def _present_layout(cls, document: Any) -> Any:
        return (
            {"layout": layout_of(document.get("format", "")), **document}
            if isinstance(document, dict)
            else document
        )

    def model_copy(
        self, *, update: Mapping[str, Any] | None = None, deep: bool = False
    ) -> Manifest:
        changed = dict(update or {})
        if "cases" in changed:
            changed["cases"] = CaseTable.of(changed["cases"])
        return super().model_copy(update=changed, deep=deep)

    def outline(self) -> dict[str, Any]:
        """Data set and plan as JSON: no case, no split, no file."""
        none: dict[str, Any] = {"cases": (), "splits": {}, "files": {}}
        none |= {"joined": None, "fingerprint": {}}
        return self.model_copy(update=none).model_dump(mode="json")

    def case(self, case_id: str) -> CaseEntry:
        if entry := self.cases.find(case_id):
            return entry
        ids = list(self.cases.column("id"))
        rest = f" and {len(ids) - FEW} more" if len(ids) > FEW else ""
        raise InputError(
            f"case: found '{case_id}', expected one of the {len(ids)} cases of "
            f"{self.dataset.name}: {', '.join(ids[:FEW])}{rest}.{did_you_mean(case_id, ids)}"
        )

    def folds(self, split: str) -> tuple[dict[str, tuple[str, ...]], ...]:
        """All folds of a split. Raises InputError with the legal names."""
        if split == "all" and split not in self.splits:  # every case trains
            return ({"train": tuple(self.cases.column("id")), "val": ()},)
        check_one_of("data.split", split, [*self.splits, "all"])
        return self.splits[split]

    def fold(self, split: str, fold: int | str) -> dict[str, tuple[str, ...]]:
        """Ids of one fold: {"train": ..., "val": ...}. Raises InputError with the legal names and
        numbers."""
        folds = self.folds(split)
        if isinstance(fold, str):
            raise InputError(
                f"data.fold: found '{fold}', which train and submit take; expected one fold here, "
                f"0 to {len(folds) - 1} (split '{split}')"
            )
        if not 0 <= fold < len(folds):
            raise InputError(
                f"data.fold: found {fold}, expected 0 to {len(folds) - 1} (split '{split}')"
            )
        return folds[fold]


def layout_of(format: str) -> int:
    """The present revision of a format's shard files."""
    return LAYOUTS.get(format, 1)


MEASURED = ("shapes", "spacings")  # of the fingerprint: one of every case
# of a case: where it lies and where it came from, which change no result
PLACE = {"shard", "key", "source_sha256", "image_sha256", "image_file"}


def content_id(manifest: Manifest) -> str:
    """Identity of a store, the same for every format, folder and time: the hash of everything in
    its manifest (as plain JSON) that changes a result."""
    splits = {
        name: [{side: list(ids) for side, ids in fold.items()} for fold in folds]
        for name, folds in manifest.splits.items()
    }
    document = [
        manifest.dataset.model_dump(mode="json"),
        manifest.plan.model_dump(mode="json"),
        splits,
    ]
    ids = tuple(manifest.cases.column("id"))
    order = sorted(range(len(ids)), key=ids.__getitem__)
    return _identity(
        document, (manifest.cases[index].model_dump(mode="json", exclude=PLACE) for index in order)
    )


def _id_as_written(document: dict[str, Any]) -> str:
    """`content_id` of a manifest without columns, in which settings that came later are missing."""
    cases = sorted(document["cases"], key=lambda case: case["id"])
    own = ({key: value for key, value in case.items() if key not in PLACE} for case in cases)
    return _identity([document["dataset"], document["plan"], document["splits"]], own)


def _identity(document: list[Any], cases: Iterable[dict[str, Any]]) -> str:
    """The hash of the JSON document [*facts, [*cases]], which is never in memory as a whole."""
    digest = hashlib.sha256(_canonical(document)[:-1] + b",[")
    for number, case in enumerate(cases):
        digest.update((b"," if number else b"") + _canonical(case))
    digest.update(b"]]")
    return digest.hexdigest()[:32]


def _canonical(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def _digest(document: dict[str, Any]) -> str:
    """Of all of a manifest, so that no changed digit goes unseen."""
    return hashlib.sha256(_canonical(document)).hexdigest()


def is_published(store: str | Path) -> bool:
    """Whether a manifest stands there, of whatever kind: an unusable one is no invitation to make
    the store."""
    return os.path.lexists(Path(store) / NAME)


def load_manifest(store: str | Path) -> Manifest:
    """Read STORE/manifest.json and map the columns beside it. Raises InputError if there is none,
    it is damaged, or its shards are of another revision."""
    path = Path(store) / NAME
    if is_published(path.parent) and not path.is_file():  # a pipe would be waited for
        raise InputError(f"store: {path} is no regular file. {RESTORE}")
    if not path.is_file():
        raise InputError(
            f"store: {store} holds no {NAME}: it is no store, or its preprocessing never "
            "finished. Run `segfleet preprocess`."
        )
    try:
        raw = parse_json(path.read_text(encoding="utf-8"))
        sha256 = raw.pop("sha256", None)
        if raw.get("version") not in READ:
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
        if sha256 == _digest(raw):
            if raw["version"] >= 3:
                return _with_columns(Path(store), raw)
            if raw.get("id") == _id_as_written(raw):
                return Manifest.model_validate(raw)
        raise InputError(
            f"store: {path} is damaged or was changed by hand (its sha256 differs). {RESTORE}"
        )
    except InputError:
        raise
    # ValueError: no JSON, no text, brackets without end, values that do not fit
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError) as error:
        raise InputError(
            f"store: {path} is damaged ({str(error).splitlines()[0]}). {RESTORE}"
        ) from None


def _with_columns(store: Path, raw: dict[str, Any]) -> Manifest:
    ((name, expected),) = raw.pop("tables").items()
    path = (store / inside(name)).absolute()
    try:
        stamp = stamp_of(path)
        whole = stamp[0] == expected["bytes"] and sha256_of(path) == expected["sha256"]
    except OSError as error:
        raise InputError(f"store: {path} cannot be read ({error.strerror}). {RESTORE}") from None
    if not whole:
        raise InputError(
            f"store: {path} is damaged (its sha256 is not that of the manifest). {RESTORE}"
        )
    arrays = mapped(path, stamp)
    cases = CaseTable(arrays, None, (path, stamp))
    if len(cases) != raw.pop("cases"):
        raise KeyError("cases")
    measured = {
        key: Rows(arrays, f"measured.{key}", (path, stamp))
        for key in MEASURED
        if f"measured.{key}.code" in arrays
    }
    return Manifest.model_validate(
        {
            **raw,
            "fingerprint": {**measured, **raw["fingerprint"]},
            "cases": cases,
            "splits": SplitTable(cases, arrays, raw["splits"]),
            "files": FileTable(arrays, (path, stamp)),
            "tables": {name: expected},
        }
    )


def with_id(manifest: Manifest) -> Manifest:
    """The manifest with the id of its content."""
    return manifest.model_copy(update={"id": content_id(manifest)})


def save_manifest(store: Path, manifest: Manifest) -> Manifest:
    """Write STORE/manifest.json with the id of its content, and its columns; the manifest as
    written. Whoever has an earlier one open reads on in it."""
    return _save(Path(store), with_id(manifest))


def _save(store: Path, manifest: Manifest) -> Manifest:
    arrays, spans = split_columns(manifest.cases.column("id"), manifest.splits)
    arrays |= CaseTable.of(manifest.cases).arrays()
    arrays |= TextBuilder(manifest.files).arrays("file.path")
    arrays |= TextBuilder(map(json.dumps, manifest.files.values())).arrays("file.facts")
    fingerprint = dict(manifest.fingerprint)
    for key in MEASURED:
        if key in fingerprint:
            texts = (json.dumps(row, separators=(",", ":")) for row in fingerprint.pop(key))
            arrays |= CodedBuilder(texts).arrays(f"measured.{key}")
    partial = store / TABLE.format("partial")
    write_columns(partial, arrays)
    digest = sha256_of(partial)
    table = store / TABLE.format(digest[:12])
    os.replace(partial, table)
    tables = {table.name: {"bytes": table.stat().st_size, "sha256": digest}}
    manifest = manifest.model_copy(update={"version": VERSION, "tables": tables})
    complete = manifest.model_copy(
        update={"cases": (), "splits": {}, "files": {}, "fingerprint": fingerprint}
    )
    document = {
        **complete.model_dump(mode="json", exclude={"files"}),
        "cases": len(manifest.cases),
        "splits": spans,
        "tables": tables,
    }
    text = json.dumps({**document, "sha256": _digest(document)}, indent=1)
    write_atomically(store / NAME, text)
    for other in store.glob(TABLE.format("*")):
        if other != table:
            other.unlink()
    return manifest


def upgrade(store: Path) -> bool:
    """Rewrite the manifest of a published store as this version does; False if it is so already.
    Its id and its shards stay. Raises InputError."""
    manifest = load_manifest(store)
    if manifest.version == VERSION:
        return False
    _save(Path(store), manifest)
    return True
