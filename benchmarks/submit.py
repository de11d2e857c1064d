"""Seconds from `segfleet submit` to the first line of our code on a node, and to the first training
step, on a SLURM of this machine, and each part's share.

    python benchmarks/submit.py [--repeats 5] [--nodes 2] [--ranks-per-node 2]

Starts a `segfleet slurm-sandbox` of its own, submits a tiny training again and again, one at a
time, each with another seed. Counted from the moment the command is started (`command`, an ordinary
shell command, Python's start included) and from the moment SLURM has accepted the job (`accepted`);
needs Debian's SLURM packages and root. Writes results/submit.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from segfleet.slurm.sandbox.sandbox import Sandbox

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests"))
from conftest import write_tiny_store  # noqa: E402

RECIPE = {
    "name": "submit",
    "model": {"name": "unet_lite_standard", "options": {"width": 4}},
    "stages": [{"name": "only", "epochs": 1, "steps": 1, "lr": 1e-2}],
}


def once(work: Path, environment: dict[str, str], shape: list[str], seed: int) -> dict[str, float]:
    load, start = os.getloadavg()[0], time.time()
    command = [
        sys.executable,
        "-m",
        "segfleet.cli.main",
        "submit",
        "submit.yaml",
        f"seed={seed}",
        *shape,
        "--no-check",
        "--json",
    ]
    job = json.loads(
        subprocess.run(
            command, cwd=work, env=environment, check=True, stdout=subprocess.PIPE, text=True
        ).stdout
    )
    run, folder = Path(job["run"]), Path(job["log"]).parent
    accepted = json.loads((folder / "submission.json").read_text())["time"]
    while not (run / "evaluation.json").exists():
        state = subprocess.run(
            ["squeue", "-h", "-j", job["job"], "-o", "%T"],
            env=environment,
            capture_output=True,
            text=True,
        ).stdout
        if not state.strip() and not (run / "evaluation.json").exists():
            raise RuntimeError(f"the job ended without a result; see {job['log']}")
        time.sleep(0.5)
    line = json.loads((folder / f"life-{job['job']}.0" / "life.json").read_text())["time"]
    events = list(map(json.loads, (run / "events.jsonl").read_text().splitlines()))
    stage, step = (
        next(event["time"] for event in events if event["event"] == kind)
        for kind in ("stage_start", "step")
    )
    while subprocess.run(
        ["squeue", "-h"], env=environment, capture_output=True, text=True
    ).stdout.strip():
        time.sleep(0.2)
    return {
        "command_to_accepted": accepted - start,  # code frozen, recipe checked, sbatch
        "accepted_to_first_line": line - accepted,  # SLURM's start, Python, the first imports
        "first_line_to_stage": stage - line,  # torch, the ranks meet, store, network
        "stage_to_first_step": step - stage,  # loader, optimizer, the step itself
        "command_to_first_line": line - start,
        "command_to_first_step": step - start,
        "load": load,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--ranks-per-node", type=int, default=2)
    chosen = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="segfleet-submit-"))
    work.chmod(0o755)
    sandbox = Sandbox(work / "slurm")
    write_tiny_store(work / "store", 2, "zarr", 6, 2, 24, 1)
    (work / "submit.yaml").write_text(
        yaml.safe_dump(
            {**RECIPE, "data": {"store": str(work / "store"), "batch": 8, "patch": [16, 16]}}
        )
    )
    found: dict[str, list[dict[str, float]]] = {}
    try:
        sandbox.start()
        environment = {**sandbox.environment, "OMP_NUM_THREADS": "1"}
        for name, nodes, ranks in [
            ("1 x 1", 1, 1),
            (f"{chosen.nodes} x {chosen.ranks_per_node}", chosen.nodes, chosen.ranks_per_node),
        ]:
            # the first one freezes the code and warms the disk's cache: not counted
            for seed in range(chosen.repeats + 1):
                shape = ["--nodes", str(nodes), "--ranks-per-node", str(ranks)]
                facts = once(work, environment, shape, 100 * nodes + seed)
                print(name, {key: round(value, 2) for key, value in facts.items()}, flush=True)
                if seed:
                    found.setdefault(name, []).append(facts)
    finally:
        sandbox.stop()
        shutil.rmtree(work, ignore_errors=True)
    median = {
        name: {key: round(statistics.median(row[key] for row in rows), 2) for key in rows[0]}
        for name, rows in found.items()
    }
    document = {
        "cores": os.cpu_count(),
        "repeats": chosen.repeats,
        "nodes x ranks": median,
        "all": found,
    }
    (HERE / "results" / "submit.json").write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(median, indent=1))


if __name__ == "__main__":
    main()
