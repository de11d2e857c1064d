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
