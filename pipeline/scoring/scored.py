"""What a run's score was taken of, and how. Without torch, so that launchers and sweeps can ask
whether a run is scored.

Runs whose splits have the same training cases share a folder, and options of the evaluation are no
part of a run's uid. So a score is a run's own only if evaluation.json says under "scored" exactly
what the recipe asks for.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segfleet.core.errors import InputError
from segfleet.core.files import read_json, write_json
from segfleet.pipeline.recipe import Recipe, members
from segfleet.pipeline.run import StageFolder
from segfleet.pipeline.scoring.form import is_evaluation
from segfleet.pipeline.stage_data import manifests_of, stages_of, training_ids
from segfleet.preprocess.stores.manifest import Manifest

if TYPE_CHECKING:
    from segfleet.pipeline.scoring.external import TestSet

EVALUATION = "evaluation.json"
REPORT = "report.html"  # beside it, written after it
EXTERNAL = "on"  # folder in a run: scores on other stores
VERSION = 3  # of what an evaluation.json holds; one of another version is made anew


def scored_ids(recipe: Recipe, manifest: Manifest) -> list[str]:
    """The cases a run is scored on, in the order of their ids."""
    return sorted(manifest.fold(recipe.data.split, recipe.data.fold)["val"])


def chosen_step(recipe: Recipe, done: dict[str, Any]) -> int:
    """Step of the checkpoint a finished run is judged by: the last, or the best on validation by
    `evaluation.select` if the recipe says so and there is one."""
    best = None
    if recipe.evaluation.weights == "best":
        best = done.get("best", {}).get(recipe.evaluation.select)
    return best["step"] if best else int(done["checkpoint"].rpartition("-")[2])


def score_facts(
    recipe: Recipe, manifest: Manifest, done: dict[str, Any], ids: Sequence[str] | None = None
) -> dict[str, Any]:
    """Everything that decides the score of a finished run, besides what its uid holds; `done`: its
    done.json; `ids`: the cases, if not those of its fold. Plain JSON."""
    options = recipe.evaluation
    return {
        "version": VERSION,
        "pool": recipe.data.batch,
        "store": manifest.id,
        "split": recipe.data.split,
        "fold": recipe.data.fold,
        "cases": _digest(tuple(scored_ids(recipe, manifest) if ids is None else ids)),
        "weights": options.weights,
        "select": options.select if options.weights == "best" else None,
        "step": chosen_step(recipe, done),
        "overlap": options.overlap,
        "average": options.average,
        "mirror": sorted(options.mirror),
        "tolerance": options.tolerance,
    }


def evaluation_of(run: Path) -> dict[str, Any]:
    """The same of a run that was scored. Raises InputError."""
    document = read_evaluation(run, whole=True)
    if document is None or "summary" not in document:
        raise InputError(
            f"evaluation: {Path(run) / EVALUATION} is missing or damaged; `segfleet evaluate` "
            "scores the run again"
        )
    return document


def own_evaluation(
    run: Path, recipe: Recipe, manifest: Manifest, test: TestSet | None = None
) -> dict[str, Any]:
    """The evaluation that a command has just made of a run, or of a test set beside it. Raises
    InputError if it is damaged, or if another command's has replaced it since."""
    run = Path(run)
    done = StageFolder(path=run, index=len(recipe.stages) - 1).done()
    if done is None:
        raise InputError(f"evaluation: {run} is not finished; train it first")
    folder = run / EXTERNAL / test.folder(manifest) if test else run
    identity = test_facts(run, recipe, manifest, done, test) if test else None
    document = evaluation_of(folder)
    if document.get("scored") != (identity or score_facts(recipe, manifest, done)):
        raise InputError(
            f"evaluation: {folder / EVALUATION} was replaced by another evaluation meanwhile; run "
            "the same command again"
        )
    return document


def test_facts(
    run: Path, recipe: Recipe, manifest: Manifest, done: dict[str, Any], test: TestSet
) -> dict[str, Any]:
    """Everything that decides the score of a run on a test set, as `score_facts`."""
    identity = score_facts(recipe, manifest, done, test.ids(manifest))
    return identity | {"run": run.name, "split": test.split, "fold": test.fold}


def read_evaluation(run: Path, *, whole: bool = False) -> dict[str, Any] | None:
    """The evaluation.json of a run as it was written; None if there is none or it is damaged. Only
    if the `whole` one is asked for is more looked at than its summary."""
    path = Path(run) / EVALUATION
    document = read_json(path)
    if not document or is_evaluation(document, whole=whole):
        return document or None
    sys.stderr.write(f"segfleet: {path} is damaged and is left out\n")
    return None


def write_evaluation(run: Path, document: dict[str, Any]) -> None:
    write_json(Path(run) / EVALUATION, document)


def is_scored(run: Path, recipe: Recipe, manifest: Manifest) -> bool:
    """Whether the run in the folder `run` is finished and its evaluation.json holds the score that
    `recipe` asks for. A reconstruction has none."""
    done = StageFolder(path=Path(run), index=len(recipe.stages) - 1).done()
    if done is None:
        return False
    if recipe.task == "reconstruct":
        return True  # there is nothing to score
    path = Path(run) / EVALUATION
    try:
        status = path.stat()
        recorded = _known(str(path), status.st_ino, status.st_mtime_ns)
    except FileNotFoundError:
        return False
    return recorded is not None and recorded == json.dumps(
        score_facts(recipe, manifest, done), sort_keys=True
    )


def seen_in_training(ids: Sequence[str], recipe: Recipe, manifest: Manifest) -> dict[str, int]:
    """How many of the cases `ids` the network was trained on in any of its stages, and how many
    others are of patients it was trained on."""
    patient = {case: group or case for case, group in manifest.cases.columns("id", "group")}
    trained: set[str] = set()
    manifests = manifests_of(recipe, manifest)
    own_stores = [
        settings for _, own, _ in stages_of(recipe, manifests) for settings in members(own)
    ]
    for own in own_stores:
        stored = manifests(own)
        trained_ids = set(training_ids(own, stored))
        if stored.id != manifest.id:  # another store: the same images, whatever they are called
            images = dict(stored.cases.columns("id", "image_sha256"))
            same = {images[case] for case in trained_ids if case in images} - {""}
            trained_ids = {
                case
                for case, image in manifest.cases.columns("id", "image_sha256")
                if image in same
            }
        trained |= trained_ids
    patients = {patient.get(case, case) for case in trained}
    others = [case for case in ids if case not in trained and patient.get(case, case) in patients]
    return {"cases": len(trained & set(ids)), "others_of_the_same_patients": len(others)}


def optimism(document: dict[str, Any]) -> list[str]:
    """Sentences on why the scores of an evaluation.json are better than those of new patients would
    be."""
    seen, total, sentences = (
        document.get("seen_in_training") or {},
        len(document.get("cases", ())),
        [],
    )
    if count := seen.get("cases"):
        sentences.append(
            f"{count} of the {total} scored cases are training cases: the scores are optimistic."
        )
    if count := seen.get("others_of_the_same_patients"):
        sentences.append(
            f"{count} of the {total} scored cases are of patients with training cases: the scores "
            "are optimistic."
        )
    if document.get("selected_on_these_cases"):
        sentences.append(
            "The checkpoint was chosen by its score on the very cases that are scored here: the "
            "scores are optimistic."
        )
    return sentences


@functools.lru_cache(maxsize=4096)
def _known(path: str, inode: int, changed: int) -> str | None:
    """What an evaluation.json says it was taken of; the file is replaced as a whole, so inode and
    time distinguish its versions."""
    identity = (read_evaluation(Path(path).parent) or {}).get("scored")
    return json.dumps(identity, sort_keys=True) if identity else None


@functools.lru_cache(maxsize=64)
def _digest(ids: tuple[str, ...]) -> str:
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()
