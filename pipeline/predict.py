"""New images to label files that lie exactly on them. Stops for nobody: a bad image is listed, the rest is done."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from segfleet.pipeline.restore import restore
from segfleet.pipeline.sliding_window import Forward, sliding_window
from segfleet.pipeline.task import Task
from segfleet.preprocess.case import Case
from segfleet.preprocess.images import ENDINGS, ending, read_image, stem
from segfleet.preprocess.manifest import Dataset, Plan, write_atomically
from segfleet.preprocess.problems import InputError
from segfleet.preprocess.readers.base import natural, visible
from segfleet.preprocess.shard_reader import to_float32
from segfleet.preprocess.transforms import preprocess_case, resample_axis
from segfleet.preprocess.writer import WRITABLE, write_label

RECORD = "predictions.json"
CHANNEL = re.compile(r"(.+)_(\d{4})")


@dataclass(frozen=True, kw_only=True)
class Input:
    """One image to segment: its files, one per channel or one for all. `problem` says why it cannot be used."""

    id: str
    images: tuple[Path, ...]
    problem: str = ""

    @property
    def output(self) -> str:
        """Name of the label file: the image's own ending if labels survive it, else .png."""
        kind = ending(self.images[0])
        return self.id + (kind if kind in WRITABLE else ".png")


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
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Segment the images `inputs` (files and folders) into the folder `out`; one label file each, written whole or not at all.

    Files that are there already are kept, so an interrupted call goes on; `made_by` (network and settings) is recorded in `out`, and a
    folder made by another is refused. Returns {"done", "kept": [{"id", "file"}], "failed": [{"id", "files", "problem"}], "exit_code"}:
    2 if any failed, else 0. Raises InputError when nothing can be done at all.
    """
    found, out = collect(inputs, len(dataset.channels)), Path(out)
    _claim(out, found, made_by)
    window = {"patch": patch, "overlap": overlap, "mirror_axes": mirror_axes, "batch": batch, "dims": dims or (2 if patch[0] == 1 else 3)}
    result: dict[str, Any] = {"out": str(out), "done": [], "kept": [], "failed": []}
    for number, one in enumerate(found):
        path = out / one.output
        try:
            if one.problem:
                raise InputError(one.problem)
            if path.exists():
                result["kept"].append({"id": one.id, "file": str(path)})
            else:
                _predict(forward, plan, task, one, path, {**window, "device": device, "keep_on": "cpu"})
                result["done"].append({"id": one.id, "file": str(path)})
        except (InputError, OSError, FloatingPointError, MemoryError) as error:
            problem = str(error) or type(error).__name__
            result["failed"].append({"id": one.id, "files": [str(p) for p in one.images], "problem": problem})
        if progress:
            progress(number + 1, len(found))
    return {**result, "exit_code": 2 if result["failed"] else 0}


def _predict(forward: Forward, plan: Plan, task: Task, one: Input, path: Path, window: dict[str, Any]) -> None:
    image, geometry = read_image(one.images)
    if len(image) == 1 and plan.normalisation == ("rgb_to_0_1",) * 3:
        image = np.repeat(image, 3, axis=0)  # a grey picture among colour ones
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise InputError(f"{one.images[0]}: image: found voxels that are nan or infinite, expected finite ones. Mend the image.")
    case = Case(id=one.id, image_CZYX=image, label_ZYX=None, geometry=geometry)
    stored, _, facts = preprocess_case(case, plan)
    found = sliding_window(forward, torch.from_numpy(to_float32(stored, plan.scale)), **window)
    axis = resample_axis(geometry.spacing, plan)
    write_label(path, restore(found, task, crop=facts["crop"], raw_shape=geometry.shape, anisotropic_axis=axis), geometry)


def collect(inputs: Sequence[str | Path], channels: int) -> list[Input]:
    """The images among files and folders, in natural order. CASE_0000, CASE_0001, ... are channels of CASE when exactly the channels of
    the data set are there, or only 0000 (one channel, or all in one file); any other file is an image of its own.

    Raises InputError when a path does not exist or nothing is found.
    """
    files: list[Path] = []
    for path in map(Path, inputs):
        if not path.exists():
            raise InputError(f"input: found no file or folder {path}")
        files += [p for p in visible(path) if p.is_file() and p.name.lower().endswith(ENDINGS)] if path.is_dir() else [path]
    if not files:
        where = ", ".join(map(str, inputs)) or "nothing"
        raise InputError(f"input: found no image in {where}; expected files ending in {', '.join(ENDINGS)}")
    cases: dict[tuple[Path, str, str], dict[int, Path]] = {}
    alone: list[Input] = []
    for path in dict.fromkeys(files):
        match = CHANNEL.fullmatch(stem(path))
        if match:
            cases.setdefault((path.parent, match[1], ending(path)), {})[int(match[2])] = path
        else:
            alone.append(Input(id=stem(path), images=(path,)))
    for (_, name, _), parts in cases.items():
        alone += _channels(name, dict(sorted(parts.items())), channels)
    return _distinct(sorted(alone, key=lambda one: natural(one.id)))


def _channels(name: str, parts: dict[int, Path], channels: int) -> list[Input]:
    if set(parts) in ({0}, set(range(channels))):
        return [Input(id=name, images=tuple(parts.values()))]
    if channels == 1:  # numbered images of one channel, not channels
        return [Input(id=stem(path), images=(path,)) for path in parts.values()]
    have = ", ".join(f"{index:04d}" for index in parts)
    where = next(iter(parts.values())).parent / name
    problem = f"{where}: channels: found {have}, expected 0000 to {channels - 1:04d}. Add or remove files."
    return [Input(id=name, images=tuple(parts.values()), problem=problem)]


def _distinct(found: list[Input]) -> list[Input]:
    """Two images that would be written to one file: the second is a problem."""
    seen: dict[str, Input] = {}
    result = []
    for one in found:
        first = seen.setdefault(one.output, one)
        if first is not one:
            problem = f"{one.images[0]}: its prediction would be called {one.output}, as that of {first.images[0]}. Rename one of them."
            one = Input(id=one.id, images=one.images, problem=problem)
        result.append(one)
    return result


def _claim(out: Path, found: list[Input], made_by: str) -> None:
    """Make the folder. Raises InputError if predictions would overwrite images or mix with those of another network."""
    if out.exists() and not out.is_dir():
        raise InputError(f"out: {out} is a file, expected a folder")
    images = {path.resolve() for one in found for path in one.images}
    for one in found:
        if (out / one.output).resolve() in images:
            raise InputError(f"out: the prediction {one.output} would overwrite the image in {out}; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    record = out / RECORD
    try:
        known = json.loads(record.read_text(encoding="utf-8"))["made_by"]
    except FileNotFoundError:
        known = None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"out: {record} is damaged; choose another folder, or remove the file if the predictions may be kept") from None
    if known not in (None, made_by):
        raise InputError(f"out: {out} holds predictions made by {known!r}, expected {made_by!r}; choose another folder")
    if known is None:
        write_atomically(record, json.dumps({"made_by": made_by}))
