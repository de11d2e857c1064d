"""Clusters as sites run them: all long tests of tests/slurm on real SLURM sandboxes, and scripts
that rebuild what users have reported. Needs root and Debian's SLURM with its accounting.

`python benchmarks/sites.py [--tests] [--cases FOLDER] [NAME ...]`. A script exits 0 where all is
right, 1 where the fault is back. What is not asked for keeps its last result in results/sites.json;
NAME: only the tests or scripts whose names contain it. Exit code 1 if anything failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from long import PATIENCE, ROOT, outcomes

from segfleet.core.files import write_atomically

RESULT = Path(__file__).parent / "results" / "sites.json"


def case(script: Path) -> dict:
    """Exit code, last words and CPU seconds of one script. `segfleet` is that of this Python."""
    own = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": f"{own}{os.pathsep}{os.environ['PATH']}"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile("w+") as output:
        done = subprocess.Popen(
            ["bash", script], env=environment, stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            done.wait(600 * PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(done.pid, signal.SIGTERM)  # the script's trap stops its SLURM
            done.wait()
        output.seek(0)
        lines = output.read().splitlines()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    words = next((line for line in lines if line.startswith("FAULT")), "".join(lines[-1:]))
    return {"exit_code": done.returncode, "last_words": words[:300], "cpu_seconds": round(used, 1)}


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--tests", action="store_true", help="run the long tests")
    options.add_argument("--cases", type=Path, help="run the scripts in this folder")
    options.add_argument("names", nargs="*", help="only those whose names contain one of these")
    asked = options.parse_args()
    version = subprocess.run(["slurmd", "-V"], capture_output=True, text=True).stdout.strip()

    def keep(part: str, found: dict[str, dict]) -> None:
        kept = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        kept |= {"slurm": version, "cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d")}
        kept.setdefault(part, {}).update(found)
        write_atomically(RESULT, json.dumps(kept, indent=1) + "\n")

    for script in sorted(asked.cases.glob("*.sh")) if asked.cases else []:
        if not asked.names or any(re.search(name, script.stem) for name in asked.names):
            found = case(script)
            print(script.stem, found, flush=True)
            keep("cases", {script.stem: found})
    chosen = ["-k", " or ".join(asked.names)] if asked.names else []
    for module in sorted((ROOT / "tests" / "slurm").glob("test_slurm_*.py")) if asked.tests else []:
        if not asked.names or any(name in module.read_text() for name in asked.names):
            keep("tests", outcomes([str(module), *chosen]))
    kept = json.loads(RESULT.read_text())
    faults = [name for name, found in kept.get("cases", {}).items() if found["exit_code"]]
    faults += [
        name for name, found in kept.get("tests", {}).items() if found["outcome"] != "passed"
    ]
    print("\n".join(["not right:", *faults]) if faults else "all right")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
