"""A comparison of runs as files: JSON, CSV, Markdown, LaTeX and one HTML page."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from segfleet.core.files import write_atomically
from segfleet.pipeline.reports.curves import slopes
from segfleet.pipeline.reports.html import Cell, Table, interval, render
from segfleet.pipeline.reports.score_tables import COLUMNS, in_unit

COLUMNS_OF_CSV = (
    *("metric", "structure", "first", "second", "cases", "patients", "one_missing", "difference"),
    *("ci95_low", "ci95_high", "p", "p_holm", "p_wilcoxon", "p_wilcoxon_holm", "better"),
)
HEAD = ("Metric", "Structure", "Runs", "Difference", "95 % interval", "p (Holm)", "Wilcoxon (Holm)")
SPECIAL = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$"}
)


MINUS = re.compile(r"(?<![\w.-])-(?=\d)")  # of a number, not the hyphen of a name


def write_comparison(out: Path, document: dict[str, Any]) -> list[Path]:
    """OUT/comparison.{json,csv,md,tex,html}, each whole or not at all; their paths."""
    out.mkdir(parents=True, exist_ok=True)
    texts = {
        "json": json.dumps(document, indent=1, allow_nan=False) + "\n",
        "csv": as_csv(document),
        "md": as_markdown(document),
        "tex": as_latex(document),
        "html": as_html(document),
    }
    paths = [out / f"comparison.{ending}" for ending in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        write_atomically(path, text)
    return paths


def headings(document: dict[str, Any]) -> dict[str, tuple[str, int, float]]:
    """Metric -> its heading, digits, and what it is multiplied by."""
    columns = in_unit(COLUMNS, document["unit"])
    by_metric = {metric: (text, digits, factor) for metric, text, digits, _, factor in columns}
    return {m: by_metric.get(m, (m.replace("_", " "), 3, 1.0)) for m in document["metrics"]}


def differences(document: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows of `HEAD` as texts."""
    heads, rows = headings(document), []
    for row in document["differences"]:
        heading, digits, factor = heads[row["metric"]]
        rows.append(
            (
                heading,
                row["structure"],
                f"{row['second']} - {row['first']}",
                _number(row["difference"], digits, factor, "+"),
                _bounds(row["ci95"], digits, factor),
                p_text(row["p_holm"]),
                p_text(row["p_wilcoxon_holm"]),
            )
        )
    return rows


def means(document: dict[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
    """Head and rows: metric, structure, and each run's mean with its interval."""
    heads, rows = headings(document), []
    of_row: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in document["means"]:
        of_row.setdefault((entry["metric"], entry["structure"]), []).append(entry)
    for (metric, structure), entries in of_row.items():
        heading, digits, factor = heads[metric]
        texts = []
        for entry in entries:
            between = _bounds(entry["ci95"], digits, factor)
            mean = _number(entry["mean"], digits, factor)
            texts.append(f"{mean} ({between})" if entry["ci95"] else mean)
        rows.append((heading, structure, *texts))
    for metric, ranks in document["ranks"].items():
        texts = ["-" if rank is None else f"{rank:.2f}" for rank in ranks.values()]
        rows.append((heads[metric][0], "mean rank", *texts))
    return ["Metric", "Structure", *document["runs"]], rows


def p_text(p: float | None) -> str:
    return "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _number(value: float | None, digits: int, factor: float, sign: str = "") -> str:
    return "-" if value is None else f"{value * factor:{sign}.{digits}f}"


def _bounds(bounds: Sequence[float] | None, digits: int, factor: float) -> str:
    return interval([b * factor for b in bounds], digits) if bounds else "too few patients"


def as_csv(document: dict[str, Any]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS_OF_CSV, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for row in document["differences"]:
        low, high = row["ci95"] or (None, None)
        writer.writerow({**row, "ci95_low": low, "ci95_high": high})
    return out.getvalue()


def caption(document: dict[str, Any]) -> str:
    return f"{document['cases']} cases of {document['patients']} patients"


def as_markdown(document: dict[str, Any]) -> str:
    def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        lines = [head, ["---"] * len(head), *rows]
        return "\n".join(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
        )

    return (
        f"{caption(document)}; mean (95 % interval over patients).\n\n{table(*means(document))}\n\n"
        f"Paired differences; p by sign flips over patients, after Holm.\n\n"
        f"{table(HEAD, differences(document))}\n"
    )


def as_latex(document: dict[str, Any]) -> str:
    """Two tables for the package booktabs."""

    def row(line: Sequence[str]) -> str:
        cells = [cell.translate(SPECIAL) for cell in line]
        numbers = [MINUS.sub("$-$", cell) for cell in cells[2:]]
        return " & ".join([*cells[:2], *numbers]) + r" \\"

    def table(text: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
        return "\n".join(
            [
                r"\begin{table}",
                rf"\caption{{{text.translate(SPECIAL)}}}",
                rf"\begin{{tabular}}{{ll{'r' * (len(head) - 2)}}}",
                r"\toprule",
                row(head),
                r"\midrule",
                *map(row, rows),
                r"\bottomrule",
                r"\end{tabular}",
                r"\end{table}",
            ]
        )

    first = f"Mean (95 % interval over patients) of {caption(document)}."
    second = "Paired differences; two-sided p by sign flips over patients, after Holm."
    return (
        "% \\usepackage{booktabs}\n"
        + table(first, *means(document))
        + "\n\n"
        + table(second, HEAD, differences(document))
        + "\n"
    )


def as_html(document: dict[str, Any]) -> str:
    heading, *_ = headings(document)[document["metrics"][0]]
    head, rows = means(document)
    charts = [
        Markup("<div>{}</div>").format(
            slopes(
                f"{heading}: {structure}",
                document["runs"],
                [
                    (case["id"], case["values"][structure])
                    for case in document["per_case"]
                    if None not in case["values"][structure]
                ],
            )
        )
        for structure in document["structures"]
    ]
    most = [
        (
            entry["id"],
            [
                entry["group"],
                *(Cell(value) for value in entry["mean_dice"].values()),
                Cell(entry["apart"]),
            ],
        )
        for entry in document["differ_most"]
    ]
    return render(
        "comparison.html",
        title=f"{' and '.join(document['runs'])} \u2013 segfleet comparison",
        runs=document["runs"],
        caption=caption(document),
        means=Table(
            label="Means of every run",
            caption="Mean over cases, and its 95 % interval over patients; mean ranks below, 1 is "
            "best.",
            head=head,
            rows=[(first, others) for first, *others in rows],
            left=len(head),
        ),
        differences=Table(
            label="Paired differences",
            caption="The same cases, paired; p over patients, corrected by Holm within each "
            "metric.",
            head=HEAD,
            rows=[(first, others) for first, *others in differences(document)],
            left=len(HEAD),
        ),
        charts=charts,
        most=Table(
            label="Cases that differ most",
            caption="By mean Dice over structures. Click a heading to sort.",
            head=["Case", "Patient", *document["runs"], "Apart"],
            rows=most,
            left=2,
            sortable=True,
        ),
        definitions=document["definitions"],
    )
