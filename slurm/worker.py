"""What every rank runs: join the gang, do the job, say what went wrong. `python -m segfleet.slurm.worker FOLDER`.

FOLDER holds job.json; a rank that fails leaves failed-<rank>.json there for its launcher.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path

from segfleet.pipeline.stop import StopRequest
from segfleet.preprocess.problems import explain
from segfleet.slurm.local import die_with_parent

LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "recv failed", "Socket closed")


def main(meeting: Path) -> int:
    if parent := os.environ.get("SEGFLEET_PARENT"):
        die_with_parent(int(parent))
    rank = int(os.environ.get("RANK", "0"))
    stop = StopRequest()  # before the slow imports, so that no early signal is lost
    try:
        from segfleet.pipeline import gang, jobs

        job = json.loads((meeting / "job.json").read_text(encoding="utf-8"))
        jobs.run_job(job, gang.join_gang(meeting / "address"), stop)
        return 0
    except BaseException as error:
        return report(meeting, rank, error)


def report(meeting: Path, rank: int, error: BaseException) -> int:
    """Leave the reason for the launcher, the message for the user's mistakes and the traceback for ours; the exit code."""
    full = traceback.format_exc()
    message, code = explain(error) or (f"rank {rank} failed:\n{full}", 1)
    lost = code == 1 and any(sign in full for sign in LOST)
    facts = {"rank": rank, "time": time.time(), "exit_code": code, "message": message, "lost_partner": lost}
    partial = meeting / f".failed-{rank}"
    partial.write_text(json.dumps(facts), encoding="utf-8")
    os.replace(partial, meeting / f"failed-{rank}.json")
    return code


if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads and process groups of a broken gang must not hold a failed rank back
