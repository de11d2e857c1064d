"""A sweep's report: one HTML file that needs nothing else, made from what lies on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segfleet.core.files import write_atomically
from segfleet.pipeline.events import read_events
from segfleet.pipeline.reports.html import cell, e, facts, interval, page, section, table
from segfleet.pipeline.run import stage_steps
from segfleet.sweeps.results.charts import bars, branches, legend, parallel, scatter
from segfleet.sweeps.results.ledger import Ledger
from segfleet.sweeps.space.plan import Plan
from segfleet.sweeps.space.space import short

NAME = "report.html"


def write_sweep_report(plan: Plan, ledger: Ledger, document: dict[str, Any]) -> Path:
    """Write SWEEP/report.html, whole or not at all; its path."""
    best = document["best"]
    shown = "\u2013" if best is None else f"{best['score']:.3f}"
    score = f'<div class="score"><span class="soft">best mean foreground Dice</span><b>{shown}</b></div>'
    winner = best["name"] if best else "no point has ended"
    title = f'<div><p class="soft">segfleet sweep</p><h1>{e(document["sweep"])}</h1><p>{e(winner)}</p></div>'
    body = [
        f"<header>{title}{score}</header><main>",
        _facts(document),
        section("Ranking", _ranking(document), "ranking"),
        section("All points at once", _parallel(document), "parallel"),
        section("One axis against the score", _scatters(document), "axes"),
        section("Learning curves along the tree", _curves(plan, ledger), "curves"),
        section("What sharing saved", _savings(document), "savings"),
        *([section("What failed", _failed(document), "failed")] if document["failed"] else []),
        "</main>",
    ]
    write_atomically(
        plan.folder / NAME, page(f"{document['sweep']} \u2013 segfleet sweep", "\n".join(body))
    )
    return plan.folder / NAME


def _facts(document: dict[str, Any]) -> str:
    rows, savings = document["ranking"], document["savings"]
    pairs = [
        ("Points ranked", f"{len(rows)} of {len(rows) + len(document['unranked'])}"),
        ("Runs per point", ", ".join(sorted({str(len(row["runs"])) for row in rows})) or None),
        (
            "Stages of the tree",
            ", ".join(f"{count} {state}" for state, count in document["nodes"].items()),
        ),
        (
            "Epochs",
            f"{savings['epochs_shared']:,} instead of {savings['epochs_naive']:,} "
            f"({savings['ratio']:g} times fewer)",
        ),
        ("Best", document["best"]["name"] if document["best"] else None),
    ]
    notes = [*document["warnings"]]
    if rows:
        notes.append(
            "The best point was chosen on the cases it is scored on, so its score is optimistic; "
            "the more points, the more so."
        )
    return facts(pairs) + "".join(f'<p class="warning" role="note">{e(text)}</p>' for text in notes)


def _ranking(document: dict[str, Any]) -> str:
    rows = [*document["ranking"], *document["unranked"]]
    if not rows:
        return "<p>There are no points.</p>"
    labels = list(rows[0]["point"])
    headings = [
        "Rank",
        *labels,
        "Dice",
        "Best minus this",
        "p",
        "Stages shared with the best",
        "Epochs",
    ]
    head = (
        "<tr>"
        + "".join(
            f'<th scope="col"><button type="button" data-column="{i}">{e(h)}</button></th>'
            for i, h in enumerate(headings)
        )
        + "</tr>"
    )
    lines = []
    for row in rows:
        against = row["against_best"] or {}
        values = "".join(
            f'<td class="left">{e(short(value))}</td>' for value in row["point"].values()
        )
        state = (
            ""
            if row["score"] is not None
            else ", ".join(sorted({run["state"] for run in row["runs"]}))
        )
        score = (
            f'<td class="missing" data-v="">{e(state)}</td>'
            if state
            else cell(row["score"], 4, interval(row["ci95"], 4))
        )
        cells = (
            cell(row["rank"]) + values + score
            + cell(against.get("mean"), 4, interval(against.get("ci95"), 4), signed=True) + cell(against.get("p"), 4)
            + cell(against.get("shared_stages")) + cell(row["epochs"])
        )  # fmt: skip
        lines.append(f"<tr>{cells}</tr>")
    text = (
        "Dice with its 95 % interval (Student's over folds, or over the seeds of one fold; over "
        "patients where there is one run). "
        "Differences are paired case by case, intervals and sign-flip p over patients, not "
        "corrected for the number of points. "
        "Points that share a stage share its luck: comparing first stages needs several seeds."
    )
    return table(head, lines, text, "Ranking of all points")


def _parallel(document: dict[str, Any]) -> str:
    rows = document["ranking"]
    labels = list(rows[0]["point"]) if rows else []
    if not rows or not labels:
        return "<p>Nothing to draw yet.</p>"
    return parallel(
        labels, [(list(row["point"].values()), row["score"], row["name"]) for row in rows]
    )


def _scatters(document: dict[str, Any]) -> str:
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
        charts.append(f"<div>{scatter(label, dict(sorted(groups.items())))}</div>")
    return (
        f'<div class="charts">{"".join(charts)}</div>'
        if charts
        else "<p>No axis is a number with several values.</p>"
    )


def _numeric(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _curves(plan: Plan, ledger: Ledger) -> str:
    names = sorted({node.recipe.model.name for node in plan.tree.nodes.values()})
    losses, dices = [], []
    for node in plan.tree.walk():
        steps, hue = (
            stage_steps(node.recipe, plan.stores(node.recipe))[-1],
            names.index(node.recipe.model.name),
        )
        first = node.begin + (plan.tree.nodes[node.trunk].stage.epochs if node.trunk else 0)
        events = list(read_events(ledger.path(node)))
        for kind, what, lines in (("step", "loss", losses), ("validation", "dice", dices)):
            found = [
                (node.begin + event["step"] / steps, event[what])
                for event in events
                if event["event"] == kind and event[what] is not None
            ]
            lines.append(
                (
                    [point for point in found if point[0] > first],
                    hue,
                    f"{node.recipe.model.name}, stage {node.index + 1}, {node.uid}",
                )
            )
    unit = "epochs along the path"
    charts = [branches("Training loss", unit, losses)]
    if any(points for points, _, _ in dices):
        charts.append(branches("Validation Dice", unit, dices))
    return "".join(charts) + (legend(names) if len(names) > 1 else "")


def _savings(document: dict[str, Any]) -> str:
    savings = document["savings"]
    return bars(
        [
            ("every trial alone", savings["epochs_naive"]),
            ("stages shared", savings["epochs_shared"]),
        ],
        "epochs",
    )


def _failed(document: dict[str, Any]) -> str:
    rows: Sequence[str] = [
        f'<tr><th scope=row class="left">{e(uid)}</th><td class="left">{e(text)}</td></tr>'
        for uid, text in document["failed"].items()
    ]
    return table(
        '<tr><th scope="col">Stage</th><th scope="col" class="left">Reason</th></tr>',
        rows,
        "Run the sweep again to retry.",
        "Failed stages",
    )
