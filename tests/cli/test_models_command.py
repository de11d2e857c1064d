"""`segfleet models NAME`, in this process. The list: tests/models/test_docs.py."""

from __future__ import annotations

import json

import pytest

from segfleet.cli.models import command
from segfleet.models.registry import ModelError, spec


def test_one_network_for_people(capsys):
    command("unet_lite_spatial", as_json=False)
    said = capsys.readouterr().out
    for words in ("6,206,756", "7.578 G", "width, bilinear", "down4", "1,721,856", "unet_lite"):
        assert words in said


def test_one_network_as_json(capsys):
    command("plain_unet_2d", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["stages"] == dict(spec("plain_unet_2d").stages)
    assert (
        "conv_per_stage" in found["options"] and found["training_bytes"] > 4 * found["parameters"]
    )


def test_unknown_name_names_the_legal_ones():
    with pytest.raises(ModelError, match="unet_lite_standard"):
        command("unet", as_json=False)
