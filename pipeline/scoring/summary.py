"""A set of scored cases in a few numbers: means, confidence intervals, counts of what is empty or
missing, named variants of Dice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from segfleet.pipeline.scoring.intervals import (
    FEWEST,
    RESAMPLES,
    SEED,
    bootstrap_weights,
    interval,
    of_patients,
)
from segfleet.pipeline.scoring.metrics import METRICS, overlap, ratio
from segfleet.preprocess.stores.manifest import Manifest

SUMMARY: dict[str, str] = {
    "mean_foreground_dice": "Mean over the structures of each structure's mean Dice over cases.",
    "ci95": f"95 % interval of the mean by the studentised bootstrap: {RESAMPLES} resamples of "
    f"patients with replacement (all cases of a patient together), seed {SEED}; missing where "
    f"fewer than {FEWEST} patients have a value, too few for any interval to hold what it "
    "promises.",
    "n": "Cases that have a value; the others are missing and are counted below, never set to 0 "
    "or 1.",
    "empty_truth": "Cases whose truth does not hold the structure.",
    "empty_prediction": "Cases whose prediction does not hold the structure.",
    "excluded": "Cases where truth and prediction are both empty: not in the mean Dice.",
    "hd95_missing": "Cases where only one of truth and prediction is empty: Dice 0, no surface "
    "distance.",
}

VARIANTS: dict[str, str] = {
    "pooled": "One confusion matrix over all voxels of the set: large structures weigh more "
    "(MALUNet, EGE-UNet convention).",
    "pooled_at_stored_size": "As pooled, but on the stored grid: images resized to one size weigh "
    "the same (ASC-Seg, VM-UNet: 256 x 256).",
    "pooled_per_batch": "On the stored grid, IoU pooled over each batch of `data.batch` cases in "
    "the order of their ids, Dice = 2 IoU / (1 + IoU), mean weighted by the batches' sizes (UNeXt, "
    "U-KAN, NLIE-UNet).",
    "pooled_per_batch_unweighted": "On the stored grid, Dice pooled over each batch, plain mean "
    "over the batches, a short last one included (U-NetLite).",
    "per_image": "Mean over cases with empty/empty = 1 and empty/non-empty = 0 (PraNet family "
    "convention).",
    "per_volume": "Mean over cases, empty/empty excluded, empty/non-empty = 0 (LiTS convention): "
    "the mean Dice above.",
    "per_case_with_truth": "Mean over the cases whose truth holds the structure; what is "
    "predicted in others counts nowhere (MONAI's DiceMetric with ignore_empty=True).",
    "per_patient": "Voxels of all cases of one patient pooled first, then the mean over patients, "
    "empty/empty excluded.",
    "per_slice": "Mean over all slices with empty/empty = 1 (REC-UNet convention): inflated by "
    "slices without the structure.",
}


# What a mean can be at all, where that is not 0 to 1.
BOUNDS = {
    **dict.fromkeys(("hd95", "hd95_max", "hd95_area", "assd", "masd"), (0.0, np.inf)),
    **dict.fromkeys(("lesion_fp", "truth_ml", "predicted_ml"), (0.0, np.inf)),
    "volume_error": (-1.0, np.inf),
    "volume_error_ml": (-np.inf, np.inf),
}

# What papers read off one confusion matrix over many images.
POOL_METRICS = ("dice", "iou", "accuracy", "specificity", "sensitivity", "precision", "mean_iou")
BATCH_SMOOTH = 1e-5  # of the batch-pooled IoU and Dice, as UNeXt's code has it


def definitions(unit: str = "mm") -> dict[str, str]:
    """One sentence for every name that an evaluation document uses; `unit` as by `unit_of`."""
    sentences = {
        **METRICS,
        **SUMMARY,
        **{f"variant {name}": text for name, text in VARIANTS.items()},
    }
    if unit != "mm":  # spacing 1 by convention: distances and volumes are counts
        sentences = {
            name: text.replace(" in mm", f" in {unit}") for name, text in sentences.items()
        }
        unknown = f"in thousands of {unit}: the files know no spacing, and 1 mm stands for it."
        sentences |= {
            "volume_error_ml": f"Predicted minus true size of one case {unknown}",
            "truth_ml": f"True size of one case {unknown}",
            "predicted_ml": f"Predicted size of one case {unknown}",
        }
    return sentences


def unit_of(manifest: Manifest) -> str:
    """What distances are counted in: "mm", or "pixels" ("voxels" in 3D) where no file of the data
    set knows its spacing."""
    grids = zip(manifest.cases.grids("affine"), manifest.cases.grids("raw_spacing"), strict=True)
    if any(affine is not None or set(spacing) != {1.0} for affine, spacing in grids):
        return "mm"
    return "pixels" if manifest.dataset.dims == 2 else "voxels"


def summarise(
    cases: Sequence[dict[str, Any]],
    names: Sequence[str],
    pool: int | None = None,
    intervals: bool = True,
) -> dict[str, Any]:
    """`cases`: [{"id", "group", "scores": {structure: Scores}}] -> the summary of the set;
    JSON-able, missing numbers are None. `pool`: cases of a batch, for the batch-pooled variants."""
    patients = sorted({case["group"] for case in cases})
    number = {patient: index for index, patient in enumerate(patients)}
    owner = np.array([number[case["group"]] for case in cases], dtype=np.int64)
    draws = bootstrap_weights(len(patients)) if intervals else None
    structures, dice = {}, []
    for name in names:
        scores = [case["scores"][name] for case in cases]
        structures[name] = _structure(scores, owner, draws, pool)
        dice.append(of_patients(_values(scores, "dice"), owner, len(patients)))
    means = [s["dice"]["mean"] for s in structures.values() if s["dice"]["mean"] is not None]
    variants = {v: _mean([s["variants"][v] for s in structures.values()]) for v in VARIANTS}
    return {
        "cases": len(cases),
        "patients": len(patients),
        "mean_foreground_dice": _mean(means),
        "mean_foreground_dice_ci95": interval(
            *(np.hstack(parts) for parts in zip(*dice, strict=True)), draws, (0.0, 1.0)
        )
        if dice
        else None,
        "variants": variants,
        "structures": structures,
        "bootstrap": {"over": "patients", "resamples": RESAMPLES, "seed": SEED, "fewest": FEWEST},
    }


def _structure(
    scores: list[dict], owner: np.ndarray, draws: np.ndarray | None, pool: int | None
) -> dict[str, Any]:
    empty_truth = [s["truth_voxels"] == 0 for s in scores]
    empty_prediction = [s["predicted_voxels"] == 0 for s in scores]
    result: dict[str, Any] = {}
    for metric in METRICS:
        values, ci95 = _values(scores, metric), None
        if draws is not None:
            per_patient = of_patients(values, owner, draws.shape[1])
            ci95 = interval(*per_patient, draws, BOUNDS.get(metric, (0.0, 1.0)))
        result[metric] = {**_describe(values), "ci95": ci95}
    result["counts"] = {
        "cases": len(scores),
        "empty_truth": sum(empty_truth),
        "empty_prediction": sum(empty_prediction),
        "excluded": sum(t and p for t, p in zip(empty_truth, empty_prediction, strict=True)),
        "hd95_missing": sum(t != p for t, p in zip(empty_truth, empty_prediction, strict=True)),
    }
    result["variants"] = _variants(scores, owner, pool)
    result["pooled"] = _pooled(scores, pool)
    return result


def _describe(values: np.ndarray) -> dict[str, Any]:
    defined = values[~np.isnan(values)]
    if not len(defined):
        return {"mean": None, "sd": None, "median": None, "n": 0}
    sd = float(defined.std(ddof=1)) if len(defined) > 1 else None
    return {
        "mean": float(defined.mean()),
        "sd": sd,
        "median": float(np.median(defined)),
        "n": len(defined),
    }


def _values(scores: list[dict], metric: str) -> np.ndarray:
    """One number per case, NaN where it is missing."""
    return np.array([np.nan if s[metric] is None else s[metric] for s in scores], dtype=float)


def _counts(scores: list[dict]) -> tuple[np.ndarray, np.ndarray | None]:
    """(cases, 4) TP, FP, FN, TN on the raw and on the stored grid; None where the latter is not
    known."""
    raw = [[s["tp"], s["fp"], s["fn"], s["tn"]] for s in scores]
    stored = [s.get("stored_counts") for s in scores]
    complete = all(counts is not None for counts in stored)
    return (
        np.array(raw, dtype=np.int64).reshape(-1, 4),
        np.array(stored, dtype=np.int64).reshape(-1, 4) if complete else None,
    )


def _pooled(scores: list[dict], pool: int | None) -> dict[str, dict[str, float | None]]:
    """What papers read off one confusion matrix, per way of pooling; {} per way that is not
    known."""
    raw, stored = _counts(scores)
    pooled: dict[str, dict[str, float | None]] = {}
    pooled["pooled"] = _matrix(raw)
    pooled["pooled_at_stored_size"] = {} if stored is None else _matrix(stored)
    pooled["pooled_per_batch"] = {}
    if stored is not None and pool and len(stored):
        iou, sizes = _batch_iou(stored, pool), _batch_sizes(len(stored), pool)
        pooled["pooled_per_batch"] = {
            "iou": float(np.average(iou, weights=sizes)),
            "dice": float(np.average(2 * iou / (1 + iou), weights=sizes)),
        }
    return pooled


def _matrix(counts: np.ndarray) -> dict[str, float | None]:
    tp, fp, fn, tn = (int(n) for n in counts.sum(0))
    every = overlap(tp, fp, fn, tn)
    return {metric: every[metric] for metric in POOL_METRICS}


def _batch_sizes(cases: int, pool: int) -> np.ndarray:
    return np.diff([*range(0, cases, pool), cases])


def _batch_iou(counts: np.ndarray, pool: int) -> np.ndarray:
    """(batches,) IoU of each batch's pixels; an empty union counts 1."""
    tp, fp, fn, _ = np.add.reduceat(counts, range(0, len(counts), pool)).T
    return (tp + BATCH_SMOOTH) / (tp + fp + fn + BATCH_SMOOTH)


def _variants(scores: list[dict], owner: np.ndarray, pool: int | None) -> dict[str, float | None]:
    raw, stored = _counts(scores)
    counts, batches = raw[:, :3], None
    if stored is not None and pool and len(stored):
        iou = _batch_iou(stored, pool)
        batches = 2 * iou / (1 + iou)
    of_patients = [counts[owner == patient].sum(0) for patient in np.unique(owner)]
    dice = [s["dice"] for s in scores]
    return {
        "pooled": _dice(*counts.sum(0)),
        "pooled_at_stored_size": None if stored is None else _dice(*stored[:, :3].sum(0)),
        "pooled_per_batch": None
        if batches is None
        else float(np.average(batches, weights=_batch_sizes(len(stored), pool))),
        "pooled_per_batch_unweighted": None if batches is None else float(batches.mean()),
        "per_image": _mean([1.0 if d is None else d for d in dice]),
        "per_volume": _mean(dice),
        "per_case_with_truth": _mean([s["dice"] for s in scores if s["truth_voxels"]]),
        "per_patient": _mean([_dice(*c) for c in of_patients]),
        "per_slice": ratio(
            sum(s["slice_dice_sum"] for s in scores), sum(s["slices"] for s in scores)
        ),
    }


def _dice(tp: int, fp: int, fn: int) -> float | None:
    return ratio(2 * int(tp), 2 * int(tp) + int(fp) + int(fn))


def _mean(values: Sequence[float | None]) -> float | None:
    defined = [v for v in values if v is not None]
    return float(np.mean(defined)) if defined else None
