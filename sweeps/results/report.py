"""A sweep's report: one HTML file that needs nothing else, made from what lies on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from markupsafe import Markup

from segfleet.core.files import write_atomically
from segfleet.pipeline.events import read_events
from segfleet.pipeline.reports.html import Cell, Table, interval, render
from segfleet.pipeline.stage_data import stage_steps
from segfleet.sweeps.results.charts import bars, branches, legend, parallel, scatter
from segfleet.sweeps.results.ledger import Ledger
from segfleet.sweeps.space.plan import Plan
from segfleet.sweeps.space.space import short

NAME = "report.html"
TEMPLATES = Path(__file__).with_name("templates")


def write_sweep_report(plan: Plan, ledger: Ledger, document: dict[str, Any]) -> Path:
    """Write SWEEP/report.html, whole or not at all; its path."""
    best = document["best"]
    text = render(
        "sweep.html",
        TEMPLATES,
        title=f"{document['sweep']} \u2013 segfleet sweep",
        name=document["sweep"],
        winner=best["name"] if best else "no point has ended",
        score="\u2013" if best is None else _number(best["score"]),
        measure=_labels(document)[0],
        known=_facts(document),
        notes=_notes(document),
        ranking=_ranking(document),
        learning=_learning(document),
        asked=_asked(document.get("learning")),
        parallel=_parallel(document),
        scatters=_scatters(document),
        front=_front(document),
        importance=_importance(document),
        curves=_curves(plan, ledger),
        savings=_savings(document),
        failed=_failed(document),
    )
    write_atomically(plan.folder / NAME, text)
    return plan.folder / NAME


def _facts(document: dict[str, Any]) -> list[tuple[str, Any]]:
    rows, savings = document["ranking"], document["savings"]
    return [
        ("Ranking", document["standing"]),
        ("Runs per point", ", ".join(sorted({str(len(row["runs"])) for row in rows})) or None),
        (
            "Stages of the tree",
            ", ".join(f"{count} {state}" for state, count in document["nodes"].items()),
        ),
        (
            "Epochs",
            f"{savings['epochs_trained']:,} trained instead of {savings['epochs_naive']:,} "
            f"({savings['ratio']:g} times fewer), {savings['epochs_left_out']:,} left out by "
            "stopping early",
        ),
        (
            "Code",
            ", then ".join(
                f"{code['hash']} (commit {code['commit'] or 'unknown'})"
                for code in document["code"]
            )
            or None,
        ),
        ("Best", document["best"]["name"] if document["best"] else None),
    ]


def _notes(document: dict[str, Any]) -> list[str]:
    chosen = (
        "The best point was chosen on the cases it is scored on, so its score is optimistic; "
        "the more points, the more so."
    )
    return [*document["warnings"], *([chosen] if document["ranking"] else [])]


def _ranking(document: dict[str, Any]) -> Table | None:
    rows = [*document["ranking"], *document["unranked"]]
    if not rows:
        return None
    labels, measures = list(rows[0]["point"]), _labels(document)
    others = list(document["objectives"])[1:]
    bounded = _bounded(document)
    several = [*(["Pareto front"] if others else []), *(["Violates"] if bounded else [])]
    lines = []
    for row in rows:
        against = row["against_best"] or {}
        state = (
            ""
            if row["score"] is not None
            else ", ".join(sorted({run["state"] for run in row["runs"]}))
        )
        cells = [
            Cell(row["rank"]),
            *(short(value) for value in row["point"].values()),
            Cell(None, extra=state) if state else Cell(row["score"], 4, interval(row["ci95"], 4)),
            *(Cell(row["values"].get(name), 4) for name in others),
            *([Cell(row["front"])] if others else []),
            *([", ".join(row["violates"]) or "\u2013"] if bounded else []),
            Cell(against.get("mean"), 4, interval(against.get("ci95"), 4), signed=True),
            Cell(against.get("p"), 4),
            Cell(against.get("shared_stages")),
            Cell(row["epochs"]),
        ]
        lines.append((None, cells))
    last = ("Best minus this", "p", "Stages shared with the best", "Epochs")
    front = (
        "Front 1 is the Pareto front: no other point is nowhere worse and somewhere better. "
        if others
        else ""
    )
    return Table(
        label="Ranking of all points",
        caption=f"{front}{measures[0]} with its 95 % interval (Student's over folds, or over the "
        "seeds of one fold; over patients where there is one run). "
        "Differences are paired case by case, intervals and sign-flip p over patients, not "
        "corrected for the number of points. "
        "Points that share a stage share its luck: comparing first stages needs several seeds.",
        head=["Rank", *labels, *measures, *several, *last],
        rows=lines,
        sortable=True,
    )


def _labels(document: dict[str, Any]) -> list[str]:
    """The objectives as headings."""
    return ["Dice" if name == "dice" else name for name in document["objectives"]]


def _bounded(document: dict[str, Any]) -> bool:
    return bool(document["constraints"])


def _number(value: float) -> str:
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"


def _front(document: dict[str, Any]) -> list[Markup]:
    """The first objective over every other one, the Pareto front in its own colour."""
    names, labels, charts = list(document["objectives"]), _labels(document), []
    for name, label in zip(names[1:], labels[1:], strict=True):
        groups: dict[str, list] = {"Pareto front": [], "other points": []}
        for row in document["ranking"]:
            group = "Pareto front" if row["front"] == 1 and not row["violates"] else "other points"
            groups[group].append((row["values"][name], row["score"], row["name"]))
        groups = {group: points for group, points in groups.items() if points}
        if groups:
            charts.append(scatter(f"{labels[0]} over {label}", groups))
    return charts


def _importance(document: dict[str, Any]) -> Table | None:
    importances = document["importance"]
    if not importances:
        return None
    axes = sorted({axis for shares in importances.values() for axis in shares})
    axes.sort(key=lambda axis: -next(iter(importances.values())).get(axis, 0.0))
    return Table(
        label="Importance of the axes",
        caption="Shares of what sets the best quarter of the points apart from all of them "
        "(PED-ANOVA). Of few points they are rough.",
        head=["Axis", *_labels(document)],
        rows=[
            (None, [axis, *(Cell(shares.get(axis), 3) for shares in importances.values())])
            for axis in axes
        ],
        left=1,
    )


def _asked(learning: dict[str, Any] | None) -> str:
    """The question that the table of gains answers."""
    if not learning or not learning["without"]:
        return "With how many labelled cases"
    return "Does pre-training help" + (
        ", and with how many labelled cases" if learning["axis"] else ""
    )


def _learning(document: dict[str, Any]) -> Table | None:
    learning = document.get("learning")
    if not learning or not learning["rows"]:
        return None
    several, lines = learning["axis"] is not None, []
    for row in learning["rows"]:
        gain = row["gain"] or {}
        number = "all" if row["cases"] is None else str(row["cases"])
        cells = [
            *([number] if several else []),
            Cell(row["score"], 4, interval(row["ci95"], 4)),
            Cell(gain.get("mean"), 4, interval(gain.get("ci95"), 4), signed=True),
            Cell(gain.get("p"), 4),
        ]
        lines.append((None, [row["way"], *cells]))
    first = "" if learning["without"] else ", the first of the space"
    equal = f", at equal {learning['axis']}" if several else ""
    return Table(
        label="Score by labelled cases" if several else "Score with and without pre-training",
        caption=f"Gains are over {learning['reference']}{first}{equal}: "
        "paired case by case, intervals and sign-flip p over patients, not corrected for the "
        "number of rows." + (" Fewer cases are among more." if several else ""),
        head=["", *(["Labelled cases"] if several else []), _labels(document)[0], "Gain", "p"],
        rows=lines,
        left=1,
    )


def _parallel(document: dict[str, Any]) -> Markup:
    rows = document["ranking"]
    labels = list(rows[0]["point"]) if rows else []
    if not rows or not labels:
        return Markup("<p>Nothing to draw yet.</p>")
    lines = [(list(row["point"].values()), row["score"], row["name"]) for row in rows]
    return parallel(labels, lines, _labels(document)[0])


def _scatters(document: dict[str, Any]) -> list[Markup]:
    """Every numeric axis against the score, one colour per value of the first axis that is not
    numeric (the architecture, as a rule)."""
    rows = document["ranking"]
    labels = list(rows[0]["point"]) if rows else []
    numeric = [
        label
        for label in labels
        if all(_numeric(row["point"][label]) for row in rows)
        and len({row["point"][label] for row in rows}) > 1
    ]
    grouping = next((label for label in labels if label not in numeric), None)
    charts = []
    for label in numeric:
        groups: dict[str, list] = {}
        for row in rows:
            name = short(row["point"][grouping]) if grouping else "all"
            groups.setdefault(name, []).append((row["point"][label], row["score"], row["name"]))
        charts.append(scatter(label, dict(sorted(groups.items()))))
    return charts


def _numeric(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _curves(plan: Plan, ledger: Ledger) -> list[Markup]:
    names = sorted({node.recipe.model.name for node in plan.tree.nodes.values()})
    losses, dices = [], []
    for node in plan.tree.walk():
        steps, hue = (
            stage_steps(node.recipe, plan.stores)[-1],
            names.index(node.recipe.model.name),
        )
        first = node.begin + (plan.tree.nodes[node.trunk].stage.epochs if node.trunk else 0)
        events = list(read_events(ledger.path(node)))
        for kind, field, lines in (("step", "loss", losses), ("validation", "dice", dices)):
            curve = [
                (node.begin + event["step"] / steps, event[field])
                for event in events
                if event["event"] == kind and event[field] is not None
            ]
            lines.append(
                (
                    [point for point in curve if point[0] > first],
                    hue,
                    f"{node.recipe.model.name}, stage {node.index + 1}, {node.uid}",
                )
            )
    unit = "epochs along the path"
    charts = [branches("Training loss", unit, losses)]
    if any(points for points, _, _ in dices):
        charts.append(branches("Validation Dice", unit, dices))
    return [*charts, *([legend(names)] if len(names) > 1 else [])]


def _savings(document: dict[str, Any]) -> Markup:
    savings = document["savings"]
    return bars(
        [
            ("every trial alone", savings["epochs_naive"]),
            ("stages shared", savings["epochs_trained"]),
        ],
        "epochs",
    )


def _failed(document: dict[str, Any]) -> Table | None:
    if not document["failed"]:
        return None
    return Table(
        label="Failed stages",
        caption="Run the sweep again to retry.",
        head=("Stage", "Reason"),
        rows=[(uid, [text]) for uid, text in document["failed"].items()],
        left=2,
    )
