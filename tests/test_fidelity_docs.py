"""docs/fidelity.md says what the recipes do, for every recipe of a publication."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from segfleet.pipeline.recipe import RECIPES, load_recipe, recipe_names
from segfleet.pipeline.scoring.summary import VARIANTS

DOCS = Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture(scope="module")
def maker():
    found = importlib.util.spec_from_file_location("fidelity_table", DOCS / "fidelity_table.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(maker):
    page = (DOCS / "fidelity.md").read_text(encoding="utf-8")
    made = maker.with_tables(page, maker.tables())
    assert made == page, "stale: run `python docs/fidelity_table.py`"


def test_every_publication_is_there_and_every_difference_has_a_reason(maker):
    names = maker.published()
    claimed = [n for n in recipe_names() if "\n# paper" in (RECIPES / f"{n}.yaml").read_text()]
    assert names == claimed and len(names) > 15
    for name in names:
        rows = maker.rows(name)
        settings = [row[0] for row in rows]
        assert len(set(settings)) == len(settings)
        needed = {"initialisation", "split", "loss", "optimizer", "weight decay", "rate", "length"}
        assert needed | {"batch", "precision", "checkpoint", "score"} <= set(settings), name
        for setting, theirs, ours, why in rows:
            assert theirs == ours or why, (
                f"{name}: {setting}: {theirs} became {ours} without a word"
            )


# settings in which every recipe is its publication; in others each recipe says why it is not
AS_PUBLISHED = {
    "size", "interpolation", "intensity", "loss", "deep supervision", "optimizer", "weight decay",
    "length", "validation", "clip", "forced foreground", "mirroring at test time",
}  # fmt: skip


def test_what_needs_no_excuse_is_the_authors(maker):
    """And those who decay every parameter do so here."""
    seen = set()
    for name in maker.published():
        for setting, theirs, ours, _ in maker.rows(name):
            if setting in AS_PUBLISHED:
                seen.add(setting)
                assert ours == theirs, f"{name}: {setting}"
        if name.startswith(("asc_seg", "vm_unet", "e2mi_seg", "unext")):
            assert load_recipe(name).optimizer.decay == "all", name
        if maker.prepare(name)["size"] != "native grid":
            assert maker.prepare(name)["interpolation"] == "bilinear", name
    assert seen == AS_PUBLISHED


@pytest.mark.parametrize("name", ["asc_seg_isic2018", "e2mi_seg_acdc", "unext_busi_512"])
def test_ours_follows_the_recipe(maker, name):
    """A changed recipe changes the table: nothing of ours is written by hand twice."""
    recipe = load_recipe(name)
    before = maker.facts(name, recipe)
    changed = load_recipe(
        name, ["optimizer.weight_decay=0.5", "data.batch=3", "evaluation.weights=last"]
    )
    after = maker.facts(name, changed)
    assert before["decay"] != after["decay"] and "0.5" in after["decay"]
    assert after["batch"] == "3"
    assert after["checkpoint"] == "last"


def test_headers_name_ways_of_counting_that_exist():
    for name in recipe_names():
        text = (RECIPES / f"{name}.yaml").read_text()
        words = " ".join(line.strip("# ") for line in text.splitlines() if line.startswith("#"))
        for named in re.findall(r"compare (?:the variant )?'(\w+)'", words):
            assert named in VARIANTS, f"{name}: {named}"


# what a header says under "differs", and the row of the table that says it too
CLAIMS = {
    r"no overlap|parts overlap|7:3 division|has its sizes|[Ss]orted (file )?names|Split: |fold 0 of"
    r"|Patients, not slices": "split",
    r"[Aa]ugmentation drawn anew|rotation angle|Gaussian noise|have our ranges|augmentation are "
    r"not "
    r"documented": "augmentation",
    r"masks cut at half": "masks",
    r"rate per step|rate falls per step|warm restarts|halves the rate|ours is constant": "rate",
    r"the best checkpoint": "checkpoint",
    r"ImageNet weights": "initialisation",
    r"publishes the network only|those of its framework": "set-up",
    r"normalised once": "normalisation",
    r"union of all masks": "target",
    r"as the last revision": "revision",
    r"scrambled layout": "spatial attention",
    r"after its last convolution|which does not, has it before": "last skip",
    r"momentum stays": "momentum",
    r"bf16 instead of fp32": "precision",
    r"HD95 in mm|empty masks are counted": "score",
    r"annotated slice": "slices",
    r"no early stop": "early stop",
    r"last weights of stage 1|those of its lowest": "second stage",
}  # fmt: skip
ADVICE = r"docs/fidelity.md lists|ends at its bottom"


def test_what_a_header_says_differs_is_in_the_table(maker):
    for name in maker.published():
        lines = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8").split("# differs ")[1]
        words = []
        for line in lines.splitlines():
            if words and not line.startswith("#  "):
                break
            words.append(line.strip("# "))
        text = re.sub(r" \([^)]*\)", "", " ".join(words))
        rows = {setting: (theirs, ours) for setting, theirs, ours, _ in maker.rows(name)}
        for clause in re.split(r"[.;]\s+|[.]$", text):
            settings = [row for claim, row in CLAIMS.items() if re.search(claim, clause)]
            assert settings or not clause or re.search(ADVICE, clause), f"{name}: {clause}"
            for setting in settings:
                theirs, ours = rows[setting]
                assert theirs != ours or "as upstream" in clause, f"{name}: {setting}: {clause}"
