"""What points are ranked by: measures by name, several of them, constraints; what a search learns
of them, and what other sweeps know."""

from __future__ import annotations

import json

import numpy as np
import optuna
import pytest

from segfleet.core.errors import InputError
from segfleet.pipeline.scoring.metrics import score_structure
from segfleet.pipeline.scoring.scored import score_facts
from segfleet.pipeline.scoring.summary import summarise
from segfleet.sweeps.results.importance import importance
from segfleet.sweeps.results.ledger import Ledger
from segfleet.sweeps.results.outcome import as_csv, write_outcome
from segfleet.sweeps.search.optuna import Suggestions
from segfleet.sweeps.space.load import parse_search
from segfleet.sweeps.space.objectives import Constraint, Objective, fronts
from segfleet.sweeps.space.plan import make_plan, prepare_folder
from segfleet.sweeps.space.tree import StageTree

RATES = (1e-2, 1e-3, 1e-4)
SHIFTS = {1e-2: (0, 6), 1e-3: (2, 2), 1e-4: (5, 4)}  # pixels that blob1 and blob2 are predicted off
HOURS = {1e-2: 3.0, 1e-3: 2.0, 1e-4: 1.0}


def square(off: int) -> np.ndarray:
    mask = np.zeros((1, 40, 40), bool)
    mask[0, 10:20, 10 + off : 20 + off] = True
    return mask


def write_run(plan, node, shifts, hours=0.0, ranks=1):
    """What a stage leaves that was trained for `hours` and whose structures are predicted off by so
    many pixels."""
    folder, done = plan.runs / node.path, {"checkpoint": "step-00000001"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "done.json").write_text(json.dumps(done))
    events = [
        {"event": "stage_start", "time": 0.0, "step": 0, "steps": 1, "ranks": ranks},
        {"event": "finished", "time": 3600.0 * hours, "step": 1},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    cases = []
    for number in range(6):
        scores = {
            f"blob{k}": score_structure(square(shift), square(0), spacing=(1.0, 1.0, 1.0))
            for k, shift in enumerate(shifts, 1)
        }
        dice = [one["dice"] for one in scores.values()]
        cases.append({"id": f"c{number}", "group": f"p{number}", "source": f"hash{number}",
                      "mean_dice": sum(dice) / 2, "scores": scores})  # fmt: skip
    document = {"cases": cases, "summary": summarise(cases, ["blob1", "blob2"]), "store": "s"}
    document |= {
        "parameters": 7,
        "scored": score_facts(node.recipe, plan.stores(node.recipe), done),
    }
    (folder / "evaluation.json").write_text(json.dumps(document))


@pytest.fixture
def ended(search, tmp_path):
    """`ended(**changes of the space)`: the outcome of a grid of three rates, and its plan."""

    def made(**changes):
        stages = [{"epochs": 2, "steps": 1, "lr": list(RATES)}]
        plan = make_plan(search(axes={}, stages=stages, **changes), tmp_path / "runs")
        plan.folder.mkdir(parents=True, exist_ok=True)
        for node in plan.tree.nodes.values():
            write_run(plan, node, SHIFTS[node.stage.lr], HOURS[node.stage.lr])
        return write_outcome(plan, Ledger(plan.tree, plan.runs, plan.folder)), plan

    return made


def rates(document):
    return [row["point"]["stages.0.lr"] for row in document["ranking"]]


# squares of 10 x 10 that are n pixels off: Dice 1 - n / 10; the distance of the farthest edge is n
@pytest.mark.parametrize(
    ("objective", "order", "best"),
    [
        ("dice", [1e-3, 1e-2, 1e-4], 0.8),
        ("dice:blob1", [1e-2, 1e-3, 1e-4], 1.0),
        ("dice:blob2", [1e-3, 1e-4, 1e-2], 0.8),
        ("hd95:blob2", [1e-3, 1e-4, 1e-2], 2.0),
        ("hd95", [1e-3, 1e-2, 1e-4], 2.0),
        ("gpu_hours", [1e-4, 1e-3, 1e-2], 1.0),
        ("epochs", None, 2),
        ("parameters", None, 7),
    ],
)
def test_points_are_ranked_by_a_measure_of_that_name(ended, objective, order, best):
    document, plan = ended(objective=objective)
    assert order is None or rates(document) == order
    assert document["best"]["score"] == pytest.approx(best)
    assert list(document["objectives"]) == [objective]
    second = document["ranking"][1]["against_best"]
    if objective in ("gpu_hours", "epochs", "parameters"):
        assert second is None and document["best"]["ci95"] is None
    else:
        step = abs(document["ranking"][1]["score"] - best)
        assert abs(second["mean"]) == pytest.approx(step) and second["patients"] == 6
        single = objective != "hd95"  # of several structures' distances there is no interval
        assert (document["best"]["ci95"] is not None) is single
    page = (plan.folder / "report.html").read_text()
    assert (f"best {objective}" if objective != "dice" else "best Dice") in page


def test_hours_are_those_of_the_whole_path_times_its_ranks(search, tmp_path):
    stages = [{"epochs": 2, "steps": 1, "lr": list(RATES)}, {"epochs": 1, "steps": 1, "lr": 1e-4}]
    plan = make_plan(search(axes={}, stages=stages, objective="gpu_hours"), tmp_path / "runs")
    plan.folder.mkdir(parents=True)
    for node in plan.tree.nodes.values():
        write_run(plan, node, (0, 0), 2.0 if node.index == 0 else 0.5, ranks=4)
    document = write_outcome(plan, Ledger(plan.tree, plan.runs, plan.folder))
    assert [row["score"] for row in document["ranking"]] == pytest.approx([10.0] * 3)


def test_several_objectives_make_a_pareto_front(ended):
    document, plan = ended(objective=["dice", "gpu_hours"])
    # Dice 0.7, 0.8, 0.55 at 3, 2, 1 hours: the first is worse and dearer than the second
    assert rates(document) == [1e-3, 1e-4, 1e-2]
    assert [row["front"] for row in document["ranking"]] == [1, 1, 2]
    assert document["standing"] == "all 3 points are ranked; 2 on the Pareto front"
    assert document["ranking"][1]["values"] == pytest.approx({"dice": 0.55, "gpu_hours": 1.0})
    page = (plan.folder / "report.html").read_text()
    assert "Dice over gpu_hours" in page and "Pareto front" in page
    head, *lines = as_csv(document).splitlines()
    assert head.split(",")[-4:] == ["front", "dice", "gpu_hours", "run"] and len(lines) == 3


def test_who_violates_a_constraint_comes_last_and_is_never_the_best(ended):
    document, plan = ended(constraints=["hd95 <= 4", "gpu_hours <= 1.5"])
    # hd95 3, 2, 4.5 at 3, 2, 1 hours: all violate one
    assert document["best"] is None and not (plan.folder / "best.yaml").exists()
    (plan.folder / "best.yaml").write_text("of other constraints")
    write_outcome(plan, Ledger(plan.tree, plan.runs, plan.folder))
    assert not (plan.folder / "best.yaml").exists()
    assert document["standing"].endswith("0 keep the constraints")
    assert rates(document) == [1e-4, 1e-3, 1e-2], "by how much they violate"
    assert document["ranking"][0]["violates"] == pytest.approx({"hd95 <= 4": 0.125})
    assert "gpu_hours &lt;= 1.5" in (plan.folder / "report.html").read_text()
    document, _ = ended(constraints=["gpu_hours <= 1.5"])
    assert document["best"]["point"]["stages.0.lr"] == 1e-4


def test_a_measure_that_is_not_defined_gives_no_rank(search, tmp_path):
    stages = [{"epochs": 1, "steps": 1, "lr": [1e-2, 1e-3]}]
    plan = make_plan(search(axes={}, stages=stages, objective="hd95:blob1"), tmp_path / "runs")
    plan.folder.mkdir(parents=True)
    for node in plan.tree.nodes.values():
        write_run(plan, node, (3 if node.stage.lr == 1e-2 else 30, 0))
    nodes = list(plan.tree.nodes.values())
    path = plan.runs / nodes[1].path / "evaluation.json"
    document = json.loads(path.read_text())
    document["summary"]["structures"]["blob1"]["hd95"]["mean"] = None
    path.write_text(json.dumps(document))
    found = write_outcome(plan, Ledger(plan.tree, plan.runs, plan.folder))
    assert rates(found) == [1e-2]
    assert found["unranked"][0]["reason"].startswith("not defined: hd95:blob1")


def test_fronts_are_those_of_optuna():
    """Against Optuna's own sort of trials with two and three objectives."""
    draws = np.random.default_rng(0)
    for count in (2, 3):
        values = np.round(draws.random((60, count)), 1)  # with equals
        study = optuna.create_study(directions=["maximize"] * count)
        for row in values:
            study.add_trial(optuna.trial.create_trial(values=list(row)))
        best = {trial.number for trial in study.best_trials}
        found = fronts([(0.0, list(row)) for row in values])
        assert {i for i, number in enumerate(found) if number == 1} == best
        for i, number in enumerate(found):  # somebody of the front before lies over it
            over = [
                j
                for j, other in enumerate(found)
                if other == number - 1 and (values[j] >= values[i]).all()
            ]
            assert number == 1 or over
    assert fronts([(0.5, [9.0]), (0.0, [1.0]), (0.2, [9.0]), (0.0, [2.0])]) == [4, 2, 3, 1]
    many = fronts([(0.0, [float(i % 5000)]) for i in range(10_000)])  # at once, not by the square
    assert max(many) == 5000


def test_a_bound_is_violated_by_a_share_of_it():
    limit = Constraint(objective=Objective(metric="hd95"), relation="<=", bound=10.0)
    assert [limit.violation(v) for v in (9.0, 10.0, 15.0, None)] == [0, 0, 0.5, 1.0]
    least = Constraint(objective=Objective(metric="nsd"), relation=">=", bound=0.8)
    assert [least.violation(v) for v in (0.9, 0.4)] == pytest.approx([0, 0.5])


MISTAKES = [
    ({"objective": "dise"}, "objective: nobody measures 'dise'", "Did you mean 'dice'?"),
    ({"objective": "volume_error"}, "nobody measures 'volume_error'", "hd95, hd95_max"),
    ({"objective": "dice:blob3"}, "has no structure 'blob3'", "blob1, blob2"),
    ({"objective": "gpu_hours:blob1"}, "gpu_hours is a cost of the whole point", ""),
    ({"objective": ["dice", "dice"]}, "'dice' stands twice", ""),
    ({"objective": []}, "objective", ""),
    ({"constraints": ["hd95 < 10"]}, "constraints: found 'hd95 < 10'", "'hd95 <= 10'"),
    ({"constraints": ["hd95 <= ten"]}, "found 'hd95 <= ten'", ""),
    ({"constraints": ["nsd:blob9 >= 0.5"]}, "has no structure 'blob9'", ""),
    ({"warm_start": ["other"]}, "warm_start: search 'grid' does not learn", "search: optuna"),
    ({"candidates": 3}, "candidates: search 'grid' does not learn", ""),
    (
        {"scheduler": "pbt", "stages": [{"epochs": 4, "lr": [1e-3, 1e-4]}], "objective": "epochs"},
        "pbt compares its members by one metric",
        "found epochs",
    ),
]


@pytest.mark.parametrize(("change", "words", "more"), MISTAKES, ids=lambda value: str(value)[:40])
def test_a_mistake_gets_one_message(space, change, words, more, tmp_path):
    with pytest.raises(InputError) as caught:
        make_plan(parse_search({**space, "axes": {}, **change}), tmp_path)
    assert words in str(caught.value) and more in str(caught.value)
    assert not list(tmp_path.iterdir())


def rows_of(search, score):
    return [{"point": point, "values": {"dice": score(point)}} for point in search.points()]


def test_importance_names_the_axis_that_decides(search):
    made = search(
        axes={"data.batch": [1, 2, 3, 4], "optimizer.clip": [1.0, 2.0, 3.0]},
        stages=[{"epochs": 1, "lr": [1e-2, 1e-3]}],
    )
    rows = rows_of(made, lambda point: point["data.batch"] + 0.01 * point["optimizer.clip"])
    found = importance(made, rows)["dice"]
    assert set(found) == {"data.batch", "optimizer.clip", "stages.0.lr"}
    assert found["data.batch"] > 0.9 and sum(found.values()) == pytest.approx(1.0, abs=1e-3)
    assert importance(made, rows[:9]) is None, "too few points"


@pytest.fixture
def asked(search, tmp_path):
    """`asked(count, score, **space)`: an Optuna search of one rate whose points are scored at
    once."""

    def made(count, shifts, name="tiny", **changes):
        stages = [{"epochs": 1, "steps": 1, "lr": {"loguniform": [1e-5, 1e-1]}}]
        found = {"axes": {}, "stages": stages, "budget": {"trials": count}, **changes}
        plan = make_plan(search(search="optuna", name=name, **found), tmp_path / "runs")
        plan.folder.mkdir(parents=True, exist_ok=True)
        ledger = Ledger(plan.tree, plan.runs, plan.folder)
        ask = Suggestions(plan, ledger)
        while ask():
            node = next(reversed(plan.tree.nodes.values()))
            write_run(plan, node, shifts(node.stage.lr), abs(np.log10(node.stage.lr)))
        ask.tell()
        write_outcome(plan, ledger)
        return plan, ask

    return made


def near(rate):
    """Best at 1e-3, a pixel worse for every third of a decade."""
    off = min(9, round(3 * abs(np.log10(rate) + 3)))
    return off, off


def test_optuna_is_told_all_objectives_and_constraints(asked):
    plan, ask = asked(6, near, objective=["dice", "gpu_hours"], constraints=["hd95 <= 3"])
    told = [t for t in ask.study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    assert [d.name for d in ask.study.directions] == ["MAXIMIZE", "MINIMIZE"] and len(told) == 6
    for trial in told:
        dice, hours = trial.values
        off = near(trial.params["stages.0.lr"])[0]
        assert dice == pytest.approx(1 - off / 10)
        assert hours == pytest.approx(abs(np.log10(trial.params["stages.0.lr"])))
        assert trial.constraints["hd95 <= 3"] == pytest.approx(max(0, off - 3) / 3)
    front = {trial.number for trial in ask.study.best_trials}
    document = json.loads((plan.folder / "outcome.json").read_text())
    best = [r for r in document["ranking"] if r["front"] == 1 and not r["violates"]]
    rates = {trial.params["stages.0.lr"] for trial in ask.study.trials if trial.number in front}
    assert {row["point"]["stages.0.lr"] for row in best} == rates


def test_a_failed_point_is_told_as_one_that_keeps_no_constraint(search, tmp_path):
    stages = [{"epochs": 1, "steps": 1, "lr": {"loguniform": [1e-5, 1e-1]}}]
    made = search(axes={}, search="optuna", stages=stages, budget={"trials": 3}, objective="hd95")
    plan = make_plan(made, tmp_path / "runs")
    plan.folder.mkdir(parents=True)
    ledger = Ledger(plan.tree, plan.runs, plan.folder)
    ask = Suggestions(plan, ledger)
    ask()
    ledger.mark(next(iter(plan.tree.nodes.values())), "failed", message="why")
    ask.tell()
    (trial,) = [t for t in ask.study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    assert max(trial.constraints.values()) > 1e3, "a distance of 0 would be the best there is"


def test_a_larger_space_tells_optuna_the_points_of_the_smaller_one(asked, search, tmp_path):
    """A value more, in front of the others: what was measured stays with its value."""

    def stages(*rates):
        return [{"epochs": 1, "steps": 1, "lr": list(rates)}]

    plan, _ = asked(2, near, stages=stages(1e-2, 1e-3))
    prepare_folder(plan, [])
    made = search(axes={}, search="optuna", stages=stages(1e-4, 1e-2, 1e-3), budget={"trials": 9})
    larger = make_plan(made, tmp_path / "runs")
    ask = Suggestions(larger, Ledger(larger.tree, larger.runs, larger.folder))
    assert ask(), "the new value"
    assert larger.trials[-1].point == {"stages.0.lr": 1e-4}
    told = {t.params["stages.0.lr"]: t.value for t in ask.study.trials if t.value is not None}
    assert told.keys() == {1, 2} and told[2] == pytest.approx(1.0) and told[1] < 1
    assert not ask(), "three values, three points"


def test_a_warm_start_begins_where_another_sweep_ended(asked):
    _, cold = asked(12, near, name="first")
    plan, warm = asked(3, near, name="second", warm_start=["first"], seed=1)
    assert len(warm.study.trials) >= 15 and len(plan.trials) == 3
    rates = [trial.point["stages.0.lr"] for trial in plan.trials]
    assert all(rate not in {t.params["stages.0.lr"] for t in cold.study.trials} for rate in rates)
    assert "begins with 12 of 12 points of the sweep first" in plan.warnings
    # four decades, and the good ones lie within one: three blind draws would hardly all be there
    assert all(near(rate)[0] <= 4 for rate in rates), rates
    known = [
        row["point"]["stages.0.lr"]
        for row in json.loads((plan.runs / "sweeps/first/outcome.json").read_text())["ranking"]
    ]
    inside = sum(1e-4 <= rate <= 1e-3 for rate in known)
    assert 0 < inside < 12, "a narrower space takes what lies in it"
    narrow = [{"epochs": 1, "steps": 1, "lr": {"loguniform": [1e-4, 1e-3]}}]
    plan, _ = asked(1, near, name="third", warm_start=["first"], stages=narrow)
    assert f"begins with {inside} of 12 points of the sweep first" in plan.warnings


def test_a_warm_start_from_nothing_is_one_message(asked, search):
    with pytest.raises(InputError, match="warm_start: first: no point is ranked"):
        asked(1, near, warm_start=["first"])
    asked(2, near, name="first")
    with pytest.raises(InputError, match="did not measure nsd, but dice"):
        asked(1, near, warm_start=["first"], objective="nsd")
    other = [{"epochs": 1, "steps": 1, "lr": 1e-3}]
    with pytest.raises(InputError, match="has no axis of this space; its axes are stages.0.lr"):
        asked(1, near, warm_start=["first"], stages=other, axes={"data.batch": [1, 2]})
    with pytest.raises(InputError, match="names itself"):
        asked(1, near, name="first", warm_start=["first"])


def test_cheap_points_are_likelier(search, tmp_path):
    """Three beginnings of 99 epochs, ends of one: with candidates, fewer beginnings are paid
    for."""

    def trained(candidates):
        stages = [
            {"epochs": 99, "steps": 1, "lr": [1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7]},
            {"epochs": 1, "steps": 1, "lr": {"loguniform": [1e-5, 1e-1]}},
        ]
        made = search(axes={}, search="optuna", stages=stages, budget={"trials": 8},
                      candidates=candidates, name=f"n{candidates}")  # fmt: skip
        plan = make_plan(made, tmp_path / "runs", build=False)
        plan.folder.mkdir(parents=True)
        ask = Suggestions(plan, Ledger(plan.tree, plan.runs, plan.folder))
        while ask():
            pass
        assert len(plan.trials) == 8
        return plan.tree.shared_epochs

    assert trained(8) <= 3 * 99 + 8 < trained(1)


def test_the_price_of_a_point_is_what_the_tree_gains(search, tmp_path):
    stages = [
        {"epochs": [4, 9], "steps": 1, "lr": [1e-2, 1e-3]},
        {"epochs": [1, 3], "steps": 1, "lr": [1e-3, 1e-4], "schedule": "poly"},
    ]
    plan = make_plan(search(axes={}, stages=stages, seeds=[0, 1]), tmp_path / "runs", build=False)
    tree, points = StageTree([], plan.stores), {}
    for trial in plan.trials:
        points.setdefault(json.dumps(trial.point), []).append(trial)
    order = list(points.values())
    for trials in order[::2] + order[1::2]:
        before, price = tree.shared_epochs, tree.price(trials)
        tree.add(trials)
        assert tree.shared_epochs - before == price
    assert tree.price(order[0]) == 0


def test_what_another_sweep_has_trained_costs_nothing(search, tmp_path):
    """A beginning of 99 epochs that lies in the folder of runs is preferred."""
    stages = [
        {"epochs": 99, "steps": 1, "lr": [1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7]},
        {"epochs": 1, "steps": 1, "lr": {"loguniform": [1e-5, 1e-1]}},
    ]
    made = search(axes={}, search="optuna", stages=stages, budget={"trials": 6}, candidates=8)
    plan = make_plan(made, tmp_path / "runs", build=False)
    plan.folder.mkdir(parents=True)
    [trial] = plan.trials_at({"stages.0.lr": 1e-4, "stages.1.lr": 1e-3})
    [first, _] = StageTree([trial], plan.stores).walk()
    (plan.runs / first.path).mkdir()
    (plan.runs / first.path / "done.json").write_text("{}")
    ask = Suggestions(plan, Ledger(plan.tree, plan.runs, plan.folder))
    assert ask._price({"stages.0.lr": 1e-4, "stages.1.lr": 1e-3}) == 1
    assert ask._price({"stages.0.lr": 1e-5, "stages.1.lr": 1e-3}) == 100
    while ask():
        pass
    assert {trial.point["stages.0.lr"] for trial in plan.trials} == {1e-4}
