"""Every command of README and docs runs, in its order, on synthetic data in the layouts it names.

A fenced block without a language is commands if its first line begins with a program; ```python is
run, too. All pages share one folder, README first, so a page finds what the ones before it made.
What a reader has and we have not is made here: raw data (a phantom of the layout named), images to
predict, RUN (the run that README trains). `submit` and `sweep` rehearse (`--dry-run`); commands
that need a submitted job or daemons are only parsed, and run for real in tests/slurm. In an HTML
comment above a block a page may say

    <!-- first: segfleet datasets lits phantom raw/lits -->     to be run before it
    <!-- test: not here -->                                     parse it: needs a network or a GPU
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("segfleet", "make", "pip", "python", "python3", "podman", "apptainer", "git", "export")
LESS = [
    "stages.0.epochs=1",
    "stages.0.steps=2",
    "model.options.features=[4,8,8]",
    "data.patch=[16,32,32]",
    "data.batch=2",
]  # not 15 minutes
PARSED = ("logs", "cancel", "resume", "slurm-sandbox")
BLOCK = re.compile(
    r"((?:^<!--[^\n]*-->\n+)*)^```(\w*)\n(.*?)^```|`(segfleet [^`\n]+)`", re.M | re.S
)
DRIVER = """# A fork will do.
import importlib.util, json, sys
from pathlib import Path
from segfleet.cli import main
spec = importlib.util.spec_from_file_location("warm", sys.argv[1])  # ranks that start at once
warm = importlib.util.module_from_spec(spec)
spec.loader.exec_module(warm)
undo = warm.install()
for words in json.load(sys.stdin):
    if words[0] == "python":
        print("python:", words[1][:60], flush=True)
        exec(compile(words[1], "page", "exec"), {"__name__": "page"})
        continue
    if words[0] == "predict" and not Path(words[2]).exists():
        Path(words[2]).mkdir()
        for image in sorted(next(Path().glob("*/imagesTr")).resolve().glob("[!.]*.nii.gz"))[:2]:
            (Path(words[2]) / image.name).symlink_to(image)
    if "RUN" in words:
        # README's own: what `train auto` plans hangs on measured time, and so does its uid
        scored = [path.parent for path in Path("runs").rglob("evaluation.json")]
        names = {path: json.loads((path / "recipe.json").read_text())["name"] for path in scored}
        run = min(path for path in scored if names[path] == "hippocampus").name
        words = [run if word == "RUN" else word for word in words]
    print("$ segfleet", *words, flush=True)
    sys.argv = ["segfleet", *words]
    try:
        main.main()
    except SystemExit as end:
        if end.code:
            sys.exit(f"exit code {end.code} of: segfleet {' '.join(words)}")
undo()
"""


def parts(page: Path):
    """(what a comment says, language, text) of every block and of every command in the text."""
    for found in BLOCK.finditer(page.read_text(encoding="utf-8")):
        notes, language, block, inline = found.groups()
        if inline:
            yield "", "inline", inline
        elif language == "python" or (
            not language and re.split(r"[\s=]", block.strip())[0] in PROGRAMS
        ):
            yield notes or "", language or "commands", block
        elif notes:
            yield notes, language, ""


def lines(block: str) -> list[list[str]]:
    text = block.replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def all_lines(program: str) -> list[tuple[str, list[str]]]:
    """(page, words) of every line of a block that begins with `program`."""
    return [
        (page.name, words)
        for page in PAGES
        for _, kind, text in parts(page)
        if kind == "commands"
        for words in lines(text)
        if words[0] == program
    ]


def plan() -> list[list[str]]:
    """What to run, page after page. A second training of a recipe goes apart: one run has the
    name."""
    steps, raw, trained, follows = [], set(), set(), None
    for page in PAGES:
        for notes, kind, text in parts(page):
            steps += map(shlex.split, re.findall(r"first: segfleet (.*?)-->", notes))
            if "test: not here" in notes or (kind == "inline" and page.name != "README.md"):
                continue
            if kind == "python":
                if follows == page:  # a block may use what the one before it made
                    steps[-1] = ["python", steps[-1][1] + text]
                else:
                    steps.append(["python", text])
                follows = page
                continue
            for program, *words in lines(text):
                if program == "segfleet" and can_run(words):
                    follows = None
                    again = words[0] == "train" and words[1] in trained
                    apart = ["--runs", "apart"] if again else []
                    trained |= {words[1]} if words[0] == "train" else set()
                    steps += [*phantoms(words, raw), adapted(words) + apart]
    # the same words in another order are parsed, not run
    return [step for k, step in enumerate(steps) if sorted(step) not in map(sorted, steps[:k])]


def can_run(words: list[str]) -> bool:
    if words[0] in PARSED or words[:2] == ["sweep", "status"]:
        return False
    if any(word.isupper() and word != "RUN" for word in words):  # NAME, DIR
        return False
    needed = [option.name for option in command_of(words[0]).params if option.required]
    return len(words) > 1 or not needed  # a bare name in the text names the command


def phantoms(words: list[str], raw: set[str]) -> list[list[str]]:
    """The raw data a command reads, unless an earlier one made or used them."""
    place = None
    if words[0] == "datasets" and words[2:3] == ["check"]:
        layout, place = words[1], words[3]
    elif "preprocess" in words and "--raw" in words:
        layout, place = words[words.index("preprocess") + 1], words[words.index("--raw") + 1]
    elif words[0] == "datasets" and words[2:3] == ["phantom"]:
        raw.add(words[3])
    if place is None or place in raw:
        return []
    raw.add(place)
    return [["datasets", layout, "phantom", place]]


def adapted(words: list[str]) -> list[str]:
    name, *rest = words
    if name == "train":
        return [name, *rest[:1], *LESS, *rest[1:]]
    rehearse = [] if "--dry-run" in rest else ["--dry-run"]
    if name == "submit":
        return [name, *rehearse, *rest]
    if name == "sweep":  # phantoms are smaller than the patches of papers
        return [name, *rest, "data.patch=null", *rehearse]
    return words


@pytest.mark.slow
@pytest.mark.timeout(620)
def test_commands_of_all_pages(tmp_path):
    steps = plan()
    no_slurm = tmp_path / "slurm.conf"  # empty: there is no controller, and no waiting for one
    no_slurm.touch()
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(ROOT / "tests" / "warm.py")],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "SLURM_CONF": str(no_slurm)},
        input=json.dumps(steps),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    ran = {words[0] for words in steps}
    assert {"doctor", "datasets", "preprocess", "train", "evaluate", "status", "predict"} <= ran
    assert {"recipe", "models", "submit", "sweep"} <= ran
    predicted = list((tmp_path / "predictions").glob("*.nii.gz"))
    assert len(predicted) == len(list((tmp_path / "new_images").glob("[!.]*.nii.gz")))


def command_of(name: str):
    from segfleet.cli import main

    command = typer.main.get_command(main.app).get_command(None, name)
    assert command is not None, f"segfleet {name}: there is no such command"
    return command


@pytest.mark.parametrize(
    "page, words",
    [pytest.param(*found, id=f"{found[0]}-{k}") for k, found in enumerate(all_lines("segfleet"))],
)
def test_every_command_in_a_block_parses(page, words):
    """Options, arguments and their types, also of what no test can run in place."""
    command_of(words[1]).make_context(words[1], words[2:])


def test_commands_in_the_text_exist_with_their_options():
    from segfleet.cli import main

    everywhere = typer.main.get_command(main.app)  # takes its options before or after a command
    for page in PAGES:
        for _, kind, text in parts(page):
            if kind != "inline":
                continue
            words = shlex.split(text)[1:]
            if words == ["--help"]:
                continue
            options = [*command_of(words[0]).params, *everywhere.params]
            known = {flag for option in options for flag in option.opts}
            flags = {word for word in words if word.startswith("--") and word != "--"}
            assert flags <= known | {"--help"}, f"{page.name}: {text}"


def test_make_commands_of_all_pages():
    """`make -n` with the very words: targets and variables."""
    found = all_lines("make")
    assert {"demo", "test", "compat", "release"} <= {words[1] for _, words in found} | {
        word for page in PAGES for word in re.findall(r"`make (\w+)", page.read_text())
    }
    for page, words in found:
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, f"{page}: {shlex.join(words)}\n{done.stderr}"


def test_pip_commands_of_all_pages():
    """Files, extras and torch's version are those of the repository. tests/test_packaging.py
    resolves the commands."""
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    torch = re.search(r"^TORCH \?= (\S+)", (ROOT / "Makefile").read_text(), flags=re.M)[1]
    for page, words in all_lines("pip"):
        for flag, value in zip(words, words[1:], strict=False):
            assert flag != "-c" or (ROOT / value).is_file(), f"{page}: {value}"
            for extra in re.findall(r"^\.\[(\w+)\]$", value):
                assert f'"{extra}": [' in setup, f"{page}: {value}"
        assert {word for word in words if word.startswith("torch")} <= {torch}, page


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
