"""The report: complete, self-contained, safe, and working in a real browser."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch

from segfleet.core.errors import InputError
from segfleet.pipeline.inference.sliding_window import Window
from segfleet.pipeline.reports.curves import MOST, broken, curve, running_mean, thinned, ticks
from segfleet.pipeline.reports.html import TEMPLATES, Cell, environment
from segfleet.pipeline.reports.overlays import save_overlays
from segfleet.pipeline.reports.report import write_report
from segfleet.pipeline.scoring.evaluate import CaseJournal, evaluate_cases
from segfleet.pipeline.task import make_task
from segfleet.preprocess.building.build import build
from segfleet.preprocess.building.request import BuildRequest
from segfleet.preprocess.phantoms.phantom import write_msd_phantom
from segfleet.preprocess.stores.base import open_store

RECIPE = {
    "name": "blobs <script>alert(1)</script> & co",
    "seed": 7,
    "data": {
        "store": "stores/phantom",
        "split": "kfold",
        "fold": 0,
        "batch": 2,
        "patch": [8, 16, 16],
    },
    "model": {"name": "plain_unet_3d"},
    "optimizer": {"name": "adamw"},
    "engine": {"name": "ddp", "precision": "bf16"},
    "stages": [
        {"name": "base", "epochs": 10, "lr": 3e-4},
        {"name": "finetune", "epochs": 2, "lr": 1e-4},
    ],
}


def forward(x):
    """Channel k likes voxels near 1.3 k standard deviations: Dice somewhere between 0 and 1."""
    axes = tuple(range(1, x.ndim))
    z = (x - x.mean(axes, keepdim=True)) / x.std(axes, keepdim=True)
    return torch.cat([torch.exp(-((z - 1.3 * k) ** 2)) for k in range(3)], 1)


def events(steps, start, lr):
    first = {"event": "stage_start", "time": start, "step": 0, "steps": steps, "ranks": 2}
    lines = [first | {"hardware": "2 x 16 cores of Fast CPU 9000"}]
    for step in range(10, steps + 1, 10):
        loss = 0.2 + math.exp(-step / 300) + 0.1 * math.sin(step * 12.9898)
        facts = {"time": start + step, "step": step, "epoch": step // 100}
        lines.append({"event": "step", **facts, "loss": loss, "lr": lr * (1 - step / 2000)})
        if step % 100 == 0:
            dice = 0.9 - 0.6 * math.exp(-step / 300)
            lines.append({"event": "validation", **facts, "dice": dice})
    lines.append({"event": "finished", "time": start + steps, "step": steps, "joules": 1.8e6})
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run folder with two stages, scores of eight cases (one of them empty on both sides, one
    missed) and overlays."""
    root = tmp_path_factory.mktemp("report")
    write_msd_phantom(root / "raw", cases=8, size=(10, 32, 40))
    build(BuildRequest("msd", root / "raw", root / "store", workers=1))
    store = open_store(root / "store")
    task, window = make_task(store.manifest.dataset), Window(patch=(8, 16, 16), batch=4)
    leaf = root / "runs" / "0a1b2c3d4e5f" / "f5e4d3c2b1a0"
    leaf.mkdir(parents=True)
    (leaf / "recipe.json").write_text(json.dumps(RECIPE))
    (leaf.parent / "events.jsonl").write_text(events(1000, 1.7e9, 3e-4))
    # cut off by a kill
    (leaf / "events.jsonl").write_text(events(200, 1.7e9 + 2000, 1e-4) + '{"event": "step", "st')
    kept = CaseJournal(root / "kept", {}, 0)
    document = evaluate_cases(
        forward, store, [case.id for case in store.manifest.cases], task, window, journal=kept
    )
    document |= {
        "checkpoint": "step-000000200",
        "split": "kfold",
        "fold": 0,
        "selected_on_these_cases": False,
        "parameters": 1234567,
        "training_cases": 32,
    }
    save_overlays(leaf, document, store, task, kept.slices)
    (leaf / "evaluation.json").write_text(json.dumps(document))
    return leaf


class Page(HTMLParser):
    """What a test wants to know of a page; fails on tags that do not match."""

    VOID = {"meta", "img", "br"}

    def __init__(self, text):
        super().__init__()
        self.stack, self.tags, self.text, self.ids = [], [], [], []
        self.feed(text)
        assert not self.stack, self.stack

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.stack and self.stack.pop() == tag, tag

    def handle_data(self, data):
        if not self.stack or self.stack[-1] not in ("script", "style"):
            self.text.append(data)


@pytest.fixture(scope="module")
def written(finished):
    path = write_report(finished)
    assert path == finished / "report.html"
    return path.read_text(encoding="utf-8")


def test_it_is_one_well_formed_file_that_needs_nothing_else(written):
    page = Page(written)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form"), tag
        for name in ("src", "href", "data", "action"):
            assert attributes.get(name, "data:").startswith("data:"), attributes
    assert not re.search(r"https?:|url\(|@import", written)
    assert len(page.ids) == len(set(page.ids))
    assert len(written) < 2_000_000


def test_names_cannot_break_out(written):
    assert "<script>alert" not in written and "&lt;script&gt;alert(1)" in written
    assert [tag for tag, _ in Page(written).tags].count("script") == 1


def test_every_picture_has_a_text(written):
    pictures = [(tag, a) for tag, a in Page(written).tags if tag == "img" or (tag == "svg")]
    assert len(pictures) == 3 + 4
    for tag, attributes in pictures:
        assert len(attributes["alt" if tag == "img" else "aria-label"]) > 30
        assert tag == "img" or attributes["role"] == "img"


def test_the_numbers_are_those_of_the_evaluation(finished, written):
    document = json.loads((finished / "evaluation.json").read_text())
    text = " ".join(Page(written).text)
    summary = document["summary"]
    low, high = summary["mean_foreground_dice_ci95"]
    assert f"{summary['mean_foreground_dice']:.3f}" in text and f"{low:.3f} to {high:.3f}" in text
    for name, scores in summary["structures"].items():
        row = re.search(rf'<tr><th scope="?row"?>{name}</th>(.*?)</tr>', written)[1]
        assert f"{scores['dice']['mean']:.3f}<small>" in row
        assert "{:.3f} to {:.3f}".format(*scores["dice"]["ci95"]) in row
    for name, definition in document["definitions"].items():
        assert name in text and definition in text
    for fact in (
        "1,234,567",
        "kfold, fold 0",
        "plain_unet_3d",
        "base: 10 epochs, lr 0.0003, 1,000 steps",
        "2023-11-14 22:13 UTC",
    ):
        assert fact in text, fact


def test_what_a_paper_asks_for_is_there(finished, written):
    """By hand: 1,000 and 200 steps of a second; twice half a kilowatt hour, of which the kill of
    the second stage left nothing; voxels of the phantom; ml per case; colours as in the
    pictures."""
    facts = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", written))
    assert facts["Training cases"] == "32" and facts["Training time"] == "0 h 20 min"
    assert facts["Hardware"] == "2 x 16 cores of Fast CPU 9000"
    assert facts["Energy"].startswith("1 kWh")
    document = json.loads((finished / "evaluation.json").read_text())
    steps = {tuple(case["spacing"]) for case in document["cases"]}
    assert all(f"{step:.3g}" in facts["Voxels (z, y, x)"] for step in min(steps)) or len(steps) > 1
    text = " ".join(Page(written).text)
    assert "True volume (ml)" in text and "Predicted volume (ml)" in text
    volume = document["cases"][0]["scores"]["core"]["truth_ml"]
    assert f'data-v="{volume!r}"' in written
    index = json.loads((finished / "overlays" / "index.json").read_text())
    colours = {name: one for picture in index for name, one in picture["colours"].items()}
    assert len(set(colours.values())) == len(colours) == 2
    for name, colour in colours.items():
        assert f'<span class="swatch" style="background:{colour}"></span>{name}' in written


def test_without_spacing_sizes_are_counted(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    document = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps(document | {"unit": "pixels"}))
    text = write_report(run).read_text()
    assert "True area (pixels)" in text and "(ml)" not in text and "(mm)" not in text
    assert "<dt>Voxels (z, y, x)</dt>" not in text


def test_a_validation_curve_is_always_there(finished, tmp_path):
    """Of a run that validated only at its end: the final score as a point."""
    run = tmp_path / "0a1b2c3d4e5f" / "f5e4d3c2b1a0"
    shutil.copytree(finished.parent, run.parent)
    for events_file in (run.parent / "events.jsonl", run / "events.jsonl"):
        lines = events_file.read_text().splitlines(keepends=True)
        events_file.write_text("".join(line for line in lines if '"validation"' not in line))
    labels = [
        a["aria-label"] for tag, a in Page(write_report(run).read_text()).tags if tag == "svg"
    ]
    final = json.loads((run / "evaluation.json").read_text())["summary"]["mean_foreground_dice"]
    assert labels[1].startswith("Validation Dice") and f"{final:.3g}" in labels[1], labels[1]


def test_every_case_is_a_row(finished, written):
    document = json.loads((finished / "evaluation.json").read_text())
    body = re.findall(r"<tbody>(.*?)</tbody>", written, re.DOTALL)[-1]
    assert re.findall(r'<th scope="row" class="left id">(.*?)</th>', body) == [
        case["id"] for case in document["cases"]
    ]


def test_the_curves_span_both_stages(written):
    labels = [a["aria-label"] for tag, a in Page(written).tags if tag == "svg"]
    assert labels[0].startswith("Training loss from step") and "to step" not in labels[0]
    assert "Validation Dice from step 100 to 1200" in labels[1]
    assert ">finetune</text>" in written


def test_what_is_missing_is_said(finished, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(InputError, match="no run folder"):
        write_report(run)
    (run / "recipe.json").write_text(json.dumps({**RECIPE, "stages": RECIPE["stages"][:1]}))
    text = " ".join(Page(write_report(run).read_text()).text)
    assert "not been scored yet" in text and "No events were recorded" in text
    shutil.copy(finished / "evaluation.json", run)
    assert "No pictures were saved" in " ".join(Page(write_report(run).read_text()).text)
    (run / "evaluation.json").write_text("{")
    with pytest.raises(InputError, match="damaged"):
        write_report(run)


def test_empty_cases_and_optimism_are_shown(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    document = json.loads((run / "evaluation.json").read_text())
    scores = document["cases"][0]["scores"]["core"]
    scores |= {metric: None for metric in scores if metric not in ("tp", "fp", "fn", "slices")}
    document["summary"]["structures"]["core"]["counts"] |= {
        "empty_truth": 3,
        "empty_prediction": 2,
        "excluded": 1,
        "hd95_missing": 3,
    }
    document["selected_on_these_cases"] = True
    (run / "evaluation.json").write_text(json.dumps(document))
    text = write_report(run).read_text()
    assert "scores are optimistic" in text
    assert text.count('<td class="missing"') == 6  # all six scores of that case
    row = re.search(r'<tr><th scope="?row"?>core</th><td data-v="8">8</td>(.*?)</tr>', text)[1]
    assert re.findall(r'data-v="(\d)"', row) == ["3", "2", "1", "3"]


def test_one_patient_has_no_interval(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    document = json.loads((run / "evaluation.json").read_text())
    document["summary"] |= {"mean_foreground_dice_ci95": None, "mean_foreground_dice": None}
    for scores in document["summary"]["structures"].values():
        for metric in scores:
            if "ci95" in scores[metric]:
                scores[metric] |= {"ci95": None, "mean": None, "sd": None}
    (run / "evaluation.json").write_text(json.dumps(document))
    assert "too few patients" in write_report(run).read_text()


@pytest.mark.parametrize(
    "low, high",
    [(0.0, 1.0), (-3.2, 17.1), (1e-5, 3e-4), (0.73, 0.731), (5.0, 5.0), (0.0, 0.0), (0, 123456)],
)
def test_ticks_are_few_round_and_enclose(low, high):
    found = ticks(low, high)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 7
    steps = [b - a for a, b in zip(found, found[1:], strict=False)]
    assert max(steps) == pytest.approx(min(steps))


def test_curves_are_broken_between_stages_not_averaged_over_them():
    points = [(float(i), 1.0) for i in range(10, 1001, 10)] + [
        (float(i), 5.0) for i in range(1010, 2001, 10)
    ]
    assert broken(points, [0, 1000]) == [points[:100], points[100:]]
    assert broken(points, [0, 1000, 2000]) == [points[:100], points[100:]], (
        "a stage that has not begun"
    )
    assert broken(points, []) == [points]
    heights = set(
        re.findall(
            r",([\d.]+)[ \"]",
            re.search(r'class="curve" points="(.*?)"', curve("l", points, [(0, "a"), (1000, "b")]))[
                0
            ],
        )
    )
    assert len(heights) == 1, "a level line stays level up to the border"


def test_curves_stay_small_and_true():
    points = [(float(i), i % 7.0) for i in range(10_001)]
    few = thinned(points)
    assert len(few) <= MOST and few[0][0] >= 0 and few[-1][0] <= 10_000
    assert sum(y for _, y in running_mean(few)) / len(few) == pytest.approx(3.0, abs=0.1)
    assert running_mean([(0.0, 2.0), (1.0, 4.0)]) == [(0.0, 3.0), (1.0, 3.0)]
    assert "nothing was recorded" in curve("Loss", [(1.0, float("nan"))])
    assert "<circle" in curve("Loss", [(1.0, 0.5)]), "a single point is a dot"


def test_a_cell_sorts_by_the_exact_number_and_shows_a_dash_for_what_is_missing():
    cell = environment(TEMPLATES).get_template("macros.html").module.cell
    assert str(cell(Cell(0.12345678))) == '<td data-v="0.12345678">0.123</td>'
    assert str(cell(Cell(0.5, 2, signed=True))) == '<td data-v="0.5">+0.50</td>'
    assert 'data-v=""' in cell(Cell(None)) and "&lt;b&gt;" in cell("<b>")


BROWSER = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
]

PROBE = """<script>
const images = [...document.images].map(i => i.complete && i.naturalWidth > 0);
const out = {errors: window.problems, images, sorts: []};
const table = [...document.querySelectorAll("table")].at(-1);
const shown = cell => cell.dataset.v ?? cell.textContent;
const column = n => [...table.tBodies[0].rows].map(r => shown(r.cells[n]));
for (const n of [2, 2, 0, 3]) {
  const button = table.querySelector(`button[data-column="${n}"]`);
  button.click();
  out.sorts.push([n, button.closest("th").getAttribute("aria-sort"), column(n)]);
}
out.wide = document.documentElement.scrollWidth <= window.innerWidth;
const made = document.createElement("pre");
made.id = "probe"; made.textContent = JSON.stringify(out); document.body.append(made);
</script></body>"""


def test_in_a_real_browser(finished, written, tmp_path):
    """Pictures load, a click sorts, nothing is wider than the window, the console is silent."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    listen = (
        "<script>window.problems = []; addEventListener('error', e => "
        "problems.push(String(e.message)), true);"
    )
    listen += (
        "addEventListener('securitypolicyviolation', e => "
        "problems.push(e.violatedDirective));</script><title>"
    )
    page = tmp_path / "probed.html"
    missing = re.sub(
        r'<td data-v="[^"]*">([\d.]+)</td>',
        '<td class="missing" data-v="">x</td>',
        written.split("<tbody>")[-1],
        count=1,
    )
    probed = "<tbody>".join([*written.split("<tbody>")[:-1], missing])
    page.write_text(
        probed.replace("<title>", listen, 1).replace("</body>", PROBE), encoding="utf-8"
    )
    command = [
        chromium,
        *BROWSER,
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command += [
        "--window-size=1280,900",
        "--enable-logging=stderr",
        "--v=0",
        "--virtual-time-budget=5000",
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    found = json.loads(
        re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)[1]
        .replace("&lt;", "<")
        .replace("&amp;", "&")
    )
    assert found["errors"] == [] and found["images"] == [True] * 3 and found["wide"]
    up, down, names, other = found["sorts"]
    assert [s[1] for s in found["sorts"]] == ["ascending", "descending", "ascending", "ascending"]
    for _, _, values in (up, down):
        assert values[-1] == "" and values.count("") == 1, "missing values stay last"
    numbers = [float(v) for v in up[2][:-1]]
    assert numbers == sorted(numbers) and len(set(numbers)) > 3
    assert [float(v) for v in down[2][:-1]] == numbers[::-1]
    assert names[2] == [f"phantom_{i:03d}" for i in range(8)]
    assert [float(v) for v in other[2]] == sorted(float(v) for v in other[2])
