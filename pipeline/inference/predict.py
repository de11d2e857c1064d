"""New images to label files that lie exactly on them. Does not stop: a bad image is listed, the
rest is done."""

from __future__ import annotations

import errno
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from segfleet.core.ahead import ahead
from segfleet.core.errors import InputError, is_full
from segfleet.core.files import write_atomically
from segfleet.core.machine import memory_budget
from segfleet.pipeline.inference.collect import collect
from segfleet.pipeline.inference.ensemble import Member, Stored, predict_maps
from segfleet.pipeline.inference.inputs import (
    SEG,
    SEG_NRRD,
    Input,
    StoreInput,
    forget,
    is_made,
    prepare_folder,
    vouch,
)
from segfleet.pipeline.inference.postprocess import Rule, clean
from segfleet.pipeline.inference.probabilities import write_probabilities
from segfleet.pipeline.inference.restore import Map, combine
from segfleet.pipeline.inference.room import pinned, roomy
from segfleet.pipeline.ranks import Ranks, error_as_json, error_from_json
from segfleet.pipeline.task import Task
from segfleet.preprocess.case import Case, Geometry
from segfleet.preprocess.exporting.nnunet import dataset_document as nnunet_dataset
from segfleet.preprocess.files.dicom_seg import write_seg
from segfleet.preprocess.files.faults import ALWAYS_FITS, text_of
from segfleet.preprocess.files.grids import settled
from segfleet.preprocess.files.images import ImageError, read_label
from segfleet.preprocess.files.names import write_names
from segfleet.preprocess.files.segments import read_seg
from segfleet.preprocess.files.writer import write_label, write_segments
from segfleet.preprocess.readers.base import Layout
from segfleet.preprocess.readers.pairs import colours
from segfleet.preprocess.stores.manifest import Dataset, Plan
from segfleet.preprocess.transforms.case_transforms import OF_COLOURS, check_room, preprocess_case

OVERLAYS = "overlays"  # folder of pictures among the predictions


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What is written besides labels, and what is done to these. `rules`: structure -> what is
    taken out of it. `draw`: also OUT/overlays/<id>.png, the outlined prediction on its image.
    `read` an image in another way than in this process. `format` of the labels: that of the image
    (""), "dicom-seg" or "seg-nrrd". `layout` of the inputs, where they are raw data sets."""

    probabilities: bool = False
    rules: dict[str, Rule] | None = None
    draw: Callable[[Path, np.ndarray, np.ndarray, Sequence[float]], Any] | None = None
    read: Callable[[Input], tuple[np.ndarray, Geometry]] = Input.read
    format: str = ""
    layout: Layout | None = None


def predict_files(
    members: Sequence[Member],
    dataset: Dataset,
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    device: torch.device | str = "cpu",
    made_by: str = "",
    wishes: Wishes | None = None,
    ranks: Ranks | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Segment the images `inputs` (files, folders, stores, raw data sets) into the folder `out`;
    one label file each, written whole or not at all. Several `members` are an ensemble.

    Files that were made of the same image in the same way are kept, so an interrupted call resumes;
    those of another image of that name or of other settings are written again, and a file that is
    no prediction is left alone and listed. A folder of another `made_by` (run and checkpoint) is
    refused. Every rank of `ranks` segments its share, `progress(done, total)` counts that, and
    every rank gets the whole answer: {"done", "kept": [{"id", "file"}], "failed": [{"id", "files",
    "problem"}], "exit_code"}: 2 if any failed, else 0. Raises InputError when nothing can be done
    at all, OSError where `out` is full or cannot be written to; an error of one rank is raised on
    all.
    """
    ranks, out, wishes = ranks or Ranks(), Path(out), wishes or Wishes()
    cases = collect(inputs, len(dataset.channels), wishes.format, wishes.layout)
    if wishes.draw and (
        stored := next((case for case in cases if isinstance(case, StoreInput)), None)
    ):
        raise InputError(
            f"overlays: the raw image of {stored.id}, a case of a store, is not there to draw on; "
            "`segfleet evaluate --on STORE` draws what a store holds"
        )
    every = [member.settings() for member in members]
    settings = {"made_by": made_by, **(every[0] if len(every) == 1 else {"members": every})}
    if wishes.rules:
        settings["postprocess"] = {name: rule.text for name, rule in wishes.rules.items()}
    if wishes.probabilities:
        settings["probabilities"] = True
    error = _caught(lambda: prepare_folder(out, cases, made_by)) if ranks.rank == 0 else None
    if shared_error := ranks.share(error_as_json(error)):
        raise error or error_from_json(shared_error)
    share, answers = range(ranks.rank, len(cases), ranks.size), {}

    reading = ahead(
        lambda index: _prepared(members, cases[index], out, settings, wishes, device),
        share,
        background=torch.device(device).type == "cuda",
        roomy=lambda read: read.room,
    )

    def segment() -> None:
        for index, ready in reading:
            case = cases[index]
            answers[index] = _answer(members, dataset.labels, case, out, ready, wishes, device)
            if wishes.draw and answers[index][0] != "failed":
                was_there = answers[index][0] == "kept"
                _draw(wishes, case, out, members[0].plan, dataset.labels, was_there)
            if progress:
                progress(len(answers), len(share))

    with closing(reading):
        error = _caught(segment)
    gathered = ranks.gather((list(answers.items()), error_as_json(error)))
    for failure in (error, *(error_from_json(elsewhere) for _, elsewhere in gathered)):
        if failure:
            raise failure
    whole = sorted((index, answer) for part, _ in gathered for index, answer in part)
    result = {
        kind: [case for _, (outcome, case) in whole if outcome == kind]
        for kind in ("done", "kept", "failed")
    }
    if ranks.rank == 0 and result["done"]:
        write_names(out, dataset.labels)
        _describe(out, dataset, Path(result["done"][0]["file"]).name, result["done"][0]["id"])
    return {"out": str(out), **result, "exit_code": 2 if result["failed"] else 0}


def _describe(out: Path, dataset: Dataset, name: str, case: str) -> None:
    """dataset.json as nnU-Net has it beside predictions, so that its evaluation runs on them."""
    document = nnunet_dataset(dataset, 0, name.removeprefix(case))
    write_atomically(out / "dataset.json", json.dumps(document, indent=1) + "\n")


def _caught(function: Callable[[], None]) -> Exception | None:
    try:
        function()
    except Exception as error:
        return error
    return None


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """An image read and preprocessed, before its turn. `made`: its prediction is there already."""

    identity: dict[str, Any]  # what decides its prediction
    made: bool = False
    geometry: Geometry | None = None  # the raw grid
    stored: Callable[[Member], Stored] | None = None
    room: bool = True  # for another one beside it


def _prepared(
    members: Sequence[Member],
    case: Input,
    out: Path,
    settings: dict[str, Any],
    wishes: Wishes,
    device: torch.device | str,
) -> Prepared:
    if case.problem:
        raise InputError(case.problem)
    identity = {"image": case.content(), **settings}
    if is_made(out, case, identity):
        return Prepared(identity=identity, made=True)
    if isinstance(case, StoreInput):
        entry, plan = case.entry, case.store.manifest.plan
        image = torch.from_numpy(np.ascontiguousarray(case.store.stored_image(entry)))
        geometry, scale, crop, spacing = case.geometry, plan.scale, entry.crop, entry.raw_spacing
        first = Stored(
            image_CZYX=pinned(image, device), scale=scale, crop=crop, raw_spacing=spacing
        )
        return Prepared(
            identity=identity, geometry=geometry, stored=lambda _: first, room=roomy(image)
        )
    array, geometry = wishes.read(case)
    later = _stored(array, geometry, case.id, case.images[0])
    first = later(members[0])
    first = replace(first, image_CZYX=pinned(first.image_CZYX, device))
    if all(member.plan == members[0].plan for member in members):
        later = None  # the raw image is not needed any more
    return Prepared(
        identity=identity,
        geometry=geometry,
        stored=lambda member: first if member.plan == members[0].plan else later(member),
        room=roomy(first.image_CZYX),
    )


def _answer(
    members: Sequence[Member],
    labels: Mapping[str, int],
    case: Input,
    out: Path,
    ready: Callable[[], Prepared],
    wishes: Wishes,
    device: torch.device | str,
) -> tuple[str, dict[str, Any]]:
    try:
        read = ready()
        if read.made:
            return "kept", {"id": case.id, "file": str(out / case.output)}
        geometry = read.geometry
        maps = predict_maps(members, read.stored, device=device, folder=out)
        forget(out, case)
        with _room(maps, geometry, out, wishes.probabilities) as keep:
            label = combine(maps, geometry.shape, keep)
            if wishes.rules:
                label = clean(label, wishes.rules, members[0].task, geometry.spacing)
            if keep is not None:
                write_probabilities(out / case.probabilities, keep)
        if case.format == SEG:
            write_seg(out / case.output, label, case.images, labels)
        elif case.format == SEG_NRRD:
            write_segments(out / case.output, label, geometry, labels)
        else:
            write_label(out / case.output, label, geometry)
        vouch(out, case, read.identity)
        return "done", {"id": case.id, "file": str(out / case.output)}
    except (InputError, OSError, FloatingPointError, MemoryError) as error:
        if is_full(error) or getattr(error, "errno", None) == errno.EROFS:
            raise  # every further case would fail, too; what is done is kept
        return "failed", {
            "id": case.id,
            "files": [str(p) for p in case.images],
            "problem": str(error) or type(error).__name__,
        }


@contextmanager
def _room(
    maps: Sequence[Map], geometry: Geometry, out: Path, wanted: bool
) -> Iterator[np.ndarray | None]:
    """(K, Z, Y, X) float16 zeros on the raw grid, in a file without a name."""
    if not wanted:
        yield None
        return
    shape = (len(maps[0].scores_KZYX), *geometry.shape)
    with tempfile.TemporaryFile(dir=out) as file:
        size = np.dtype(np.float16).itemsize * math.prod(shape)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)  # a mapped hole on a full disk is a SIGBUS
        yield np.memmap(file, np.float16, "w+", shape=shape)


def _draw(
    wishes: Wishes, case: Input, out: Path, plan: Plan, labels: Mapping[str, int], was_there: bool
) -> None:
    """The picture of a prediction that lies in `out`."""
    path = out / OVERLAYS / f"{case.id}.png"
    if was_there and path.exists():
        return
    image, geometry = _as_planned(*wishes.read(case), plan)
    if case.format == SEG:
        label, _ = settled(*read_seg(out / case.output, labels), geometry)
    else:
        label, _ = read_label(out / case.output, names=labels)
    wishes.draw(path, image, label.reshape(geometry.shape), geometry.spacing)


def check_sums(where: str | Path, shape_ZYX: Sequence[int], task: Task) -> None:
    """Raises InputError where what networks say of an image would not fit into this machine's
    memory: a number for every class and pixel, and the weights of the tiles."""
    size = 4 * (task.channels + 1) * math.prod(shape_ZYX)
    if size > ALWAYS_FITS and size > (budget := memory_budget()):
        pixels = "x".join(map(str, shape_ZYX))
        raise InputError(
            f"{where}: size: found {pixels} voxels and {task.channels} classes, which take "
            f"{text_of(size)}, expected at most {text_of(budget)} on this machine. Cut the image "
            "into tiles, or give the job more memory."
        )


def _as_planned(image: np.ndarray, geometry: Geometry, plan: Plan) -> tuple[np.ndarray, Geometry]:
    """The raw image (C, Z, Y, X) as every layout would read it."""
    if len(plan.normalisation) == 3 and set(plan.normalisation) <= set(OF_COLOURS):
        image, geometry = colours(image, geometry)  # as all layouts of colour pictures do
    return image, geometry


def image_maps(
    members: Sequence[Member],
    image_CZYX: np.ndarray,
    geometry: Geometry,
    case_id: str,
    where: str | Path,
    device: torch.device | str,
) -> list[Map]:
    """What the networks say of a raw image. Raises ImageError or InputError that names `where`."""
    return predict_maps(members, _stored(image_CZYX, geometry, case_id, where), device=device)


def _stored(
    image_CZYX: np.ndarray, geometry: Geometry, case_id: str, where: str | Path
) -> Callable[[Member], Stored]:
    """The raw image as a member's plan has it. Raises ImageError or InputError that names
    `where`."""

    def stored(member: Member) -> Stored:
        plan = member.plan
        image, grid = _as_planned(image_CZYX, geometry, plan)
        if len(image) != (channels := len(plan.normalisation)):
            mend = "Save the image with the channels the network was trained on."
            raise ImageError(where, "channels", str(len(image)), str(channels), mend)
        if image.dtype.kind == "f" and not np.isfinite(image).all():
            raise InputError(
                f"{where}: image: found voxels that are nan or infinite, expected finite ones. "
                "Correct the image."
            )
        case = Case(id=case_id, image_CZYX=image, label_ZYX=None, geometry=grid)
        check_room(case_id, grid.shape, grid.spacing, plan)
        array, _, description = preprocess_case(case, plan)
        check_sums(where, description["shape"], member.task)
        return Stored(
            image_CZYX=torch.from_numpy(array),
            scale=plan.scale,
            crop=description["crop"],
            raw_spacing=grid.spacing,
        )

    return stored
