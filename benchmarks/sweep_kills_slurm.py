"""SIGKILL of the one process that waits for a sweep's SLURM jobs, at seeded moments.

    python benchmarks/sweep_kills_slurm.py [--kills 10]

On a SLURM of its own (`segfleet slurm-sandbox`), without Ray. Half of the kills hit the command
`sweep --on slurm`, the other half the job of `submit -- sweep`; the same command is then given
again. A kill comes when so many of a sweep's 6 stages (2 first rates, 2 second ones each) have been
submitted or finished as was drawn, and up to two seconds later. In the end the sweep must have the
ranking and the weights of one that was trained here in one process, no step may stand twice in a
stage's events, and no finished stage may have been written again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests")]
os.environ["OMP_NUM_THREADS"] = "1"
from conftest import write_tiny_store  # noqa: E402
from sweep import space, weights  # noqa: E402
from sweep_kills import finished, ranking  # noqa: E402

STAGES = 6
PATIENCE = 3000.0  # seconds for one sweep, on a machine under load
WORDS = ["space.yaml", "--on", "slurm", "--slots", "2"]
RESULT = HERE / "results" / "sweep_kills_slurm.json"


class Command:
    """The command line waits for the jobs."""

    def __init__(self, work: Path, runs: str, environment: dict[str, str]):
        command = [sys.executable, "-m", "segfleet.cli.main", "sweep", *WORDS, "--runs", runs]
        with open(work / f"{runs}.log", "a") as log:
            self.process = subprocess.Popen(
                command, cwd=work, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def runs(self) -> bool:
        return self.process.poll() is None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


class Submitted:
    """A job waits for the jobs. SIGKILL of its rank ends it; it is submitted again."""

    def __init__(self, work: Path, runs: str, environment: dict[str, str]):
        self.environment = environment
        command = [sys.executable, "-m", "segfleet.cli.main", "submit", "--runs", runs, "--json"]
        done = subprocess.run(
            [*command, "--", "sweep", *WORDS],
            cwd=work, env=environment, check=True, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.job = json.loads(done.stdout)["job"]

    def runs(self) -> bool:
        asked = ["squeue", "-h", "-j", self.job, "-o", "%T"]
        done = subprocess.run(asked, env=self.environment, capture_output=True, text=True)
        return bool(done.stdout.strip())

    def kill(self) -> None:
        while self.runs():
            # of its step: the batch script lives and ends with the exit code of its rank
            words = ["scancel", "--signal=KILL", self.job]
            subprocess.run(words, env=self.environment, capture_output=True)
            time.sleep(0.5)


WAYS: dict[str, Any] = {"command": Command, "job": Submitted}


def submitted(runs: Path) -> list[Path]:
    """Submissions of stages, not of the sweep itself."""
    return [path for path in runs.glob("*/**/submission.json") if "sweeps" not in path.parts]


def disturbed(
    work: Path, name: str, deck: list[str], rng: random.Random, environment: dict[str, str]
) -> list[dict[str, Any]]:
    """One sweep, killed at most as often as the deck has ways of the first kind, and given again
    until it is done. The kills."""
    runs, way, rows, begun = work / name, deck[0], [], time.monotonic()
    points = sorted(rng.randrange(2 * STAGES) for _ in range(deck.count(way)))
    before: dict[str, int] = {}
    while not (runs / "sweeps" / "bench" / "outcome.json").exists():
        waiting = WAYS[way](work, name, environment)
        while waiting.runs():
            done, sent = finished(runs), submitted(runs)
            assert all(done[uid] == when for uid, when in before.items()), "written again"
            before = done
            if points and len(done) + len(sent) >= points[0]:
                time.sleep(rng.uniform(0, 2))
                if waiting.runs():
                    waiting.kill()
                    points.pop(0)
                    deck.remove(way)
                    rows.append({"of": way, "submitted": len(sent), "done": len(done)})
                    print(json.dumps(rows[-1]), flush=True)
            time.sleep(0.3)
            assert time.monotonic() - begun < PATIENCE, "it does not end"
    return rows


def straight(document: dict[str, Any], runs: Path) -> list[tuple]:
    """The ranking of the same stages, trained here one after another."""
    from segfleet.pipeline.jobs import run_job
    from segfleet.pipeline.ranks import Ranks
    from segfleet.pipeline.stop import StopRequest
    from segfleet.sweeps.results.ledger import Ledger
    from segfleet.sweeps.results.outcome import outcome
    from segfleet.sweeps.space.load import parse_search
    from segfleet.sweeps.space.plan import make_plan

    plan = make_plan(parse_search(document), runs)
    for node in plan.tree.walk():
        run_job(plan.order(node).job, Ranks(), StopRequest())
    return ranking(json.loads(json.dumps(outcome(plan, Ledger(plan.tree, runs, plan.folder)))))


def once(runs: Path) -> bool:
    """Whether every step of every stage stands once in its events."""
    for path in runs.rglob("events.jsonl"):
        events = map(json.loads, path.read_text().splitlines())
        steps = [event["step"] for event in events if event["event"] == "step"]
        if steps != sorted(set(steps)):
            return False
    return True


def main(kills: int) -> None:
    from segfleet.slurm.sandbox.sandbox import Sandbox

    rng, rows, sweeps = random.Random(0), [], []
    deck = ["command"] * (kills // 2) + ["job"] * (kills - kills // 2)
    with tempfile.TemporaryDirectory(prefix="kills-") as scratch:
        work = Path(scratch)
        work.chmod(0o755)
        document = space(write_tiny_store(work / "store", 2, "zarr", 6, 2, 40, 1), 20)
        document["axes"] = {}
        document["stages"][1]["lr"] = document["stages"][1]["lr"][:2]
        (work / "space.yaml").write_text(yaml.safe_dump(document))
        calm = straight(document, work / "straight")
        sandbox = Sandbox(work / "slurm")
        sandbox.start()
        try:
            while deck:  # a sweep may be done before all kills have come
                name = f"killed{len(sweeps)}"
                found = disturbed(work, name, deck, rng, sandbox.environment)
                runs, rows = work / name, rows + found
                outcome = json.loads((runs / "sweeps" / "bench" / "outcome.json").read_text())
                sent = [path.parents[2] for path in submitted(runs)]
                facts = {
                    "kills": len(found),
                    "of": found[0]["of"] if found else None,
                    "stages": len(finished(runs)),
                    "same_ranking": ranking(outcome) == calm,
                    "same_weights": weights(runs) == weights(work / "straight"),
                    "every_step_once": once(runs),
                    "stages_submitted_twice": len(sent) - len(set(sent)),
                }
                sweeps.append(facts)
                print(json.dumps(facts), flush=True)
                if not (facts["same_ranking"] and facts["same_weights"]):
                    shutil.copytree(work, Path(tempfile.mkdtemp(prefix="kills-kept-")) / "work")
        finally:
            sandbox.stop()
    sweeps = [one for one in sweeps if one["kills"]]
    good = ("same_ranking", "same_weights", "every_step_once")
    equal = sum(one["kills"] for one in sweeps if all(one[key] for key in good))
    result = {"equal": equal, "of": len(rows), "kills": rows, "sweeps": sweeps}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    assert equal == len(rows) and all(one["stages"] == STAGES for one in sweeps)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    main(parser.parse_args().kills)
