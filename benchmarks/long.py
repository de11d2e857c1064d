"""The tests behind the marker `long`: outcome and seconds of each.

`python benchmarks/long.py [WORDS OF PYTEST ...]`: folders, files, `-k EXPRESSION`; all without.
What is not asked for keeps its last result in results/long.json. Exit code 1 if anything failed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

from segfleet.core.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
RESULT = Path(__file__).parent / "results" / "long.json"
PATIENCE = float(os.environ.get("SEGFLEET_TEST_PATIENCE", 1))  # more on a loaded machine


def outcomes(words: list[str]) -> dict[str, dict]:
    """Outcome and seconds of every long test that pytest finds with `words`, by module and name."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = ["-m", "pytest", "-q", "-m", "long", *words, f"--junitxml={report}"]
        command.append(f"--timeout={1200 * PATIENCE:.0f}")  # s for a test
        subprocess.run([sys.executable, *command], cwd=ROOT)
        found = {}
        for case in ElementTree.parse(report).getroot().iter("testcase"):
            ends = [child for child in case if child.tag in ("failure", "error", "skipped")]
            said = {"last_words": ends[0].get("message", "")[:300]} if ends else {}
            module = case.get("classname", "").rpartition(".")[2]
            found[f"{module}::{case.get('name')}"] = {
                "outcome": ends[0].tag if ends else "passed",
                "seconds": round(float(case.get("time", 0)), 1),
                **said,
            }
    return found


def main() -> int:
    kept = json.loads(RESULT.read_text()) if RESULT.exists() else {"tests": {}}
    found = outcomes(sys.argv[1:])
    for each in found.values():
        each["date"] = time.strftime("%Y-%m-%d")
    kept["tests"] = dict(sorted((kept["tests"] | found).items()))
    kept["cores"] = os.cpu_count()
    write_atomically(RESULT, json.dumps(kept, indent=1) + "\n")
    faults = [name for name, each in found.items() if each["outcome"] not in ("passed", "skipped")]
    print("\n".join(["not right:", *faults]) if faults else f"all right: {len(found)}")
    return bool(faults) or not found


if __name__ == "__main__":
    sys.exit(main())
