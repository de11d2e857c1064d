"""All folds of a recipe: a run for each, and one score over all their cases once each run is
scored.

Every case is scored by the one network that was not trained on it (out of fold). Such a score lies
in `runs/folds/<uid>/`, as evaluation.json and report.html like a run's own; recipe.json says
`fold: all`. No torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from segfleet.core.errors import InputError
from segfleet.core.files import absolute, digest_of, write_json
from segfleet.pipeline.events import training_of
from segfleet.pipeline.recipe import Recipe
from segfleet.pipeline.run import (
    FOLDS,
    RECIPE,
    StageFolder,
    find_run,
    folder_at,
    open_run,
    root_of,
    run_folders,
    stage_folders,
)
from segfleet.pipeline.scoring import scored
from segfleet.pipeline.scoring.summary import summarise
from segfleet.preprocess.stores.manifest import Manifest

ALL = "all"
SCORES = "scores"  # folder among predictions, of `segfleet score`
SHARED = (
    "version",
    "dataset",
    "store",
    "settings",
    "structures",
    "unit",
    "definitions",
    "versions",
)


def with_fold(recipe: Recipe, fold: int | str) -> Recipe:
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"fold": fold})})


def every_fold(recipe: Recipe, manifest: Manifest) -> list[Recipe]:
    """The recipe for each fold of its split."""
    count = len(manifest.folds(recipe.data.split))
    return [with_fold(recipe, fold) for fold in range(count)]


def chosen_folds(recipe: Recipe, manifest: Manifest) -> list[Recipe]:
    """What a recipe asks for: with `data.fold: all` every fold, else itself."""
    return every_fold(recipe, manifest) if recipe.data.fold == ALL else [recipe]


def family_of(recipe: Recipe) -> str:
    """What the folds of one recipe have in common, as a hash."""
    document = recipe.model_dump(mode="json")
    del document["name"], document["data"]["fold"], document["data"]["workers"]
    del document["trackers"], document["save_minutes"], document["save_every"]
    return digest_of(_followed(document))[:12]


def _followed(document: Any) -> Any:
    """The same with all links of its paths followed: one store has several names."""
    if isinstance(document, dict):
        return {key: _followed(value) for key, value in document.items()}
    if isinstance(document, list):
        return [_followed(value) for value in document]
    path = isinstance(document, str) and os.path.isabs(document)
    return os.path.realpath(document) if path else document


def find_folds(text: str, root: Path) -> list[Path]:
    """The runs of every fold of one recipe, in the order of the folds, from the recipe's name or
    from the folder or the beginning of the uid of any of them. Raises InputError that lists what
    else the name fits."""
    matching = set()
    if (Path(text) / RECIPE).is_file():
        own, recipe = folder_at(Path(text)), open_run(Path(text))[0]
        root = own.parents[1] if own.parent.name == FOLDS else root_of(own, recipe)
        matching.add(family_of(recipe))
    families: dict[str, list[tuple[int, Path]]] = {}
    for folder in run_folders(root):
        with suppress(InputError):  # made by another version, or damaged
            recipe = open_run(folder)[0]
            family = family_of(recipe)
            families.setdefault(family, []).append((recipe.data.fold, absolute(folder)))
            if text == recipe.name or folder.name.startswith(text):
                matching.add(family)
    if not matching & families.keys():
        find_run(text, root)  # says what is there
    if len(matching) > 1:
        lines = [
            f"  {members[0][1].name[:8]}  {len(members)} fold(s)"
            for family, members in sorted(families.items())
            if family in matching
        ]
        raise InputError(
            f"run: '{text}' fits {len(matching)} recipes under {root} that differ in more than "
            "their fold; give the uid of one of their runs:\n" + "\n".join(lines)
        )
    return [folder for _, folder in sorted(families[matching.pop()])]


def folder_of(root: Path, runs: list[str]) -> Path:
    """Where what is known of all folds together lies; `runs`: the uids of their last stages."""
    text = json.dumps(sorted(runs))
    return Path(root) / FOLDS / hashlib.sha256(text.encode()).hexdigest()[:12]


def find_scored(text: str, root: Path, fold: int | str | None = None, best: bool = False) -> Path:
    """The folder of an evaluation: of a run as `find_run` finds it, of all folds of a recipe
    together (`fold` "all", or where the name fits several runs that are its folds), a folder that
    holds one, or predictions that were scored. Raises InputError."""
    for folder in (Path(text), Path(text) / SCORES):
        if (folder / scored.EVALUATION).is_file():
            return folder
    if fold != ALL:
        try:
            return find_run(text, root, fold, best)
        except InputError:
            together = None if fold is not None or best else _all_folds(text, root)
            if together is None:
                raise
            return together
    if (together := _all_folds(text, root)) is None:
        raise InputError(
            f"run: the folds of '{text}' have no score together yet; `segfleet train RECIPE "
            "data.fold=all` trains and scores what is missing"
        )
    return together


def _all_folds(text: str, root: Path) -> Path | None:
    """The score over all folds of the recipe that `text` names, if it is there. Raises InputError
    if it names none, or several."""
    runs = find_folds(text, root)
    out = folder_of(root_of(runs[0], open_run(runs[0])[0]), [run.name for run in runs])
    return out if (out / scored.EVALUATION).is_file() else None


def score_folds(
    root: Path, recipe: Recipe, manifest: Manifest, report: Callable[[Path], Any]
) -> Path | None:
    """Write the score over all folds, with `report` of it, unless exactly that is there; its
    folder. None while a fold is not scored as `recipe` asks for, or cannot be trained, or where
    folds say nothing more than a run does: there is only one, or they validate on the same
    cases."""
    members = every_fold(recipe, manifest)
    ids = [case for member in members for case in scored.scored_ids(member, manifest)]
    if len(members) < 2 or len(set(ids)) < len(ids):
        return None
    try:
        stages = [stage_folders(root, member, manifest) for member in members]
    except InputError:  # of one that cannot be trained so: it has fewer cases than `data.cases`
        return None
    folders = [fold[-1] for fold in stages]
    if not all(
        scored.is_scored(folder.path, member, manifest)
        for folder, member in zip(folders, members, strict=True)
    ):
        return None
    out = folder_of(root, [folder.path.name for folder in folders])
    identity = [
        scored.score_facts(member, manifest, folder.done())
        for folder, member in zip(folders, members, strict=True)
    ]
    before = scored.read_evaluation(out) if (out / scored.EVALUATION).exists() else None
    if not before or before.get("scored") != {"folds": identity}:
        _write(out, with_fold(recipe, ALL), stages, identity)
        report(out)
    elif not (out / scored.REPORT).exists():  # killed in between
        report(out)
    return out


def _write(
    out: Path, recipe: Recipe, stages: list[list[StageFolder]], identity: list[dict]
) -> None:
    """`stages`: those of every fold."""
    folders = [fold[-1] for fold in stages]
    parts = [scored.evaluation_of(folder.path) for folder in folders]
    cases = [{**case, "fold": fold} for fold, part in enumerate(parts) for case in part["cases"]]
    cases.sort(key=lambda case: case["id"])
    first = parts[0]
    document: dict[str, Any] = {key: first[key] for key in SHARED if key in first}
    document |= {
        "cases": cases,
        "summary": summarise(cases, first["structures"], recipe.data.batch),
        "split": recipe.data.split,
        "fold": ALL,
        "folds": [
            {
                "fold": fold,
                "run": folder.path.name,
                "cases": len(part["cases"]),
                "training_cases": part.get("training_cases"),
                "mean_foreground_dice": part["summary"]["mean_foreground_dice"],
            }
            for fold, (folder, part) in enumerate(zip(folders, parts, strict=True))
        ],
        "parameters": first.get("parameters"),
        # a pre-training that all folds share was trained once
        "training": training_of(dict.fromkeys(stage.path for fold in stages for stage in fold)),
        "seen_in_training": {
            key: sum((part.get("seen_in_training") or {}).get(key, 0) for part in parts)
            for key in ("cases", "others_of_the_same_patients")
        },
        "selected_on_these_cases": any(part.get("selected_on_these_cases") for part in parts),
        "scored": {"folds": identity},
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / RECIPE, recipe.model_dump(mode="json"))
    scored.write_evaluation(out, document)
