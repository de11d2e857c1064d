"""What the tests of this room share."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def run_in_ranks():
    """`run_in_ranks("file.py:function", ranks, **arguments)`: see rank_runner.py."""
    spec = importlib.util.spec_from_file_location(
        "rank_runner", Path(__file__).with_name("rank_runner.py")
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    runner = module.RankRunner()
    yield runner
    runner.close()
