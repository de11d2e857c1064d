"""Two or more evaluations of the same cases: paired differences, intervals over patients, tests,
ranks. Without torch.

Cases are paired by the hash of their raw files, whatever store they lie in, or by id where a score
knows no hash. A family of tests, for Holm's correction, is all rows of one metric.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from segfleet.core.errors import InputError, did_you_mean
from segfleet.pipeline.scoring.intervals import (
    bootstrap_weights,
    holm,
    interval,
    of_patients,
    paired,
)
from segfleet.pipeline.scoring.metrics import METRICS
from segfleet.pipeline.scoring.summary import BOUNDS, definitions

DEFAULT = ("dice", "nsd", "hd95")
SMALLER_IS_BETTER = {
    *("hd95", "hd95_max", "hd95_area", "assd", "masd", "lesion_fp", "brier", "ece"),
}
NEITHER = {"volume_error", "volume_error_ml", "truth_ml", "predicted_ml"}  # best near 0, or a fact
ALL = "mean of structures"
MOST = 10  # cases that differ most
TESTS = {
    "difference": "Mean over cases of the second run minus the first, and its 95 % interval by the "
    "studentised bootstrap over patients; the interval is missing for too few patients.",
    "p": "Two-sided sign-flip permutation test over patients, whose cases flip together; exact up "
    "to 13 patients, else 9,999 random flips.",
    "p_wilcoxon": "Wilcoxon signed-rank test of the patients' mean differences, two-sided; "
    "patients without a difference are left out.",
    "p_holm": "p after Holm's correction over all rows of one metric (structures and pairs of "
    "runs).",
    "rank": "Mean over cases and structures of a run's rank among the runs, 1 is best, equals "
    "share their ranks; only where every run has a value.",
    "one_missing": "Cases where just one of the two runs has a value (Dice where the truth is "
    "empty and only one predicts something): in no difference.",
}


def compare(
    runs: Sequence[tuple[str, dict[str, Any]]],
    metrics: Sequence[str] = DEFAULT,
    common: bool = False,
) -> dict[str, Any]:
    """The comparison of runs, (name, evaluation.json) each, as one strict JSON document. `common`:
    of the cases that all have, instead of refusing runs of different cases. Raises InputError if
    the runs cannot be compared: one message with all reasons."""
    metrics = known_metrics(metrics)
    names = [name for name, _ in runs]
    check(runs, metrics)
    cases = same_cases(runs, common)
    structures = list(runs[0][1]["structures"])
    shown = [*structures, *([ALL] if len(structures) > 1 else [])]
    groups = [row[0]["group"] for row in cases]
    number = {group: index for index, group in enumerate(dict.fromkeys(groups))}
    owner = np.array([number[group] for group in groups])
    draws = bootstrap_weights(len(number))
    means, rows, ranks = [], [], {}
    for metric in metrics:
        values = {name: _values(cases, name, structures, metric) for name in shown}
        means += [
            _mean(metric, structure, names[run], values[structure][run], owner, draws)
            for structure in shown
            for run in range(len(names))
        ]
        family = [
            _pair(metric, structure, (names[a], names[b]), values[structure][[a, b]], owner)
            for structure in shown
            for a, b in itertools.combinations(range(len(names)), 2)
        ]
        for key in ("p", "p_wilcoxon"):
            for row, corrected in zip(family, holm([row[key] for row in family]), strict=True):
                row[f"{key}_holm"] = corrected
        rows += family
        if metric not in NEITHER:
            stacked = np.concatenate([values[name] for name in structures], axis=1)
            ranks[metric] = dict(zip(names, _ranks(metric, stacked), strict=True))
    return {
        "runs": names,
        "metrics": list(metrics),
        "structures": structures,
        "unit": runs[0][1].get("unit", "mm"),
        "cases": len(cases),
        "patients": len(number),
        "means": means,
        "differences": rows,
        "ranks": ranks,
        "per_case": _per_case(cases, structures, metrics[0], names),
        "differ_most": _differ_most(cases, names),
        "definitions": TESTS | {m: definitions(runs[0][1].get("unit", "mm"))[m] for m in metrics},
    }


def known_metrics(metrics: Sequence[str]) -> list[str]:
    """The metrics, each once. Raises InputError with the legal names."""
    for metric in metrics:
        if metric not in METRICS:
            raise InputError(
                f"compare: found the metric '{metric}', expected one of: {', '.join(METRICS)}."
                f"{did_you_mean(metric, METRICS)}"
            )
    return list(dict.fromkeys(metrics))


def check(runs: Sequence[tuple[str, dict[str, Any]]], metrics: Sequence[str]) -> None:
    """Raises InputError with every reason why the runs cannot be compared, besides their cases."""
    if len(runs) < 2:
        raise InputError("compare: found one run, expected two or more")
    (first, reference), reasons = runs[0], []
    twice = [name for name, count in Counter(name for name, _ in runs).items() if count > 1]
    if twice:
        reasons.append(f"'{twice[0]}' is named twice")
    for name, other in runs[1:]:
        if set(reference["structures"]) != set(other["structures"]):
            reasons.append(
                f"'{first}' scores the structures {', '.join(reference['structures'])}; '{name}' "
                f"scores {', '.join(other['structures'])}"
            )
        units = reference.get("unit", "mm"), other.get("unit", "mm")
        if units[0] != units[1]:
            reasons.append(f"'{first}' is measured in {units[0]}, '{name}' in {units[1]}")
        own, there = (d.get("settings", {}).get("tolerance") for d in (reference, other))
        if "nsd" in metrics and own != there:
            reasons.append(
                f"nsd: the tolerances of '{first}' are {own}, those of '{name}' {there}; "
                "`segfleet evaluate RUN evaluation.tolerance=...` scores one of them again"
            )
    for name, document in runs:
        scores = next(iter(document["cases"]), {"scores": {}})["scores"]
        lacking = [
            m for m in metrics if any(m not in case_scores for case_scores in scores.values())
        ]
        if lacking:
            reasons.append(
                f"'{name}' was scored by a version without {', '.join(lacking)}; `segfleet "
                "evaluate` scores it again"
            )
    if reasons:
        raise InputError("compare: these runs cannot be compared:\n  " + "\n  ".join(reasons))


def same_cases(
    runs: Sequence[tuple[str, dict[str, Any]]], common: bool
) -> list[tuple[dict[str, Any], ...]]:
    """Each case's entry in every run, in the first run's order. Raises InputError."""
    keys = ["id"]
    if all(_hashed(document) for _, document in runs):
        keys = ["source", "id"]
    key, by_key = keys[0], []
    for _, document in runs:
        by_key.append({case[key]: case for case in document["cases"]})
    shared = set(by_key[0]).intersection(*by_key[1:])
    if not shared or (not common and any(len(cases) > len(shared) for cases in by_key)):
        counts = ", ".join(f"'{name}' {len(d['cases'])}" for name, d in runs)
        raise InputError(
            f"compare: these runs were scored on different cases: {counts}, of which "
            f"{len(shared)} are in all (paired by "
            + ("the hash of their raw files)" if key == "source" else "their ids)")
            + ("; --common compares those" if shared else "")
        )
    rows = [
        tuple(cases[identity] for cases in by_key) for identity in by_key[0] if identity in shared
    ]
    for row in rows:
        for (name, _), entry in zip(runs[1:], row[1:], strict=True):
            for structure, scores in row[0]["scores"].items():
                own, there = (
                    scores["truth_voxels"],
                    entry["scores"][structure]["truth_voxels"],
                )
                if own != there:
                    raise InputError(
                        f"compare: the truth of '{row[0]['id']}' differs: {structure} has {own} "
                        f"voxels in '{runs[0][0]}' and {there} in '{name}'; score both against the "
                        "same labels"
                    )
    return rows


def _hashed(document: dict[str, Any]) -> bool:
    """Whether every case has a hash of its own."""
    hashes = [case.get("source") for case in document["cases"]]
    return all(hashes) and len(set(hashes)) == len(hashes)


def _values(
    cases: Sequence[tuple[dict[str, Any], ...]],
    structure: str,
    structures: Sequence[str],
    metric: str,
) -> np.ndarray:
    """(runs, cases), NaN where missing; of `ALL` the mean over the structures that have a value in
    every run."""
    values = np.array(
        [
            [
                [
                    np.nan if (value := entry["scores"][name][metric]) is None else value
                    for name in (structures if structure == ALL else [structure])
                ]
                for entry in row
            ]
            for row in cases
        ],
        dtype=float,
    )  # (cases, runs, structures)
    if structure == ALL:
        defined = ~np.isnan(values).any(axis=1, keepdims=True)
        count = defined.sum(axis=2)
        total = np.where(defined, values, 0.0).sum(axis=2)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan).T
    return values[:, :, 0].T


def _mean(
    metric: str, structure: str, run: str, values: np.ndarray, owner: np.ndarray, draws: Any
) -> dict[str, Any]:
    defined = values[~np.isnan(values)]
    patients = int(owner.max()) + 1
    bounds = interval(*of_patients(values, owner, patients), draws, BOUNDS.get(metric, (0.0, 1.0)))
    return {
        "metric": metric,
        "structure": structure,
        "run": run,
        "mean": float(defined.mean()) if len(defined) else None,
        "ci95": bounds,
        "n": len(defined),
    }


def _pair(
    metric: str, structure: str, names: tuple[str, str], values: np.ndarray, owner: np.ndarray
) -> dict[str, Any]:
    """One row: the second run minus the first."""
    missing = np.isnan(values)
    differences = values[1] - values[0]
    by_patient: dict[int, list[float]] = {}
    for patient, value in zip(owner, differences, strict=True):
        if not np.isnan(value):
            by_patient.setdefault(int(patient), []).append(float(value))
    row = {
        "metric": metric,
        "structure": structure,
        "first": names[0],
        "second": names[1],
        "cases": int((~missing.any(axis=0)).sum()),
        "patients": len(by_patient),
        "one_missing": int((missing[0] != missing[1]).sum()),
        "better": None,
    }
    if not by_patient:
        return row | {"difference": None, "ci95": None, "p": None, "p_wilcoxon": None}
    comparison = paired(list(by_patient.values()))
    if metric not in NEITHER and comparison["mean"]:
        row["better"] = names[(comparison["mean"] > 0) != (metric in SMALLER_IS_BETTER)]
    return row | {
        "difference": comparison["mean"],
        "ci95": comparison["ci95"],
        "p": comparison["p"],
        "p_wilcoxon": wilcoxon([float(np.mean(values)) for values in by_patient.values()]),
    }


def wilcoxon(differences: Sequence[float]) -> float | None:
    """Two-sided p of the signed-rank test; None for fewer than two differences, 1 if all are 0."""
    from scipy import stats

    if len(differences) < 2:
        return None
    rounded = np.round(differences, 12)  # so that equal differences are ties
    return float(stats.wilcoxon(rounded).pvalue) if rounded.any() else 1.0


def _ranks(metric: str, values: np.ndarray) -> list[float | None]:
    """Mean rank of each run over the columns in which all have a value."""
    from scipy.stats import rankdata

    defined = values[:, ~np.isnan(values).any(axis=0)]
    if not defined.shape[1]:
        return [None] * len(values)
    sign = 1.0 if metric in SMALLER_IS_BETTER else -1.0
    return rankdata(np.round(sign * defined, 12), axis=0).mean(axis=1).tolist()


def _per_case(
    cases: Sequence[tuple[dict[str, Any], ...]],
    structures: Sequence[str],
    metric: str,
    names: Sequence[str],
) -> list[dict[str, Any]]:
    return [
        {
            "id": row[0]["id"],
            "group": row[0]["group"],
            "values": {
                structure: [entry["scores"][structure][metric] for entry in row]
                for structure in structures
            },
            "mean_dice": dict(zip(names, (entry["mean_dice"] for entry in row), strict=True)),
        }
        for row in cases
    ]


def _differ_most(
    cases: Sequence[tuple[dict[str, Any], ...]], names: Sequence[str]
) -> list[dict[str, Any]]:
    """The cases whose mean Dice the runs disagree on most, most first."""
    entries = []
    for row in cases:
        dice = [entry["mean_dice"] for entry in row]
        defined = [value for value in dice if value is not None]
        if len(defined) > 1:
            entry = {
                "id": row[0]["id"],
                "group": row[0]["group"],
                "apart": max(defined) - min(defined),
            }
            entries.append(entry | {"mean_dice": dict(zip(names, dice, strict=True))})
    return sorted(entries, key=lambda entry: (-entry["apart"], entry["id"]))[:MOST]
