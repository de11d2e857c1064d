"""Folders of a run. `runs/<uid of stage 1>/<uid of stage 2>/...`: the tree on disk is the state."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segfleet.core.errors import InputError, did_you_mean
from segfleet.core.files import absolute, read_json, write_json
from segfleet.core.lock import Lock, holder
from segfleet.pipeline.identity import stage_uids
from segfleet.pipeline.recipe import Recipe, parse, resolve
from segfleet.pipeline.stage_data import Manifests
from segfleet.preprocess.stores.manifest import Manifest, load_manifest

if TYPE_CHECKING:  # it needs torch, which a process that only looks at runs must not load
    from segfleet.pipeline import checkpoint

RECIPE, DONE, LOCK, DATA = "recipe.json", "done.json", "lock", "data.json"
CHECKPOINTS = "checkpoints"
FOLDS = "folds"  # folder below that of all runs: scores over all folds, see `scoring/folds.py`


@dataclass(frozen=True, kw_only=True)
class StageFolder:
    """The folder of one stage of a run."""

    path: Path
    index: int

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    def done(self) -> dict[str, Any] | None:
        """{"checkpoint": folder name, ...} once the stage is finished, else None."""
        document = read_json(self.path / DONE)
        if document is None:
            return None
        best, step = (
            document.get("best") or {},
            re.fullmatch(r"step-\d{8,}", str(document.get("checkpoint"))),
        )
        whole = step and isinstance(best, dict) and isinstance(best.get("step", 0), int)
        return {**document, "best": best} if whole else None

    def check_done(self) -> dict[str, Any]:
        """`done`. Raises InputError if the stage is not finished; looks into no checkpoint."""
        if (document := self.done()) is None:
            raise InputError(
                f"checkpoint: stage {self.index + 1} in {self.path} is not finished; train it first"
            )
        return document

    def final(self) -> checkpoint.Checkpoint:
        """The checkpoint of a finished stage. Raises InputError."""
        return self.load(self.check_done()["checkpoint"])

    def load(self, name: str) -> checkpoint.Checkpoint:
        """A checkpoint that a finished stage must have, by its folder's name. Raises
        CheckpointError that says how to repair it."""
        from segfleet.pipeline import checkpoint

        try:
            return checkpoint.load(self.checkpoints / name)
        except checkpoint.CheckpointError as error:
            raise checkpoint.CheckpointError(
                f"{error}; run `segfleet train` again: it trains this stage again"
            ) from None

    def finish(self, name: str, **fields: Any) -> None:
        write_json(self.path / DONE, {"checkpoint": name, **fields})


def stage_folders(root: Path, recipe: Recipe, manifest: Manifest | Manifests) -> list[StageFolder]:
    """The folders of all stages, first to last; not created here. `manifest`: that of the recipe's
    own store."""
    folders, path = [], Path(root)
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise InputError(
            f"runs: {str(path)!a} is no UTF-8, as safetensors wants paths to be; choose another"
        ) from None
    for index, uid in enumerate(stage_uids(recipe, manifest)):
        path = path / uid
        folders.append(StageFolder(path=path, index=index))
    return folders


def folder_at(path: Path) -> Path:
    """A run's own folder, absolute. Links above it stay; it lies in its earlier stages, so one that
    is itself a link is followed."""
    path = absolute(path)
    while path.is_symlink():
        path = absolute(path.parent / os.readlink(path))
    return path


def open_run(path: Path) -> tuple[Recipe, list[StageFolder]]:
    """Recipe, resolved for the last stage, and stage folders of the run whose last stage is in
    `path`. Raises InputError."""
    path = folder_at(path)
    if not (path / RECIPE).is_file():
        raise InputError(
            f"run: {path} holds no {RECIPE}, so it is no run folder; `segfleet status` lists the "
            "runs under a folder"
        )
    if (document := read_json(path / RECIPE)) is None:
        raise InputError(
            f"run: {path / RECIPE} is damaged; the command that began the run writes it again"
        )
    recipe = resolve(parse(document, str(path / RECIPE)))
    chain = [path, *path.parents][: len(recipe.stages)][::-1]
    return recipe, [StageFolder(path=folder, index=index) for index, folder in enumerate(chain)]


def note_data(path: Path, manifest: Manifest) -> None:
    """Keep data set and plan of the store in a run folder: a trained network does not need its
    training data."""
    document = manifest.outline()
    if read_json(path / DATA) != document:
        path.mkdir(parents=True, exist_ok=True)
        write_json(path / DATA, document)


def data_of(path: Path, recipe: Recipe) -> Manifest:
    """Data set and plan of a run, without cases: from its own folder; of runs that kept none, from
    their store. Raises InputError."""
    if (path / DATA).exists():
        try:
            return Manifest.model_validate(read_json(path / DATA))
        except ValueError:
            raise InputError(
                f"run: {path / DATA} is damaged; remove it, and the store is asked"
            ) from None
    try:
        return load_manifest(Path(recipe.data.store))
    except InputError as error:
        raise InputError(
            f"{error.args[0]} The run {path.name} was made before runs kept what they need of it: "
            f"once, `segfleet evaluate {path.name} data.store=FOLDER` with where the store is now"
        ) from None


def find_run(text: str, root: Path, fold: int | None = None, best: bool = False) -> Path:
    """A run folder from its path, the beginning of its uid, or its recipe's name below `root`. Of
    several: that of `fold`, and with `best` that of the highest score. Raises InputError that
    lists them."""
    if (Path(text) / RECIPE).is_file():
        return folder_at(Path(text))
    outlines = {folder: _outline(folder) for folder in run_folders(absolute(root))}
    fitting = {
        folder: outline
        for folder, outline in outlines.items()
        if folder.name.startswith(text) or outline["name"] == text
    }
    if not fitting:
        others = ", ".join(f"{f.name} ({outline['name']})" for f, outline in outlines.items())
        others = others or "none; `segfleet train RECIPE` makes one"
        hint = did_you_mean(text, {outline["name"] for outline in outlines.values()})
        raise InputError(f"run: found no run '{text}'; runs under {root}: {others}.{hint}")
    matching = {
        folder: outline
        for folder, outline in fitting.items()
        if fold is None or outline["fold"] == fold
    }
    if best and (
        scored := {f: outline for f, outline in matching.items() if outline["score"] is not None}
    ):
        return max(scored, key=lambda folder: scored[folder]["score"])
    if len(matching) == 1:
        return next(iter(matching))
    lines = [
        f"  {folder.name}  fold {outline['fold']}  "
        + ("not scored" if outline["score"] is None else f"Dice {outline['score']:.4f}")
        for folder, outline in (matching or fitting).items()
    ]
    what = f"'{text}'" + ("" if fold is None else f" with fold {fold}")
    raise InputError(
        f"run: {what} fits {len(matching)} runs under {root}; give the uid of one, or --fold N, or "
        "--best, the highest score; predict and export take --fold all, an ensemble:\n"
        + "\n".join(lines)
    )


def _outline(folder: Path) -> dict[str, Any]:
    """Name, fold and score (None before there is one) of a run, as far as its files can be read."""
    outline: dict[str, Any] = {"name": "", "fold": None, "score": None}
    recipe, scores = read_json(folder / RECIPE) or {}, read_json(folder / "evaluation.json") or {}
    outline["name"] = str(recipe.get("name", ""))
    with suppress(KeyError, TypeError):
        outline["fold"] = recipe["data"]["fold"]
    with suppress(KeyError, TypeError):
        outline["score"] = scores["summary"]["mean_foreground_dice"]
    return outline


def run_folders(root: Path) -> list[Path]:
    """Folders that hold a whole run's recipe, in a fixed order."""
    folders = []
    for folder, inner, files in os.walk(root):  # passes over what a running job removes meanwhile
        inner[:] = [name for name in inner if name != CHECKPOINTS and not name.startswith(".")]
        if RECIPE in files:
            folders.append(Path(folder))
    return sorted(folder for folder in folders if folder.parent.name != FOLDS)


def root_of(folder: Path, recipe: Recipe) -> Path:
    """The folder of all runs, from a run's: its stages lie inside one another."""
    return Path(folder).parents[len(recipe.stages) - 1]


ADVICE = "; wait or stop it, then run the same command again"


def lock_stage(folder: Path, stopped: Callable[[], bool] = lambda: False) -> Lock:
    """The lock of one stage, or of a sweep: one process at a time works there. Raises InputError
    that names the holder."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder / LOCK)
    if not lock.acquire(stopped=stopped):
        who = holder(folder / LOCK) or "another process"
        raise InputError(f"run: {folder} is in use by {who}{ADVICE}")
    lock.sign()
    return lock
