"""A real SLURM for the whole session, and a folder with a recipe to send to it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from segfleet.slurm.sandbox.sandbox import NODES, Sandbox, missing

PATIENCE = float(os.environ.get("SEGFLEET_TEST_PATIENCE", 1))  # more on a loaded machine
MODEL = {"name": "plain_unet_2d", "options": {"features": [4, 8]}}
STAGES = [
    {"name": "base", "epochs": 2, "steps": 80, "lr": 1e-2},
    {"name": "tune", "epochs": 1, "steps": 20, "lr": 1e-3, "inherit": "weights+optimizer"},
]


@pytest.fixture(scope="session")
def sandbox():
    """The daemons. Where SLURM is missing the test is skipped and says so; in CI it fails."""
    if why := missing():
        assert not os.environ.get("CI"), f"no SLURM: {why}"
        pytest.skip(f"no SLURM: {why}")
    folder = Path(tempfile.mkdtemp(prefix="segfleet-slurm-"))  # a short path, for munge's socket
    made = Sandbox(folder)
    try:
        made.start()
        yield made
    finally:
        made.stop()
        assert not made.pids()
        shutil.rmtree(folder, ignore_errors=True)


class Cluster:
    """`segfleet` commands against the sandbox, in a folder of their own."""

    python = sys.executable
    of: str | None = None  # the cluster that `queue` asks, if not the sandbox's own

    def __init__(self, sandbox: Sandbox, folder: Path, environment: dict[str, str]):
        self.sandbox, self.folder = sandbox, folder
        self.restarts_seen: dict[str, int] = {}  # job -> requeues, at its last release
        self.environment = {**environment, "OMP_NUM_THREADS": "1"}

    def segfleet(self, *arguments, code: int = 0, **more) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "segfleet.cli.main", *map(str, arguments)]
        environment = {**self.environment, **more}
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=200 * PATIENCE,
        )
        assert done.returncode == code, (
            f"exit code {done.returncode}, expected {code}\n{done.stdout}\n{done.stderr}"
        )
        return done

    def submit(self, *arguments, runs="runs", **more) -> dict:
        """Submit the recipe; the document that --json prints."""
        document = json.loads(
            self.segfleet(
                "submit", "tiny.yaml", *arguments, "--runs", runs, "--json", **more
            ).stdout
        )
        return document

    def row(self, document: dict, runs="runs") -> dict:
        """What `segfleet status` says of a run."""
        rows = json.loads(self.segfleet("status", self.folder / runs, "--json").stdout)
        return next(row for row in rows if row["path"] == document["run"])

    def queue(self, job: str) -> tuple[str, str]:
        """SLURM's own words: state and reason."""
        rows = [
            line.split("|")
            for line in self.call(
                "squeue",
                *(("-M", self.of) if self.of else ()),
                "--states=all",
                "-r",
                "-h",
                "-o",
                "%i|%T|%r",
            ).splitlines()
            if "|" in line
        ]
        return next(((state, reason) for found, state, reason in rows if found == job), ("", ""))

    def jobs(self) -> set[str]:
        """Ids of all jobs that SLURM knows, whatever their state: it forgets ended ones after a
        while."""
        return set(self.call("squeue", "--states=all", "-h", "-o", "%i").split())

    def call(self, *command: str) -> str:
        return self.sandbox.call(*command)

    def wait(self, condition, timeout=240.0, what="", pause=0.5) -> None:
        """`pause`: seconds between two looks after a while. Who asks SLURM five times a second
        takes a core from the job he waits for."""
        begun = time.monotonic()
        while not condition():
            waited = time.monotonic() - begun
            assert waited < timeout * PATIENCE, (
                f"{what} did not come within {timeout:.0f} "
                f"s:\n{self.call('squeue', '--states=all')}"
            )
            time.sleep(min(pause, 0.1 + waited / 20))

    def wait_for_state(self, document: dict, *states: str, timeout=240.0) -> str:
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        found = []

        def arrived() -> bool:
            found.append(self.queue(document["job"])[0])
            return found[-1] in (*states, *over)

        self.wait(arrived, timeout, f"job {document['job']}: {states}")
        assert found[-1] in states, f"{found[-1]}, expected {states}:\n{self.output(document)}"
        return found[-1]

    def wait_for_step(self, document: dict, step: int, timeout=240.0) -> Path:
        """Wait until the first stage has logged `step` in whatever life; its folder."""
        stage, asked = Path(document["run"]).parent, time.monotonic()

        def reached() -> bool:
            nonlocal asked
            there = any(event["step"] >= step for event in events(stage, "step"))
            if there or time.monotonic() - asked > 1.0:
                asked = time.monotonic()
                over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
                assert self.queue(document["job"])[0] not in over, self.output(document)
            return there

        self.wait(reached, timeout, f"step {step}", pause=0.1)
        return stage

    def release(self, document: dict) -> None:
        """SLURM holds a requeued job back for two minutes; a test waits only until nothing of its
        last life is left. After a node's failure the job may start again by itself meanwhile."""
        job = document["job"]
        before = self.restarts_seen.get(job, 0)
        self.wait(
            lambda: self.queue(job)[0] == "PENDING" or self.restarts(job) > before, 60, "requeue"
        )
        self.wait(
            lambda: not self.helpers(document) or self.queue(job)[0] == "RUNNING",
            60,
            "the end of the last life",
        )
        self.restarts_seen[job] = self.restarts(job)
        # a job that starts within the second of its requeue is refused: "Job credential revoked"
        time.sleep(1.5)
        deadline = time.monotonic() + 60
        while self.queue(document["job"])[0] == "PENDING":
            assert time.monotonic() < deadline, self.call(
                "scontrol", "show", "job", document["job"]
            )
            try:
                self.call("scontrol", "update", f"jobid={document['job']}", "StartTime=now")
            except subprocess.CalledProcessError:
                pass  # it has just started
            time.sleep(0.5)

    def restarts(self, job: str) -> int:
        """How often SLURM has requeued it."""
        words = self.call("scontrol", "show", "job", job)
        return int(re.search(r"Restarts=(\d+)", words).group(1))

    def same_result(self, document: dict, straight: dict) -> None:
        """Bitwise equal weights of all stages, equal score, and every step logged exactly once."""
        import torch

        for mine, theirs in zip(
            (Path(document["run"]).parent, Path(document["run"])),
            map(Path, straight["stages"]),
            strict=True,
        ):
            first, second = final_weights(mine), final_weights(theirs)
            assert first.keys() == second.keys() and all(
                torch.equal(first[name], second[name]) for name in first
            )
            undisturbed, found = (
                [event["step"] for event in events(stage, "step")] for stage in (theirs, mine)
            )
            assert found == sorted(set(found)) and set(undisturbed) <= set(found)
        scores = json.loads((Path(document["run"]) / "evaluation.json").read_text())["summary"]
        assert scores["mean_foreground_dice"] == straight["mean_foreground_dice"]

    def events(self, stage: Path, kind: str) -> list[dict]:
        return events(stage, kind)

    def weights(self, stage: Path) -> dict:
        """The final ones of a stage, by name."""
        return final_weights(stage)

    def resumed(self, document: dict) -> list[int]:
        """Steps from which the first stage went on."""
        return [event["from_step"] for event in events(Path(document["run"]).parent, "resumed")]

    def stopped(self, document: dict) -> list[int]:
        """Steps at which the first stage stopped in order."""
        return [event["at_step"] for event in events(Path(document["run"]).parent, "stopped")]

    def helpers(self, document: dict, node: str | None = None) -> list[psutil.Process]:
        """SLURM's own processes that hold a job's steps, on one node or all."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.name() == "slurmstepd" and f"[{document['job']}." in " ".join(
                    process.cmdline()
                ):
                    nodes = {child.environ().get("SLURMD_NODENAME") for child in process.children()}
                    found += [process] if node is None or node in nodes else []
        return found

    def output(self, document: dict) -> str:
        """What ranks and controller have said of a job."""
        files = sorted(Path(document["log"]).parent.glob(f"{document['job']}_*_log.out"))
        controller = (self.sandbox.folder / "log" / "slurmctld.log").read_text().splitlines()
        said = "\n".join(line for line in controller if document["job"].partition("_")[0] in line)
        return "\n".join(
            [*(f"== {path.name}\n{path.read_text()}" for path in files), "== slurmctld.log", said]
        )


def events(stage: Path, kind: str) -> list[dict]:
    path = stage / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    whole = []
    for line in lines:
        try:
            whole.append(json.loads(line))
        except json.JSONDecodeError:  # being written
            continue
    return [event for event in whole if event["event"] == kind]


@pytest.fixture(scope="session")
def work(tiny_recipe):
    """A folder with a recipe for a tiny network on a tiny store. No batch normalisation: many ranks
    on few cores talk long about it."""
    return tiny_recipe(STAGES, batch=8, model=MODEL)


@pytest.fixture
def cluster(sandbox, work):
    """Every test finds all nodes idle and leaves no job behind."""
    made = Cluster(sandbox, work, sandbox.environment)
    yield made
    made.call("scancel", "--user=root")
    made.wait(lambda: not made.call("squeue", "-h").strip(), 30, "an empty queue")
    for node in NODES:
        if f"slurmd {node}" not in sandbox.pids():
            sandbox.start_node(node)
    made.wait(
        lambda: made.call("sinfo", "-h", "-p", "main", "-o", "%T %D").split() == ["idle", "4"],
        40,
        "four idle nodes",
    )


@pytest.fixture(scope="session")
def straight(work):
    """`straight(ranks)`: what --json prints of the same recipe on local ranks that nobody
    disturbed."""
    made: dict[tuple, dict] = {}

    def run(ranks: int, *changes: str) -> dict:
        if (ranks, changes) not in made:
            runs = f"straight{len(made)}"
            options = ("--ranks", str(ranks), "--runs", runs, "--json")
            command = [
                sys.executable,
                "-m",
                "segfleet.cli.main",
                "train",
                "tiny.yaml",
                *changes,
                *options,
            ]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                command,
                cwd=work,
                env=environment,
                capture_output=True,
                text=True,
                timeout=200 * PATIENCE,
            )
            assert done.returncode == 0, done.stderr
            made[ranks, changes] = json.loads(done.stdout)
        return made[ranks, changes]

    return run


def final_weights(stage: Path) -> dict:
    from safetensors.torch import load_file

    done = json.loads((stage / "done.json").read_text())
    return load_file(stage / "checkpoints" / done["checkpoint"] / "weights.safetensors")
