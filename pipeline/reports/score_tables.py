"""The tables of scores in reports: which metrics, in what order, under what headings."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from segfleet.pipeline.reports.html import Cell, Table, interval

POOLED = (  # what is read off one confusion matrix
    ("dice", "Dice"),
    ("iou", "IoU"),
    ("mean_iou", "Mean IoU with background"),
    ("accuracy", "Pixel accuracy"),
    ("sensitivity", "Sensitivity"),
    ("specificity", "Specificity"),
    ("precision", "Precision"),
)
COLUMNS = (  # metric, heading, digits, signed
    ("dice", "Dice", 3, False),
    ("iou", "IoU", 3, False),
    ("nsd", "NSD", 3, False),
    ("hd95", "HD95 (mm)", 2, False),
    ("hd95_max", "HD95 max (mm)", 2, False),
    ("hd95_area", "HD95 by area (mm)", 2, False),
    ("assd", "ASSD (mm)", 2, False),
    ("masd", "MASD (mm)", 2, False),
    ("sensitivity", "Sensitivity", 3, False),
    ("precision", "Precision", 3, False),
    ("specificity", "Specificity", 3, False),
    ("accuracy", "Pixel accuracy", 3, False),
    ("lesion_f1", "Lesion F1", 3, False),
    ("lesion_recall", "Lesion recall", 3, False),
    ("lesion_fp", "False lesions per case", 2, False),
    ("brier", "Brier score", 4, False),
    ("ece", "ECE", 4, False),
    ("truth_ml", "True volume (ml)", 2, False),
    ("predicted_ml", "Predicted volume (ml)", 2, False),
    ("volume_error", "Volume error", 3, True),
    ("volume_error_ml", "Volume error (ml)", 2, True),
)
AGREEMENT, CONTENT = COLUMNS[:8], COLUMNS[8:]  # two tables: overlap and surfaces, and all others
OF_CASES = ("dice", "nsd", "hd95", "truth_ml", "predicted_ml", "volume_error")


def in_unit(columns: Sequence[tuple], unit: str) -> list[tuple[str, str, int, bool, float]]:
    """Columns in the unit of an evaluation, and what their values are multiplied by."""
    if unit == "mm":
        return [(*column, 1.0) for column in columns]
    size = "area" if unit == "pixels" else "volume"
    converted = []
    for metric, heading, digits, signed in columns:
        heading = heading.replace("(mm)", f"({unit})").replace("(ml)", f"({unit})")
        heading = heading.replace("volume", size).replace("Volume", size.capitalize())
        counted = metric.endswith("_ml")
        converted.append(
            (metric, heading, 0 if counted else digits, signed, 1e3 if counted else 1.0)
        )
    return converted


def times(value: Any, factor: float) -> Any:
    """A number, or the bounds of an interval, in another unit; None stays None."""
    if value is None or factor == 1.0:
        return value
    return [times(bound, factor) for bound in value] if isinstance(value, list) else value * factor


def cases_csv(document: dict[str, Any]) -> str:
    """One line per case and structure of an evaluation, with all of its numbers; empty: missing."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    first = next(iter(document["cases"]), {"scores": {}})
    keys = [
        key
        for key, value in next(iter(first["scores"].values()), {}).items()
        if not isinstance(value, list)
    ]
    writer.writerow(["case", "patient", "fold", "structure", *keys])
    for case in document["cases"]:
        for name, scores in case["scores"].items():
            fold = case.get("fold", document.get("fold"))
            values = [scores.get(key) for key in keys]
            writer.writerow([case["id"], case["group"], fold, name, *values])
    return out.getvalue()


def folds_table(folds: list[dict[str, Any]] | None) -> Table | None:
    """Every fold's own score, of a report over all folds."""
    if not folds:
        return None
    return Table(
        label="Folds",
        caption="Every case is scored by the one network that was not trained on it.",
        head=("Fold", "Run", "Training cases", "Cases", "Mean foreground Dice"),
        rows=[
            (
                str(fold["fold"]),
                [
                    fold["run"],
                    Cell(fold.get("training_cases")),
                    Cell(fold["cases"]),
                    Cell(fold["mean_foreground_dice"]),
                ],
            )
            for fold in folds
        ],
    )


def structures_tables(structures: dict[str, Any], unit: str) -> list[Table]:
    def means(columns: Sequence[tuple], label: str) -> Table:
        shown = [
            column
            for column in in_unit(columns, unit)
            if any(column[0] in scores for scores in structures.values())
        ]
        return Table(
            label=label,
            caption="Mean over cases; below it the 95 % interval over patients.",
            head=["Structure", *(heading for _, heading, *_ in shown)],
            rows=[
                (
                    name,
                    [
                        Cell(
                            times(scores[m]["mean"], factor),
                            digits,
                            interval(times(scores[m]["ci95"], factor), digits),
                            signed,
                        )
                        for m, _, digits, signed, factor in shown
                    ],
                )
                for name, scores in structures.items()
            ],
        )

    spread = Table(
        label="Spread by structure",
        caption="Spread over cases, and how many cases have a value.",
        head=[
            "Structure",
            *("Dice median", "Dice s.d.", "Dice cases"),
            *(f"HD95 median ({unit})", f"HD95 s.d. ({unit})", "HD95 cases"),
        ],
        rows=[
            (
                name,
                [
                    Cell(scores[m][key], digits)
                    for m, digits in (("dice", 3), ("hd95", 2))
                    for key in ("median", "sd", "n")
                ],
            )
            for name, scores in structures.items()
        ],
    )
    return [
        means(AGREEMENT, "Mean scores by structure"),
        means(CONTENT, "Detection, calibration and volume by structure"),
        spread,
    ]


def counts_table(structures: dict[str, Any]) -> Table:
    columns = (
        ("cases", "Cases"),
        ("empty_truth", "Truth empty"),
        ("empty_prediction", "Prediction empty"),
        ("excluded", "Both empty: excluded from Dice"),
        ("hd95_missing", "One empty: Dice 0, HD95 missing"),
    )
    return Table(
        label="Counts of empty and missing cases",
        caption="Nothing is dropped without being counted here.",
        head=["Structure", *(text for _, text in columns)],
        rows=[
            (name, [Cell(scores["counts"][key]) for key, _ in columns])
            for name, scores in structures.items()
        ],
    )


def variants_table(summary: dict[str, Any]) -> Table:
    names = [name for name, value in summary["variants"].items() if value is not None]
    rows = [
        (structure, [Cell(scores["variants"].get(name)) for name in names])
        for structure, scores in summary["structures"].items()
    ]
    if len(rows) > 1:
        rows.append(("mean of structures", [Cell(summary["variants"][name]) for name in names]))
    return Table(
        label="Dice under other conventions",
        caption="Papers differ in what they call Dice; compare numbers of one column only. The "
        "columns are defined at the end.",
        head=["Dice", *names],
        rows=rows,
    )


def pooled_tables(structures: dict[str, Any]) -> list[Table]:
    """What papers of 2D data sets print: everything that one confusion matrix holds."""
    rows = [
        (structure, [way, *(Cell(values[key]) if key in values else "" for key, _ in POOLED)])
        for structure, scores in structures.items()
        for way, values in scores.get("pooled", {}).items()
        if values
    ]
    table = Table(
        label="Pooled scores",
        caption="One confusion matrix over many images, as most 2D papers count.",
        head=["Structure", "counted over", *(name for _, name in POOLED)],
        rows=rows,
        left=2,
    )
    return [table] if rows else []


def cases_table(document: dict[str, Any]) -> Table:
    names = document["structures"]
    columns = [column for column in COLUMNS if column[0] in OF_CASES]
    shown = in_unit(columns, document.get("unit", "mm"))
    rows = [
        (
            case["id"],
            [
                case["group"],
                Cell(case["mean_dice"]),
                *(
                    Cell(times(case["scores"][name].get(m), factor), digits, "", signed)
                    for name in names
                    for m, _, digits, signed, factor in shown
                ),
            ],
        )
        for case in document["cases"]
    ]
    return Table(
        label="Scores of every case",
        caption="Click a heading to sort; missing values stay last. All scores are in "
        "evaluation.json, and `segfleet report --csv` writes them as a table.",
        head=["Case", "Patient", "Mean Dice", *(text for _ in names for _, text, *_ in shown)],
        rows=rows,
        groups=[("", 3), *((name, len(shown)) for name in names)],
        left=2,
        sortable=True,
    )
