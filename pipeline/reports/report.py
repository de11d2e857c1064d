"""A run's report: one HTML file that needs nothing else. It is made from what lies in the run
folder, without data or GPU.

Read: recipe.json, events.jsonl of every stage, evaluation.json, overlays/. What is not there is
said to be missing. A folder of scores without a run (`segfleet score`) has no recipe and no curves.
"""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from segfleet.core.errors import InputError
from segfleet.core.files import read_json, write_atomically
from segfleet.pipeline.events import BEGUN, read_events, training_by
from segfleet.pipeline.recipe import parse
from segfleet.pipeline.reports.curves import curve, strips
from segfleet.pipeline.reports.drawn import FOLDER, drawn
from segfleet.pipeline.reports.html import interval, render
from segfleet.pipeline.reports.score_tables import (
    cases_table,
    counts_table,
    folds_table,
    pooled_tables,
    structures_tables,
    variants_table,
)
from segfleet.pipeline.scoring.form import is_evaluation
from segfleet.pipeline.scoring.intervals import FEWEST
from segfleet.pipeline.scoring.scored import REPORT, optimism

CASES_CSV = "cases.csv"


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
        folds=folds_table((document or {}).get("folds")),
        version=_version(),
        now=_date(datetime.now(UTC).timestamp()),
        source=f"run {run.name}" if "stages" in recipe else run.name,
        **(_scores(document, run) if document else {"summary": None}),
    )
    write_atomically(run / REPORT, text)
    return run / REPORT


def _json(path: Path) -> Any:
    """The document in a file, or None if there is no file. Raises InputError if it is damaged."""
    document = read_json(path)
    if document is None and path.exists():
        raise _damaged(path)
    return document


def _damaged(path: Path) -> InputError:
    return InputError(f"report: {path} is damaged. Score the run again, or remove the file.")


def _stages(run: Path, recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """Every stage with its events and the step of the whole run it begins at."""
    described = recipe.get("stages") or [{}]
    folders, begin, stages = [run, *run.parents][: len(described)][::-1], 0, []
    for index, (stage, folder) in enumerate(zip(described, folders, strict=True)):
        events = list(read_events(folder))
        starts = [
            event["steps"]
            for event in events
            if event.get("event") == "stage_start" and "steps" in event
        ]
        steps = max([*starts[-1:], *(event.get("step", 0) for event in events)], default=0)
        stages.append(
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
    return stages


def _facts(
    recipe: dict[str, Any], document: dict[str, Any], stages: list[dict[str, Any]]
) -> list[tuple[str, Any]]:
    stamps = [event["time"] for stage in stages for event in stage["events"] if "time" in event]
    events = [event for stage in stages for event in stage["events"]]
    starts = [event for event in events if event.get("event") in BEGUN]
    training = document.get("training") or training_by([stage["events"] for stage in stages])
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
        ("Training cases", _training_cases(document)),
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
        ("Hardware", "; ".join(training["hardware"])),
        ("Started", _date(min(stamps)) if stamps else None),
        ("Last event", _date(max(stamps)) if stamps else None),
        ("Training time", None if training["seconds"] is None else _hours(training["seconds"])),
        (
            "Energy",
            None
            if training["joules"] is None
            else f"{training['joules'] / 3.6e6:.3g} kWh, as far as it could be read",
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


def _training_cases(document: dict[str, Any]) -> Any:
    """How many a network was trained on; of all folds the range."""
    counts = [fold.get("training_cases") for fold in document.get("folds") or ()]
    if not counts or None in counts:
        return document.get("training_cases")
    low, high = min(counts), max(counts)
    return f"{low if low == high else f'{low} to {high}'} of each fold"


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
        rest = f" and {len(names) - 8} more" if len(names) > 8 else ""
        text += f"; {key}: {', '.join(names[:8])}{rest}" if names else ""
    return text


def _spacing(document: dict[str, Any]) -> str | None:
    """The middle size of a voxel and the range over the scored cases."""
    spacings = np.array(
        [case["spacing"] for case in document.get("cases", ()) if case.get("spacing")]
    )
    if document.get("unit", "mm") != "mm" or not len(spacings):
        return None
    text = " \u00d7 ".join(f"{value:.3g}" for value in np.median(spacings, axis=0)) + " mm"
    low, high = spacings.min(0), spacings.max(0)
    if np.allclose(low, high):
        return text
    ranges = " \u00d7 ".join(f"{a:.3g}\u2013{b:.3g}" for a, b in zip(low, high, strict=True))
    return f"{text} (median; {ranges})"


def _hours(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def _warnings(document: dict[str, Any], stages: list[dict[str, Any]]) -> list[str]:
    warnings = optimism(document)
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
        warnings.append(
            f"{skipped} training step(s) had a gradient that was not finite and were skipped."
        )
    return warnings


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
    index = drawn(run)
    return {
        "summary": summary,
        "between": f"95 % interval {interval(bounds)}" if bounds else too_few,
        "structures": structures_tables(structures, document.get("unit", "mm")),
        "strips": strips(rows),
        "counts": counts_table(structures),
        "variants": [variants_table(summary), *pooled_tables(structures)],
        "overlays": _overlays(run, index),
        "colours": colours_of(index),
        "drawn": "areas are the truth, lines the prediction, one colour for each structure",
        "cases": cases_table(document),
        "definitions": document["definitions"],
    }


def colours_of(index: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Colour and name of all structures that the pictures show."""
    return sorted(
        {(colour, name) for entry in index for name, colour in entry["colours"].items()},
        key=lambda pair: pair[1],
    )


def _overlays(run: Path, index: list[dict[str, Any]]) -> list[dict[str, str]]:
    folder, pictures = run / FOLDER, []
    for entry in index:
        dice = "no score" if entry["mean_dice"] is None else f"mean Dice {entry['mean_dice']:.3f}"
        where = (
            f"slice {entry['slice']} of {entry['slices']}"
            if entry["slices"] > 1
            else "the whole image"
        )
        title = f"{entry['role'].capitalize()}: {entry['case']}"
        pictures.append(
            {
                "data": base64.b64encode((folder / entry["file"]).read_bytes()).decode(),
                "title": title,
                "caption": f"{dice}, {where}",
                "alt": f"{title}, {dice}: {where}, the truth as areas, the prediction as outlines, "
                "a colour for each structure",
            }
        )
    return pictures


def _version() -> str:
    try:
        return version("segfleet")
    except PackageNotFoundError:
        return "(not installed)"


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
