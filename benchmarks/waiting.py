"""Steps of a training on CPU cores that others use, too: threads that spin while they wait for each
other, as OpenMP's do by default, against threads that sleep (OMP_WAIT_POLICY=passive, which
`segfleet train` sets on this machine unless it is set).

    python benchmarks/waiting.py [--seconds 20] [--rounds 3]

Each figure is the median of rounds in turns, alone and beside one busy process for each core:
milliseconds by the clock and of CPU time a step. Writes results/waiting.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from segfleet.core.machine import cpus

RESULT = Path(__file__).parent / "results" / "waiting.json"
POLICIES = {"spinning": {}, "sleeping": {"OMP_WAIT_POLICY": "passive"}}
STEP = """
import json, sys, time
import torch
from segfleet.models.registry import build_model
torch.manual_seed(0)
model = build_model("unet_lite_standard", in_channels=3, num_classes=2)
optimizer = torch.optim.SGD(model.parameters(), 0.01)
image = torch.randn(8, 3, 64, 64)
def step():
    optimizer.zero_grad()
    found = model(image)
    (found[0] if isinstance(found, (list, tuple)) else found).square().mean().backward()
    optimizer.step()
for _ in range(3):
    step()
clock, cpu, steps = time.perf_counter(), time.process_time(), 0
while time.perf_counter() - clock < float(sys.argv[1]):
    step()
    steps += 1
print(json.dumps({"clock_ms": 1e3 * (time.perf_counter() - clock) / steps,
                  "cpu_ms": 1e3 * (time.process_time() - cpu) / steps}))
"""


def once(policy: str, beside: int, seconds: float) -> dict[str, float]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    environment |= {"OMP_NUM_THREADS": str(cpus()), **POLICIES[policy]}
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(beside)]
    try:
        command = [sys.executable, "-c", STEP, str(seconds)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    turns = [(policy, beside) for beside in (0, cpus()) for policy in POLICIES]
    found: dict[tuple[str, int], list[dict]] = {turn: [] for turn in turns}
    for _ in range(options.rounds):
        for turn in turns:
            found[turn].append(once(*turn, options.seconds))
    rows = [
        {"policy": policy, "busy_processes": beside}
        | {k: round(statistics.median(row[k] for row in rows), 1) for k in rows[0]}
        for (policy, beside), rows in found.items()
    ]
    result = {"cores": cpus(), "load": round(os.getloadavg()[0], 1), "rows": rows}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
