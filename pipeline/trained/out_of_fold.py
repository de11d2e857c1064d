"""What runs say of cases that they were not trained on: for choosing a post-processing, and for
the score of an ensemble.

Of a set of runs, every case is predicted by those that validate on it: the runs of one fold of each
recipe. Cases that some run was trained on and none validates on are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from segfleet.core.ahead import ahead
from segfleet.core.errors import InputError
from segfleet.core.files import digest_of, read_json, write_json
from segfleet.pipeline.inference.ensemble import Member, Stored, predict_maps
from segfleet.pipeline.inference.postprocess import LARGEST, Rule, clean, rules_of
from segfleet.pipeline.inference.restore import combine
from segfleet.pipeline.inference.room import pinned, roomy
from segfleet.pipeline.ranks import Ranks, error_as_json, error_from_json
from segfleet.pipeline.run import root_of
from segfleet.pipeline.scoring.evaluate import stored_image, truth_of
from segfleet.pipeline.scoring.folds import folder_of
from segfleet.pipeline.scoring.intervals import paired
from segfleet.pipeline.scoring.metrics import score_case
from segfleet.pipeline.scoring.scored import scored_ids
from segfleet.pipeline.trained.model import Model, Trained
from segfleet.preprocess.stores.base import ShardStore, open_store

DECISION = "postprocessing.json"
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A case, the networks that may speak of it, and where it is stored for each."""

    id: str
    networks: tuple[Trained, ...]
    stores: tuple[ShardStore, ...]


def cases_of(networks: Sequence[Trained]) -> list[Case]:
    """All cases that any of the networks validates on, with those networks; in an order in which
    each network is loaded about once. Raises InputError if a store is gone or another one now, or
    if the stores hold other images under the same names."""
    stores = {network.uid: _store_of(network) for network in networks}
    by_case: dict[str, list[Trained]] = {}
    for network in networks:
        manifest = stores[network.uid].manifest
        trained = set(manifest.fold(network.recipe.data.split, network.recipe.data.fold)["train"])
        for case in scored_ids(network.recipe, manifest):
            if case not in trained:
                by_case.setdefault(case, []).append(network)
    cases = [
        Case(id=case, networks=tuple(own), stores=tuple(stores[network.uid] for network in own))
        for case, own in by_case.items()
    ]
    if not cases:
        raise InputError(
            f"out of fold: {' and '.join(network.uid for network in networks)} validate on no case "
            "that they were not trained on"
        )
    for case in cases:
        grids = {store.manifest.case(case.id).raw_shape for store in case.stores}
        if len(grids) > 1:
            raise InputError(
                f"out of fold: case '{case.id}' has another grid in another store: "
                f"{' and '.join(map(str, sorted(grids)))}; the runs are of other data"
            )
    return sorted(cases, key=lambda case: ([network.uid for network in case.networks], case.id))


def _store_of(network: Trained) -> ShardStore:
    store = open_store(network.recipe.data.store)
    if store.manifest.id != network.manifest.id:
        raise InputError(
            f"out of fold: {network.recipe.data.store} is not the store that {network.uid} was "
            "trained on; evaluate the run with its own store"
        )
    return store


def predictions(
    model: Model,
    cases: Sequence[Case],
    score: Callable[[Case, np.ndarray, np.ndarray], dict[str, Any]],
    ranks: Ranks,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """`score(case, label, truth)` of every case's label on the raw grid, in the order of `cases`,
    shared out among the ranks; an error of one is raised on all."""
    share = range(ranks.rank, len(cases), ranks.size)
    scores, error = {}, None
    reading = ahead(
        lambda index: Read.of(cases[index], model.device),
        share,
        background=torch.device(model.device).type == "cuda",
        roomy=lambda read: roomy(read.first.image_CZYX),
    )
    try:
        with closing(reading):
            for index, ready in reading:
                read = ready()
                scores[index] = score(read.case, _predict(model, read), read.truth_ZYX)
                del read
                if progress:
                    progress(len(scores), len(share))
    except Exception as caught:
        error = caught
    answers = ranks.gather((list(scores.items()), error_as_json(error)))
    for failure in (error, *(error_from_json(elsewhere) for _, elsewhere in answers)):
        if failure:
            raise failure
    return [
        entry for _, entry in sorted((pair for part, _ in answers for pair in part), key=_first)
    ]


def _first(pair: tuple[int, Any]) -> int:
    return pair[0]


@dataclass(frozen=True, kw_only=True)
class Read:
    """What is read of a case before its turn: its truth on the raw grid, and the image as its first
    network's store has it. Others of other stores are read when their network's turn comes."""

    case: Case
    truth_ZYX: np.ndarray
    first: Stored

    @classmethod
    def of(cls, case: Case, device: torch.device | str) -> Read:
        store = case.stores[0]
        entry = store.manifest.case(case.id)
        first = _stored(store, case.id)
        first = replace(first, image_CZYX=pinned(first.image_CZYX, device))
        return cls(case=case, truth_ZYX=truth_of(store, entry), first=first)


def _stored(store: ShardStore, case_id: str) -> Stored:
    entry = store.manifest.case(case_id)
    return Stored(
        image_CZYX=stored_image(store, entry),
        scale=store.manifest.plan.scale,
        crop=entry.crop,
        raw_spacing=entry.raw_spacing,
    )


def _predict(model: Model, read: Read) -> np.ndarray:
    """(Z, Y, X) label on the raw grid: the mean of the case's networks."""
    case = read.case
    members = [model.member(network) for network in case.networks]
    store_of = dict(zip(map(id, members), case.stores, strict=True))

    def stored(member: Member) -> Stored:
        store = store_of[id(member)]
        return read.first if store is case.stores[0] else _stored(store, case.id)

    maps = predict_maps(members, stored, device=model.device)
    return combine(maps, case.stores[0].manifest.case(case.id).raw_shape)


# post-processing


def decision_file(networks: Sequence[Trained]) -> Path | None:
    """Where the decision on runs' post-processing is kept: in the run's folder, or that of all
    folds together. None for what is no run."""
    runs = [network.run for network in networks]
    if None in runs or not runs:
        return None
    if len(runs) == 1:
        return runs[0] / DECISION
    return folder_of(root_of(runs[0], networks[0].recipe), [run.name for run in runs]) / DECISION


def read_decision(networks: Sequence[Trained]) -> dict[str, Any] | None:
    """The decision, if one was made on the networks as they are."""
    path = decision_file(networks)
    decision = read_json(path) if path else None
    return decision if decision and decision.get("made_on") == made_on(networks) else None


def made_on(networks: Sequence[Trained]) -> list[list[Any]]:
    """Networks, checkpoints and how they are used: what a decision holds for."""
    return sorted(
        [
            network.uid,
            network.checkpoint,
            digest_of(network.recipe.evaluation.model_dump(mode="json")),
        ]
        for network in networks
    )


def decided(model: Model, ranks: Ranks, progress: Progress | None = None) -> dict[str, Rule]:
    """The rule of each structure that the cases not trained on showed to help, decided now if it
    was not before; kept for the next time. Raises InputError where that cannot be known."""
    if model.postprocessing is None:
        if decision_file(model.networks) is None:
            return model.rules("auto")  # raises: a model file brings its decision or has none
        model.postprocessing = decide(model, ranks, progress)
        if ranks.rank == 0:
            path = decision_file(model.networks)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, model.postprocessing)
    return rules_of(model.postprocessing["rules"])


def decide(model: Model, ranks: Ranks, progress: Progress | None = None) -> dict[str, Any]:
    """Whether keeping only the largest part of a structure helps, structure by structure: where the
    mean paired difference of Dice is above 0 and its 95 % interval over patients does not reach
    below (nowhere with fewer than five patients). Empty in truth and prediction counts 1, so that
    taking out a false part is seen."""
    task = model.task

    def score(case: Case, label: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
        entry = case.stores[0].manifest.case(case.id)
        spacing, rows = entry.raw_spacing, {}
        before = score_case(label, truth, spacing=spacing, task=task, distances=False)
        for name in task.names:
            cleaned = clean(label, {name: LARGEST}, task, spacing)
            after = score_case(cleaned, truth, spacing=spacing, task=task, distances=False)
            rows[name] = [_dice(before[name]["dice"]), _dice(after[name]["dice"])]
        return {"id": case.id, "group": entry.group or case.id, "dice": rows}

    rows = sorted(
        predictions(model, cases_of(model.networks), score, ranks, progress),
        key=lambda row: row["id"],
    )
    structures = {
        name: compared(
            [row["dice"][name][0] for row in rows],
            [row["dice"][name][1] for row in rows],
            [row["group"] for row in rows],
        )
        for name in task.names
    }
    return {
        "rules": {
            name: LARGEST.text
            for name, comparison in structures.items()
            if comparison["difference"] > 0 and comparison["ci95"] and comparison["ci95"][0] >= 0
        },
        "structures": structures,
        "made_on": made_on(model.networks),
        "definition": " ".join((decide.__doc__ or "").split()),
    }


def _dice(value: float | None) -> float:
    return 1.0 if value is None else value


def compared(
    before: Sequence[float], after: Sequence[float], groups: Sequence[str]
) -> dict[str, Any]:
    """Means before and after, their paired difference over cases, and its 95 % interval over
    patients (None for too few of them)."""
    difference = np.asarray(after, float) - np.asarray(before, float)
    by_patient: dict[str, list[float]] = {}
    for group, value in zip(groups, difference, strict=True):
        by_patient.setdefault(group, []).append(float(value))
    comparison = paired([by_patient[group] for group in sorted(by_patient)])
    return {
        "cases": len(difference),
        "changed": int(np.count_nonzero(difference)),
        "before": float(np.mean(before)),
        "after": float(np.mean(after)),
        "difference": comparison["mean"],
        "ci95": comparison["ci95"],
    }
