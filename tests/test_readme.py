"""Every command of the README runs, in its order, on synthetic data in the layouts it names."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
# not 15 minutes
LESS = [
    "stages.0.epochs=1",
    "stages.0.steps=2",
    "model.options.features=[4,8,8]",
    "data.patch=[8,16,16]",
    "data.batch=2",
]
# tests/slurm, tests/sweeps
BY_OTHER_TESTS = (
    "submit",
    "logs",
    "cancel",
    "resume",
    "slurm-sandbox",
    "sweep",
)


def commands() -> list[list[str]]:
    """The segfleet commands of all code blocks and in the text, comments cut off; those with a
    placeholder like NAME left out."""
    blocks = re.findall(r"^```\n(.*?)^```", README, flags=re.M | re.S)
    inline = re.findall(r"`(segfleet [^`]+)`", README)
    lines = [*"\n".join(blocks).splitlines(), *inline]
    found = [shlex.split(line, comments=True) for line in lines if line.startswith("segfleet ")]
    return [command for command in found if not any(word.isupper() for word in command)]


def segfleet(*arguments: str, cwd: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "segfleet.cli.main", *arguments]
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, f"{shlex.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_commands_of_the_readme(tmp_path):
    segfleet("datasets", "msd", "phantom", "Task04_Hippocampus", cwd=tmp_path)
    segfleet("datasets", "nnunet", "phantom", "Dataset001_Mine", cwd=tmp_path)
    (tmp_path / "new_images").symlink_to(tmp_path / "Task04_Hippocampus" / "imagesTr")
    ran = []
    for _, name, *rest in commands():
        if name in BY_OTHER_TESTS:
            continue
        if name == "train":
            rest = [*rest[:1], *LESS, *rest[1:]]
        segfleet(name, *rest, cwd=tmp_path)
        ran.append(name)
    assert {
        "doctor",
        "datasets",
        "preprocess",
        "train",
        "status",
        "predict",
        "recipe",
        "evaluate",
        "models",
    } <= set(ran)
    assert len(list((tmp_path / "predictions").glob("*.nii.gz"))) == len(
        list((tmp_path / "new_images").glob("[!.]*.nii.gz"))
    )
    (code,) = re.findall(r"^```python\n(.*?)^```", README, flags=re.M | re.S)
    code += "assert logits.shape == (1, 3, 32, 32, 32) and label.shape == image.shape[1:]\n"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=100)


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(
        re.findall(
            r"^make (\w+)",
            README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
            flags=re.M,
        )
    ):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_links_of_the_documents_lead_somewhere():
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_no_path_of_one_machine():
    found = subprocess.run(
        ["git", "-C", str(ROOT), "grep", "-lE", "/wor[k]/|/opt/pyp[i]"],
        capture_output=True,
        text=True,
    )
    assert found.stdout == ""
