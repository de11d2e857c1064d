"""A run's report: one HTML file that needs nothing else. It is made from what lies in the run
folder, without data or GPU.

Read: recipe.json, events.jsonl of every stage, evaluation.json, overlays/. What is not there is
said to be missing. A folder of scores without a run (`segfleet score`) has no recipe and no curves.
"""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from segfleet.core.errors import InputError
from segfleet.core.files import read_json, write_atomically
from segfleet.pipeline.events import read_events
from segfleet.pipeline.recipe import parse
from segfleet.pipeline.reports.curves import curve, strips
from segfleet.pipeline.reports.html import Cell, Table, interval, render
from segfleet.pipeline.scoring.form import is_evaluation
from segfleet.pipeline.scoring.intervals import FEWEST
from segfleet.pipeline.scoring.scored import optimism

NAME, CASES_CSV = "report.html", "cases.csv"

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
    found = []
    for metric, heading, digits, signed in columns:
        heading = heading.replace("(mm)", f"({unit})").replace("(ml)", f"({unit})")
        heading = heading.replace("volume", size).replace("Volume", size.capitalize())
        counted = metric.endswith("_ml")
        found.append((metric, heading, 0 if counted else digits, signed, 1e3 if counted else 1.0))
    return found


def times(value: Any, factor: float) -> Any:
    """A number, or the bounds of an interval, in another unit; None stays None."""
    if value is None or factor == 1.0:
        return value
    return [times(one, factor) for one in value] if isinstance(value, list) else value * factor


def write_report(run_folder: str | Path) -> Path:
    """Write RUN/report.html, whole or not at all; its path. `run_folder` is the folder of the run's
    last stage, or one with an evaluation.json of its own. Raises InputError."""
    run = Path(run_folder).resolve()
    recipe, document = _json(run / "recipe.json"), _json(run / "evaluation.json")
    if document is not None and not is_evaluation(document):
        raise _damaged(run / "evaluation.json")
    if recipe is not None:
        parse(recipe, str(run / "recipe.json"))
    if recipe is None and (document is None or "summary" not in document):
        raise InputError(f"report: {run} holds no recipe.json, so it is no run folder")
    recipe = recipe or {"name": document.get("name", run.name)}
    stages = _stages(run, recipe)
    name = recipe.get("name", run.name)
    model = recipe.get("model", {}).get("name", "")
    text = render(
        "report.html",
        title=f"{name} \u2013 segfleet report",
        name=name,
        subtitle=" \u00b7 ".join(
            str(part) for part in ((document or {}).get("dataset", ""), model) if part
        ),
        known=_facts(recipe, document or {}, stages),
        notes=_warnings(document or {}, stages),
        curves=_curves(stages, document or {}) if "stages" in recipe else None,
        folds=_folds((document or {}).get("folds")),
        version=_version(),
        now=_date(datetime.now(UTC).timestamp()),
        source=f"run {run.name}" if "stages" in recipe else run.name,
        **(_scores(document, run) if document else {"summary": None}),
    )
    write_atomically(run / NAME, text)
    return run / NAME


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


def _json(path: Path) -> Any:
    """The document in a file, or None if there is no file. Raises InputError if it is damaged."""
    found = read_json(path)
    if found is None and path.exists():
        raise _damaged(path)
    return found


def _damaged(path: Path) -> InputError:
    return InputError(f"report: {path} is damaged. Score the run again, or remove the file.")


def _stages(run: Path, recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """Every stage with its events and the step of the whole run it begins at."""
    described = recipe.get("stages") or [{}]
    folders, begin, found = [run, *run.parents][: len(described)][::-1], 0, []
    for index, (stage, folder) in enumerate(zip(described, folders, strict=True)):
        events = list(read_events(folder))
        starts = [
            event["steps"]
            for event in events
            if event.get("event") == "stage_start" and "steps" in event
        ]
        steps = max([*starts[-1:], *(event.get("step", 0) for event in events)], default=0)
        found.append(
            {
                "name": stage.get("name", f"stage {index + 1}"),
                "recipe": stage,
                "events": events,
                "begin": begin,
                "steps": steps,
                "transfer": _json(folder / "transfer.json"),
            }
        )
        begin += steps
    return found


def _facts(
    recipe: dict[str, Any], document: dict[str, Any], stages: list[dict[str, Any]]
) -> list[tuple[str, Any]]:
    stamps = [event["time"] for stage in stages for event in stage["events"] if "time" in event]
    events = [event for stage in stages for event in stage["events"]]
    starts = [event for event in events if event.get("event") in ("stage_start", "resumed")]
    parameters = document.get("parameters") or next(
        (event["parameters"] for event in starts if "parameters" in event), None
    )
    data, engine, settings = (
        recipe.get("data", {}),
        recipe.get("engine", {}),
        document.get("settings", {}),
    )
    plans = [
        f"{s['name']}: {s['recipe'].get('epochs', '?')} epochs, lr {s['recipe'].get('lr', 0):g}, "
        f"{s['steps']:,} steps"
        for s in stages
        if s["recipe"]
    ]
    fold = document.get("fold", data.get("fold"))
    tolerance = settings.get("tolerance") or {}
    unit = document.get("unit", "mm")
    energy = [event["joules"] for event in events if event.get("joules") is not None]
    return [
        ("Recipe", recipe.get("name") if "stages" in recipe else None),
        ("Data set", document.get("dataset")),
        ("Store", document.get("store") or data.get("store")),
        (
            "Split and fold",
            None
            if fold is None
            else f"{document.get('split', data.get('split', ''))}, fold {fold}",
        ),
        ("Training cases", document.get("training_cases")),
        ("Voxels (z, y, x)", _spacing(document)),
        ("Model", recipe.get("model", {}).get("name")),
        ("Parameters", f"{parameters:,}" if parameters else None),
        (
            "Patch (z, y, x)",
            " \u00d7 ".join(map(str, settings.get("patch") or data.get("patch") or ())) or None,
        ),
        ("Batch", data.get("batch")),
        ("Seed", recipe.get("seed")),
        ("Optimizer", recipe.get("optimizer", {}).get("name")),
        ("Stages", "; ".join(plans)),
        ("Weights from", _foreign(recipe)),
        ("Taken over", " | ".join(map(_transfer, filter(_started, stages))) or None),
        ("Engine", f"{engine.get('name', '')}, {engine.get('precision', '')}" if engine else None),
        ("Ranks", starts[-1].get("ranks") if starts else None),
        ("Hardware", "; ".join(dict.fromkeys(e["hardware"] for e in starts if "hardware" in e))),
        ("Started", _date(min(stamps)) if stamps else None),
        ("Last event", _date(max(stamps)) if stamps else None),
        ("Training time", _hours(sum(map(trained_seconds, stages))) if stamps else None),
        (
            "Energy",
            f"{sum(energy) / 3.6e6:.3g} kWh, as far as it could be read" if energy else None,
        ),
        ("Checkpoint scored", document.get("checkpoint")),
        ("Predictions", document.get("predictions")),
        (
            "Tiles",
            f"overlap {settings['overlap']:g}, mirrored axes {settings['mirror_axes'] or 'none'}"
            if "overlap" in settings
            else None,
        ),
        (
            f"NSD tolerance ({unit})",
            f"{next(iter(tolerance.values())):g}"
            if len(set(tolerance.values())) == 1
            else ", ".join(f"{name} {value:g}" for name, value in tolerance.items()),
        ),
        (
            "Versions",
            ", ".join(f"{name} {text}" for name, text in document.get("versions", {}).items()),
        ),
    ]


def _foreign(recipe: dict[str, Any]) -> str | None:
    """The file of weights, trained by others, that the first stage begins with."""
    first = next(iter(recipe.get("stages", ())), {})
    model = {**recipe.get("model", {}), **(first.get("model") or {})}
    if not model.get("weights"):
        return None
    return f"{Path(model['weights']).name}, sha256 {model.get('weights_sha256')}"


def _started(stage: dict[str, Any]) -> bool:
    """Whether a stage notes what it took over from the one before."""
    return bool(stage.get("transfer"))


def _transfer(stage: dict[str, Any]) -> str:
    """What a stage took over, in words; long lists are cut."""
    text = f"{stage['name']}: {len(stage['transfer']['taken'])} tensors as they were"
    for key in ("changed", "new", "left"):
        names = list(stage["transfer"][key])
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        text += f"; {key}: {', '.join(names[:8])}{more}" if names else ""
    return text


def _spacing(document: dict[str, Any]) -> str | None:
    """The middle size of a voxel and the range over the scored cases."""
    found = np.array([case["spacing"] for case in document.get("cases", ()) if case.get("spacing")])
    if document.get("unit", "mm") != "mm" or not len(found):
        return None
    text = " \u00d7 ".join(f"{value:.3g}" for value in np.median(found, axis=0)) + " mm"
    low, high = found.min(0), found.max(0)
    if np.allclose(low, high):
        return text
    ranges = " \u00d7 ".join(f"{a:.3g}\u2013{b:.3g}" for a, b in zip(low, high, strict=True))
    return f"{text} (median; {ranges})"


def trained_seconds(stage: dict[str, Any]) -> float:
    """How long the ranks worked on a stage, validation included and pauses left out."""
    total, start, last = 0.0, None, None
    for event in stage["events"]:
        if "time" not in event:
            continue
        if event.get("event") in ("stage_start", "resumed"):
            total += (last - start) if start is not None else 0.0
            start = event["time"]
        last = event["time"]
    return total + (last - start if start is not None else 0.0)


def _hours(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def _warnings(document: dict[str, Any], stages: list[dict[str, Any]]) -> list[str]:
    found = optimism(document)
    skipped = max(
        (
            event.get("skipped", 0)
            for stage in stages
            for event in stage["events"]
            if event.get("event") == "non_finite"
        ),
        default=0,
    )
    if skipped:
        found.append(
            f"{skipped} training step(s) had a gradient that was not finite and were skipped."
        )
    return found


def _curves(stages: list[dict[str, Any]], document: dict[str, Any]) -> list[Any]:
    def of(kind: str, key: str) -> list[tuple[float, float]]:
        return [
            (stage["begin"] + event["step"], event[key])
            for stage in stages
            for event in stage["events"]
            if event.get("event") == kind and event.get(key) is not None and "step" in event
        ]

    if not any(stage["events"] for stage in stages):
        return []
    marks = [(stage["begin"], stage["name"]) for stage in stages]
    dice = of("validation", "dice")
    final = document.get("summary", {}).get("mean_foreground_dice")
    if not dice and final is not None:  # not validated while training: the end is known
        dice = [(stages[-1]["begin"] + stages[-1]["steps"], final)]
    return [
        curve("Training loss", of("step", "loss"), marks),
        curve("Validation Dice", dice, marks, dots=True),
        curve("Validation loss", of("validation", "loss"), marks, dots=True),
        curve("Learning rate", of("step", "lr"), marks),
    ]


def _folds(folds: list[dict[str, Any]] | None) -> Table | None:
    """Every fold's own score, of a report over all folds."""
    if not folds:
        return None
    return Table(
        label="Folds",
        caption="Every case is scored by the one network that was not trained on it.",
        head=("Fold", "Run", "Cases", "Mean foreground Dice"),
        rows=[
            (
                str(one["fold"]),
                [one["run"], Cell(one["cases"]), Cell(one["mean_foreground_dice"])],
            )
            for one in folds
        ],
    )


def _scores(document: dict[str, Any], run: Path) -> dict[str, Any]:
    """What the template wants of an evaluation."""
    summary = document["summary"]
    structures, bounds = summary["structures"], summary["mean_foreground_dice_ci95"]
    rows = [
        {
            "name": name,
            "values": [
                (c["id"], c["scores"][name]["dice"])
                for c in document["cases"]
                if c["scores"][name]["dice"] is not None
            ],
            **structures[name]["dice"],
        }
        for name in structures
    ]
    too_few = f"no interval: too few patients (fewer than {FEWEST} with a score)"
    index = read_json(run / "overlays" / "index.json", list) or []
    return {
        "summary": summary,
        "between": f"95 % interval {interval(bounds)}" if bounds else too_few,
        "structures": _structures(structures, document.get("unit", "mm")),
        "strips": strips(rows),
        "counts": _counts(structures),
        "variants": [_variants(summary), *_pooled(structures)],
        "overlays": _overlays(run, index),
        "colours": colours_of(index),
        "drawn": "areas are the truth, lines the prediction, one colour for each structure",
        "cases": _cases(document),
        "definitions": document["definitions"],
    }


def _structures(structures: dict[str, Any], unit: str) -> list[Table]:
    def means(columns: Sequence[tuple], label: str) -> Table:
        known = [
            column
            for column in in_unit(columns, unit)
            if any(column[0] in scores for scores in structures.values())
        ]
        return Table(
            label=label,
            caption="Mean over cases; below it the 95 % interval over patients.",
            head=["Structure", *(heading for _, heading, *_ in known)],
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
                        for m, _, digits, signed, factor in known
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


def _counts(structures: dict[str, Any]) -> Table:
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


def _variants(summary: dict[str, Any]) -> Table:
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


def _pooled(structures: dict[str, Any]) -> list[Table]:
    """What papers of 2D data sets print: everything that one confusion matrix holds."""
    rows = [
        (structure, [way, *(Cell(found[key]) if key in found else "" for key, _ in POOLED)])
        for structure, scores in structures.items()
        for way, found in scores.get("pooled", {}).items()
        if found
    ]
    table = Table(
        label="Pooled scores",
        caption="One confusion matrix over many images, as most 2D papers count.",
        head=["Structure", "counted over", *(name for _, name in POOLED)],
        rows=rows,
        left=2,
    )
    return [table] if rows else []


def colours_of(index: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Colour and name of all structures that the pictures show."""
    return sorted(
        {(colour, name) for entry in index for name, colour in entry.get("colours", {}).items()},
        key=lambda pair: pair[1],
    )


def _overlays(run: Path, index: list[dict[str, Any]]) -> list[dict[str, str]]:
    folder, found = run / "overlays", []
    for entry in index:
        path = folder / entry["file"]
        if path.name != entry["file"] or not path.is_file():
            continue
        dice = "no score" if entry["mean_dice"] is None else f"mean Dice {entry['mean_dice']:.3f}"
        where = (
            f"slice {entry['slice']} of {entry['slices']}"
            if entry["slices"] > 1
            else "the whole image"
        )
        title = f"{entry['role'].capitalize()}: {entry['case']}"
        found.append(
            {
                "data": base64.b64encode(path.read_bytes()).decode(),
                "title": title,
                "caption": f"{dice}, {where}",
                "alt": f"{title}, {dice}: {where}, the truth as areas, the prediction as outlines, "
                "a colour for each structure",
            }
        )
    return found


def _cases(document: dict[str, Any]) -> Table:
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


def _version() -> str:
    try:
        return version("segfleet")
    except PackageNotFoundError:
        return "(not installed)"


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
