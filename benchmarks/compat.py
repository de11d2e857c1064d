"""The quick tests under the lowest versions that setup.py allows, and under the newest.

Each set gets a fresh environment: versions by `uv pip compile`, wheels from the configured index
(gigabytes: torch comes with CUDA), tests on the CPU. `python benchmarks/compat.py [SET ...]`; needs
uv, and the Pythons on PATH or under pyenv. `--keep FOLDER` leaves environments and the tests'
output there. What was installed and what failed goes to results/compat.json. Exit code 1 if
anything failed or the tests did not come to their end.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULT = Path(__file__).parent / "results" / "compat.json"
SETS = {  # name -> Python, how to resolve, further requirements
    "3.11 lowest": ("3.11", "lowest-direct", []),
    "3.12 torch 2.11": ("3.12", "highest", ["torch==2.11.*"]),
    "3.13 newest": ("3.13", "highest", []),
}
QUICK = "not slow and not long and not compile"
PARALLEL = ["-n", "3", "--dist", "loadfile"]  # as `make test`
SHOWN = ("torch", "triton", "numpy", "h5py", "zarr", "numcodecs", "ray", "deepspeed", "submitit")
UV = [sys.executable, "-m", "uv", "--no-config"]


def interpreter(version: str) -> str:
    """Of this version: what uv finds, else pyenv's newest. Raises SystemExit."""
    found = subprocess.run(
        [*UV, "python", "find", "--no-python-downloads", version], capture_output=True, text=True
    )
    if found.returncode == 0:
        return found.stdout.strip()
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    installed = sorted(
        pyenv.glob(f"{version}.*"), key=lambda path: [*map(int, path.name.split("."))]
    )
    if not installed:
        sys.exit(f"Python {version} was found neither by uv nor under {pyenv}")
    return str(installed[-1] / "bin" / "python")


def compat(name: str, folder: Path) -> dict:
    version, resolution, more = SETS[name]
    python, wanted = str(folder / "venv" / "bin" / "python"), folder / "wanted.in"
    wanted.write_text("\n".join([f"segfleet[dev] @ file://{ROOT}", *more]) + "\n")
    target = ["--python", python]
    subprocess.run(
        [*UV, "venv", "-q", "--allow-existing", "-p", interpreter(version), folder / "venv"],
        check=True,
    )
    pinned = subprocess.run(
        [*UV, "pip", "compile", "-q", "--resolution", resolution, *target]
        + ["--no-header", "--no-annotate", str(wanted)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    lines = [line for line in pinned.splitlines() if not line.startswith("segfleet")]
    (folder / "pinned.txt").write_text("\n".join(lines) + "\n")
    # without --compile-bytecode every process that a test starts would compile torch again
    how = ["-q", "--compile-bytecode", *target]
    install = [*UV, "pip", "install", *how]
    subprocess.run([*UV, "pip", "sync", *how, folder / "pinned.txt"], check=True)
    subprocess.run([*install, "--no-deps", "dynamic-network-architectures", "pip"], check=True)
    subprocess.run([*install, "--no-deps", "-e", ROOT], check=True)
    return {"python": version} | tests(python, folder) | {"versions": versions(lines)}


def versions(lines: list[str]) -> dict[str, str]:
    pins = dict(line.split("==") for line in lines if "==" in line)
    return {name: pins.get(name, "-") for name in SHOWN}


def tests(python: str, folder: Path) -> dict:
    bin_folder = str(Path(python).parent)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([bin_folder, os.environ["PATH"]]),
        "OMP_NUM_THREADS": "1",
        "SEGFLEET_DEVICE": "cpu",
    }
    start = time.time()
    with open(folder / "log", "w+", encoding="utf-8") as log:
        ended = subprocess.run(
            [python, "-m", "pytest", "-q", "-m", QUICK, "-p", "no:cacheprovider", *PARALLEL],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        ).returncode
        log.seek(0)
        said = log.read()
    counts = {
        what: int(n)
        for n, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", said.splitlines()[-1])
    }
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "complete": ended in (0, 1),  # pytest's other codes: interrupted, or an error of its own
        "tests": counts,
        "failed": sorted(re.findall(r"^(?:FAILED|ERROR) (\S+)", said, flags=re.M)),
        "minutes": round((time.time() - start) / 60, 1),
        "cpu_minutes_with_installation": round((spent.ru_utime + spent.ru_stime) / 60, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"of {', '.join(SETS)}")
    parser.add_argument("--keep", type=Path, help="leave environments and output in this folder")
    options = parser.parse_args()
    names = options.sets or list(SETS)
    if unknown := sorted(set(names) - set(SETS)):
        parser.error(f"no set {', '.join(unknown)}; there are {', '.join(SETS)}")
    done = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for name in names:
        with tempfile.TemporaryDirectory(prefix="compat-") as temporary:
            folder = options.keep / name.replace(" ", "-") if options.keep else Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            done[name] = {"date": time.strftime("%Y-%m-%d")} | compat(name, folder)
        print(name, json.dumps(done[name], indent=1), flush=True)
        RESULT.write_text(json.dumps(done, indent=1) + "\n")
    return int(any(done[name]["failed"] or not done[name]["complete"] for name in names))


if __name__ == "__main__":
    sys.exit(main())
