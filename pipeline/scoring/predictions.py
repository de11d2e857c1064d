"""Scores of a folder of predictions, of whatever tool: label files against the truth of the same
names. Without a network or a store."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from segfleet.core.errors import DataError, InputError, Problem
from segfleet.core.parallel import run
from segfleet.pipeline.scoring.evaluate import check_tolerance
from segfleet.pipeline.scoring.metrics import TOLERANCE, score_case, tolerance_of
from segfleet.pipeline.scoring.scored import VERSION
from segfleet.pipeline.scoring.summary import definitions, summarise
from segfleet.pipeline.task import Task, make_task
from segfleet.preprocess.case import Geometry
from segfleet.preprocess.files.dicom import LABELMAP, SEG
from segfleet.preprocess.files.faults import ImageError, is_regular
from segfleet.preprocess.files.grids import disagreement, settled
from segfleet.preprocess.files.images import ENDINGS, peek, read_label, sources, stem
from segfleet.preprocess.files.masks import LOSSY, read_mask
from segfleet.preprocess.files.npy import read_npy
from segfleet.preprocess.files.segments import kind_of, read_seg
from segfleet.preprocess.planning.patients import NAME as SHEET
from segfleet.preprocess.planning.patients import by_names, read_sheet
from segfleet.preprocess.readers.base import declared_labels, natural, number, read_json, visible
from segfleet.preprocess.readers.nnunet import dataset_of

DESCRIPTIONS = ("dataset.json", "labels.json")
FEW = 5  # names in a message
OTHERS = (".npy", ".dcm")  # that hold labels: arrays of the layout npy, DICOM SEG


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One case: a label file of each side."""

    id: str
    prediction: Path
    truth: Path


def score_predictions(
    predictions: Path,
    truth: Path,
    *,
    labels: Mapping[str, int] | None = None,
    partial: bool = False,
    tolerance: float | Mapping[str, float] = TOLERANCE,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """An evaluation document as that of a run, of the label files in `predictions` against those in
    `truth`; files of one stem are one case.

    `labels`: name -> value; else what a dataset.json or labels.json beside the files declares, else
    black and white masks. `partial`: cases without a prediction are left out instead of refused.
    Predictions without a truth are left out and named. Raises InputError, DataError with every file
    that cannot be scored: a prediction on another grid is shown with both geometries.
    """
    matched, missing, unknown = pairs(predictions, truth, partial)
    task = task_for(predictions, truth, labels)
    if task:
        check_tolerance(tolerance, task)
    score_one = functools.partial(score_pair, task=task, tolerance=tolerance)
    weights = [16 * int(np.prod(peek(pair.truth))) for pair in matched]
    names = [pair.id for pair in matched]
    answers: dict[int, dict[str, Any] | Problem] = {}
    for index, answer in run(score_one, matched, weights=weights, names=names, workers=workers):
        answers[index] = answer
        if progress:
            progress(len(answers), len(matched))
    ordered = [answers[index] for index in range(len(matched))]
    if problems := [answer for answer in ordered if isinstance(answer, Problem)]:
        raise DataError(str(predictions), problems)
    cases = [answer for answer in ordered if isinstance(answer, dict)]
    shapes, real = ([case.pop(key) for case in cases] for key in ("shape", "real"))
    dims = 2 if all(shape[0] == 1 for shape in shapes) else 3
    unit = "mm" if any(real) else ("voxels", "pixels")[dims == 2]
    groups = patients(truth, names, dims)
    cases = [{**case, "group": groups.get(case["id"], case["id"])} for case in cases]
    structures = list(cases[0]["scores"])
    return {
        "version": VERSION,
        "name": predictions.resolve().name,
        "dataset": truth.resolve().name,
        "predictions": str(predictions),
        "truth": str(truth),
        "settings": {
            "distances": True,
            "tolerance": {name: tolerance_of(name, tolerance) for name in structures},
        },
        "structures": structures,
        "cases": cases,
        "without_prediction": missing,
        "without_truth": unknown,
        "summary": summarise(cases, structures),
        "unit": unit,
        "definitions": definitions(unit),
    }


def pairs(predictions: Path, truth: Path, partial: bool) -> tuple[list[Pair], list[str], list[str]]:
    """The cases in natural order, those of the truth without a prediction, and predictions without
    a truth. Raises InputError."""
    predicted, labelled = label_files(predictions, "predictions"), label_files(truth, "truth")
    both = sorted(predicted.keys() & labelled.keys(), key=natural)
    missing = sorted(labelled.keys() - predicted.keys(), key=natural)
    unknown = sorted(predicted.keys() - labelled.keys(), key=natural)
    if not both:
        raise InputError(
            f"score: no file of {predictions} has the name of one in {truth}: found "
            f"{few(sorted(predicted))}; expected {few(sorted(labelled))}"
        )
    if missing and not partial:
        raise InputError(
            f"score: {len(missing)} of {len(labelled)} cases in {truth} have no prediction in "
            f"{predictions}: {few(missing)}. Predict them, or leave them out by --partial"
        )
    matched = [Pair(id=case, prediction=predicted[case], truth=labelled[case]) for case in both]
    return matched, missing, unknown


def label_files(folder: Path, what: str) -> dict[str, Path]:
    """Stem -> file. Raises InputError for a folder that holds none, or two of one stem."""
    if not folder.is_dir():
        raise InputError(f"score: {what}: {folder} is not a folder")
    files: dict[str, Path] = {}
    for path in visible(folder):
        if path.name.lower().endswith((*ENDINGS, *OTHERS)) and is_regular(path):
            name = path.stem if path.suffix.lower() in OTHERS else stem(path)
            name = name[:-4] if name.lower().endswith(".seg") else name
            if name in files:
                raise InputError(
                    f"score: {what}: {files[name].name} and {path.name} in {folder} are both the "
                    f"case '{name}'; keep one"
                )
            files[name] = path
    if not files:
        raise InputError(
            f"score: {what}: {folder} holds no label files; expected one per case, ending in one "
            f"of: {', '.join((*ENDINGS, *OTHERS))}"
        )
    return files


def task_for(predictions: Path, truth: Path, labels: Mapping[str, int] | None) -> Task | None:
    """What the label values mean; None: they are not declared, so masks are black and white. Raises
    InputError."""
    if labels:
        return _plain_task({"background": 0, **labels})
    tasks = {}
    for folder in dict.fromkeys((truth, truth.parent, predictions)):
        if (task := described(folder)) is not None:
            tasks[folder] = task
    own = next((tasks[folder] for folder in (truth, truth.parent) if folder in tasks), None)
    other = tasks.get(predictions)
    if own and other and (own.names, own.members) != (other.names, other.members):
        texts = [", ".join(map(str, zip(t.names, t.members, strict=True))) for t in (own, other)]
        raise InputError(
            f"score: the labels differ: {texts[0]} beside the truth, {texts[1]} beside the "
            "predictions; --labels name=value,... says what counts"
        )
    return own or other


def described(folder: Path) -> Task | None:
    """The task that a folder's dataset.json (nnU-Net's or the Decathlon's) or labels.json
    describes. Raises InputError."""
    file = folder / DESCRIPTIONS[0]
    if file.is_file():
        document = read_json(file)
        labels = document.get("labels")
        if isinstance(labels, dict) and labels and all(str(key).isdecimal() for key in labels):
            return _plain_task({str(name): number(v, "labels", file) for v, name in labels.items()})
        if isinstance(labels, dict):
            completed = {"channel_names": {"0": "image"}, **document}
            return _task_of(dataset_of(completed, file, name="", dims=3, ending=""))
    declared = declared_labels(folder / DESCRIPTIONS[1])
    return _plain_task(declared) if declared else None


def _task_of(dataset: Any) -> Task:
    if dataset.regions:
        return make_task(dataset)
    return replace(_plain_task(dataset.labels), ignore_label=dataset.ignore_label)


def _plain_task(labels: Mapping[str, int]) -> Task:
    some = {name: value for name, value in labels.items() if value}
    return Task(
        head="softmax",
        names=tuple(some),
        members=tuple((value,) for value in some.values()),
        values=(0, *some.values()),
    )


def parse_labels(text: str | None) -> dict[str, int] | None:
    """{"liver": 1} of "liver=1,tumour=2". Raises InputError."""
    if text is None:
        return None
    labels: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if not name or not value.isdecimal() or not 0 < int(value) < 256:
            raise InputError(
                f"labels: found '{part.strip()}', expected name=value with a value from 1 to 255, "
                "as in liver=1,tumour=2"
            )
        labels[name] = int(value)
    if len(set(labels.values())) < len(labels) or len(labels) < text.count(",") + 1:
        raise InputError(f"labels: found '{text}', expected different names and values")
    return labels


def score_pair(
    pair: Pair, *, task: Task | None, tolerance: float | Mapping[str, float]
) -> dict[str, Any] | Problem:
    """The entry of one case, or what is wrong with its files."""
    digest = hashlib.sha256()
    for path in sources(pair.truth):
        digest.update(path.read_bytes())
    try:
        truth, grid = _read(pair.truth, task, whole=True)
        prediction, own = _read(pair.prediction, task, whole=False)
    except ImageError as error:
        return error.problem(pair.id)
    truth, grid = settled(truth, grid, own)  # segments may lie on a part of the other's grid
    prediction, own = settled(prediction, own, grid)
    if difference := disagreement(own, grid):
        return Problem(
            case=pair.id,
            field=f"grid ({difference[0]})",
            found=f"{_grid(own)} in {pair.prediction.name}",
            expected=f"{_grid(grid)} as the truth {pair.truth.name}",
            mend="Write predictions on the grid of their images; nothing is resampled here.",
        )
    used = task or FOREGROUND
    scores = score_case(prediction, truth, spacing=grid.spacing, task=used, tolerance=tolerance)
    dice = [s["dice"] for s in scores.values() if s["dice"] is not None]
    return {
        "id": pair.id,
        "source": "",  # of image and label, as a store has it: not known here
        "truth_sha256": digest.hexdigest(),
        "spacing": list(grid.spacing),
        "mean_dice": float(np.mean(dice)) if dice else None,
        "scores": scores,
        "shape": list(grid.shape),
        "real": grid.affine is not None or set(grid.spacing) != {1.0},
    }


FOREGROUND = Task(head="sigmoid", names=("foreground",), members=((1,),), values=(1,))


def _read(path: Path, task: Task | None, *, whole: bool) -> tuple[np.ndarray, Geometry]:
    """uint8 (Z, Y, X) of declared values. `whole`: the truth, which alone may say "ignore". Raises
    ImageError."""
    names = dict(zip(task.names, (m[0] for m in task.members), strict=True)) if task else {}
    label, grid = _label(path, names, declared=bool(task))
    legal = {0, *(v for group in (task or FOREGROUND).members for v in group)}
    if task:
        legal |= set(task.values) | ({task.ignore_label} if task.ignore_label and whole else set())
    values = {float(value) for value in np.unique(label)}
    white = len(values | {0.0}) == 2 or path.name.lower().endswith(LOSSY)
    if not values <= legal and len(legal) == 2 and white:  # one structure, painted white
        label = label != 0 if path.suffix.lower() in OTHERS else read_mask(path)[0]
        label, values = label.astype(np.uint8) * max(legal), legal
    if not values <= legal:
        shown = ", ".join(f"{value:g}" for value in sorted(values - legal)[:8])
        raise ImageError(
            path,
            "label values",
            f"{shown} in {path.name}",
            f"one of {', '.join(str(v) for v in sorted(legal))}",
            "Declare all labels: --labels name=value,..., dataset.json or labels.json.",
        )
    return label.astype(np.uint8), grid


def _label(path: Path, names: Mapping[str, int], *, declared: bool) -> tuple[np.ndarray, Geometry]:
    """A label file as it is stored; black and white where nothing is `declared`. Raises
    ImageError."""
    named = names or {"foreground": 1}
    if path.suffix.lower() == ".npy":
        array = read_npy(path, 2)[None]
        return array, Geometry(shape=array.shape)
    if path.suffix.lower() == ".dcm":
        if kind_of(path) not in (SEG, LABELMAP):
            expected, mend = "a segmentation (DICOM SEG)", "Keep only label files in this folder."
            raise ImageError(path, "file", f"{path.name}, another DICOM object", expected, mend)
        return read_seg(path, named)
    if declared or path.name.lower().endswith(".seg.nrrd"):
        return read_label(path, None, named)
    return read_mask(path)


def _grid(grid: Geometry) -> str:
    shape = " x ".join(map(str, grid.shape))
    text = f"{shape} voxels of {' x '.join(f'{s:.4g}' for s in grid.spacing)} mm"
    if grid.affine is None:
        return text
    rows = np.asarray(grid.affine)
    turn = "; ".join(" ".join(f"{v:.4g}" for v in row[:3]) for row in rows[:3])
    return f"{text}, origin ({', '.join(f'{v:.5g}' for v in rows[:3, 3])}), axes [{turn}]"


def patients(truth: Path, ids: Sequence[str], dims: int) -> dict[str, str]:
    """The patient of each case, by a patients.csv beside the truth, else by the names."""
    for folder in (truth, truth.parent):
        if sheet := read_sheet(folder / SHEET, lambda name: name):
            return dict(sheet.patients)
    return dict(by_names(list(ids), dims).patients)


def few(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return ", ".join(names[:FEW]) + rest


def write_scores(out: Path, document: dict[str, Any]) -> Path:
    """OUT/evaluation.json; the folder."""
    from segfleet.pipeline.scoring.scored import write_evaluation

    out.mkdir(parents=True, exist_ok=True)
    write_evaluation(out, json.loads(json.dumps(document)))
    return out
