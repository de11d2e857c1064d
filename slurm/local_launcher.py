"""Ranks on this machine behind the same two protocols as a cluster. `python -m segfleet.slurm.local_launcher FOLDER RANKS` runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segfleet.slurm import submission
from segfleet.slurm.jobspec import JobSpec
from segfleet.slurm.local import INTERRUPTED, RankFailed, run_ranks

OUTCOME = "outcome.json"


@dataclass(frozen=True)
class LocalJob:
    run: Path
    submission: submission.Submission

    @property
    def id(self) -> str:
        return self.submission.id

    def state(self) -> str:
        outcome = self._outcome()
        if outcome:
            return {0: "done", INTERRUPTED: "stopped"}.get(outcome["exit_code"], "failed")
        return "running" if self._alive() else "lost"

    def reason(self) -> str | None:
        return (self._outcome() or {}).get("message")

    def cancel(self) -> None:
        if self.state() == "running":
            os.kill(int(self.id), signal.SIGTERM)

    def _outcome(self) -> dict[str, Any] | None:
        try:
            return json.loads((Path(self.submission.folder) / OUTCOME).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def _alive(self) -> bool:
        """Whether the process still is the one we started: a number may have gone to another."""
        try:
            line = Path(f"/proc/{self.id}/cmdline").read_bytes().decode().split("\0")
        except OSError:
            return False
        return self.submission.folder in line


class LocalLauncher:
    """Starts the ranks in the background; they outlive the process that started them."""

    def submit(self, run: Path, recipe: dict[str, Any], root: Path, spec: JobSpec) -> LocalJob:
        folder = submission.write_job(run, submission.train_job(run, recipe, root), spec)
        with open(folder / "log.out", "ab") as log:
            command = [sys.executable, "-m", "segfleet.slurm.local_launcher", str(folder), str(spec.ranks)]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        facts = {"id": str(process.pid), "name": run.name, "launcher": "local", "spec": spec, "logs": folder, "code": None, "commit": None}
        return LocalJob(run, submission.record(folder, **facts))


def main(folder: Path, ranks: int) -> int:
    outcome: dict[str, Any] = {"exit_code": 0, "message": None}
    try:
        run_ranks(json.loads((folder / "job.json").read_text(encoding="utf-8")), ranks)
    except RankFailed as error:
        outcome = {"exit_code": error.exit_code, "message": str(error)}
    (folder / OUTCOME).write_text(json.dumps({**outcome, "time": time.time()}), encoding="utf-8")
    return outcome["exit_code"]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
