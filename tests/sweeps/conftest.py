"""A search that fits on a tiny store."""

from __future__ import annotations

import copy

import pytest

from segfleet.sweeps.space.load import parse_search

SPACE = {
    "name": "tiny",
    "base": {
        "name": "tiny",
        "data": {"store": "", "batch": 2, "patch": [16, 16]},
        "model": {"name": "unet_lite_standard", "options": {"width": 4}},
        "stages": [{"epochs": 1, "lr": 1e-3}],
        "save_every": 1,
    },
    "axes": {"model.name": ["unet_lite_standard", "unet_lite_depthwise"]},
    "stages": [
        {"name": "train", "epochs": 100, "steps": 1, "lr": [1e-2, 1e-3]},
        {
            "name": "finetune",
            "epochs": 20,
            "steps": 1,
            "lr": [1e-3, 3e-4, 1e-4],
            "inherit": "weights+optimizer",
        },
    ],
}


@pytest.fixture
def space(tiny_store):
    """The document of a space of 2 networks x 2 first rates x 3 second rates."""
    document = copy.deepcopy(SPACE)
    document["base"]["data"]["store"] = str(tiny_store(dims=2))
    return document


@pytest.fixture
def search(space):
    """`search(**changes of the space)`"""
    return lambda **changes: parse_search({**space, **changes})
