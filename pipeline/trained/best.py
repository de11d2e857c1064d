"""The best of several recipes and of their ensembles in pairs, by cases no network was trained on.

As nnU-Net's find_best_configuration (Isensee et al. 2021): each recipe's folds together score every
case once; a pair is the mean of the probabilities of both. The highest mean foreground Dice is the
best; of equal ones a single recipe.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from segfleet.core.errors import InputError
from segfleet.core.files import read_json, write_json
from segfleet.pipeline.ranks import Ranks
from segfleet.pipeline.run import root_of
from segfleet.pipeline.scoring.folds import folder_of
from segfleet.pipeline.scoring.metrics import score_case
from segfleet.pipeline.scoring.scored import evaluation_of
from segfleet.pipeline.scoring.summary import summarise
from segfleet.pipeline.trained.model import Model, Trained, check_together
from segfleet.pipeline.trained.out_of_fold import Case, cases_of, made_on, predictions

WARNING = (
    "The best was chosen on the cases it is scored on, so its score is optimistic, the more so the "
    "more there was to choose from: a test set nobody chose on says how good it is."
)
PAIR = "ensemble.json"


def find_best(
    configurations: Sequence[Sequence[Trained]],
    progress: Callable[[int, int], None] | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """{"candidates": best first, "best": runs of the best, "cases", "warning"} of recipes, each the
    networks of its folds. Scores are over the cases that every recipe scored. Raises InputError for
    recipes of other structures or channels, unscored runs, or without a common case."""
    check_together([network for networks in configurations for network in networks])
    scored = [_scores(networks) for networks in configurations]
    common = set.intersection(*(set(cases) for cases in scored))
    if not common:
        raise InputError(
            "best: the recipes validate on no common case; train the same folds of the same split"
        )
    names = list(configurations[0][0].task.names)
    candidates = [
        _candidate([networks], cases, common, names)
        for networks, cases in zip(configurations, scored, strict=True)
    ]
    pairs = list(itertools.combinations(range(len(configurations)), 2))
    for done, (a, b) in enumerate(pairs):
        both = [configurations[a], configurations[b]]
        cases = _pair([*both[0], *both[1]], common, device)
        candidates.append(_candidate(both, cases, common, names))
        if progress:
            progress(done + 1, len(pairs))
    candidates.sort(key=lambda row: (-(row["mean_foreground_dice"] or 0.0), len(row["recipes"])))
    return {
        "candidates": candidates,
        "best": candidates[0]["runs"],
        "cases": len(common),
        "warning": WARNING,
    }


def _scores(networks: Sequence[Trained]) -> dict[str, dict[str, Any]]:
    """{case: its entry} of the evaluations of a recipe's runs."""
    entries: dict[str, dict[str, Any]] = {}
    for network in networks:
        document = evaluation_of(network.run)
        if (document.get("seen_in_training") or {}).get("cases"):
            raise InputError(
                f"best: {network.uid} was scored on cases it was trained on (split "
                f"{network.recipe.data.split}); choose runs of a split with validation cases"
            )
        for case in document["cases"]:
            if case["id"] in entries:
                raise InputError(
                    f"best: two runs of {network.recipe.name} score the case '{case['id']}'; "
                    "choose runs whose folds do not share validation cases"
                )
            entries[case["id"]] = case
    return entries


def _candidate(
    recipes: Sequence[Sequence[Trained]],
    cases: dict[str, dict[str, Any]],
    common: set[str],
    names: list[str],
) -> dict[str, Any]:
    chosen = [cases[case] for case in sorted(common)]
    summary = summarise(chosen, names)
    return {
        "recipes": [networks[0].recipe.name for networks in recipes],
        "runs": [network.uid for networks in recipes for network in networks],
        "mean_foreground_dice": summary["mean_foreground_dice"],
        "mean_foreground_dice_ci95": summary["mean_foreground_dice_ci95"],
        "structures": {
            name: scores["dice"]["mean"] for name, scores in summary["structures"].items()
        },
    }


def _pair(
    networks: list[Trained], common: set[str], device: torch.device | str
) -> dict[str, dict[str, Any]]:
    """The entries of an ensemble's cases; kept beside the score over all folds, so that they are
    predicted once."""
    root = root_of(networks[0].run, networks[0].recipe)
    path = folder_of(root, [network.uid for network in networks]) / PAIR
    made = made_on(networks)
    recorded = read_json(path) or {}
    if recorded.get("made_on") == made and common <= set(recorded["cases"]):
        return recorded["cases"]
    model = Model(networks, device)
    model.check()

    def score(case: Case, label: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
        entry = case.stores[0].manifest.case(case.id)
        scores = score_case(
            label, truth, spacing=entry.raw_spacing, task=model.task, distances=False
        )
        return {"id": case.id, "group": entry.group or case.id, "scores": scores}

    cases = [case for case in cases_of(networks) if case.id in common]
    if lonely := next((case for case in cases if len(case.networks) < 2), None):
        raise InputError(
            f"best: the case '{lonely.id}' is validated by one of the recipes alone: their folds "
            "differ; train the same split with both"
        )
    by_id = {entry["id"]: entry for entry in predictions(model, cases, score, Ranks())}
    document = {"made_on": made, "cases": by_id}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, document)
    return by_id
