"""Everything that is to be known of segfleet on a GPU, in one call of less than eight minutes.

    python benchmarks/gpu.py [--minutes 8] [--only SECTION ...] [--out FILE] [--again]
                             [--device cuda|cpu] [--quick]

Sections, in the order of their worth: doctor, tests (of the suite, those that need a GPU), resume
(bitwise or not, with and without engine.deterministic), yardstick (the step of nnU-Net's own
network in its own loop, and ours, on the same patches), workers (128 cubed, from store to step,
with 0, 8 and 14 loader processes, and how long the device idles), loader (alone), scan (Triton
against chunked and mamba_ssm), window (sliding window), checkpoint (what saving stalls), networks
(a step of every registered network: time, memory, share of the card's peak, bf16 and fp32, eager
and compiled, and whether it makes the host wait).

Every section runs in a process of its own, within its seconds; every figure is written to FILE as
soon as it is known, and a second call goes on with those that are missing, as it does after a kill.
`--again` forgets what is there. `--device cpu --quick` runs the same code on tiny sizes in about a
minute: its figures mean nothing, that it runs does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

# section -> seconds it may take in one call: without the last less than seven minutes
SECONDS = {
    "doctor": 20,
    "tests": 30,
    "resume": 45,
    "yardstick": 110,
    "workers": 90,
    "loader": 25,
    "scan": 40,
    "window": 30,
    "checkpoint": 25,
    "networks": 420,  # what is left
}
ATTEMPTS = 2  # of a figure whose process does not come back
# figure -> (section, row, key, at least or at most, target)
TARGETS: dict[str, tuple[str, str, str, str, float]] = {
    "voxels/s against nnU-Net's": ("yardstick", "ratio", "times_nnunet", ">=", 1.15),
    "device idle while training, 14 workers": ("workers", "14", "idle", "<=", 0.02),
    "scan against mamba_ssm, 4096": ("scan", "4096", "times_mamba_ssm", ">=", 1.0),
    "scan against mamba_ssm, 65536": ("scan", "65536", "times_mamba_ssm", ">=", 1.0),
    "stall of checkpoints every 10 minutes": ("checkpoint", "stall", "share", "<=", 0.01),
    "resume with engine.deterministic": ("resume", "deterministic", "bitwise", ">=", 1),
}


class Results:
    """The file: {"machine", "sections": {section: {row: facts}}, "targets"}."""

    def __init__(self, path: Path, again: bool = False):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if again:
            path.unlink(missing_ok=True)

    def read(self) -> dict[str, Any]:
        if not self.path.exists():
            return {"machine": {}, "sections": {}, "begun": {}, "targets": []}
        return json.loads(self.path.read_text(encoding="utf-8"))

    def write(self, document: dict[str, Any]) -> None:
        partial = self.path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.path)

    def of_machine(self, facts: dict[str, Any]) -> None:
        """Note where the figures are from; those of two machines are not put into one file."""
        document = self.read()
        if document["machine"] not in ({}, facts):
            sys.exit(
                f"{self.path} holds figures of {document['machine']}, and this is {facts}: "
                "--out another file, or --again"
            )
        self.write(document | {"machine": facts})

    def missing(self, section: str, row: str) -> bool:
        return row not in self.read()["sections"].get(section, {})

    def begin(self, section: str, row: str) -> bool:
        """Note that a figure is being taken; False if it never came back before."""
        document = self.read()
        key = f"{section} {row}"
        document["begun"][key] = document["begun"].get(key, 0) + 1
        if document["begun"][key] > ATTEMPTS:
            document["sections"].setdefault(section, {})[row] = {
                "failed": f"its process did not come back {ATTEMPTS} times"
            }
        self.write(document)
        return document["begun"][key] <= ATTEMPTS

    def keep(self, section: str, row: str, facts: dict[str, Any]) -> None:
        document = self.read()
        document["sections"].setdefault(section, {})[row] = facts
        document["begun"].pop(f"{section} {row}", None)
        document["targets"] = judged(document["sections"])
        self.write(document)
        print(f"{section} {row}: {line(facts)}", flush=True)


def judged(sections: dict[str, Any]) -> list[dict[str, Any]]:
    """Every target beside its figure; "met" is None where that is missing."""
    found = []
    for name, (section, row, key, relation, target) in TARGETS.items():
        value = sections.get(section, {}).get(row, {}).get(key)
        met = None
        if value is not None:
            met = value >= target if relation == ">=" else value <= target
        found.append(
            {"figure": name, "value": value, "target": f"{relation} {target:g}", "met": met}
        )
    return found


def line(facts: dict[str, Any]) -> str:
    shown = (
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in facts.items()
        if not isinstance(value, dict | list)
    )
    return ", ".join(shown)[:200]


def section(asked: argparse.Namespace) -> None:
    """In a process of its own: the rows of one section that are missing, as long as there is
    time."""
    import torch
    from gpu_sections import SECTIONS, Bench

    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // (2 if asked.quick else 1)))
    results, end = Results(asked.out), time.monotonic() + asked.seconds
    bench = Bench(
        device=torch.device(asked.device),
        quick=asked.quick,
        folder=asked.folder,
        known=lambda name, row: results.read()["sections"].get(name, {}).get(row, {}),
    )
    facts = torch.cuda.get_device_properties(0) if asked.device == "cuda" else None
    results.of_machine(
        {
            "gpu": facts and facts.name,
            "gib": facts and round(facts.total_memory / 2**30, 1),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "cores": len(os.sched_getaffinity(0)),
        }
    )
    for row, measure in SECTIONS[asked.section](bench):
        if not results.missing(asked.section, row):
            continue
        if time.monotonic() > end:
            return
        if not results.begin(asked.section, row):
            continue
        start = time.monotonic()
        try:
            facts = measure()
        except Exception as error:
            words = " ".join(str(error).split())[:300]
            facts = {"failed": f"{type(error).__name__}: {words}"}
        facts["took_s"] = round(time.monotonic() - start, 2)
        results.keep(asked.section, row, facts)


def run(asked: argparse.Namespace, folder: Path) -> None:
    """All sections, each within its time and what is left of the call's."""
    end = time.monotonic() + 60 * asked.minutes
    for name in asked.only or SECONDS:
        left = min(SECONDS[name], end - time.monotonic())
        if left < 3:
            print(f"{name}: no time is left; run the same command again", flush=True)
            continue
        command = [sys.executable, str(Path(__file__).resolve()), "--section", name]
        command += ["--seconds", str(left), "--folder", str(folder), "--out", str(asked.out)]
        command += ["--device", asked.device, *(["--quick"] if asked.quick else [])]
        process = subprocess.Popen(command, start_new_session=True)
        try:
            # a compilation may be under way: a while more, but not beyond the call's end
            code = process.wait(left + min(20, max(1, end - time.monotonic() - left)))
            if code:
                print(f"{name}: its process ended with {code}", flush=True)
        except subprocess.TimeoutExpired:
            print(f"{name}: longer than {left:.0f} s; run the same command again", flush=True)
        finally:
            stop(process)


def without_gpu() -> str:
    """Why there is nothing to measure; empty: there is."""
    import torch

    from segfleet.pipeline.devices import driver

    if torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built for CPUs"
    return driver.fault() or "PyTorch sees no GPU here"


def stop(process: subprocess.Popen) -> None:
    """It and the loader processes it has started: they are one session."""
    if process.poll() is None:
        os.killpg(process.pid, 9)
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--minutes", type=float, default=7.8)
    parser.add_argument("--only", nargs="*", choices=SECONDS, help="these sections")
    parser.add_argument("--again", action="store_true", help="forget earlier figures")
    parser.add_argument("--out", type=Path, help="default: results/gpu.json; of --quick, none")
    parser.add_argument("--section", choices=SECONDS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.section:
        section(asked)
        return
    if asked.device == "cuda" and (lacking := without_gpu()):
        parser.exit(2, f"gpu.py: {lacking}; --device cpu --quick shows that it runs\n")
    with tempfile.TemporaryDirectory(prefix="gpu-") as folder:
        if asked.out is None:
            asked.out = Path(folder) if asked.quick else HERE / "results"
            asked.out /= "gpu.json"
        results = Results(asked.out, asked.again)
        run(asked, Path(folder))
        targets = judged(results.read()["sections"])
    for one in targets:
        met = {None: "not measured", True: "met", False: "MISSED"}[one["met"]]
        print(f"{one['figure']}: {one['value']} (target {one['target']}): {met}")


if __name__ == "__main__":
    main()
