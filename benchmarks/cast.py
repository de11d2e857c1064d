"""The two pictures of the README, from a real session on synthetic data: a run that is killed and
resumed as an animated SVG, and its report as a PNG (needs chromium). `python benchmarks/cast.py`;
results: docs/pictures/resume.svg, docs/pictures/report.png and benchmarks/results/cast.json."""

from __future__ import annotations

import argparse
import html
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
PICTURES = ROOT / "docs" / "pictures"
COLUMNS, LINE, LEFT, TOP = 92, 19, 16, 44
STEP = 60  # of 100 of the first stage, after which a rank is killed
WEIGHTS = "checkpoints/*/weights.safetensors"


def segfleet(*words: str, folder: Path, **options) -> subprocess.Popen:
    command = [sys.executable, "-m", "segfleet.cli.main", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": str(COLUMNS)}
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True,
        **({"stderr": subprocess.STDOUT} | options),
    )  # fmt: skip


class Session:
    """What a terminal showed: (seconds, kind, line)."""

    def __init__(self, folder: Path):
        self.folder, self.start, self.lines = folder, time.monotonic(), []

    def say(self, kind: str, text: str) -> None:
        self.lines.append((round(time.monotonic() - self.start, 1), kind, text))

    def run(self, *words: str, kill_at: int | None = None, quiet: bool = False) -> int:
        """A command and what it prints; a rank is killed once the run has logged step `kill_at`.
        `quiet`: without its progress."""
        self.say("typed", f"segfleet {' '.join(words)}" + (" 2> log" if quiet else ""))
        errors = subprocess.DEVNULL if quiet else subprocess.STDOUT
        process = segfleet(*words, folder=self.folder, stderr=errors)
        reader = threading.Thread(target=self._read, args=(process,))
        reader.start()
        if kill_at:
            rank = self._wait_for(kill_at, process)
            self.say("note", f"# another shell: kill -9 {rank.pid}, one of the two ranks")
            rank.send_signal(signal.SIGKILL)
        reader.join()
        return process.wait()

    def _read(self, process: subprocess.Popen) -> None:
        for line in process.stdout:
            if line.strip():
                self.say("printed", line.rstrip().replace(f"{self.folder}/", ""))

    def _wait_for(self, step: int, process: subprocess.Popen) -> psutil.Process:
        while process.poll() is None:
            for path in (self.folder / "runs").glob("*/events.jsonl"):
                if f'"step": {step}' in path.read_text():
                    children = psutil.Process(process.pid).children()
                    return max(children, key=lambda child: child.create_time())
            time.sleep(0.05)
        raise SystemExit("the run ended before it could be killed")

    def sums(self) -> tuple[str, str]:
        """sha256 of the final weights of both runs, as the shell prints them."""
        command = f"sha256sum {{runs,undisturbed}}/*/*/{WEIGHTS}"
        self.say("typed", f"sha256sum {{runs,undisturbed}}/*/*/{WEIGHTS}")
        out = subprocess.run(
            ["bash", "-c", command], cwd=self.folder, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        for line in out:
            digest, path = line.split()
            self.say("printed", f"{digest[:32]}...  {path.split('/')[0]}")
        first, second = (line.split()[0] for line in out)
        return first, second


def draw(lines: list[tuple[float, str, str]]) -> str:
    """An SVG of a terminal whose lines appear in their order; a viewer without animation shows all
    of them."""
    wrapped = []
    for number, (_, kind, text) in enumerate(lines):
        prefix = "$ " if kind == "typed" else ""
        for at in range(0, len(text), COLUMNS - 2):
            part = (prefix if at == 0 else "") + text[at : at + COLUMNS - 2]
            wrapped += [(number, kind, part)]
    height, width = TOP + LINE * len(wrapped) + 14, 2 * LEFT + round(8.05 * COLUMNS)
    colours = {"typed": "#ffffff", "printed": "#b9c4d0", "note": "#ffb454"}
    rows = "\n".join(
        f'<text x="{LEFT}" y="{TOP + LINE * row + 10}" fill="{colours[kind]}" '
        f'style="animation-delay:{0.7 * number:.1f}s">{html.escape(text)}</text>'
        for row, (number, kind, text) in enumerate(wrapped)
    )
    dots = "".join(
        f'<circle cx="{20 + 18 * i}" cy="18" r="5.5" fill="{colour}"/>'
        for i, colour in enumerate(("#ff5f57", "#febc2e", "#28c840"))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-label="A training is killed, and the '
        'same command resumes it; the weights are those of an undisturbed run">\n'
        "<style>text{font:13.4px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;"
        "white-space:pre;animation:show .01s both}@keyframes show{from{opacity:0}to{opacity:1}}"
        "@media(prefers-reduced-motion:reduce){text{animation:none}}</style>\n"
        f'<rect width="{width}" height="{height}" rx="9" fill="#14181f"/>{dots}\n{rows}\n</svg>\n'
    )


def picture(report: Path, chromium: str) -> None:
    """The top of a report as PNG, of few colours."""
    from PIL import Image

    shot = report.with_name("shot.png")
    subprocess.run(
        [chromium, "--headless=new", "--no-sandbox", "--hide-scrollbars", "--disable-gpu",
         "--force-device-scale-factor=1", "--window-size=1100,1240", f"--screenshot={shot}",
         report.as_uri()],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    with Image.open(shot) as image:
        image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(
            PICTURES / "report.png", optimize=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draw", action="store_true", help="only draw the recorded session again")
    recorded = ROOT / "benchmarks" / "results" / "cast.json"
    PICTURES.mkdir(parents=True, exist_ok=True)
    if parser.parse_args().draw:
        lines = [tuple(line) for line in json.loads(recorded.read_text())["lines"]]
        (PICTURES / "resume.svg").write_text(draw(lines), encoding="utf-8")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for words in (
            ("datasets", "dsb2018", "phantom", "raw"),
            ("preprocess", "dsb2018", "--raw", "raw", "--out", "stores/phantom2d"),
        ):
            process = segfleet(*words, folder=folder)
            out, _ = process.communicate()
            assert process.returncode == 0, out
        session = Session(folder)
        killed = session.run("train", "phantom2d", "--ranks", "2", kill_at=STEP)
        done = session.run("train", "phantom2d", "--ranks", "2")
        straight = session.run(
            "train", "phantom2d", "--ranks", "2", "--runs", "undisturbed", quiet=True
        )
        assert (killed, done, straight) == (1, 0, 0), session.lines
        first, second = session.sums()
        session.say("note", "# bitwise the same weights" if first == second else "# they differ!")
        facts = {"killed_at_step": STEP, "same_weights": first == second, "lines": session.lines}
        recorded.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        (PICTURES / "resume.svg").write_text(draw(session.lines), encoding="utf-8")
        if chromium := shutil.which("chromium") or shutil.which("google-chrome"):
            picture(next((folder / "runs").rglob("report.html")), chromium)


if __name__ == "__main__":
    main()
