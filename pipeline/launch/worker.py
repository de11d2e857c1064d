"""What every rank runs: join the ranks, do the job, say what went wrong. `python -m
segfleet.pipeline.launch.worker FOLDER`.

FOLDER holds job.json; a rank that fails leaves failed-<rank>.json there for its launcher.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from segfleet.core.errors import explain
from segfleet.core.files import write_atomically
from segfleet.core.litter import forget_multiprocessing
from segfleet.core.process import open_standard_files
from segfleet.pipeline.launch.local import AGAIN, die_with_parent, survive_hangup
from segfleet.pipeline.stop import Interrupted, StopRequest

LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "recv failed",
    "Socket closed",
)
LOST += (
    "Connection refused",
    "Socket Timeout",
    "NCCL communicator was aborted",
    "NCCL error: remote process exited",
)


def main(rendezvous: Path) -> int:
    keep_stdout()
    survive_hangup()
    if parent := os.environ.get("SEGFLEET_PARENT"):
        die_with_parent(int(parent))
    stop = StopRequest()  # before the slow imports, so that no early signal is lost
    stop.at_once = lambda: exit_interrupted(rendezvous)
    job = rendezvous / "job.json"
    code, _ = work(rendezvous, lambda: json.loads(job.read_text(encoding="utf-8")), stop)
    return code


def keep_stdout() -> None:
    """stdout, which belongs to the command line, for Python's own words alone. What libraries in
    C++ write there, as gloo of torch 2.10 does whenever ranks meet, goes to stderr."""
    open_standard_files()
    sys.stdout.flush()
    stdout, terminal = os.dup(1), sys.stdout.isatty()
    sys.stdout = open(stdout, "w", 1 if terminal else -1, sys.stdout.encoding, sys.stdout.errors)
    os.dup2(2, 1)


def work(
    rendezvous: Path,
    read: Callable[[], dict[str, Any]],
    stop: StopRequest,
    first: Callable[[Any], None] = lambda ranks: None,
) -> tuple[int, BaseException | None]:
    """Meet in the folder `rendezvous`, do `first` with the ranks, then the job whose plain JSON
    `read` returns; the exit code and what went wrong."""
    try:
        from segfleet.pipeline.launch.job import OF_A_STORE, parse_job

        job = parse_job(read())
        if isinstance(job, OF_A_STORE):
            from segfleet.preprocess import jobs as preprocessing

            preprocessing.run_job(job, ProgressMessages(stop))
            return 0, None
        from segfleet.pipeline import jobs
        from segfleet.pipeline.ranks import join_ranks

        ranks = join_ranks(rendezvous / "address")
        ranks.give_up = lambda message: give_up(rendezvous, message)
        first(ranks)
        jobs.run_job(job, ranks, stop)
        return 0, None
    except BaseException as error:
        return report(rendezvous, int(os.environ.get("RANK", "0")), error), error


class ProgressMessages:
    """The progress of preprocessing: a line now and then, and the moment at which a stop can be
    obeyed."""

    def __init__(self, stop: StopRequest):
        self.stop, self.phase, self.time = stop, "", 0.0

    def __call__(self, phase: str, done: int, total: int) -> None:
        if phase != self.phase or done == total or time.monotonic() - self.time > 10:
            sys.stdout.write(f"{phase}: {done} of {total}\n")
            sys.stdout.flush()
            self.phase, self.time = phase, time.monotonic()
        if self.stop.asked() and done < total:
            raise Interrupted(
                f"stopped after {done} of {total} ({phase}); what is finished is kept, the same "
                "job goes on"
            )


def report(rendezvous: Path, rank: int, error: BaseException) -> int:
    """Write the reason for the launcher, the message for the user's mistakes and the traceback for
    ours; the exit code."""
    explained = explain(error)
    message, code = explained or (
        f"rank {rank} failed:\n{''.join(traceback.format_exception(error))}",
        1,
    )
    document = {
        "rank": rank,
        "time": time.time(),
        "exit_code": code,
        "message": message,
        "peer_failure": peer_failure(error),
        # the rank that failed first kept the others from the rendezvous
        "joining": getattr(error, "joining", False),
    }
    write_atomically(rendezvous / f"failed-{rank}.json", json.dumps(document))
    return code


def exit_interrupted(rendezvous: Path) -> None:
    """End this rank in the middle of whatever it does. An exception would not: where Python cannot
    raise one, in a finalizer say, it prints it and continues."""
    error = Interrupted(
        "interrupted. Run the same command again: it goes on from the last checkpoint."
    )
    exit_now(report(rendezvous, int(os.environ.get("RANK", "0")), error))


def give_up(rendezvous: Path, message: str) -> None:
    """End this rank because another one hangs; the job is to come back by itself."""
    (rendezvous / AGAIN).touch()
    exit_now(report(rendezvous, int(os.environ.get("RANK", "0")), Interrupted(message)))


def peer_failure(error: BaseException) -> bool:
    """Whether a rank failed only because another one went."""
    return explain(error) is None and any(
        sign in "".join(traceback.format_exception(error)) for sign in LOST
    )


def exit_now(code: int) -> None:
    """End this process at once: threads and process groups of a broken group must not hold a failed
    rank back."""
    with suppress(RuntimeError, OSError):  # RuntimeError: this is a signal in the middle of a write
        sys.stdout.flush()
        sys.stderr.flush()
    forget_multiprocessing()
    os._exit(code)


if __name__ == "__main__":
    exit_now(main(Path(sys.argv[1])))
