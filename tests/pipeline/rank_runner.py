"""Run a function on real processes that form a process group.

`RankRunner()("engine_programs.py:train_all", 2, store=...)` calls `train_all(ranks, store=...)` of
that file beside this one in two processes and returns what the ranks returned. Arguments are plain
JSON, results what `torch.save` takes. In the ranks warnings are errors, as in pytest, and whatever
reaches stdout is a failure: stdout belongs to the command line.

The ranks are forks of one process that has imported what takes seconds (torch, its compiler, which
every optimizer imports, and the program), and nothing else: no process group, no thread. It is
itself a fork of the suite's warm process (tests/warm.py).
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

# the last: DDP, 1x1x1
HARMLESS = (
    ":DeprecationWarning",
    ":PendingDeprecationWarning",
    ":ResourceWarning",
    "Grad strides do not match",
)
STRICT = ["error", *(f"ignore:{kind}" for kind in HARMLESS)]  # as after python -W
# as `python FILE`
START = """# A fork will do.
import os, runpy, sys
sys.path[0] = os.path.dirname(sys.argv[1])
runpy.run_path(sys.argv[1], run_name="__main__")
"""


class RankRunner:
    """Its process is started by the first call, and ends with `close` or with this process."""

    server: subprocess.Popen | None = None

    def __call__(
        self, program: str, ranks: int, timeout: float = 240.0, **arguments: Any
    ) -> list[Any]:
        """Results, rank by rank. Raises AssertionError with the output of every rank that failed;
        no rank is left behind. `timeout`: seconds that a machine of their own would take."""
        import torch

        with tempfile.TemporaryDirectory(prefix="ranks-") as name:
            folder = Path(name)
            order = {"folder": name, "program": program, "ranks": ranks}
            order["timeout"] = timeout * float(os.environ.get("SEGFLEET_TEST_PATIENCE", 1))
            codes = self._ask(order | {"arguments": arguments, "environment": {**os.environ}})
            failed = [rank for rank, code in enumerate(codes) if code]
            said = "\n".join(
                f"rank {rank} ({codes[rank]}; -9: too late, or another one failed):\n"
                + (folder / f"{rank}.err").read_text()[-4000:]
                for rank in failed
            )
            assert not failed, f"{program} failed on rank(s) {failed} of {ranks}\n{said}"
            chatter = "".join((folder / f"{rank}.out").read_text() for rank in range(ranks))
            assert not chatter, f"{program} wrote to stdout:\n{chatter}"
            return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]

    def _ask(self, order: dict[str, Any]) -> list[int]:
        if self.server is None:
            self.server = subprocess.Popen(
                [sys.executable, "-c", START, __file__],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def close(self) -> None:
        if self.server is not None:
            self.server.stdin.close()
            self.server.wait(60)
            self.server.stdout.close()


def serve() -> None:
    """Orders, one a line, until there are no more."""
    import torch._dynamo  # noqa: F401

    from segfleet.pipeline import jobs  # noqa: F401
    from segfleet.pipeline.launch.local import die_with_parent

    die_with_parent(os.getppid())
    sys.warnoptions[:] = STRICT  # their own children get them, too
    warnings.resetwarnings()
    warnings._processoptions(STRICT)
    for line in sys.stdin:
        order = json.loads(line)
        with suppress(Exception):  # the ranks will say it
            _program(order["program"].rpartition(":")[0])
        gc.freeze()  # DeepSpeed collects garbage for every engine: not among what is imported
        ranks = [_fork(order, rank) for rank in range(order["ranks"])]
        codes = _watch(ranks, order["timeout"])
        sys.stdout.write(json.dumps(codes) + "\n")
        sys.stdout.flush()
    os._exit(0)


def _watch(waiting: list[int], timeout: float) -> list[int]:
    """Exit codes of these children, all of which have ended; negative: by that signal."""
    order, codes = list(waiting), {}
    end, spent, before = math.inf, 0.0, time.monotonic()
    while len(codes) < len(order):
        now = time.monotonic()
        # a machine that others use, too, gets more time: their share is not the ranks' own
        spent += (now - before) * min(1.0, (os.cpu_count() or 1) / max(0.1, os.getloadavg()[0]))
        before = now
        for child in order:
            if child not in codes:
                ended, status = os.waitpid(child, os.WNOHANG)
                codes |= {child: os.waitstatus_to_exitcode(status)} if ended else {}
        if any(codes.values()):  # the others may have something to say
            end = min(end, now + 1.0)
        if spent > timeout or now > end:
            for child in order:
                if child not in codes:
                    os.kill(child, 9)
                    codes[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.02)
    return [codes[child] for child in order]


def _fork(order: dict[str, Any], rank: int) -> int:
    parent = os.getpid()
    if child := os.fork():
        return child
    code = 1
    try:
        from segfleet.pipeline.launch.local import die_with_parent

        die_with_parent(parent)
        folder = Path(order["folder"])
        os.environ.clear()
        os.environ.update(
            order["environment"],
            RANK=str(rank),
            WORLD_SIZE=str(order["ranks"]),
            LOCAL_RANK=str(rank),
            OMP_NUM_THREADS="1",
        )
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, kind in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / f"{rank}.{kind}", os.O_CREAT | os.O_WRONLY), number)
        code = _work(folder, order["program"], order["arguments"])
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _work(folder: Path, program: str, arguments: dict[str, Any]) -> int:
    import torch

    from segfleet.pipeline.launch.worker import keep_stdout
    from segfleet.pipeline.ranks import join_ranks

    keep_stdout()
    try:
        file, _, function = program.rpartition(":")
        run = getattr(_program(file), function)
        ranks = join_ranks(folder / "address")
        torch.save(run(ranks, **arguments), folder / f"{ranks.rank}.pt")
        ranks.barrier()
        return 0
    except BaseException:
        traceback.print_exc()
        return 1


@functools.cache
def _program(file: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("rank_program", Path(__file__).parent / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    serve()
