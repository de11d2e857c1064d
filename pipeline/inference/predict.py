"""New images to label files that lie exactly on them. Stops for nobody: a bad image is listed, the
rest is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from segfleet.core.errors import InputError
from segfleet.pipeline.inference.inputs import Input, claim, collect, forget, is_made, vouch
from segfleet.pipeline.inference.restore import restore
from segfleet.pipeline.inference.sliding_window import Forward, sliding_window
from segfleet.pipeline.ranks import Ranks, as_facts, from_facts
from segfleet.pipeline.task import Task
from segfleet.preprocess.case import Case, Geometry
from segfleet.preprocess.files.images import ImageError, read_label
from segfleet.preprocess.files.names import write_names
from segfleet.preprocess.files.writer import write_label
from segfleet.preprocess.readers.pairs import colours
from segfleet.preprocess.stores.manifest import Dataset, Plan
from segfleet.preprocess.stores.shard_reader import to_float32
from segfleet.preprocess.transforms.case_transforms import (
    OF_COLOURS,
    check_room,
    preprocess_case,
    raw_resample_axis,
)

OVERLAYS = "overlays"  # folder of pictures among the predictions


def predict_files(
    forward: Forward,
    plan: Plan,
    dataset: Dataset,
    task: Task,
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    patch: Sequence[int],
    overlap: float = 0.5,
    mirror_axes: Sequence[int] = (),
    batch: int = 1,
    dims: int | None = None,
    device: torch.device | str = "cpu",
    made_by: str = "",
    ranks: Ranks | None = None,
    progress: Callable[[int, int], None] | None = None,
    draw: Callable[[Path, np.ndarray, np.ndarray, Sequence[float]], Any] | None = None,
    read: Callable[[Input], tuple[np.ndarray, Geometry]] = Input.read,
) -> dict[str, Any]:
    """Segment the images `inputs` (files and folders) into the folder `out`; one label file each,
    written whole or not at all.

    Files that were made of the same image in the same way are kept, so an interrupted call goes on;
    those of another image of that name or of other settings are written again, and a file that is
    no prediction is left alone and listed. A folder of another `made_by` (run and checkpoint) is
    refused. Every rank of `ranks` segments its share, `progress(done, total)` counts that, and
    every rank gets the whole answer: {"done", "kept": [{"id", "file"}], "failed": [{"id", "files",
    "problem"}], "exit_code"}: 2 if any failed, else 0. Raises InputError when nothing can be done
    at all; an error of one rank is raised on all. `draw`: also OUT/overlays/<id>.png, the
    outlined prediction on its image. `read` an image in another way than in this process.
    """
    ranks, found, out = ranks or Ranks(), collect(inputs, len(dataset.channels)), Path(out)
    window = {
        "patch": patch,
        "overlap": overlap,
        "mirror_axes": mirror_axes,
        "batch": batch,
        "dims": dims or (2 if patch[0] == 1 else 3),
    }
    settings = {
        "made_by": made_by,
        "patch": list(patch),
        "overlap": overlap,
        "mirror_axes": sorted(mirror_axes),
        "dims": window["dims"],
        "averages": task.averages,
    }
    window |= {"device": device, "keep_on": "cpu"}
    error = _caught(lambda: claim(out, found, made_by)) if ranks.rank == 0 else None
    if facts := ranks.share(as_facts(error)):
        raise error or from_facts(facts)
    share, answers = range(ranks.rank, len(found), ranks.size), {}

    def segment() -> None:
        for index in share:
            one = found[index]
            answers[index] = _answer(forward, plan, task, one, out, settings, window, read)
            if draw and answers[index][0] != "failed":
                _draw(draw, one, out, plan, answers[index][0] == "kept", read)
            if progress:
                progress(len(answers), len(share))

    error = _caught(segment)
    gathered = ranks.gather((list(answers.items()), as_facts(error)))
    for failure in (error, *(from_facts(elsewhere) for _, elsewhere in gathered)):
        if failure:
            raise failure
    whole = sorted((index, answer) for part, _ in gathered for index, answer in part)
    result = {
        kind: [one for _, (what, one) in whole if what == kind]
        for kind in ("done", "kept", "failed")
    }
    if ranks.rank == 0 and result["done"]:
        write_names(out, dataset.labels)
    return {"out": str(out), **result, "exit_code": 2 if result["failed"] else 0}


def _caught(function: Callable[[], None]) -> Exception | None:
    try:
        function()
    except Exception as error:
        return error
    return None


def _answer(
    forward: Forward,
    plan: Plan,
    task: Task,
    one: Input,
    out: Path,
    settings: dict[str, Any],
    window: dict[str, Any],
    read: Callable[[Input], tuple[np.ndarray, Geometry]],
) -> tuple[str, dict[str, Any]]:
    try:
        if one.problem:
            raise InputError(one.problem)
        facts = {"image": one.content(), **settings}
        if is_made(out, one, facts):
            return "kept", {"id": one.id, "file": str(out / one.output)}
        label, geometry = _predict(forward, plan, task, one, window, read)
        forget(out, one)
        write_label(out / one.output, label, geometry)
        vouch(out, one, facts)
        return "done", {"id": one.id, "file": str(out / one.output)}
    except (InputError, OSError, FloatingPointError, MemoryError) as error:
        return "failed", {
            "id": one.id,
            "files": [str(p) for p in one.images],
            "problem": str(error) or type(error).__name__,
        }


def _draw(
    draw: Callable[..., Any], one: Input, out: Path, plan: Plan, kept: bool, read: Callable
) -> None:
    """The picture of a prediction that lies in `out`."""
    path = out / OVERLAYS / f"{one.id}.png"
    if kept and path.exists():
        return
    image, geometry = _image(one, plan, read)
    label, _ = read_label(out / one.output)
    draw(path, image, label.reshape(geometry.shape), geometry.spacing)


def _image(one: Input, plan: Plan, read: Callable) -> tuple[np.ndarray, Geometry]:
    """The raw image (C, Z, Y, X) as every layout would read it."""
    image, geometry = read(one)
    if len(plan.normalisation) == 3 and set(plan.normalisation) <= set(OF_COLOURS):
        image, geometry = colours(image, geometry)  # as all layouts of colour pictures do
    return image, geometry


def _predict(
    forward: Forward, plan: Plan, task: Task, one: Input, window: dict[str, Any], read: Callable
) -> tuple[np.ndarray, Geometry]:
    image, geometry = _image(one, plan, read)
    if len(image) != (channels := len(plan.normalisation)):
        mend = "Save the image with the channels the network was trained on."
        raise ImageError(one.images[0], "channels", str(len(image)), str(channels), mend)
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise InputError(
            f"{one.images[0]}: image: found voxels that are nan or infinite, expected finite "
            "ones. Mend the image."
        )
    case = Case(id=one.id, image_CZYX=image, label_ZYX=None, geometry=geometry)
    check_room(one.id, geometry.shape, geometry.spacing, plan)
    stored, _, facts = preprocess_case(case, plan)
    found = sliding_window(forward, torch.from_numpy(to_float32(stored, plan.scale)), **window)
    label = restore(
        found,
        task,
        crop=facts["crop"],
        raw_shape=geometry.shape,
        anisotropic_axis=raw_resample_axis(geometry.spacing, plan),
        transpose=plan.transpose,
    )
    return label, geometry
