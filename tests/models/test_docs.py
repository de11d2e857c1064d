"""docs/models.md tells what `segfleet models --json` tells."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
from pathlib import Path

import pytest

from segfleet.cli.models import command
from segfleet.models.registry import legal_options, specs
from segfleet.pipeline.recipe import recipe_names

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = (DOCS / "models.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def maker():
    found = importlib.util.spec_from_file_location("models_table", DOCS / "models_table.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows():
    """Of all networks, which takes seconds."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        command(None, as_json=True)
    return json.loads(said.getvalue())


def test_list_as_json_has_every_network(rows):
    named = {row["name"]: row for row in rows}
    assert list(named) == list(specs())
    assert named["unet_lite_standard"]["parameters"] == 31_037_633
    assert named["unet_lite_standard"]["gmac"] == 48.167
    assert (
        named["resenc_unet_3d"]["divisor"] == [32, 32, 32]
        and named["resenc_unet_3d"]["deep_supervision"]
    )


def test_table_is_what_the_command_prints(maker, rows):
    made = maker.table(rows, maker.recipes_by_network())
    assert maker.with_table(PAGE, made) == PAGE, "stale: run `python docs/models_table.py`"
    assert all(
        f"| {row['parameters']:,} |" in made and f"| `{row['name']}` |" in made for row in rows
    )
    cells = [line.strip("| ").split(" | ")[-1] for line in made.splitlines()[2:]]
    assert {name for cell in cells for name in cell.split(", ")} - {"-"} == {*recipe_names()}


def test_text_speaks_of_every_network_and_of_real_options():
    text = PAGE.partition("## What is upstream")[2]
    # one paragraph each, which names the others by their endings
    families = (
        "nlie_unet",
        "e2mi_seg",
        "unet_lite",
    )
    for name in specs():
        family = next((family for family in families if name.startswith(family)), "")
        assert f"`{name}`" in text or family and f"`{name.removeprefix(family)}`" in text, (
            f"{name} has no paragraph"
        )
    options = {option for spec in specs().values() for option in legal_options(spec)}
    assert {*re.findall(r"`(\w+): [\w.]+`", text)} <= options
