"""What SLURM starts on every rank, through submitit: find out which rank this is, do the job, and
say by the exit code whether to come back.

75 from rank 0: interrupted, all is saved, the batch script requeues the job. 0 from the others
then, lest they take rank 0 down with them.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segfleet.core.errors import ExitCode, InputError
from segfleet.core.files import read_json, write_atomically
from segfleet.core.job import Job
from segfleet.core.machine import own_slice
from segfleet.pipeline.launch import worker
from segfleet.pipeline.launch.job import Command, Train
from segfleet.pipeline.stop import LEAVE, Interrupted, Paused, StopRequest
from segfleet.slurm import cluster
from segfleet.slurm.submission import LIFE, read_job

# seconds a rank that lost its partner gives SLURM to find out that a node died, before it calls it
# a failure
PATIENCE = 900


class Fruitless(RuntimeError):
    """The job was restarted again and again without a step of progress."""


class OtherCode(InputError):
    """The code that would run is not the code that was submitted."""


def run_rank(folder: str) -> None:
    """Do the job of a submission folder and end the process. What came out stands in files, never
    in submitit's pickles."""
    worker.keep_stdout()
    stop = StopRequest()  # in place of submitit's handlers: theirs act at once and on rank 0 alone
    become_rank()
    submission, life = Path(folder), Path(os.environ["SEGFLEET_LIFE"])
    rank = int(os.environ["RANK"])
    try:
        job, settings = read_job(submission)
    except InputError as error:
        sys.stderr.write(f"segfleet: {error}\n")
        worker.exit_now(worker.report(life, rank, error))
    stop.at_once = lambda: worker.exit_interrupted(life)
    spec = settings.spec
    end = int(os.environ.get("SEGFLEET_END") or 0)
    stop.deadline, stop.margin = (float(end) if end else None), spec.lead / 2
    stop.later = next_life(life)
    if rank == 0:
        try:
            begin(life, job, spec.fruitless)
        except (Fruitless, OtherCode) as error:
            worker.report(life, rank, error)
            sys.stderr.write(f"segfleet: {error}\n")
            worker.exit_now(1)

    def first(ranks: Any) -> None:
        from segfleet.slurm import health

        node = os.environ["SLURMD_NODENAME"]
        try:
            health.check_node(ranks, spec.gpus_per_node, node)
        except health.BadNode as error:
            health.remember(job.root, node, str(error))
            raise

    if isinstance(job, Command) and job.ray:
        from segfleet.slurm import ray_nodes

        def on_ray(words: list[str], environment: dict[str, str]) -> Any:
            return command([*job.words, *words], life, stop, environment)

        try:
            code, error = ray_nodes.run(life, rank, spec.gpus_per_node, stop, on_ray)
        except Exception as fault:
            code, error = worker.report(life, rank, fault), fault
    elif isinstance(job, Command):
        code, error = command(job.words, life, stop)
    else:
        code, error = worker.work(life, job.document, stop, first)
    if error is None:
        if rank == 0:
            write_atomically(life / "ended.json", json.dumps({"time": time.time()}))
        worker.exit_now(0)
    sys.stderr.write(
        json.loads((life / f"failed-{rank}.json").read_text(encoding="utf-8"))["message"] + "\n"
    )
    if isinstance(error, Interrupted):
        asked = stop.reason and stop.reason.startswith("the file")
        if rank == 0 and (asked or isinstance(error, Paused)):
            (life / "stay").touch()  # it was asked to stop, so it does not come back
        code = ExitCode.INTERRUPTED if rank == 0 else 0
    elif worker.peer_failure(error):
        sys.stderr.flush()
        wait_for_slurm()
    worker.exit_now(code)


def command(
    words: Sequence[str], life: Path, stop: StopRequest, further: dict[str, str] | None = None
) -> tuple[int, BaseException | None]:
    """Run a segfleet command as a job of one process; the exit code and what went wrong. A command
    that ends by 75 is started again by the same job."""
    own = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", LIFE, "SEGFLEET_MASTER_HOST")
    environment = {key: value for key, value in os.environ.items() if key not in own}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "segfleet.cli.main", *words],
        env={**environment, **(further or {}), LEAVE: "1"},
        stdin=subprocess.DEVNULL,
    )
    asked = False
    while process.poll() is None:
        time.sleep(0.2)
        if stop.asked() and not asked:
            process.send_signal(signal.SIGTERM)
            asked = True
    code, line = process.returncode, " ".join(words)
    if code == 0:
        return 0, None
    if code == ExitCode.INTERRUPTED:  # not asked by SLURM: a person wanted it to stop
        kind = Interrupted if asked else Paused
        error: BaseException = kind(f"segfleet {line} stopped in order")
    else:
        error = InputError(f"segfleet {line} ended with exit code {code}; its words are above")
    return worker.report(life, 0, error), error


def become_rank() -> None:
    """SLURM's words for rank, size and node in the ranks's words."""
    e = os.environ
    e["RANK"], e["LOCAL_RANK"] = e["SLURM_PROCID"], e["SLURM_LOCALID"]
    # such as "2(x3)": as many on every node, as submitted
    e["LOCAL_WORLD_SIZE"] = e.get("SLURM_STEP_TASKS_PER_NODE", "1").partition("(")[0]
    e["WORLD_SIZE"] = e.get("SLURM_STEP_NUM_TASKS") or e["SLURM_NTASKS"]
    e["SEGFLEET_MASTER_HOST"] = own_address()
    e.update(own_slice(int(e["LOCAL_RANK"])))
    e.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def own_address() -> str:
    """A name or address of this node at which the job's other nodes find it: what SLURM calls it,
    else the host's name. Many systems map their own name to the loopback (127.0.1.1); where another
    node's name leads out of this one, it is the address on that way."""
    e = os.environ
    names = (
        e.get("SLURMD_NODENAME"),
        e.get("SLURM_TOPOLOGY_ADDR", "").rpartition(".")[2],
        socket.gethostname(),
    )
    address = next((name for name in names if name and addresses_of(name)), "127.0.0.1")
    if e.get("SLURM_JOB_NUM_NODES", "1") != "1":
        from segfleet.pipeline.launch.rendezvous import is_loopback, own_address_towards

        if all(map(is_loopback, addresses_of(address))):
            for other in cluster.names_of(e.get("SLURM_JOB_NODELIST", "")):
                if other != e.get("SLURMD_NODENAME") and (way := own_address_towards(other)):
                    return address if is_loopback(way) else way
    return address


def addresses_of(name: str) -> list[str]:
    try:
        return [str(entry[4][0]) for entry in socket.getaddrinfo(name, None)]
    except OSError:
        return []


def next_life(life: Path) -> Path:
    """The folder of the job's next start. SLURM starts a job again when it has lost a node, which
    may only have lost SLURM: who lives on there has to go."""
    job, _, number = life.name.rpartition(".")
    return life.with_name(f"{job}.{int(number) + 1}")


def begin(life: Path, job: Job, limit: int) -> None:
    """Note how far the job was when this start began. Raises Fruitless after `limit` restarts
    without progress."""
    from segfleet.slurm.snapshot import digest
    from segfleet.slurm.submission import progress_of

    code, frozen = digest(), os.environ.get("SEGFLEET_CODE")
    if frozen not in (None, code):
        raise OtherCode(
            f"the job was to run the code {frozen} and found {code} on its Python path: the frozen "
            "code was changed, or --setup or the container put another segfleet before it. Submit "
            "it again"
        )
    steps = progress_of(job)
    record = {
        "time": time.time(),
        "steps": steps,
        "node": os.environ.get("SLURMD_NODENAME"),
        "code": code,
    }
    write_atomically(life / "life.json", json.dumps(record))
    number = life.name.rpartition(".")[0]
    begun = sorted(
        life.parent.glob(f"{number}.*/life.json"),
        key=lambda path: int(path.parent.name.rpartition(".")[2]),
    )
    lives = (read_json(path) for path in begun)  # of a dead node one may be empty
    if isinstance(job, Command):
        return  # what a command waits for is not its own progress
    before = [record["steps"] for record in lives if record and "steps" in record]
    if len(before) > limit and set(before[-limit - 1 :]) == {steps}:
        where, mend = "", "Give it more time and submit it again"
        if isinstance(job, Train):
            where, mend = (
                f" at step {steps}",
                "Give it more time or save more often (save_minutes), then: segfleet resume",
            )
        node = os.environ.get("SLURMD_NODENAME")
        raise Fruitless(
            f"the job was restarted {limit} times{where} and never got further; last node: "
            f"{node}. {mend}"
        )


def wait_for_slurm() -> None:
    """The rank that truly failed ends the step by its exit code, and a dead node makes SLURM
    requeue: both end us while we wait."""
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    time.sleep(PATIENCE)
