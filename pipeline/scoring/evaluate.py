"""Honest scores: whole cases on their raw grid, shared out among the ranks, gathered in the order
asked for."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import shutil
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from segfleet.core.ahead import ahead
from segfleet.core.errors import InputError
from segfleet.core.files import digest_of, parse_json, read_file
from segfleet.pipeline.inference.restore import restore
from segfleet.pipeline.inference.room import pinned, roomy
from segfleet.pipeline.inference.sliding_window import Forward, Window, sliding_window
from segfleet.pipeline.ranks import Ranks, apart, error_as_json, error_from_json
from segfleet.pipeline.scoring.calibration import calibration
from segfleet.pipeline.scoring.metrics import TOLERANCE, confusion, score_case, tolerance_of
from segfleet.pipeline.scoring.scored import VERSION
from segfleet.pipeline.scoring.summary import definitions, summarise, unit_of
from segfleet.pipeline.task import Task
from segfleet.preprocess.stores.base import ShardStore
from segfleet.preprocess.stores.manifest import CaseEntry
from segfleet.preprocess.transforms.case_transforms import raw_resample_axis

Objective = Callable[[Tensor, Tensor], Tensor]  # (logits, label) -> scalar


class CaseJournal:
    """Scores of single cases, line by line in a folder, for an evaluation that is interrupted.
    Lines of another `identity` do not count."""

    def __init__(self, folder: Path, identity: dict[str, Any], rank: int):
        self.folder, self.file = folder, folder / f"{rank}.jsonl"
        self.identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def entries(self, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Those of `ids` that are there, by id. One rank asks, before any keeps one."""
        entries = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            for line in _lines(path):
                with suppress(ValueError, TypeError, KeyError):  # damaged, or its writer was killed
                    identity, digest, entry = parse_json(line)
                    if identity == self.identity and digest == digest_of(entry):
                        entries[entry["id"]] = entry
        return {case_id: entries[case_id] for case_id in ids if case_id in entries}

    def keep(self, entry: dict[str, Any]) -> None:
        self.folder.mkdir(exist_ok=True)
        with open(self.file, "a", encoding="utf-8") as file:
            file.write("\n" + json.dumps([self.identity, digest_of(entry), entry]) + "\n")

    def keep_slice(self, case_id: str, z: int, prediction_YX: np.ndarray) -> None:
        """What a picture of the case shows of its prediction, uint8: a few kilobytes."""
        self.folder.mkdir(exist_ok=True)
        packed = base64.b85encode(zlib.compress(prediction_YX.tobytes())).decode()
        line = json.dumps([self.identity, case_id, z, list(prediction_YX.shape), packed])
        with open(self.folder / f"{self.file.stem}.slices", "a", encoding="utf-8") as file:
            file.write("\n" + line)

    def slices(self, ids: Collection[str]) -> dict[str, tuple[int, np.ndarray]]:
        """Number and prediction (Y, X) of the kept slice, of those of `ids` that have one."""
        slices = {}
        for path in sorted(self.folder.glob("*.slices")):
            for line in _lines(path):
                with suppress(ValueError, TypeError, zlib.error):  # its writer was killed
                    identity, case_id, z, shape, packed = parse_json(line)
                    if identity == self.identity and case_id in ids:
                        data = zlib.decompress(base64.b85decode(packed))
                        slices[case_id] = z, np.frombuffer(data, np.uint8).reshape(shape)
        return slices

    def forget(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _lines(path: Path) -> list[bytes]:
    try:
        return read_file(path).splitlines()
    except ValueError:
        return []


@dataclass(frozen=True, kw_only=True)
class Measures:
    """What is measured of every case."""

    distances: bool = True  # and lesions, calibration, intervals; not while training
    tolerance: float | Mapping[str, float] = TOLERANCE  # of the nsd, as for `score_case`
    pool: int | None = None  # cases of a batch, for the variants that pool batches
    objective: Objective | None = None  # its value over the whole case on the stored grid: "loss"


ALL = Measures()


def evaluate_cases(
    forward: Forward,
    store: ShardStore,
    case_ids: Sequence[str],
    task: Task,
    window: Window,
    measures: Measures = ALL,
    *,
    ranks: Ranks | None = None,
    progress: Callable[[int, int], None] | None = None,
    journal: CaseJournal | None = None,
    show: Callable[[str, int, np.ndarray], Any] | None = None,
) -> dict[str, Any]:
    """Score `forward` ((B, C, *S) -> probabilities (B, K, *S)) on the cases: {"cases": [...],
    "summary": {...}, "definitions": {...}}.

    Every rank scores its share and gets the whole document, which does not depend on the number of
    ranks. `progress(done, total)` counts this rank's cases. Cases that `journal` has are not scored
    again. With an objective, `forward` gives probabilities and then logits (B, 2K, *S).
    `show(id, z, labels_YX)` gets the slice of each of this rank's cases that a picture shows. The
    document is strict JSON: what is not defined is null. If a rank fails, its error is raised on
    all ranks.
    """
    ranks, ids = ranks or Ranks(), list(case_ids)
    distances, objective, tolerance = measures.distances, measures.objective, measures.tolerance
    check_tolerance(tolerance, task)
    twice = sorted({i for i in ids if ids.count(i) > 1})
    if twice:
        raise InputError(f"evaluation: the case '{twice[0]}' is asked for twice")
    before = ranks.share(journal.entries(ids) if journal and ranks.rank == 0 else {})
    missing = [case_id for case_id in ids if case_id not in before]
    share, scored, error = missing[ranks.rank :: ranks.size], [], None

    def score(read: Read) -> tuple[dict[str, Any], int, np.ndarray]:
        """The entry of a case, and the slice that a picture shows. The probabilities are gone
        afterwards, before the next case asks for their room."""
        case, lost = read.case, {}
        maps = read.probabilities(forward, store, window)
        if objective is not None:
            maps, logits = maps.chunk(2)
            lost = {"loss": case_loss(objective, logits, read.label_ZYX, flat=window.patch[0] == 1)}
        label = raw_label(maps, store, case, task)
        scores = score_case(
            label,
            read.truth_ZYX,
            spacing=case.raw_spacing,
            task=task,
            distances=distances,
            tolerance=tolerance,
        )
        stored = task.labels(maps).cpu().numpy()
        for name, counts in confusion(stored, read.label_ZYX, task).items():
            scores[name]["stored_counts"] = list(counts)
        if distances:
            for name, calibrated in calibration(maps, read.label_ZYX, task).items():
                scores[name] |= calibrated
        z = busiest_slice(without_ignored(read.label_ZYX, task), stored)
        return _entry(case, scores) | lost, z, stored[z]

    reading = ahead(
        functools.partial(Read.of, store, device=window.device),
        share,
        background=torch.device(window.device).type == "cuda",
        roomy=lambda read: roomy(read.image_CZYX),
    )
    try:
        with closing(reading):
            for case_id, ready in reading:
                entry, z, slice_YX = score(ready())
                scored.append(entry)
                if journal:
                    journal.keep_slice(case_id, z, slice_YX)
                    journal.keep(entry)
                if show:
                    show(case_id, z, slice_YX)
                if progress:
                    progress(len(scored), len(share))
    except Exception as caught:
        error = caught
    answers = ranks.gather((scored, error_as_json(error)))
    if error:
        raise error
    for _, elsewhere in answers:
        if elsewhere:
            raise error_from_json(elsewhere)
    entries = before | {entry["id"]: entry for part, _ in answers for entry in part}
    cases = [entries[case_id] for case_id in ids]
    unit = unit_of(store.manifest)
    return {
        "version": VERSION,
        "dataset": store.manifest.dataset.name,
        "store": store.manifest.id,
        "settings": {
            "patch": list(window.patch),
            "overlap": window.overlap,
            "mirror_axes": list(window.mirror_axes),
            "distances": distances,
            "tolerance": {name: tolerance_of(name, tolerance) for name in task.names},
            "pool": measures.pool,
        },
        "structures": list(task.names),
        "cases": cases,
        "summary": summarise(cases, task.names, measures.pool, intervals=distances),
        "unit": unit,
        "definitions": definitions(unit),
    }


def without_ignored(label_ZYX: np.ndarray, task: Task) -> np.ndarray:
    """The label, 0 where it says "ignore"."""
    if task.ignore_label is None:
        return label_ZYX
    return np.where(label_ZYX == task.ignore_label, 0, label_ZYX)


def busiest_slice(truth_ZYX: np.ndarray, prediction_ZYX: np.ndarray) -> int:
    """The slice with the most voxels of truth; of prediction where there is no truth; else the
    middle one."""
    for label in (truth_ZYX, prediction_ZYX):
        counts = np.count_nonzero(label, axis=(1, 2))
        if counts.any():
            return int(counts.argmax())
    return len(truth_ZYX) // 2


def check_tolerance(tolerance: float | Mapping[str, float], task: Task) -> None:
    """Raises InputError for a structure that the data set does not have."""
    if isinstance(tolerance, Mapping) and (unknown := sorted(set(tolerance) - set(task.names))):
        raise InputError(
            f"evaluation.tolerance: found '{unknown[0]}', expected structures of the data set: "
            f"{', '.join(task.names)}"
        )


@dataclass(frozen=True, kw_only=True)
class Read:
    """What is read of a case before its turn."""

    case: CaseEntry
    image_CZYX: Tensor  # as it is stored; pinned if a GPU is to have it
    truth_ZYX: np.ndarray  # on the raw grid
    label_ZYX: np.ndarray  # on the stored one

    @classmethod
    def of(cls, store: ShardStore, case_id: str, *, device: torch.device | str = "cpu") -> Read:
        case = store.manifest.case(case_id)
        return cls(
            case=case,
            truth_ZYX=truth_of(store, case),
            image_CZYX=pinned(stored_image(store, case), device),
            label_ZYX=store.label(case),
        )

    def probabilities(self, forward: Forward, store: ShardStore, window: Window) -> Tensor:
        return case_probabilities(forward, store, self.case, window, self.image_CZYX)


def stored_image(store: ShardStore, case: CaseEntry) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(store.stored_image(case)))


def case_probabilities(
    forward: Forward,
    store: ShardStore,
    case: CaseEntry,
    window: Window,
    image_CZYX: Tensor | None = None,
) -> Tensor:
    """(K, Z, Y, X) float32 probabilities of a stored case on the stored grid; on a GPU that has
    computed them, if they fit there. `image_CZYX`: the stored image, if it was read before."""
    try:
        return sliding_window(
            forward,
            stored_image(store, case) if image_CZYX is None else image_CZYX,
            scale=store.manifest.plan.scale,
            **window.options(),
        )
    except FloatingPointError as error:
        raise FloatingPointError(f"case '{case.id}': {error}") from None


def raw_label(scores_KZYX: Tensor, store: ShardStore, case: CaseEntry, task: Task) -> np.ndarray:
    """(Z, Y, X) uint8 label on the raw grid from probabilities on the stored one."""
    plan = store.manifest.plan
    return restore(
        scores_KZYX,
        task,
        crop=case.crop,
        raw_shape=case.raw_shape,
        anisotropic_axis=raw_resample_axis(case.raw_spacing, plan),
        transpose=plan.transpose,
    )


def case_loss(
    objective: Objective, logits_KZYX: Tensor, label_ZYX: np.ndarray, *, flat: bool
) -> float:
    """The objective over a whole case; the slices of a 2D network are a batch."""
    label = torch.from_numpy(np.ascontiguousarray(label_ZYX))
    logits, label = (logits_KZYX.movedim(1, 0), label) if flat else (logits_KZYX[None], label[None])

    def on(device: torch.device) -> float:
        if isinstance(objective, torch.nn.Module):
            objective.to(device)  # weights of classes
        return float(objective(logits.to(device), label.to(device)))

    with torch.no_grad(), apart():
        try:
            return on(logits.device)
        except torch.OutOfMemoryError:  # a whole case in float32, several times
            pass
        return on(torch.device("cpu"))


def truth_of(store: ShardStore, case: CaseEntry) -> np.ndarray:
    """(Z, Y, X) uint8 label on the raw grid. Where preprocessing changed nothing, the stored label
    is it. Raises InputError."""
    if case.has_truth:
        return store.truth(case)
    whole = store.manifest.plan.transpose == (0, 1, 2) and all(
        (start, stop) == (0, size)
        for (start, stop), size in zip(case.crop, case.raw_shape, strict=True)
    )
    if whole and tuple(case.shape) == tuple(case.raw_shape):
        return store.label(case)
    return store.truth(case)  # says that there is none


def _entry(case: CaseEntry, scores: dict[str, Any]) -> dict[str, Any]:
    dice = [s["dice"] for s in scores.values() if s["dice"] is not None]
    mean = float(np.mean(dice)) if dice else None
    return {
        "id": case.id,
        "group": case.group or case.id,
        "source": case.source_sha256,
        "spacing": list(case.raw_spacing),
        "mean_dice": mean,
        "scores": scores,
    }
