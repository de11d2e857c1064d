"""What a sweep costs beside its training: stages that do nothing, 100 to 10,000 points.

    python benchmarks/sweep_scale.py [--points 100 1000 10000] [--tune 100]

A grid of two stages (ten points share each first stage) on a tiny store. Instead of being trained a
stage gets what training and scoring leave. Every size runs in a process of its own, as the process
does that waits for SLURM jobs: without Ray, without torch. Measured in CPU seconds: the plan, then
the search from the first stage to the last; calls of `os.stat` and `open` per stage; the peak of
memory. `--tune`: so many trials of plain Ray Tune that report one number, Ray's processes included.
A size that stands in the results is not run again; --again runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "sweep_scale.json"
SHARED = 10  # points of a first stage
SLOTS = 16


def space(store: str, points: int) -> dict:
    firsts = [1e-3 * (1 + i / points) for i in range(points // SHARED)]
    return {
        "name": "scale",
        "base": {
            "name": "scale",
            "data": {"store": store, "batch": 2, "patch": [16, 16]},
            "model": {"name": "unet_lite_standard", "options": {"width": 4}},
            "stages": [{"epochs": 1, "lr": 1e-3}],
        },
        "stages": [
            {"epochs": 5, "steps": 1, "lr": firsts},
            {"epochs": 1, "steps": 1, "lr": [1e-4 * (1 + i) for i in range(SHARED)]},
        ],
    }


def finish(ledger, node, facts: str) -> None:
    """What a trained and scored stage leaves."""
    folder = ledger.path(node)
    folder.mkdir(parents=True)
    (folder / "done.json").write_text('{"checkpoint": "step-00000001"}')
    if node.leaf_of:
        (folder / "evaluation.json").write_text(facts)


def search(store: str, points: int, runs: str) -> dict:
    """Plan and search of one size, in this process."""
    from segfleet.pipeline.scoring.scored import score_facts
    from segfleet.sweeps.results.ledger import Ledger
    from segfleet.sweeps.search.tree_search import FINISHED, TreeSearch
    from segfleet.sweeps.space.load import parse_search
    from segfleet.sweeps.space.plan import make_plan

    began = time.process_time()
    plan = make_plan(parse_search(space(store, points)), Path(runs), build=False)
    planned = time.process_time() - began
    plan.folder.mkdir(parents=True)
    leaf = next(node for node in plan.tree.nodes.values() if node.leaf_of)
    done = {"checkpoint": "step-00000001"}
    summary = {"mean_foreground_dice": 0.5, "mean_foreground_dice_ci95": None, "patients": 1}
    scored = score_facts(leaf.recipe, plan.stores(leaf.recipe), done)
    facts = json.dumps({"scored": scored, "summary": summary, "cases": []})
    calls, playing = {"stat": 0, "open": 0}, 0.0
    stat = os.stat

    def counted(*args, **kwargs):
        calls["stat"] += 1
        return stat(*args, **kwargs)

    def audit(event: str, _: tuple) -> None:
        calls["open"] += event == "open"

    os.stat = counted
    sys.addaudithook(audit)
    before, number, running = dict(calls), 0, []
    began = time.process_time()
    ledger = Ledger(plan.tree, plan.runs, plan.folder)
    tree = TreeSearch(ledger, plan.order, slots=SLOTS, on_change=ledger.epochs_done)
    halves: list[float] = []
    while (order := tree.next(f"n{number}")) != FINISHED or running:
        if order not in (None, FINISHED):
            running.append((f"n{number}", order.node))
            number += 1
            if len(running) < SLOTS:
                continue
        name, uid = running.pop(0)
        start, own = time.process_time(), dict(calls)
        finish(ledger, plan.tree.nodes[uid], facts)
        playing += time.process_time() - start
        calls |= own
        tree.ended(name, {"state": "done"})
        if number in (len(plan.tree.nodes) // 2, len(plan.tree.nodes)):
            halves.append(time.process_time() - began - playing)
    spent, nodes = time.process_time() - began - playing, len(plan.tree.nodes)
    assert set(ledger.states().values()) == {"done"} and number == nodes
    return {
        "points": points,
        "stages": nodes,
        "plan_ms_per_point": round(1000 * planned / points, 2),
        "search_ms_per_stage": round(1000 * spent / nodes, 3),
        "second_half_over_first": round((spent - halves[0]) / halves[0], 2),
        "stat_calls_per_stage": round((calls["stat"] - before["stat"]) / nodes, 2),
        "open_calls_per_stage": round((calls["open"] - before["open"]) / nodes, 2),
        "peak_MiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "torch_loaded": "torch" in sys.modules,
        "ray_loaded": "ray" in sys.modules,
    }


def tune(trials: int) -> dict:
    """As many trials of plain Ray Tune that do nothing."""
    import psutil

    from segfleet.sweeps.ray.controller import NAMES, ray_session
    from segfleet.sweeps.run import Resources

    def family() -> float:
        found = [psutil.Process(), *psutil.Process().children(recursive=True)]
        return sum(sum(process.cpu_times()[:4]) for process in found)

    with (
        tempfile.TemporaryDirectory() as folder,
        ray_session(Resources(slots=2), Path(folder)) as at,
    ):
        from ray import tune  # not before: it reads the session's token when it is imported

        before, began = family(), time.perf_counter()
        tune.Tuner(
            tune.with_resources(lambda config: {"dice": config["x"]}, {"cpu": 1}),
            param_space={"x": tune.grid_search(list(range(trials)))},
            tune_config=tune.TuneConfig(reuse_actors=True, **NAMES),
            run_config=tune.RunConfig(name="tune", storage_path=str(at), verbose=0),
        ).fit()
        spent = family() - before
    return {
        "trials": trials,
        "cpu_ms_per_trial": round(1000 * spent / trials, 1),
        "wall_ms_per_trial": round(1000 * (time.perf_counter() - began) / trials, 1),
    }


def child(*words: str) -> dict:
    command = [sys.executable, __file__, "--child", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, nargs="*", default=[100, 1000, 10_000])
    parser.add_argument("--tune", type=int, default=0)
    parser.add_argument("--again", action="store_true")
    asked = parser.parse_args()
    sys.path.insert(0, str(HERE.parent / "tests"))
    from conftest import write_tiny_store

    known = json.loads(RESULT.read_text()) if RESULT.exists() and not asked.again else {}
    found = {"ours": known.get("ours", []), "tune": known.get("tune")}
    for points in asked.points:
        if any(row["points"] == points for row in found["ours"]):
            continue
        with tempfile.TemporaryDirectory(prefix="scale-") as scratch:
            store = write_tiny_store(Path(scratch) / "store", 2, "zarr", 5, 2, 30, 1)
            found["ours"].append(child("search", str(store), str(points), f"{scratch}/runs"))
        print(json.dumps(found["ours"][-1]), flush=True)
        RESULT.write_text(json.dumps(found, indent=1) + "\n")
    if asked.tune:
        found["tune"] = child("tune", str(asked.tune))
        RESULT.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        kind, *words = sys.argv[2:]
        result = (
            search(words[0], int(words[1]), words[2]) if kind == "search" else tune(int(words[0]))
        )
        print(json.dumps(result))
    else:
        main()
