"""What came out of a sweep: a ranking with intervals, paired differences, the best recipe, CSV and
JSON.

score: mean over a point's runs (seeds, folds) of the objective, the mean foreground Dice if the
space names no other; of several objectives the first. With several, a point's rank follows the
number of its Pareto front; points that violate a constraint come last. The score's 95 % interval is
Student's over the folds, or over the seeds of the one fold; else the bootstrap interval over the
patients of the one run. Seeds of a fold share its cases: their mean is one value. Differences to
the best point are paired: case by case, then resampled by patient. Points that share a stage also
share its luck, which makes that difference sharper and says nothing of other seeds.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from segfleet.core.files import read_json, write_atomically
from segfleet.core.settings import dumps
from segfleet.pipeline.events import read_events
from segfleet.pipeline.run import DONE
from segfleet.pipeline.scoring.intervals import paired
from segfleet.pipeline.scoring.scored import evaluation_of
from segfleet.pipeline.stage_data import stage_steps
from segfleet.sweeps.results.importance import importance
from segfleet.sweeps.results.learning import learning_curves
from segfleet.sweeps.results.ledger import Ledger
from segfleet.sweeps.results.measured import means_of, values_of, violations
from segfleet.sweeps.space.objectives import COSTS, Objective, fronts
from segfleet.sweeps.space.plan import Plan, codes_of
from segfleet.sweeps.space.space import Point, Search, Trial, describe
from segfleet.sweeps.space.tree import StageNode

OUTCOME = "outcome.json"


def outcome(plan: Plan, ledger: Ledger) -> dict[str, Any]:
    """The whole result as one JSON document."""
    points: dict[str, list[Trial]] = {}
    for trial in plan.ranked:
        points.setdefault(json.dumps(trial.point, sort_keys=True), []).append(trial)
    search = plan.search
    first = search.objectives[0]
    rows = [_row(search, ledger, trials) for trials in points.values()]
    ranked = ranking(search, [row for row in rows if row["reason"] is None])
    for rank, row in enumerate(ranked, 1):
        row["rank"] = rank
        row["against_best"] = _difference(row, ranked[0], first) if rank > 1 else None
    unranked = [row for row in rows if row["reason"] is not None]
    curves = learning_curves(rows, lambda row, other: _difference(row, other, first))
    best = ranked[0] if ranked and not ranked[0]["violates"] else None
    for row in rows:
        row.pop("_documents")
    unranked += [_misfit(point, why) for point, why in plan.misfits]
    states = list(ledger.states().values())
    return {
        "sweep": search.space.name,
        "objectives": {objective.name: explained(objective) for objective in search.objectives},
        "constraints": list(search.space.constraints),
        "standing": standing(ranked, unranked, len(search.objectives)),
        "ranking": ranked,
        "unranked": unranked,
        "best": best,
        "importance": importance(search, ranked),
        "learning": curves,
        "nodes": {state: states.count(state) for state in sorted(set(states))},
        "failed": {
            uid: ledger.note(ledger.tree.nodes[uid], "failed")["message"]
            for uid, s in ledger.states().items()
            if s == "failed"
        },
        "savings": savings(plan, ledger),
        "code": codes_of(plan),
        "warnings": plan.warnings,
    }


def ranking(search: Search, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that have all their values, best first; `front` is the number of their Pareto front, by
    all objectives and constraints."""
    numbers = fronts(
        [
            (
                sum(row["violates"].values()),
                [objective.sign * row["values"][objective.name] for objective in search.objectives],
            )
            for row in rows
        ]
    )
    for row, number in zip(rows, numbers, strict=True):
        row["front"] = number
    sign = search.objectives[0].sign
    return sorted(rows, key=lambda row: (row["front"], -sign * row["score"]))


def explained(objective: Objective) -> str:
    """What a measure is, in one sentence."""
    if objective.cost:
        return COSTS[objective.metric]
    if objective.name == "dice":
        return "Mean foreground Dice of whole validation cases."
    from segfleet.pipeline.scoring.summary import definitions

    of = f"of {objective.structure}" if objective.structure else "over the structures' means"
    return f"Mean {of} over whole validation cases. {definitions()[objective.metric]}"


def standing(
    ranked: Sequence[dict[str, Any]], unranked: Sequence[dict[str, Any]], objectives: int = 1
) -> str:
    """One sentence: how much of the space the ranking speaks for."""
    feasible = [row for row in ranked if not row["violates"]]
    suffix = "" if len(feasible) == len(ranked) else f"; {len(feasible)} keep the constraints"
    if objectives > 1:
        suffix += f"; {sum(row['front'] == 1 for row in feasible)} on the Pareto front"
    if not unranked:
        return f"all {len(ranked)} points are ranked{suffix}"
    reasons = [row["reason"].partition(":")[0] for row in unranked]
    counts = ", ".join(f"{reasons.count(reason)} {reason}" for reason in dict.fromkeys(reasons))
    return f"{len(ranked)} of {len(ranked) + len(unranked)} points are ranked ({counts}){suffix}"


def savings(plan: Plan, ledger: Ledger) -> dict[str, Any]:
    """Epochs: `naive` if every run had trained its own path as far as it came, `trained` as they
    were, `left_out` by stopping early; of a sweep that has ended."""
    trained = {node.uid: _trained(plan, ledger, node) for node in plan.tree.nodes.values()}

    def way(uid: str) -> int:
        """Epochs of the path to a node, as far as it came."""
        node, epochs = plan.tree.nodes[uid], 0
        while node:
            epochs += trained[node.uid]
            node = plan.tree.before(node)
        return epochs

    leaves = [plan.tree.leaves[trial.number] for trial in plan.ranked]
    naive, shared = sum(map(way, leaves)), sum(trained.values())
    states = ledger.states()
    left = sum(
        plan.tree.epochs(plan.tree.nodes[uid]) - trained[uid]
        for uid, state in states.items()
        if state in ("done", "pruned", "paused", "lost")
    )
    return {
        "epochs_naive": naive,
        "epochs_trained": shared,
        "epochs_left_out": left,
        "ratio": round(naive / max(1, shared), 3),
    }


def _trained(plan: Plan, ledger: Ledger, node: StageNode) -> int:
    """Whole epochs that this node itself trained; of one that did not end, by its last event."""
    whole, path = plan.tree.epochs(node), ledger.path(node)
    if ledger.trained(node):
        if not node.stage.patience:
            return whole
        last = (read_json(path / DONE) or {}).get("steps", 0)
    else:
        last = max((event.get("step", 0) for event in read_events(path)), default=0)
    steps = stage_steps(node.recipe, plan.stores(node.recipe))[-1]
    return max(0, min(node.stage.epochs, last // steps) - (node.stage.epochs - whole))


def _reason(ledger: Ledger, leaves: Sequence[StageNode]) -> str | None:
    """Why a point has no rank: the first of its runs that did not end."""
    for leaf in leaves:
        if (state := ledger.state(leaf)) == "done":
            continue
        node: StageNode | None = leaf
        while node and ledger.state(node) in ("lost", "waiting"):
            node = ledger.tree.before(node)
        state = ledger.state(node) if node else state
        note = ledger.note(node, state) if node else {}
        if state == "failed":
            return f"failed: {note.get('message', '')}"
        if state in ("pruned", "paused"):
            word = "stopped early" if state == "pruned" else "paused"
            dice = f"{note['dice']:.4f}" if note.get("dice") is not None else "not known"
            return f"{word}: after {note.get('epochs')} of {leaf.end} epochs, Dice {dice}"
        return f"not finished: its stage {node.index + 1 if node else 1} is {state}"
    return None


def _misfit(point: Point, why: str) -> dict[str, Any]:
    """The row of a point that makes no recipe."""
    nothing = dict.fromkeys(
        ("rank", "front", "score", "ci95", "over", "epochs", "against_best", "parameters")
    )
    row = {"point": point, "name": describe(point), "runs": [], "stages": []}
    row |= {"values": {}, "violates": {}}
    return {**nothing, **row, "reason": f"does not fit: {why}"}


def _row(search: Search, ledger: Ledger, trials: Sequence[Trial]) -> dict[str, Any]:
    """One point. `score` is None until all its runs are scored. Trials with the same last stage are
    one run."""
    trials = list({ledger.tree.leaves[trial.number]: trial for trial in trials}.values())
    leaves = [ledger.tree.nodes[ledger.tree.leaves[trial.number]] for trial in trials]
    states = [ledger.state(leaf) for leaf in leaves]
    documents = [
        evaluation_of(ledger.path(leaf)) if state == "done" else None
        for leaf, state in zip(leaves, states, strict=True)
    ]
    runs = [
        {
            "run": str(ledger.path(leaf)), "seed": trial.recipe.seed,
            "fold": trial.recipe.data.fold, "state": state,
            "dice": document["summary"]["mean_foreground_dice"] if document else None,
            "values": values_of(search, ledger, leaf, document) if document else {},
        }
        for trial, leaf, state, document in zip(trials, leaves, states, documents, strict=True)
    ]  # fmt: skip
    first, reason = search.objectives[0], _reason(ledger, leaves)
    values = {} if reason else means_of([run["values"] for run in runs])
    undefined = [
        objective.name
        for objective in search.objectives
        if not reason and values[objective.name] is None
    ]
    if undefined:
        reason = f"not defined: {', '.join(undefined)} of a run (nothing was found, perhaps)"
    score, interval, over = values.get(first.name), None, None
    if score is not None and len(runs) > 1:
        interval, over = replicates([{**run, "dice": run["values"][first.name]} for run in runs])
    elif score is not None:
        interval = first.interval(documents[0])
        over = f"{documents[0]['summary']['patients']} patients"
    row = {
        "rank": None,
        "front": None,
        "point": trials[0].point,
        "name": describe(trials[0].point),
        "score": score,
        "values": values,
        "violates": {} if reason else violations(search, values),
        "ci95": interval,
        "over": over,
    }
    row |= {
        "runs": runs,
        "epochs": leaves[0].end,
        "reason": reason,
        "stages": [leaf.path.as_posix().split("/") for leaf in leaves],
        "against_best": None,
    }
    return {
        **row,
        "parameters": documents[0]["parameters"] if documents[0] else None,
        "_documents": documents,
    }


def replicates(runs: Sequence[dict[str, Any]]) -> tuple[list[float], str]:
    """The interval over several runs' `dice`, and what it is over: independent values only."""
    folds: dict[int, list[float]] = {}
    for run in runs:
        folds.setdefault(run["fold"], []).append(run["dice"])
    if len(folds) == 1:
        return student([run["dice"] for run in runs]), f"{len(runs)} seeds"
    seeds = len({run["seed"] for run in runs})
    over = f"{len(folds)} folds" + (f" of {seeds} seeds" if seeds > 1 else "")
    return student([float(np.mean(values)) for values in folds.values()]), over


def student(values: Sequence[float]) -> list[float]:
    """95 % interval of the mean of a few runs."""
    from scipy.stats import t

    reach = t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return [float(np.mean(values) - reach), float(np.mean(values) + reach)]


def _difference(
    row: dict[str, Any], best: dict[str, Any], objective: Objective
) -> dict[str, Any] | None:
    """Best minus this point on the cases both were scored on, paired by seed, fold and the hash of
    the case's files, whatever store it lies in. None if there are none."""
    pairs: dict[tuple[str, str], list[float]] = {}
    for document, run in zip(row["_documents"], row["runs"], strict=True):
        by_name = {name: objective.of_case(case) for name, case in by_source(document).items()}
        for best_document, other in zip(best["_documents"], best["runs"], strict=True):
            if (run["seed"], run["fold"]) != (other["seed"], other["fold"]):
                continue
            for name, case in by_source(best_document).items():
                value = objective.of_case(case)
                if value is not None and by_name.get(name) is not None:
                    pairs.setdefault((case["group"], name), []).append(value - by_name[name])
    if not pairs:
        return None
    groups = sorted({group for group, _ in pairs})
    of_cases = {key: float(np.mean(values)) for key, values in pairs.items()}
    shared = sum(
        a == b
        for own_stages, best_stages in zip(row["stages"], best["stages"], strict=False)
        for a, b in zip(own_stages, best_stages, strict=False)
    )
    comparison = paired(
        [[value for (owner, _), value in of_cases.items() if owner == group] for group in groups]
    )
    return {
        **comparison,
        "cases": len(of_cases),
        "patients": len(groups),
        "shared_stages": shared // max(1, len(row["runs"])),
    }


def by_source(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The cases of an evaluation by the hash of their files; by store and id where there is none,
    or several cases have the same."""
    cases = document["cases"]
    hashes = Counter(case.get("source") for case in cases)
    return {
        case["source"]
        if case.get("source") and hashes[case["source"]] == 1
        else f"{document['store']} {case['id']}": case
        for case in cases
    }


def write_outcome(plan: Plan, ledger: Ledger) -> dict[str, Any]:
    """outcome.json, ranking.csv, best.yaml and report.html in the sweep's folder; of a population
    what its members were trained with, too: population.json. Returns the outcome's document."""
    from segfleet.sweeps.results.report import write_sweep_report

    document = outcome(plan, ledger)
    write_atomically(plan.folder / OUTCOME, json.dumps(document, indent=1))
    write_atomically(plan.folder / "ranking.csv", as_csv(document))
    if document["best"]:
        write_atomically(plan.folder / "best.yaml", best_recipe(plan, document))
    else:  # one of other objectives or constraints is the best no longer
        (plan.folder / "best.yaml").unlink(missing_ok=True)
    if plan.search.space.scheduler == "pbt":
        write_atomically(plan.folder / "population.json", json.dumps(members(plan), indent=1))
    write_sweep_report(plan, ledger, document)
    return document


def members(plan: Plan) -> list[list[dict[str, Any]]]:
    """The stages of every member of a population, those of the last generation: its schedule."""
    last = plan.trials[-plan.search.space.pbt.population :]
    return [[stage.model_dump(mode="json") for stage in trial.recipe.stages] for trial in last]


def as_csv(document: dict[str, Any]) -> str:
    """One line per run, best point first."""
    rows = [*document["ranking"], *document["unranked"]]
    labels = list(rows[0]["point"]) if rows else []
    measured = list(document["ranking"][0]["values"]) if document["ranking"] else []
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [
            "rank",
            *labels,
            "seed",
            "fold",
            "state",
            "dice",
            "score",
            "ci95_low",
            "ci95_high",
            "epochs",
            "front",
            *measured,
            "run",
        ]
    )
    for row in rows:
        values = [
            value if isinstance(value, int | float | str) else json.dumps(value)
            for value in row["point"].values()
        ]
        for run in row["runs"]:
            numbers = [run["dice"], row["score"], *(row["ci95"] or (None, None))]
            writer.writerow(
                [
                    row["rank"],
                    *values,
                    run["seed"],
                    run["fold"],
                    run["state"],
                    *numbers,
                    row["epochs"],
                    row["front"],
                    *(run["values"].get(name) for name in measured),
                    run["run"],
                ]
            )
    return out.getvalue()


def best_recipe(plan: Plan, document: dict[str, Any]) -> str:
    """The recipe of the best point's first run, as `segfleet train` takes it."""
    best = document["best"]
    trial = next(trial for trial in plan.ranked if trial.point == best["point"])
    recipe = trial.recipe.model_copy(update={"name": f"{plan.search.space.name}-best"})
    between = (
        f", 95 % interval {best['ci95'][0]:.4f} to {best['ci95'][1]:.4f} over {best['over']}"
        if best["ci95"]
        else ""
    )
    head = (
        f"# Best of {len(document['ranking'])} points of the sweep {plan.search.space.name}: "
        f"{plan.search.objectives[0].label} {best['score']:.4f}{between}\n"
    )
    head += (
        f"# at {best['name']}\n# It was chosen on its own validation cases, so the score is "
        "optimistic.\n"
    )
    return head + dumps(recipe.model_dump(mode="json"))
