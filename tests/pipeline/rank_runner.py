"""Run a function on real processes that form a process group.

`run_in_ranks("engine_programs.py:train_all", 2, store=...)` calls `train_all(ranks, store=...)` of
that file beside this one in two processes and returns what the ranks returned. Arguments are plain
JSON, results what `torch.save` takes. In the ranks warnings are errors, as in pytest, and whatever
reaches stdout is a failure: stdout belongs to the command line.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

# the last: DDP, 1x1x1
HARMLESS = (
    ":DeprecationWarning",
    ":PendingDeprecationWarning",
    ":ResourceWarning",
    "Grad strides do not match",
)
STRICT = ["-W", "error", *(part for kind in HARMLESS for part in ("-W", f"ignore:{kind}"))]


def run_in_ranks(program: str, ranks: int, timeout: float = 240.0, **arguments: Any) -> list[Any]:
    """Results, rank by rank. Raises AssertionError with the output of every rank that failed; no
    process is left behind."""
    import torch

    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps({"program": program, "arguments": arguments}))
        processes = [_start(folder, rank, ranks) for rank in range(ranks)]
        try:
            end = time.monotonic() + timeout
            while any(process.poll() is None for process in processes) and time.monotonic() < end:
                if any(process.poll() for process in processes):
                    time.sleep(1.0)  # the others may have something to say
                    break
                time.sleep(0.05)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        failed = [rank for rank, process in enumerate(processes) if process.returncode]
        said = "\n".join(
            f"rank {rank}:\n{(folder / f'{rank}.err').read_text()[-4000:]}" for rank in failed
        )
        assert not failed, f"{program} failed on rank(s) {failed} of {ranks}\n{said}"
        chatter = "".join((folder / f"{rank}.out").read_text() for rank in range(ranks))
        assert not chatter, f"{program} wrote to stdout:\n{chatter}"
        return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


def _start(folder: Path, rank: int, ranks: int) -> subprocess.Popen:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "OMP_NUM_THREADS": "1",
    }
    with open(folder / f"{rank}.out", "w") as out, open(folder / f"{rank}.err", "w") as err:
        return subprocess.Popen(
            [sys.executable, *STRICT, __file__, str(folder)],
            env=environment,
            stdout=out,
            stderr=err,
        )


def _work(folder: Path) -> int:
    import torch

    from segfleet.pipeline.ranks import join_ranks

    rank = os.environ["RANK"]
    try:
        job = json.loads((folder / "job.json").read_text())
        file, _, function = job["program"].rpartition(":")
        spec = importlib.util.spec_from_file_location("rank_program", Path(__file__).parent / file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        ranks = join_ranks(folder / "address")
        result = getattr(module, function)(ranks, **job["arguments"])
        torch.save(result, folder / f"{rank}.pt")
        ranks.barrier()
        return 0
    except BaseException:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    code = _work(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
