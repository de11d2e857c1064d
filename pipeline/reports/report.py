"""A run's report: one HTML file that needs nothing else. It is made from what lies in the run
folder, without data or GPU.

Read: recipe.json, events.jsonl of every stage, evaluation.json, overlays/. What is not there is
said to be missing.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from segfleet.core.errors import InputError
from segfleet.core.files import write_atomically
from segfleet.pipeline.events import read_events
from segfleet.pipeline.reports.curves import curve, strips
from segfleet.pipeline.reports.html import cell, e, facts, interval, page, section, table, words
from segfleet.pipeline.scoring.scored import optimism

NAME = "report.html"

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
    ("hd95", "HD95 (mm)", 2, False),
    ("hd95_max", "HD95 max (mm)", 2, False),
    ("sensitivity", "Sensitivity", 3, False),
    ("precision", "Precision", 3, False),
    ("specificity", "Specificity", 3, False),
    ("accuracy", "Pixel accuracy", 3, False),
    ("volume_error", "Volume error", 3, True),
    ("volume_error_ml", "Volume error (ml)", 2, True),
)


def columns_of(document: dict[str, Any]) -> list[tuple[str, str, int, bool, float]]:
    """`COLUMNS` in the unit of the evaluation, and what the values are multiplied by."""
    unit = document.get("unit", "mm")
    if unit == "mm":
        return [(*column, 1.0) for column in COLUMNS]
    size = "Area" if unit == "pixels" else "Volume"
    found = []
    for metric, heading, digits, signed in COLUMNS:
        heading = heading.replace("(mm)", f"({unit})").replace("(ml)", f"({unit})")
        heading = heading.replace("Volume", size)
        counted = metric == "volume_error_ml"
        found.append((metric, heading, 0 if counted else digits, signed, 1e3 if counted else 1.0))
    return found


def times(value: Any, factor: float) -> Any:
    """A number, or the bounds of an interval, in another unit; None stays None."""
    if value is None or factor == 1.0:
        return value
    return [times(one, factor) for one in value] if isinstance(value, list) else value * factor


def write_report(run_folder: str | Path) -> Path:
    """Write RUN/report.html, whole or not at all; its path. `run_folder` is the folder of the run's
    last stage. Raises InputError."""
    run = Path(run_folder).resolve()
    recipe = _json(run / "recipe.json")
    if recipe is None:
        raise InputError(f"report: {run} holds no recipe.json, so it is no run folder")
    document, stages = _json(run / "evaluation.json"), _stages(run, recipe)
    body = "\n".join(
        [
            _header(recipe, document),
            "<main>",
            _facts(recipe, document, stages),
            section("Learning curves", _curves(stages), "curves"),
            *(
                [section("Folds", _folds(document["folds"]), "folds")]
                if (document or {}).get("folds")
                else []
            ),
            *(
                _scores(document, run)
                if document
                else [section("Scores", "<p>This run has not been scored yet.</p>", "scores")]
            ),
            "</main>",
            _footer(run),
        ]
    )
    write_atomically(
        run / NAME, page(f"{recipe.get('name', run.name)} \u2013 segfleet report", body)
    )
    return run / NAME


def _json(path: Path) -> Any:
    """The document in a file, or None if there is no file. Raises InputError if it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(
            f"report: {path} is damaged ({error}). Score the run again, or remove the file."
        ) from None


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
            }
        )
        begin += steps
    return found


def _header(recipe: dict[str, Any], document: dict[str, Any] | None) -> str:
    model = recipe.get("model", {}).get("name", "")
    line = " \u00b7 ".join(
        str(part) for part in ((document or {}).get("dataset", ""), model) if part
    )
    score = ""
    if document:
        summary = document["summary"]
        mean, bounds = summary["mean_foreground_dice"], summary["mean_foreground_dice_ci95"]
        shown = "\u2013" if mean is None else f"{mean:.3f}"
        between = (
            f"95 % interval {interval(bounds)}"
            if bounds
            else "no interval: fewer than two patients"
        )
        cases = f"{summary['cases']} cases of {summary['patients']} patients"
        score = (
            f'<div class="score"><span class="soft">mean foreground Dice</span><b>{shown}</b>'
            f'<span class="soft">{between}<br>{cases}, whole, on the raw grid</span></div>'
        )
    return f'<header><div><p class="soft">segfleet report</p><h1>{e(recipe.get("name", "run"))}</h1><p>{e(line)}</p></div>{score}</header>'


def _facts(
    recipe: dict[str, Any], document: dict[str, Any] | None, stages: list[dict[str, Any]]
) -> str:
    document = document or {}
    times = [event["time"] for stage in stages for event in stage["events"] if "time" in event]
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
    ]
    versions = document.get("versions") or {}
    found = facts(
        [
            ("Recipe", recipe.get("name")),
            ("Data set", document.get("dataset")),
            ("Store", document.get("store") or data.get("store")),
            (
                "Split and fold",
                f"{document.get('split', data.get('split', ''))}, fold "
                f"{document.get('fold', data.get('fold', ''))}",
            ),
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
            (
                "Engine",
                f"{engine.get('name', '')}, {engine.get('precision', '')}" if engine else None,
            ),
            ("Ranks", starts[-1].get("ranks") if starts else None),
            ("Started", _date(min(times)) if times else None),
            ("Last event", _date(max(times)) if times else None),
            ("Checkpoint scored", document.get("checkpoint")),
            (
                "Tiles",
                f"overlap {settings['overlap']:g}, mirrored axes "
                f"{settings['mirror_axes'] or 'none'}"
                if settings
                else None,
            ),
            ("Versions", ", ".join(f"{name} {number}" for name, number in versions.items())),
        ]
    )
    skipped = max(
        (event.get("skipped", 0) for event in events if event.get("event") == "non_finite"),
        default=0,
    )
    warnings = optimism(document)
    if skipped:
        warnings.append(
            f"{skipped} training step(s) had a gradient that was not finite and were skipped."
        )
    return found + "".join(f'<p class="warning" role="note">{e(text)}</p>' for text in warnings)


def _curves(stages: list[dict[str, Any]]) -> str:
    def of(kind: str, key: str) -> list[tuple[float, float]]:
        return [
            (stage["begin"] + event["step"], event[key])
            for stage in stages
            for event in stage["events"]
            if event.get("event") == kind and event.get(key) is not None and "step" in event
        ]

    if not any(stage["events"] for stage in stages):
        return "<p>No events were recorded.</p>"
    marks = [(stage["begin"], stage["name"]) for stage in stages]
    charts = [
        curve("Training loss", of("step", "loss"), marks),
        curve("Validation Dice", of("validation", "dice"), marks, dots=True),
        curve("Validation loss", of("validation", "loss"), marks, dots=True),
        curve("Learning rate", of("step", "lr"), marks),
    ]
    return f'<div class="charts">{"".join(charts)}</div>'


def _folds(folds: list[dict[str, Any]]) -> str:
    """Every fold's own score, of a report over all folds."""
    rows = [
        f"<tr><th scope=row>{one['fold']}</th><td>{e(one['run'])}</td>{cell(one['cases'])}"
        f"{cell(one['mean_foreground_dice'])}</tr>"
        for one in folds
    ]
    head = _head("Fold", ["Run", "Cases", "Mean foreground Dice"])
    caption = "Every case is scored by the one network that was not trained on it."
    return table(head, rows, caption, "Folds")


def _scores(document: dict[str, Any], run: Path) -> list[str]:
    structures = document["summary"]["structures"]
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
    legend = '<p class="note">One dot is one case; the line is the mean, the band its 95 % bootstrap interval over patients.</p>'
    return [
        section(
            "Scores by structure",
            _structures(structures, document) + strips(rows) + legend,
            "scores",
        ),
        section("What is empty or missing", _counts(structures), "counts"),
        section("The same predictions under other conventions", _variants(document), "variants"),
        section("Best, median and worst case", _overlays(run), "overlays"),
        section("Every case", _cases(document), "cases"),
        section("Definitions", words(document["definitions"]), "definitions"),
    ]


def _structures(structures: dict[str, Any], document: dict[str, Any]) -> str:
    columns, unit = columns_of(document), document.get("unit", "mm")
    head = _head("Structure", [name for _, name, *_ in columns])
    rows = []
    for name, scores in structures.items():
        cells = "".join(
            cell(
                times(scores[m]["mean"], factor),
                digits,
                interval(times(scores[m]["ci95"], factor), digits),
                signed,
            )
            for m, _, digits, signed, factor in columns
        )
        rows.append(f"<tr><th scope=row>{e(name)}</th>{cells}</tr>")
    spread = []
    for name, scores in structures.items():
        cells = "".join(
            cell(scores[m][key], digits)
            for m, digits in (("dice", 3), ("hd95", 2))
            for key in ("median", "sd", "n")
        )
        spread.append(f"<tr><th scope=row>{e(name)}</th>{cells}</tr>")
    second = _head(
        "Structure",
        [
            "Dice median",
            "Dice s.d.",
            "Dice cases",
            f"HD95 median ({unit})",
            f"HD95 s.d. ({unit})",
            "HD95 cases",
        ],
    )
    means = table(
        head,
        rows,
        "Mean over cases; below it the 95 % bootstrap interval over patients.",
        "Mean scores by structure",
    )
    return (
        means
        + "<br>"
        + table(
            second,
            spread,
            "Spread over cases, and how many cases have a value.",
            "Spread by structure",
        )
    )


def _head(first: str, others: Sequence[str]) -> str:
    return (
        "<tr>" + "".join(f'<th scope="col">{e(text)}</th>' for text in (first, *others)) + "</tr>"
    )


def _counts(structures: dict[str, Any]) -> str:
    columns = (
        ("cases", "Cases"),
        ("empty_truth", "Truth empty"),
        ("empty_prediction", "Prediction empty"),
        ("excluded", "Both empty: excluded from Dice"),
        ("hd95_missing", "One empty: Dice 0, HD95 missing"),
    )
    head = _head("Structure", [text for _, text in columns])
    rows = [
        "<tr><th "
        f"scope=row>{e(name)}</th>{''.join(cell(scores['counts'][key]) for key, _ in columns)}</tr>"
        for name, scores in structures.items()
    ]
    return table(
        head,
        rows,
        "Nothing is dropped without being counted here.",
        "Counts of empty and missing cases",
    )


def _variants(document: dict[str, Any]) -> str:
    summary = document["summary"]
    names = [name for name, value in summary["variants"].items() if value is not None]
    head = _head("Dice", names)
    rows = [
        "<tr><th "
        f"scope=row>{e(structure)}</th>{''.join(cell(scores['variants'][name]) for name in names)}</tr>"
        for structure, scores in summary["structures"].items()
    ]
    if len(rows) > 1:
        rows.append(
            "<tr><th scope=row>mean of "
            f"structures</th>{''.join(cell(summary['variants'][name]) for name in names)}</tr>"
        )
    text = "Papers differ in what they call Dice; compare numbers of one column only. The columns are defined at the end."
    return table(head, rows, text, "Dice under other conventions") + _pooled(document)


def _pooled(document: dict[str, Any]) -> str:
    """What papers of 2D data sets print: everything that one confusion matrix holds."""
    head = _head("Structure", ["counted over", *(name for _, name in POOLED)])
    rows = [
        f"<tr><th scope=row>{e(structure)}</th><td>{e(way)}</td>"
        f"{''.join(cell(found[key]) if key in found else '<td></td>' for key, _ in POOLED)}</tr>"
        for structure, scores in document["summary"]["structures"].items()
        for way, found in scores.get("pooled", {}).items()
        if found
    ]
    text = "One confusion matrix over many images, as most 2D papers count."
    return table(head, rows, text, "Pooled scores") if rows else ""


def _overlays(run: Path) -> str:
    folder = run / "overlays"
    index = _json(folder / "index.json") or []
    figures = []
    for entry in index:
        path = folder / entry["file"]
        if path.name != entry["file"] or not path.is_file():
            continue
        data = base64.b64encode(path.read_bytes()).decode()
        dice = "no score" if entry["mean_dice"] is None else f"mean Dice {entry['mean_dice']:.3f}"
        where = (
            f"slice {entry['slice']} of {entry['slices']}"
            if entry["slices"] > 1
            else "the whole image"
        )
        role = entry["role"].capitalize()
        alt = f"{role} case {entry['case']}, {dice}: {where} with the outlines of truth (blue) and prediction (orange)"
        caption = f"<b>{e(role)}: {e(entry['case'])}</b><br>{dice}, {where}"
        figures.append(
            f'<figure><img src="data:image/png;base64,{data}" '
            f'alt="{e(alt)}"><figcaption>{caption}</figcaption></figure>'
        )
    if not figures:
        return "<p>No pictures were saved with this evaluation.</p>"
    legend = "".join(
        f'<span class="swatch" style="background:{colour}"></span>{text}'
        for colour, text in (("#00beff", "truth"), ("#ff8c00", "prediction"), ("#ffffff", "both"))
    )
    note = "The slice with the most truth, on the grid the network sees; outlines are drawn inside the structures."
    return f'<p class="note">{note}{legend}</p><div class="cases">{"".join(figures)}</div>'


def _cases(document: dict[str, Any]) -> str:
    names = document["structures"]
    columns = columns_of(document)
    shown = [column for column in columns if column[0] in ("dice", "hd95", "volume_error")]
    headings = ["Case", "Patient", "Mean Dice", *(text for _ in names for _, text, *_ in shown)]
    sortable = [
        f'<th scope="col"{" class=left" if i < 2 else ""}><button type="button" '
        f'data-column="{i}">{e(text)}</button></th>'
        for i, text in enumerate(headings)
    ]
    groups = "".join(
        f'<th class="group" scope="colgroup" colspan="{len(shown)}">{e(name)}</th>'
        for name in names
    )
    head = f'<tr><th colspan="3"></th>{groups}</tr><tr>{"".join(sortable)}</tr>'
    rows = []
    for case in document["cases"]:
        cells = "".join(
            cell(case["scores"][name][m], digits, "", signed)
            for name in names
            for m, _, digits, signed, _ in shown
        )
        first = f'<th scope="row" class="left id">{e(case["id"])}</th><td class="left">{e(case["group"])}</td>'
        rows.append(f"<tr>{first}{cell(case['mean_dice'])}{cells}</tr>")
    text = "Click a heading to sort; missing values stay last. All scores are in evaluation.json."
    return table(head, rows, text, "Scores of every case")


def _footer(run: Path) -> str:
    try:
        number = version("segfleet")
    except PackageNotFoundError:
        number = "(not installed)"
    return f'<footer class="soft">Written by segfleet {e(number)} on {_date(datetime.now(UTC).timestamp())}; run {e(run.name)}.</footer>'


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
