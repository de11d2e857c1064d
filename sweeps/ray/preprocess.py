"""A store made on a running Ray cluster: the shares that a SLURM array works on, as tasks of Ray.

Every task is one process of one core on some node, with the raw data and OUT.partial on a disk that
all nodes see. What it finished stays, whatever happens to it; the command itself does what is
missing, publishes and reports, so the bytes are those of one machine. Ray knows no state: a second
run resumes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from segfleet.pipeline.launch.job import parse_job
from segfleet.pipeline.launch.local import die_with_parent
from segfleet.preprocess.building.request import BuildRequest, Survey, Write
from segfleet.preprocess.jobs import run_job
from segfleet.preprocess.stores.manifest import NAME as MANIFEST
from segfleet.sweeps.ray.controller import SETTINGS, join

PHASES = {Survey: "check", Write: "write"}  # what a share does, in the words of `build`


def spread(
    request: BuildRequest,
    address: str,
    members: int | None,
    cases: int,
    progress: Callable[[str, int, int], None],
) -> list[str]:
    """Look at the cases of a store and write its shards on the cluster at `address`; what went
    wrong with which share, which `build` will find again.

    `members`: shares, at most one per case; None: as many as the cluster has cores.
    `progress(phase, done, total)` counts shares. Raises InputError.
    """
    if (request.out / MANIFEST).is_file():
        return []
    os.environ.update({key: os.environ.get(key, value) for key, value in SETTINGS.items()})
    import ray

    join(address, "preprocess")
    try:
        cores = int(ray.cluster_resources().get("CPU", 1))
        count = max(1, min(members or cores, cases))
        task = ray.remote(num_cpus=1, max_retries=2)(member)
        faults = []
        single = replace(request, workers=1)
        for kind, phase in PHASES.items():
            jobs = [kind(store=single, share=(number, count)) for number in range(count)]
            waiting = {task.remote(job.document()): job.share[0] for job in jobs}
            progress(phase, 0, count)
            while waiting:
                (done,), _ = ray.wait(list(waiting))
                number = waiting.pop(done)
                progress(phase, count - len(waiting), count)
                try:
                    fault = ray.get(done)
                except ray.exceptions.RayError as error:
                    fault = " ".join(str(error).split())[:300]
                faults += [f"{kind.__name__.lower()} {number}: {fault}"] if fault else []
        return faults
    finally:
        ray.shutdown()


def member(job: dict[str, Any]) -> str | None:
    """In a worker of Ray: do a share in a process of its own, which ends when this one does; its
    last words if it failed."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "segfleet.sweeps.ray.preprocess"],
        input=json.dumps(job),
        env={**os.environ, "SEGFLEET_PARENT": str(os.getpid()), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return None
    words = [line for line in done.stderr.splitlines() if line.strip()]
    return words[-1] if words else f"exit code {done.returncode}"


def main() -> int:
    from segfleet.core.errors import explain

    die_with_parent(int(os.environ["SEGFLEET_PARENT"]))
    try:
        run_job(parse_job(json.loads(sys.stdin.read())), lambda phase, done, total: None)
        return 0
    except Exception as error:
        words, code = explain(error) or (f"{type(error).__name__}: {error}", 1)
        sys.stderr.write(" ".join(words.split())[:1000] + "\n")
        return code


if __name__ == "__main__":
    sys.exit(main())
