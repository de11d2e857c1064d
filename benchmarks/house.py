"""How long one looks for something in this repository, and how large its rooms are.

    python benchmarks/house.py [COMMIT]    default: before and after the wings, and now

Names read: whoever opens a folder reads the names in it, from the root down to the file, the root's
own among them (what a repository keeps there for tools and for those who publish). Places that are
not there at a commit are null. Lines: of Python, per room. Result:
benchmarks/results/house.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
BEFORE, AFTER = "7fadff5~1", "0b5130c"  # the wings came between the two
PRODUCT = ("core", "preprocess", "models", "pipeline", "slurm", "sweeps", "cli")
ROOMS = (*PRODUCT, "tests", "benchmarks")
# What is looked for -> where it lies, in the newest layout first.
PLACES = {
    "the training loop": ("pipeline/training/train.py", "pipeline/train.py"),
    "the place of a metric": ("pipeline/scoring/metrics.py", "pipeline/metrics.py"),
    "the place of an augmentation": ("pipeline/data/augment.py", "pipeline/augment.py"),
    "the place of an export": ("preprocess/exporting/nnunet.py", "cli/export.py"),
}


def git(*words: str) -> str:
    return subprocess.check_output(["git", *words], cwd=HERE.parent, text=True)


def names_read(commit: str, place: str) -> int | None:
    """Names in all folders on the way to a file; None where there is no such file."""
    path, read, tree = Path(place), 0, f"{commit}:"
    for part in path.parts:
        names = git("ls-tree", "--name-only", tree).split()
        if part not in names:
            return None
        read, tree = read + len(names), f"{tree}{part}/"
    return read


def lines(commit: str) -> dict[str, int]:
    """Lines of Python in each room."""
    found = dict.fromkeys(ROOMS, 0)
    for row in git("grep", "-c", "", commit, "--", "*.py").splitlines():
        _, path, count = row.split(":")
        room = path.partition("/")[0]
        if room in found:
            found[room] += int(count)
    return found


def look(commit: str) -> dict:
    read = {
        what: next((n for place in places if (n := names_read(commit, place)) is not None), None)
        for what, places in PLACES.items()
    }
    rooms = lines(commit)
    product = sum(rooms[room] for room in PRODUCT)
    root = len(git("ls-tree", "--name-only", f"{commit}:").split())
    facts = {
        "names_read": read,
        "of_them_at_the_root": root,
        "lines": rooms,
        "lines_of_the_product": product,
    }
    return {"commit": git("rev-parse", "--short", commit).strip(), **facts}


def main() -> None:
    if commits := sys.argv[1:]:
        print(json.dumps([look(commit) for commit in commits], indent=1))
        return
    found = {"before the wings": look(BEFORE), "after": look(AFTER), "now": look("HEAD")}
    text = json.dumps(found, indent=1) + "\n"
    (HERE / "results" / "house.json").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
